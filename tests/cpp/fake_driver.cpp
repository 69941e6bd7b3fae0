#include "fake_driver.hpp"

#include <dlfcn.h>
#include <doctest/doctest.h>

#include <chrono>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "in_flight.hpp"

namespace shmx::test {

FakeDriver& FakeDriver::cuda() {
  static auto* driver = new FakeDriver("SHMX_CUDA_DRIVER", false);
  return *driver;
}

FakeDriver& FakeDriver::hip() {
  static auto* driver = new FakeDriver("SHMX_HIP_DRIVER", true);
  return *driver;
}

FakeDriver::FakeDriver(const char* variable, bool hip) : hip_(hip) {
  const char* path = std::getenv(variable);
  if (path == nullptr) throw std::runtime_error(std::string(variable) + " does not name the fake driver; use ctest");
  library_ = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) throw std::runtime_error(::dlerror());
  (void)find<long(const char*)>("fake_count");
}

template <typename Function>
Function* FakeDriver::find(const char* name) const {
  void* found = ::dlsym(library_, name);
  if (found == nullptr) throw std::runtime_error(std::string("the driver has no ") + name);
  return reinterpret_cast<Function*>(found);
}

template <typename Function>
Function* FakeDriver::find(const char* cuda_name, const char* hip_name) const {
  return find<Function>(hip_ ? hip_name : cuda_name);
}

// ---- controls

void FakeDriver::fail(const std::string& name, long skip, int code, bool sticky) {
  find<void(const char*, long, int, int)>("fake_fail")(name.c_str(), skip, code, sticky ? 1 : 0);
}

void FakeDriver::break_device(int device, int code) { find<void(int, int)>("fake_break")(device, code); }

void FakeDriver::recover() { find<void()>("fake_recover")(); }

long FakeDriver::count(const std::string& name) const { return find<long(const char*)>("fake_count")(name.c_str()); }

std::vector<std::string> FakeDriver::log() const {
  auto* const fill = find<long(char*, long)>("fake_log");
  std::string text(static_cast<std::size_t>(fill(nullptr, 0)) + 4096, '\0');
  fill(text.data(), static_cast<long>(text.size()));
  std::istringstream lines(text.c_str());
  std::vector<std::string> calls;
  for (std::string line; std::getline(lines, line);) calls.push_back(line);
  return calls;
}

void FakeDriver::forget_calls() { find<void()>("fake_forget_calls")(); }

std::vector<Registration> FakeDriver::registrations() const {
  auto* const fill = find<long(std::uint64_t*, long)>("fake_registrations");
  std::vector<std::uint64_t> words(std::size_t{3} * 1024);
  const long found = fill(words.data(), 1024);
  std::vector<Registration> all;
  for (std::size_t i = 0; i < static_cast<std::size_t>(found); ++i) {
    all.push_back({reinterpret_cast<std::byte*>(words[3 * i]), words[3 * i + 1], words[3 * i + 2]});
  }
  return all;
}

std::uint64_t FakeDriver::registered_bytes() const {
  std::uint64_t bytes = 0;
  for (const Registration& one : registrations()) bytes += one.bytes;
  return bytes;
}

void FakeDriver::hold_streams() { find<void(int)>("fake_gate")(1); }

void FakeDriver::release_streams() { find<void(int)>("fake_gate")(0); }

void FakeDriver::hold_calls(const std::string& name) { find<void(const char*)>("fake_hold_calls")(name.c_str()); }

void FakeDriver::release_calls() { hold_calls(""); }

long FakeDriver::held_calls() const { return find<long()>("fake_held_calls")(); }

// ---- another library

int FakeDriver::in_context(int device, const std::function<int()>& call) {
  void* context = nullptr;
  auto* const retain = find<int(void**, int)>("cuDevicePrimaryCtxRetain", "hipDevicePrimaryCtxRetain");
  if (const int code = retain(&context, device); code != 0) return code;
  if (const int code = find<int(void*)>("cuCtxPushCurrent_v2", "hipCtxPushCurrent")(context); code != 0) return code;
  const int code = call();
  (void)find<int(void**)>("cuCtxPopCurrent_v2", "hipCtxPopCurrent")(&context);
  return code;
}

int FakeDriver::register_pages(int device, void* base, std::uint64_t bytes) {
  auto* const call = find<int(void*, std::size_t, unsigned)>("cuMemHostRegister_v2", "hipHostRegister");
  return in_context(device, [&] { return call(base, bytes, 1); });
}

int FakeDriver::unregister_pages(int device, void* base) {
  auto* const call = find<int(void*)>("cuMemHostUnregister", "hipHostUnregister");
  return in_context(device, [&] { return call(base); });
}

std::uintptr_t FakeDriver::allocate(int device, std::uint64_t bytes) {
  std::uintptr_t memory = 0;
  auto* const call = find<int(std::uintptr_t*, std::size_t)>("cuMemAlloc_v2", "hipMalloc");
  if (in_context(device, [&] { return call(&memory, bytes); }) != 0) throw std::runtime_error("no device memory");
  return memory;
}

void FakeDriver::free(int device, std::uintptr_t memory) {
  auto* const call = find<int(std::uintptr_t)>("cuMemFree_v2", "hipFree");
  (void)in_context(device, [&] { return call(memory); });
}

int FakeDriver::copy_to_device(int device, std::uintptr_t to, const void* from, std::uint64_t bytes) {
  auto* const call =
      find<int(std::uintptr_t, const void*, std::size_t, void*)>("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync");
  return in_context(device, [&] { return call(to, from, bytes, nullptr); });
}

std::vector<std::byte> FakeDriver::read(int device, std::uintptr_t memory, std::uint64_t bytes) {
  std::vector<std::byte> found(bytes);
  auto* const call = find<int(void*, std::uintptr_t, std::size_t, void*)>("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync");
  if (in_context(device, [&] { return call(found.data(), memory, bytes, nullptr); }) != 0) {
    throw std::runtime_error("no copy from the device");
  }
  return found;
}

int FakeDriver::synchronize(int device) {
  auto* const call = find<int(void*)>("cuStreamSynchronize", "hipStreamSynchronize");
  return in_context(device, [&] { return call(nullptr); });
}

bool FakeDriver::has_context() {
  void* context = nullptr;
  if (find<int(void**)>("cuCtxPopCurrent_v2", "hipCtxPopCurrent")(&context) != 0) return false;
  (void)find<int(void*)>("cuCtxPushCurrent_v2", "hipCtxPushCurrent")(context);
  return true;
}

int FakeDriver::exchange_capture_mode(int mode) {
  (void)find<int(int*)>("cuThreadExchangeStreamCaptureMode", "hipThreadExchangeStreamCaptureMode")(&mode);
  return mode;
}

// ---- a test that uses a device

namespace {

DeviceDriver& opened() {
  DeviceDriver* driver = DeviceDriver::get(DriverKind::kCuda);
  if (driver == nullptr) throw std::runtime_error(DeviceDriver::why_not(DriverKind::kCuda));
  return *driver;
}

}  // namespace

Devices::Devices() : driver(opened()), before(PinLedger::instance().report()) { gpu.forget_calls(); }

Devices::~Devices() {
  gpu.recover();
  gpu.release_calls();
  gpu.release_streams();
  for (const int device : {0, 1}) CHECK(gpu.synchronize(device) == 0);
  CHECK(InFlight::instance().drain(std::chrono::minutes(1)));
  Pinner::instance().stop();
  PinLedger::instance().set_limit(UINT64_MAX);
  (void)PinLedger::instance().take_warning();
  CHECK(gpu.registrations().empty());
  CHECK(PinLedger::instance().report().bytes == before.bytes);
  CHECK(PinLedger::instance().report().chunks == before.chunks);
}

}  // namespace shmx::test
