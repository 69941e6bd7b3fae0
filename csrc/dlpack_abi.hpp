// The part of the DLPack 1.x ABI that torch exchanges tensors by (github.com/dmlc/dlpack, dlpack.h). Plain
// structs in the specified order; torch >= 2.10 publishes the function table as
// torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace shmx::dlpack {

inline constexpr std::int32_t kCpu = 1;
inline constexpr std::uint8_t kUnsigned = 1;
inline constexpr std::uint8_t kComplex = 5;
inline constexpr std::uint32_t kMajorVersion = 1;

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};
struct Device {
  std::int32_t type;
  std::int32_t id;
};
struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};
struct ExchangeApi {
  Version version;
  void* previous;
  void* allocator;
  int (*managed_tensor_from_object)(void* object, ManagedTensor** out);
  // Steals the tensor: its deleter is called when the torch storage dies, or here on failure.
  int (*managed_tensor_to_object)(ManagedTensor* tensor, void** out_object);
  // Borrowed: valid as long as the object is. May be null.
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_work_stream;
};

}  // namespace shmx::dlpack
