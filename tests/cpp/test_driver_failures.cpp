// Every call of the driver failing, at every index: bytes arrive as they were or the error is clear, no page is
// unmapped that may be locked yet, and what fails once leaves nothing locked that is not accounted for.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "fake_driver.hpp"
#include "in_flight.hpp"
#include "reaper.hpp"
#include "small_arena.hpp"

namespace shmx {
namespace {

using namespace test;

constexpr std::uint64_t kBytes = 64 * 1024;
// Of each call that is made again and again while a copy is pending, the first few.
constexpr long kMost = 16;

class Life : public Devices {
 protected:
  // Everything that is done with a device. Throws Error(kDevice).
  void live() {
    ArenaOptions options;
    options.capacity = 16 * kBytes;
    options.segment_bytes = 4 * kBytes;
    const auto arena = Arena::create(options);
    std::vector<Allocation> made;
    for (int byte = 0; byte < 3; ++byte) {
      made.push_back(arena->allocate(ByteCount{kBytes}));
      fill(made.back(), byte);
    }
    pin_if_possible(*arena->attachment());
    for (int byte = 0; byte < 3; ++byte) copy(made[static_cast<std::size_t>(byte)].hold.share(), byte, byte % 2);
    // More of it, and a peer.
    made.push_back(arena->allocate(ByteCount{4 * kBytes}));
    fill(made.back(), 9);
    pin_if_possible(*arena->attachment());
    {
      const auto peer = Attachment::join(id_of(*arena));
      pin_if_possible(*peer);
      copy(load(*peer, send(made.back().hold, exactly(1))), 9, 1);
      InFlight::instance().poll();
    }
    made.clear();
    InFlight::instance().poll();
    (void)arena->trim();
    made.push_back(arena->allocate(ByteCount{kBytes}));
    fill(made.back(), 4);
    pin_if_possible(*arena->attachment());
    copy(std::move(made.back().hold), 4, 0);
  }

  // As after the end of a program; answers how many bytes stay registered.
  std::uint64_t clean_up() {
    gpu.recover();
    for (const int device : {0, 1}) CHECK(gpu.synchronize(device) == 0);
    CHECK(InFlight::instance().drain(std::chrono::minutes(1)));
    kept_.clear();
    leave_all();
    (void)PinLedger::instance().take_warning();
    std::uint64_t left = 0;
    for (const Registration& one : gpu.registrations()) {
      // The driver ends the process here if it is not mapped any more.
      CHECK(gpu.unregister_pages(0, one.base) == 0);
      left += one.bytes;
    }
    CHECK_FALSE(gpu.has_context());
    // Where the call that restores it has failed.
    (void)gpu.exchange_capture_mode(0);
    return left;
  }

  long broken_off = 0;
  long arrived = 0;

 private:
  std::vector<std::vector<Hold>> kept_;

  void pin_if_possible(Attachment& attachment) {
    try {
      (void)attachment.pin(driver, 0, 2 * kBytes);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kDevice);
      CHECK(std::string(error.what()).find("(") != std::string::npos);
      ++broken_off;
    }
  }

  // What the Python layer does: the holds end with the copies, or when the stream has been waited for, or not at all.
  void copy(Hold hold, int byte, int device) {
    const std::byte* const data = hold.attachment().data(hold);
    const std::uint64_t bytes = entry_of(hold).place.bytes.load();
    std::vector<Hold> holds;
    const auto cuts = hold.attachment().cuts(data, bytes);
    holds.push_back(std::move(hold));
    std::vector<std::uint64_t> edges = {0};
    if (cuts) edges.insert(edges.end(), cuts->begin(), cuts->end());
    edges.push_back(bytes);
    std::uintptr_t memory = 0;
    try {
      memory = gpu.allocate(device, bytes);
    } catch (const std::runtime_error&) {
      return;
    }
    // Memory that is not registered goes through other memory: another thread may be about to register it.
    const std::vector<std::byte> staged(data, data + bytes);
    const std::byte* const source = cuts ? data : staged.data();
    bool complete = true;
    for (std::size_t i = 0; i + 1 < edges.size(); ++i) {
      complete =
          complete && gpu.copy_to_device(device, memory + edges[i], source + edges[i], edges[i + 1] - edges[i]) == 0;
    }
    try {
      InFlight::instance().depart(holds, driver, device, nullptr);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kDevice);
      ++broken_off;
      if (gpu.synchronize(device) == 0) {
        holds.clear();
      } else {
        // Nobody knows what the device does with it.
        kept_.push_back(std::move(holds));
        return;
      }
    }
    if (complete) {
      try {
        const std::vector<std::byte> found = gpu.read(device, memory, bytes);
        CHECK(
            std::all_of(found.begin(), found.end(), [byte](std::byte b) { return b == static_cast<std::byte>(byte); }));
        ++arrived;
      } catch (const std::runtime_error&) {
        ++broken_off;
      }
    }
    gpu.free(device, memory);
  }
};

constexpr const char* kCalls[] = {"CtxPushCurrent",  "CtxPopCurrent",  "ThreadExchangeStreamCaptureMode",
                                  "HostRegister",    "HostUnregister", "MemAlloc",
                                  "MemcpyHtoDAsync", "EventCreate",    "EventRecord",
                                  "EventQuery",      "EventDestroy"};

TEST_CASE_FIXTURE(Life, "rule 1: a call that fails once leaves a right result or a clear error, and no page locked") {
  live();
  CHECK(clean_up() == 0);
  CHECK(arrived == 5);
  CHECK(broken_off == 0);
  for (const char* name : kCalls) {
    gpu.forget_calls();
    live();
    CHECK(clean_up() == 0);
    const long calls = gpu.count(name);
    CHECK(calls > 0);
    for (long index = 0; index < std::min(calls, kMost); ++index) {
      CAPTURE(std::string(name));
      CAPTURE(index);
      const std::uint64_t quarantined = PinLedger::instance().report().quarantined_bytes;
      gpu.fail(name, index, 1);
      live();
      CHECK(clean_up() == PinLedger::instance().report().quarantined_bytes - quarantined);
    }
  }
}

TEST_CASE_FIXTURE(Life, "rule 1: two calls that fail, one of them in undoing the other, unmap nothing that is locked") {
  for (long first = 0; first < 6; ++first) {
    for (long second = 0; second < 6; ++second) {
      CAPTURE(first);
      CAPTURE(second);
      const std::uint64_t quarantined = PinLedger::instance().report().quarantined_bytes;
      gpu.fail("HostRegister", first, 2);
      gpu.fail("HostUnregister", second, 1);
      live();
      CHECK(clean_up() == PinLedger::instance().report().quarantined_bytes - quarantined);
    }
  }
}

TEST_CASE_FIXTURE(Life, "rule 1: a device that breaks at any call loses no page from under itself") {
  live();
  CHECK(clean_up() == 0);
  for (const char* name : kCalls) {
    gpu.forget_calls();
    live();
    CHECK(clean_up() == 0);
    const long calls = gpu.count(name);
    for (long index = 0; index < std::min(calls, kMost); ++index) {
      CAPTURE(std::string(name));
      CAPTURE(index);
      gpu.fail(name, index, 700, true);
      live();
      (void)clean_up();
    }
  }
  CHECK(broken_off > 0);
}

}  // namespace
}  // namespace shmx
