// A torch device without a GPU, for tests: PrivateUse1, whose memory, streams and events come from the driver in
// driver.cpp, so that torch's public API (to, copy_, torch.Stream, torch.Event, is_pinned) runs as on a GPU.
// Kernels run on the CPU. record_stream is missing, as it is on other devices that torch knows little about.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using at::Tensor;
using Address = std::uintptr_t;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;

struct Driver {
  int (*init)(unsigned);
  int (*retain)(void**, int);
  int (*set_current)(void*);
  int (*allocate)(Address*, std::size_t);
  int (*free)(Address);
  int (*to_device)(Address, const void*, std::size_t, void*);
  int (*to_host)(void*, Address, std::size_t, void*);
  int (*on_device)(Address, Address, std::size_t, void*);
  int (*make_stream)(void**, unsigned);
  int (*synchronize_stream)(void*);
  int (*query_stream)(void*);
  int (*is_capturing)(void*, int*);
  int (*make_event)(void**, unsigned);
  int (*record)(void*, void*);
  int (*query_event)(void*);
  int (*synchronize_event)(void*);
  int (*destroy_event)(void*);
  int (*wait_event)(void*, void*, unsigned);
  int (*elapsed)(float*, void*, void*);
  int (*attribute)(void*, int, Address);
  int (*lock_pages)(void*, std::size_t, unsigned);
  int (*unlock_pages)(void*);
  void* contexts[kDevices];
};

void check(int code, const char* call) { TORCH_CHECK(code == 0, "fake driver: ", call, " answered ", code); }

Driver load() {
  const char* path = std::getenv("SHMX_CUDA_DRIVER");
  TORCH_CHECK(path != nullptr, "SHMX_CUDA_DRIVER names the fake driver");
  void* library = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, ::dlerror());
  Driver driver{};
  const auto find = [library](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(::dlsym(library, name));
    TORCH_CHECK(function != nullptr, "fake driver: no ", name);
  };
  find(driver.init, "cuInit");
  find(driver.retain, "cuDevicePrimaryCtxRetain");
  find(driver.set_current, "cuCtxSetCurrent");
  find(driver.allocate, "cuMemAlloc_v2");
  find(driver.free, "cuMemFree_v2");
  find(driver.to_device, "cuMemcpyHtoDAsync_v2");
  find(driver.to_host, "cuMemcpyDtoHAsync_v2");
  find(driver.on_device, "cuMemcpyDtoDAsync_v2");
  find(driver.make_stream, "cuStreamCreate");
  find(driver.synchronize_stream, "cuStreamSynchronize");
  find(driver.query_stream, "cuStreamQuery");
  find(driver.is_capturing, "cuStreamIsCapturing");
  find(driver.make_event, "cuEventCreate");
  find(driver.record, "cuEventRecord");
  find(driver.query_event, "cuEventQuery");
  find(driver.synchronize_event, "cuEventSynchronize");
  find(driver.destroy_event, "cuEventDestroy_v2");
  find(driver.wait_event, "cuStreamWaitEvent");
  find(driver.elapsed, "cuEventElapsedTime");
  find(driver.attribute, "cuPointerGetAttribute");
  find(driver.lock_pages, "cuMemHostRegister_v2");
  find(driver.unlock_pages, "cuMemHostUnregister");
  check(driver.init(0), "cuInit");
  for (int i = 0; i < kDevices; ++i) check(driver.retain(&driver.contexts[i], i), "cuDevicePrimaryCtxRetain");
  return driver;
}

const Driver& driver() {
  static const auto* instance = new Driver(load());
  return *instance;
}

thread_local int current_device = 0;
thread_local void* current_streams[kDevices] = {};
std::atomic<bool> has_context[kDevices] = {};

void make_current() {
  driver().set_current(driver().contexts[current_device]);
  has_context[current_device] = true;
}

void* handle_of(const c10::Stream& stream) { return reinterpret_cast<void*>(stream.id()); }

// Of both devices; the default ones are the driver's.
std::vector<void*>& all_streams() {
  static auto* streams = new std::vector<void*>{nullptr};
  return *streams;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kDevice;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const int before = current_device;
    setDevice(device);
    return {kDevice, static_cast<c10::DeviceIndex>(before)};
  }
  c10::Device getDevice() const override { return {kDevice, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(c10::Device device) const override {
    if (device.index() >= 0) current_device = device.index();
    make_current();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream getStream(c10::Device device) const override { return stream(device, current_streams[index_of(device)]); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, nullptr); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const c10::DeviceGuard guard({kDevice, static_cast<c10::DeviceIndex>(index_of(device))});
    make_current();
    void* handle = nullptr;
    check(driver().make_stream(&handle, 1), "cuStreamCreate");
    all_streams().push_back(handle);
    return stream(device, handle);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    void*& slot = current_streams[to.device_index()];
    const c10::Stream before = stream(to.device(), slot);
    slot = handle_of(to);
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return handle_of(stream); }
  bool queryStream(const c10::Stream& stream) const override { return driver().query_stream(handle_of(stream)) == 0; }
  void synchronizeStream(const c10::Stream& stream) const override {
    const c10::DeviceGuard guard(stream.device());
    make_current();
    check(driver().synchronize_stream(handle_of(stream)), "cuStreamSynchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    const c10::DeviceGuard guard({kDevice, index});
    make_current();
    check(driver().synchronize_stream(nullptr), "cuStreamSynchronize");
  }
  bool isStreamCapturing(const c10::Stream& stream) const override {
    int status = 0;
    return driver().is_capturing(handle_of(stream), &status) == 0 && status != 0;
  }

  // These two go back by setDevice, as torch's do on CUDA: that makes a context where there was none.
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    const c10::Device before = exchangeDevice(stream.device());
    if (*event == nullptr) check(driver().make_event(event, 0), "cuEventCreate");
    check(driver().record(*event, handle_of(stream)), "cuEventRecord");
    setDevice(before);
  }
  void block(void* event, const c10::Stream& stream) const override {
    const c10::Device before = exchangeDevice(stream.device());
    if (event != nullptr) check(driver().wait_event(handle_of(stream), event, 0), "cuStreamWaitEvent");
    setDevice(before);
  }
  bool queryEvent(void* event) const override { return event == nullptr || driver().query_event(event) == 0; }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) check(driver().synchronize_event(event), "cuEventSynchronize");
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    if (event != nullptr) driver().destroy_event(event);
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    float milliseconds = 0;
    check(driver().elapsed(&milliseconds, from, to), "cuEventElapsedTime");
    return milliseconds;
  }

 private:
  static int index_of(c10::Device device) { return device.index() < 0 ? current_device : device.index(); }
  static c10::Stream stream(c10::Device device, void* handle) {
    const c10::Device place(kDevice, static_cast<c10::DeviceIndex>(index_of(device)));
    return c10::Stream(c10::Stream::UNSAFE, place, reinterpret_cast<c10::StreamId>(handle));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct DeviceAllocator final : c10::Allocator {
  static void give(void* memory) {
    if (memory != nullptr) driver().free(reinterpret_cast<Address>(memory));
  }
  c10::DataPtr allocate(std::size_t bytes) override {
    make_current();
    Address address = 0;
    if (bytes != 0) check(driver().allocate(&address, bytes), "cuMemAlloc");
    auto* memory = reinterpret_cast<void*>(address);
    return {memory, memory, &give, {kDevice, static_cast<c10::DeviceIndex>(current_device)}};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    check(driver().on_device(reinterpret_cast<Address>(to), reinterpret_cast<Address>(from), bytes, nullptr),
          "cuMemcpyDtoDAsync");
    driver().synchronize_stream(nullptr);
  }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(kDevice, &device_allocator);

struct HostAllocator final : at::HostAllocator {
  static void give(void* memory) {
    if (memory == nullptr) return;
    make_current();
    // torch's allocator keeps it until the copies have been done; this one waits for them.
    for (void* stream : all_streams()) driver().synchronize_stream(stream);
    driver().unlock_pages(memory);
    std::free(memory);
  }
  at::DataPtr allocate(std::size_t bytes) override {
    const std::size_t pages = (bytes + 4095) / 4096 * 4096;
    void* memory = pages == 0 ? nullptr : std::aligned_alloc(4096, pages);
    if (memory != nullptr) {
      std::memset(memory, 0, pages);
      make_current();
      check(driver().lock_pages(memory, pages, 1), "cuMemHostRegister");
    }
    return {memory, memory, &give, at::kCPU};
  }
  at::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  // Memory that is not its own it knows nothing of, as torch's.
  bool record_event(void*, void*, c10::Stream) override { return false; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
HostAllocator host_allocator;
REGISTER_HOST_ALLOCATOR(kDevice, &host_allocator);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override { return has_context[index]; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    current_device = index;
    make_current();
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto before = getCurrentDevice();
    setCurrentDevice(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    const auto before = getCurrentDevice();
    if (index >= 0) current_device = index;
    if (has_context[current_device]) make_current();
    return before;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator; }
  bool isPinnedPtr(const void* memory) const override {
    unsigned type = 0;
    return driver().attribute(&type, 2, reinterpret_cast<Address>(memory)) == 0 && type == 1;
  }
  at::Device getDeviceFromPtr(void*) const override { return {kDevice, static_cast<c10::DeviceIndex>(current_device)}; }
};

[[maybe_unused]] const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &device_allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator, kKeys, c10::dtype_or_default(dtype));
}

Address address_of(const Tensor& tensor) { return reinterpret_cast<Address>(tensor.const_data_ptr()); }

// The whole storage of a tensor on the device, as it is now.
Tensor storage_on_host(const Tensor& tensor, void* stream) {
  const auto bytes = static_cast<std::int64_t>(tensor.storage().nbytes());
  Tensor host =
      at::empty({bytes / static_cast<std::int64_t>(tensor.element_size())}, tensor.options().device(at::kCPU));
  const auto address = reinterpret_cast<Address>(tensor.storage().data());
  if (host.nbytes() != 0) {
    check(driver().to_host(host.mutable_data_ptr(), address, host.nbytes(), stream), "cuMemcpyDtoHAsync");
    check(driver().synchronize_stream(stream), "cuStreamSynchronize");
  }
  return host;
}

Tensor seen_on_host(const Tensor& tensor, void* stream) {
  if (tensor.is_cpu()) return tensor;
  return storage_on_host(tensor, stream).as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const c10::DeviceGuard guard(from.is_cpu() ? to.device() : from.device());
  make_current();
  void* stream = current_streams[current_device];
  const bool plain = from.sizes() == to.sizes() && from.scalar_type() == to.scalar_type() && from.is_contiguous() &&
                     to.is_contiguous();
  if (!plain) {
    const Tensor source = seen_on_host(from, stream);
    if (to.is_cpu()) return to.copy_(source);
    // Whatever the layout: all of the storage comes to the host, and goes back when it is changed.
    const Tensor all = storage_on_host(to, stream);
    all.as_strided(to.sizes(), to.strides(), to.storage_offset()).copy_(source);
    const auto address = reinterpret_cast<Address>(to.storage().data());
    if (all.nbytes() == 0) return to;
    check(driver().to_device(address, all.const_data_ptr(), all.nbytes(), stream), "cuMemcpyHtoDAsync");
    check(driver().synchronize_stream(stream), "cuStreamSynchronize");
    return to;
  }
  const std::size_t bytes = from.nbytes();
  if (bytes == 0) return to;
  if (from.is_cpu()) {
    check(driver().to_device(address_of(to), from.const_data_ptr(), bytes, stream), "cuMemcpyHtoDAsync");
  } else if (to.is_cpu()) {
    check(driver().to_host(to.mutable_data_ptr(), address_of(from), bytes, stream), "cuMemcpyDtoHAsync");
  } else {
    check(driver().on_device(address_of(to), address_of(from), bytes, stream), "cuMemcpyDtoDAsync");
  }
  if (!non_blocking) check(driver().synchronize_stream(stream), "cuStreamSynchronize");
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Scalar item(const Tensor& self) { return self.cpu().item(); }

// The fallback would copy the tensor to the CPU first, and wait for that.
void record_stream(Tensor&, c10::Stream) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "this device does not track the streams that use a tensor");
}

void on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("_local_scalar_dense", item);
  library.impl("record_stream", record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

}  // namespace

extern "C" __attribute__((visibility("default"))) int fakegpu_current_device() { return current_device; }

extern "C" __attribute__((visibility("default"))) int fakegpu_has_context(int index) { return has_context[index]; }

extern "C" __attribute__((visibility("default"))) void fakegpu_set_device(int index) {
  current_device = index;
  make_current();
}
