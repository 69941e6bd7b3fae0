// The driver without a GPU (tests/fakegpu/driver.cpp) as tests see it: its controls, and what a program that copies to
// a device does with a driver beside shmx.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cuda_driver.hpp"
#include "pinned.hpp"

namespace shmx::test {

inline constexpr std::uint64_t kPage = 4096;

struct Registration {
  std::byte* base;
  std::uint64_t bytes;
  std::uint64_t flags;
};

class FakeDriver {
 public:
  // The one that SHMX_CUDA_DRIVER (or SHMX_HIP_DRIVER) names, as ctest sets it.
  [[nodiscard]] static FakeDriver& cuda();
  [[nodiscard]] static FakeDriver& hip();

  // Names are those of the driver without prefix and version: "HostRegister".
  // The call after `skip` good ones answers `code`; sticky: and so does every call from then on.
  void fail(const std::string& name, long skip = 0, int code = 2, bool sticky = false);
  // Every call for that device answers `code`.
  void break_device(int device, int code);
  void recover();
  // Calls, or "registrations", "late copies", "staged copies", "in flight", "after fork".
  [[nodiscard]] long count(const std::string& name) const;
  [[nodiscard]] std::vector<std::string> log() const;
  void forget_calls();
  [[nodiscard]] std::vector<Registration> registrations() const;
  [[nodiscard]] std::uint64_t registered_bytes() const;
  // No stream begins another operation.
  void hold_streams();
  void release_streams();
  // Calls of that name wait before they do anything.
  void hold_calls(const std::string& name);
  void release_calls();
  [[nodiscard]] long held_calls() const;

  // As another library would: with the context of a device current.
  [[nodiscard]] int register_pages(int device, void* base, std::uint64_t bytes);
  [[nodiscard]] int unregister_pages(int device, void* base);
  [[nodiscard]] std::uintptr_t allocate(int device, std::uint64_t bytes);
  void free(int device, std::uintptr_t memory);
  // Into the device's default stream.
  [[nodiscard]] int copy_to_device(int device, std::uintptr_t to, const void* from, std::uint64_t bytes);
  // Waits for what is in the default stream.
  [[nodiscard]] std::vector<std::byte> read(int device, std::uintptr_t memory, std::uint64_t bytes);
  // Answers what the driver does.
  [[nodiscard]] int synchronize(int device);
  // Of the calling thread.
  [[nodiscard]] bool has_context();
  [[nodiscard]] int exchange_capture_mode(int mode);

 private:
  FakeDriver(const char* variable, bool hip);
  template <typename Function>
  [[nodiscard]] Function* find(const char* cuda_name, const char* hip_name) const;
  template <typename Function>
  [[nodiscard]] Function* find(const char* name) const;
  // Runs with the context of a device current.
  [[nodiscard]] int in_context(int device, const std::function<int()>& call);

  bool hip_;
  void* library_;
};

// Copies under way have ended, nothing is registered and no thread is left when a test has ended; what it has set is as
// it was.
class Devices {
 public:
  Devices();
  ~Devices();
  Devices(const Devices&) = delete;
  Devices& operator=(const Devices&) = delete;

 protected:
  FakeDriver& gpu = FakeDriver::cuda();
  DeviceDriver& driver;
  const PinReport before;
};

}  // namespace shmx::test
