// A vendor's driver, opened at run time: what a process learns of one that is missing or broken, that nothing of it
// stays set behind a call, and that a forked child leaves it alone.
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "child_process.hpp"
#include "fake_driver.hpp"
#include "in_flight.hpp"
#include "small_arena.hpp"
#include "threads.hpp"

namespace shmx {
namespace {

using namespace test;

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Of what an action throws.
template <typename Action>
std::string message_of(const Action& action) {
  try {
    (void)action();
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kDevice);
    return error.what();
  }
  return {};
}

// ---- opening: once per process, so each in a process of its own

TEST_CASE("in a process without a driver" * doctest::skip()) {
  CHECK(DeviceDriver::known(DriverKind::kCuda) == nullptr);
  CHECK(DeviceDriver::why_not(DriverKind::kCuda).empty());
  CHECK(DeviceDriver::get(DriverKind::kCuda) == nullptr);
  const std::string why = DeviceDriver::why_not(DriverKind::kCuda);
  CHECK(has(why, std::getenv("SHMX_CUDA_DRIVER")));
  CHECK(has(why, std::getenv("TEST_EXPECTS")));
  // It is not looked for again.
  ::setenv("SHMX_CUDA_DRIVER", "/somewhere/else.so", 1);
  CHECK(DeviceDriver::get(DriverKind::kCuda) == nullptr);
  CHECK(DeviceDriver::why_not(DriverKind::kCuda) == why);
  CHECK(DeviceDriver::usable());
  CHECK(has(message_of([] {
              const auto arena = Arena::create(small_options());
              return Pinner::pin_now(*arena->attachment(), DriverKind::kCuda, 0);
            }),
            why));
}

TEST_CASE("a driver that cannot be opened is told with its path and the reason") {
  const std::string name = "in a process without a driver";
  CHECK(run_test_case(name, {{"SHMX_CUDA_DRIVER", "/nowhere/libcuda.so.1"}, {"TEST_EXPECTS", "cannot open"}}) == 0);
  CHECK(run_test_case(name, {{"SHMX_CUDA_DRIVER", "libc.so.6"}, {"TEST_EXPECTS", "has no cuInit"}}) == 0);
}

TEST_CASE("in a process whose driver does not start" * doctest::skip()) {
  FakeDriver::cuda().fail("Init", 0, 100);
  CHECK(DeviceDriver::get(DriverKind::kCuda) == nullptr);
  const std::string why = DeviceDriver::why_not(DriverKind::kCuda);
  CHECK(has(why, "cuInit of "));
  CHECK(has(why, "(100)"));
  CHECK(has(why, "CUDA_VISIBLE_DEVICES"));
}

TEST_CASE("a driver that does not start is told with its code and the remedy") {
  CHECK(run_test_case("in a process whose driver does not start") == 0);
}

TEST_CASE("in a process whose threads open the driver at once" * doctest::skip()) {
  FakeDriver& gpu = FakeDriver::cuda();
  gpu.hold_calls("Init");
  std::vector<DeviceDriver*> found(4);
  {
    std::vector<std::jthread> threads;
    for (DeviceDriver*& driver : found) {
      threads.emplace_back([&driver] { driver = DeviceDriver::get(DriverKind::kCuda); });
    }
    REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
    // Nobody who only wants to know waits for it.
    CHECK(DeviceDriver::known(DriverKind::kCuda) == nullptr);
    gpu.release_calls();
  }
  for (DeviceDriver* driver : found) CHECK((driver != nullptr && driver == found.front()));
  CHECK(DeviceDriver::known(DriverKind::kCuda) == found.front());
  CHECK(gpu.count("Init") == 1);
}

TEST_CASE("threads that ask for the driver at once get the same one, initialized once") {
  CHECK(run_test_case("in a process whose threads open the driver at once") == 0);
}

TEST_CASE("in a process that uses AMD's driver" * doctest::skip()) {
  DeviceDriver* driver = DeviceDriver::get(DriverKind::kHip);
  REQUIRE(driver != nullptr);
  CHECK(DeviceDriver::known(DriverKind::kCuda) == nullptr);
  FakeDriver& gpu = FakeDriver::hip();
  std::vector<std::byte> pages(3 * kPage);
  auto* const base =
      reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(pages.data()) + kPage - 1) / kPage * kPage);
  {
    const DeviceDriver::Scope scope(*driver, 1);
    CHECK(driver->register_pages(base, kPage, true) == DriverCode::kSuccess);
    CHECK(driver->is_registered(base, kPage));
    // It knows no registration for reading.
    CHECK(gpu.registrations().at(0).flags == 1);
    void* event = driver->record_event(nullptr);
    CHECK(comes_true([&] { return driver->query_event(event) == DriverCode::kSuccess; }));
    driver->destroy_event(event);
    CHECK(driver->unregister_pages(base) == DriverCode::kSuccess);
  }
  bool stuck = false;
  for (const auto& [call, name] : {std::pair{"HostRegister", "hipHostRegister"}, {"CtxPushCurrent", "hipCtxPush"}}) {
    gpu.fail(call, 0, 1);
    const std::string text =
        message_of([&] { return register_range(*driver, 0, base, kPage, Access::kReadWrite, "it", stuck); });
    CHECK(text.starts_with(name));
  }
  gpu.fail("EventQuery", 0, 1);
  std::vector<Hold> none;
  InFlight::instance().depart(none, *driver, 0, nullptr);
  CHECK(InFlight::instance().drain(std::chrono::minutes(1)));
  CHECK(InFlight::instance().report().trouble.starts_with("hipEventQuery"));
}

TEST_CASE("AMD's driver does the same under its own names") {
  CHECK(run_test_case("in a process that uses AMD's driver") == 0);
}

// ---- calls

TEST_CASE_FIXTURE(Devices, "a device that is not there is told by its number") {
  CHECK(has(message_of([&] { return DeviceDriver::Scope(driver, -1), 0; }), "device -1 is out of range"));
  CHECK(has(message_of([&] { return DeviceDriver::Scope(driver, 64), 0; }), "device 64 is out of range"));
  const std::string text = message_of([&] { return DeviceDriver::Scope(driver, 2), 0; });
  CHECK(has(text, "cuDeviceGet of device 2"));
  CHECK(has(text, "CUDA_VISIBLE_DEVICES"));
}

TEST_CASE_FIXTURE(Devices, "a scope leaves a thread's context and capture mode as they were") {
  CHECK_FALSE(gpu.has_context());
  CHECK(gpu.exchange_capture_mode(1) == 0);
  {
    const DeviceDriver::Scope outer(driver, 0);
    CHECK(gpu.has_context());
    // Relaxed: a question about an event would end another thread's capture of a graph otherwise.
    CHECK(gpu.exchange_capture_mode(2) == 2);
    {
      const DeviceDriver::Scope inner(driver, 1);
      CHECK(gpu.has_context());
    }
    CHECK(gpu.has_context());
  }
  CHECK_FALSE(gpu.has_context());
  CHECK(gpu.exchange_capture_mode(0) == 1);
}

TEST_CASE_FIXTURE(Devices, "a scope that fails leaves a thread's context and capture mode as they were") {
  // Each device's context is retained once.
  {
    const DeviceDriver::Scope scope(driver, 0);
  }
  for (const char* call : {"CtxPushCurrent", "ThreadExchangeStreamCaptureMode"}) {
    gpu.fail(call, 0, 4);
    CHECK(has(message_of([&] { return DeviceDriver::Scope(driver, 0), 0; }), "device 0"));
    CHECK_FALSE(gpu.has_context());
    CHECK(gpu.exchange_capture_mode(0) == 0);
  }
  CHECK(gpu.count("DevicePrimaryCtxRetain") == 0);
}

TEST_CASE_FIXTURE(Devices, "an event that cannot be recorded is not left behind") {
  const DeviceDriver::Scope scope(driver, 0);
  gpu.fail("EventCreate", 0, 2);
  CHECK(has(message_of([&] { return driver.record_event(nullptr); }), "cuEventCreate"));
  gpu.fail("EventRecord", 0, 700);
  CHECK(has(message_of([&] { return driver.record_event(nullptr); }), "restart it"));
  CHECK(gpu.count("EventCreate") == gpu.count("EventDestroy") + 1);
}

// ---- forks

TEST_CASE_FIXTURE(Devices, "a child that was forked after the driver was opened has none and says why") {
  Child child([&](Line&) {
    expect(!DeviceDriver::usable());
    expect(DeviceDriver::known(DriverKind::kCuda) == nullptr);
    expect(DeviceDriver::get(DriverKind::kCuda) == nullptr);
    expect(DeviceDriver::get(DriverKind::kHip) == nullptr);
    expect(has(DeviceDriver::why_not(DriverKind::kCuda), "spawn"));
    expect(gpu.count("after fork") == 0);
  });
  child.join();
  CHECK(DeviceDriver::known(DriverKind::kCuda) == &driver);
}

TEST_CASE_FIXTURE(Devices, "a process made by a bare clone calls no driver") {
  Child child = Child::without_handlers([&](Line&) {
    expect(!DeviceDriver::usable());
    expect(DeviceDriver::get(DriverKind::kCuda) == nullptr);
    expect(gpu.count("after fork") == 0);
  });
  child.join();
}

TEST_CASE("in a process that forks before it opens a driver" * doctest::skip()) {
  Child child([&](Line&) {
    expect(DeviceDriver::get(DriverKind::kCuda) != nullptr);
    expect(FakeDriver::cuda().count("after fork") == 0);
    expect(FakeDriver::cuda().count("Init") == 1);
  });
  child.join();
  CHECK(DeviceDriver::known(DriverKind::kCuda) == nullptr);
  CHECK(DeviceDriver::get(DriverKind::kCuda) != nullptr);
}

TEST_CASE("a child that was forked before its parent opened the driver opens its own") {
  CHECK(run_test_case("in a process that forks before it opens a driver") == 0);
}

TEST_CASE("in a process that forks while a thread opens the driver" * doctest::skip()) {
  FakeDriver& gpu = FakeDriver::cuda();
  gpu.hold_calls("Init");
  std::jthread opener([] { CHECK(DeviceDriver::get(DriverKind::kCuda) != nullptr); });
  REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
  Child child([&](Line&) {
    // It may have the half of it.
    expect(!DeviceDriver::usable());
    expect(DeviceDriver::known(DriverKind::kCuda) == nullptr);
    expect(DeviceDriver::get(DriverKind::kCuda) == nullptr);
    expect(has(DeviceDriver::why_not(DriverKind::kCuda), "spawn"));
  });
  try {
    child.join();
  } catch (const std::exception& error) {
    FAIL_CHECK(std::string(error.what()));
  }
  gpu.release_calls();
}

TEST_CASE("a child that was forked while its parent opened the driver has none, and does not wait for it") {
  CHECK(run_test_case("in a process that forks while a thread opens the driver") == 0);
}

}  // namespace
}  // namespace shmx
