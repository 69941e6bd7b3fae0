// The driver of a GPU vendor, opened at run time: nothing of it is needed to build or to import shmx.
//
// The prototypes are ours, the names carry their versions. HIP has the same functions under other names, so one table
// serves both. Initialized on first use, in the process that uses it: a forked child has none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "error.hpp"

namespace shmx {

enum class DriverKind : std::uint8_t { kCuda = 0, kHip = 1 };
inline constexpr std::size_t kDriverKinds = 2;
[[nodiscard]] const char* name_of(DriverKind kind);
[[nodiscard]] std::optional<DriverKind> driver_kind(const std::string& name);

// CUresult and hipError_t agree in these.
enum class DriverCode : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kNotReady = 600,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
};

class DeviceDriver {
 public:
  // Opened and initialized by the first call, which may take a second. Null if there is none; then why_not() says why.
  [[nodiscard]] static DeviceDriver* get(DriverKind kind);
  // The same without waiting for anything: null until get() has been called.
  [[nodiscard]] static DeviceDriver* known(DriverKind kind);
  [[nodiscard]] static std::string why_not(DriverKind kind);
  // False in a child that was forked after the driver began to be opened: it must not be called there.
  [[nodiscard]] static bool usable();

  // Makes a device's primary context current in this thread, and lets calls of this thread pass while another one
  // captures a graph, which they would break otherwise.
  class Scope {
   public:
    // Throws Error(kDevice).
    Scope(DeviceDriver& driver, int device);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    DeviceDriver& driver_;
    int capture_mode_;
  };

  ~DeviceDriver();
  DeviceDriver(const DeviceDriver&) = delete;
  DeviceDriver& operator=(const DeviceDriver&) = delete;

  // Inside a Scope.
  [[nodiscard]] DriverCode register_pages(void* base, std::size_t bytes, bool read_only) const;
  [[nodiscard]] DriverCode unregister_pages(void* base) const;
  // Whether one registration, whoever made it, covers a range.
  [[nodiscard]] bool is_registered(const void* base, std::size_t bytes) const;
  // A fresh event behind what `stream` has to do by now. Throws Error(kDevice).
  [[nodiscard]] void* record_event(void* stream) const;
  [[nodiscard]] DriverCode query_event(void* event) const;
  void destroy_event(void* event) const;
  [[nodiscard]] bool is_capturing(void* stream) const;

  [[nodiscard]] DriverKind kind() const { return kind_; }
  // "cuMemHostRegister_v2 of /shmx-12ab.1: CUDA_ERROR_OUT_OF_MEMORY (2); ..."
  [[nodiscard]] Error failure(const char* call, const std::string& object, DriverCode code) const;
  [[nodiscard]] const char* register_name() const;
  [[nodiscard]] const char* unregister_name() const;
  [[nodiscard]] const char* query_name() const;

 private:
  struct Table;
  explicit DeviceDriver(DriverKind kind);
  [[nodiscard]] void* context(int device);
  void open();

  static constexpr int kMaxDevices = 64;
  const DriverKind kind_;
  std::unique_ptr<Table> table_;
  void* contexts_[kMaxDevices] = {};
  bool registers_for_reading_ = false;
};

}  // namespace shmx
