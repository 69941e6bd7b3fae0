// Uses of blocks by copies under way: each ends when the event behind its copy has completed, and no sooner; whatever
// the driver answers, whoever asks, and whatever else the process does meanwhile.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fake_driver.hpp"
#include "in_flight.hpp"
#include "process.hpp"
#include "reaper.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"
#include "threads.hpp"

namespace shmx {
namespace {

using namespace test;

constexpr std::uint64_t kBytes = 64 * 1024;
constexpr auto kLong = std::chrono::hours(1);

bool pin(const std::shared_ptr<Arena>& arena, int device = 0) {
  return Pinner::pin_now(*arena->attachment(), DriverKind::kCuda, device);
}

// One block is all that an arena of this size has room for.
std::shared_ptr<Arena> arena_of_one() {
  ArenaOptions options;
  options.capacity = kBytes;
  options.segment_bytes = kBytes;
  return Arena::create(options);
}

bool is_full(Arena& arena) {
  return code_of([&] { return arena.allocate(ByteCount{kBytes}); }) == ErrorCode::kArenaFull;
}

class Copies : public Devices {
 protected:
  Copies() : memories_{gpu.allocate(0, kBytes), gpu.allocate(1, kBytes)} {}
  ~Copies() {
    // Streams go on first: a copy may be in one.
    gpu.recover();
    gpu.release_streams();
    for (const int device : {0, 1}) {
      (void)gpu.synchronize(device);
      gpu.free(device, memories_[static_cast<std::size_t>(device)]);
    }
  }
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;

  InFlight& in_flight = InFlight::instance();
  [[nodiscard]] std::uint64_t under_way() { return in_flight.report().copies; }

  // Puts a copy of the block into the device's stream, and its use into flight.
  void copy(Hold hold, int device = 0) {
    put(hold, device);
    std::vector<Hold> holds;
    holds.push_back(std::move(hold));
    in_flight.depart(holds, driver, device, nullptr);
    CHECK(holds.empty());
  }
  void put(const Hold& hold, int device = 0) {
    CHECK(gpu.copy_to_device(device, memories_[static_cast<std::size_t>(device)], hold.attachment().data(hold),
                             kBytes) == 0);
  }
  [[nodiscard]] bool arrived(int byte, int device = 0) {
    const std::vector<std::byte> found = gpu.read(device, memories_[static_cast<std::size_t>(device)], kBytes);
    return std::all_of(found.begin(), found.end(), [byte](std::byte b) { return b == static_cast<std::byte>(byte); });
  }
  // Without another call of ours.
  [[nodiscard]] bool end_by_themselves() {
    return comes_true([this] { return under_way() == 0; });
  }

 private:
  std::uintptr_t memories_[2];
};

// ---- one copy

TEST_CASE_FIXTURE(Copies, "rules 1 and 8: a block stays in use until the copy from it has completed") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 7);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  for (int i = 0; i < 100; ++i) {
    in_flight.poll();
    CHECK(under_way() == 1);
    CHECK(is_full(*arena));
  }
  gpu.release_streams();
  CHECK(arrived(7));
  CHECK(comes_true([&] {
    in_flight.poll();
    return under_way() == 0;
  }));
  CHECK_FALSE(is_full(*arena));
  CHECK(gpu.count("EventCreate") == gpu.count("EventDestroy"));
}

TEST_CASE_FIXTURE(Copies, "a copy whose block is let go too early delivers other bytes") {
  // The control for the test above.
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 7);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  put(made.hold);
  made.hold.release();
  fill(arena->allocate(ByteCount{kBytes}), 8);
  gpu.release_streams();
  CHECK(arrived(8));
}

TEST_CASE_FIXTURE(Copies, "a use ends without another call, by a thread that shows its name") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  CHECK(threads_named("shmx-copies") == 1);
  gpu.release_streams();
  CHECK(end_by_themselves());
  CHECK(comes_true([&] { return !is_full(*arena); }));
}

TEST_CASE_FIXTURE(Copies, "a block with several copies under way is in use until the last has completed") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 9);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  for (const int device : {0, 1, 0}) copy(made.hold.share(), device);
  made.hold.release();
  CHECK(under_way() == 3);
  CHECK(is_full(*arena));
  gpu.release_streams();
  CHECK((arrived(9, 0) && arrived(9, 1)));
  CHECK(end_by_themselves());
  CHECK(comes_true([&] { return !is_full(*arena); }));
}

TEST_CASE_FIXTURE(Copies, "of the copies in a stream only the first is asked about, until it has completed") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  REQUIRE(pin(arena));
  gpu.hold_streams();
  gpu.forget_calls();
  for (int i = 0; i < 100; ++i) {
    copy(made.hold.share());
    in_flight.poll();
  }
  CHECK(under_way() == 100);
  // Whoever asks enters the device once; the watching thread does so meanwhile.
  const long asked = gpu.count("EventQuery");
  CHECK(asked > 0);
  CHECK(asked <= gpu.count("CtxPushCurrent"));
  gpu.release_streams();
  CHECK(end_by_themselves());
}

TEST_CASE_FIXTURE(Copies, "the last use of an arena may be a copy, which then ends it in order") {
  // Unregistered, unmapped, its name removed: the driver ends the process if that comes under the copy.
  auto arena = arena_of_one();
  const ArenaId id = id_of(*arena);
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 3);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  arena->close();
  arena.reset();
  CHECK(name_exists(control_name(id)));
  CHECK(gpu.registrations().size() == 1);
  gpu.release_streams();
  CHECK(arrived(3));
  CHECK(comes_true([&] { return !name_exists(control_name(id)) && gpu.registrations().empty(); }));
}

TEST_CASE_FIXTURE(Copies, "a segment is not trimmed under a copy") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 4);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  CHECK(arena->trim() == 0);
  gpu.release_streams();
  CHECK(arrived(4));
  CHECK(end_by_themselves());
  CHECK(comes_true([&] { return arena->trim() == kBytes; }));
}

// ---- a driver that fails

TEST_CASE_FIXTURE(Copies,
                  "whichever call fails as a copy departs, its uses stay with the caller and no event is left") {
  const auto arena = arena_of_one();
  const Allocation made = arena->allocate(ByteCount{kBytes});
  for (const char* call : {"CtxPushCurrent", "ThreadExchangeStreamCaptureMode", "EventCreate", "EventRecord"}) {
    std::vector<Hold> holds;
    holds.push_back(made.hold.share());
    gpu.fail(call, 0, 700);
    CHECK(code_of([&] {
            in_flight.depart(holds, driver, 0, nullptr);
            return 0;
          }) == ErrorCode::kDevice);
    REQUIRE(holds.size() == 1);
    CHECK(holds[0].held());
    CHECK(under_way() == 0);
  }
  CHECK(gpu.count("EventCreate") - 1 == gpu.count("EventDestroy"));
  CHECK_FALSE(gpu.has_context());
}

TEST_CASE_FIXTURE(Copies, "a device that cannot be entered keeps the uses of its copies, and is asked again") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  gpu.break_device(0, 700);
  gpu.release_streams();
  const long asked = gpu.count("CtxPushCurrent");
  REQUIRE(comes_true([&] { return gpu.count("CtxPushCurrent") > asked + 3; }));
  CHECK(under_way() == 1);
  CHECK(is_full(*arena));
  CHECK(in_flight.report().trouble.find("(700)") != std::string::npos);
  gpu.recover();
  CHECK(end_by_themselves());
  CHECK(comes_true([&] { return !is_full(*arena); }));
}

TEST_CASE_FIXTURE(Copies, "an event that cannot be asked about keeps its use") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  // More often than it is asked here.
  for (int i = 0; i < 10'000; ++i) gpu.fail("EventQuery", 0, 700);
  gpu.release_streams();
  REQUIRE(comes_true([&] { return in_flight.report().trouble.starts_with("cuEventQuery of "); }));
  for (int i = 0; i < 10; ++i) in_flight.poll();
  CHECK(under_way() == 1);
  CHECK(is_full(*arena));
}

TEST_CASE_FIXTURE(Copies, "copies to one device end while another one is broken") {
  const auto broken = arena_of_one();
  const auto healthy = arena_of_one();
  Allocation lost = broken->allocate(ByteCount{kBytes});
  REQUIRE(pin(broken));
  (void)healthy->allocate(ByteCount{kBytes});
  REQUIRE(pin(healthy, 1));
  gpu.hold_streams();
  copy(std::move(lost.hold), 0);
  gpu.break_device(0, 700);
  for (int round = 0; round < 3; ++round) {
    gpu.hold_streams();
    Allocation made = healthy->allocate(ByteCount{kBytes});
    fill(made, round);
    copy(std::move(made.hold), 1);
    gpu.release_streams();
    CHECK(arrived(round, 1));
    CHECK(comes_true([&] { return under_way() == 1; }));
    CHECK(comes_true([&] { return !is_full(*healthy); }));
  }
  CHECK(is_full(*broken));
}

// ---- the end

TEST_CASE_FIXTURE(Copies, "a drain waits for the copies that are under way, and ends the thread") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 5);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  std::atomic<bool> drained{false};
  {
    const std::jthread drains([&] {
      CHECK(in_flight.drain(kLong));
      drained = true;
    });
    const long asked = gpu.count("EventQuery");
    REQUIRE(comes_true([&] { return gpu.count("EventQuery") > asked + 20; }));
    CHECK_FALSE(drained.load());
    gpu.release_streams();
  }
  CHECK(under_way() == 0);
  CHECK_FALSE(is_full(*arena));
  CHECK(comes_true([] { return threads_named("shmx-copies") == 0; }));
}

TEST_CASE_FIXTURE(Copies, "a drain gives up after the time it was given, ends the thread, and ends no use") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 6);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  CHECK_FALSE(in_flight.drain(std::chrono::milliseconds(1)));
  CHECK(comes_true([] { return threads_named("shmx-copies") == 0; }));
  CHECK(under_way() == 1);
  CHECK(is_full(*arena));
  gpu.release_streams();
  CHECK(arrived(6));
  CHECK(in_flight.drain(kLong));
  CHECK_FALSE(is_full(*arena));
}

TEST_CASE_FIXTURE(Copies, "a drain does not wait for a device that is broken") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  SUBCASE("events cannot be asked about") { gpu.fail("EventQuery", 0, 700, true); }
  SUBCASE("the device cannot be entered") { gpu.break_device(0, 700); }
  CHECK_FALSE(in_flight.drain(kLong));
  CHECK(is_full(*arena));
}

TEST_CASE_FIXTURE(Copies, "a copy that departs while the thread is being ended is watched by the next one") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kBytes});
  REQUIRE(pin(arena));
  for (int round = 0; round < 500; ++round) {
    copy(made.hold.share());
    {
      const std::jthread drains([&] { CHECK(in_flight.drain(kLong)); });
      for (int i = 0; i < round % 50; ++i) std::this_thread::yield();
      copy(made.hold.share());
    }
    CHECK(end_by_themselves());
  }
}

TEST_CASE_FIXTURE(Copies, "a use that is kept never ends") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  const std::uint64_t kept = in_flight.report().kept;
  std::vector<Hold> holds;
  holds.push_back(std::move(made.hold));
  in_flight.keep(holds);
  CHECK(holds.empty());
  in_flight.poll();
  CHECK(in_flight.drain(kLong));
  CHECK(is_full(*arena));
  CHECK(in_flight.report().kept == kept + 1);
  // The process may leave all the same: its end takes the device along.
  leave_all();
}

// ---- forks

TEST_CASE_FIXTURE(Copies, "rule 10: a child has no part in its parent's copies, and calls no driver about them") {
  const auto arena = arena_of_one();
  Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 2);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(std::move(made.hold));
  const Attachment& attachment = *arena->attachment();
  const BlockState& state = arena->attachment()->control().block(BlockIndex{0}).state;
  Child child([&](Line& line) {
    expect(in_flight.report().copies == 0);
    // Its own slot had the block for as long as the fork took.
    expect(attachment.uses() == 0);
    in_flight.poll();
    expect(in_flight.drain(kLong));
    expect(threads_named("shmx-copies") == 0);
    line.say(1);
    (void)line.hear();
    leave_all();
    expect(gpu.count("after fork") == 0);
  });
  REQUIRE(child.hear() == 1);
  CHECK(state.holds.load() == hold_bit(kOwnerSlot));
  CHECK(under_way() == 1);
  child.say(1);
  child.join();
  CHECK(is_full(*arena));
  gpu.release_streams();
  CHECK(arrived(2));
  CHECK(end_by_themselves());
  CHECK(comes_true([&] { return !is_full(*arena); }));
}

TEST_CASE_FIXTURE(Copies, "rule 1: a child may hold the block of its parent's copy longer than that lasts") {
  const auto arena = arena_of_one();
  const Allocation made = arena->allocate(ByteCount{kBytes});
  fill(made, 2);
  REQUIRE(pin(arena));
  gpu.hold_streams();
  copy(made.hold.share());
  Child child([&](Line& line) {
    (void)line.hear();
    expect(is_filled(made.hold, 2));
  });
  gpu.release_streams();
  CHECK(end_by_themselves());
  child.say(1);
  child.join();
}

TEST_CASE_FIXTURE(Copies, "rule 10: children forked while threads copy, poll and drain can use what they inherit") {
  const int rounds = std::getenv("SHMX_LONG") != nullptr ? 500 : 40;
  const auto arena = Arena::create(small_options());
  const Allocation inherited = arena->allocate(ByteCount{kBytes});
  fill(inherited, 1);
  std::vector<std::jthread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i](const std::stop_token& stop) {
      for (int round = 0; !stop.stop_requested(); ++round) {
        Allocation made = arena->allocate(ByteCount{kBytes});
        fill(made, round % 251);
        (void)pin(arena);
        copy(std::move(made.hold), i);
        if (!arrived(round % 251, i)) FAIL_CHECK("other bytes");
      }
    });
  }
  threads.emplace_back([&](const std::stop_token& stop) {
    for (int round = 0; !stop.stop_requested(); ++round) {
      in_flight.poll();
      if (round % 16 == 0) (void)in_flight.drain(kLong);
      std::this_thread::yield();
    }
  });
  for (int round = 0; round < rounds; ++round) {
    Child child([&](Line&) {
      expect(in_flight.report().copies == 0);
      expect(in_flight.drain(kLong));
      expect(is_filled(inherited.hold, 1));
      const auto own = Arena::create(small_options());
      expect(own->allocate(ByteCount{kBytes}).hold.held());
      leave_all();
      expect(gpu.count("after fork") == 0);
    });
    child.join();
  }
  threads.clear();
  CHECK(end_by_themselves());
  (void)arena->sweep(false);
  CHECK(arena->stats().held_blocks == 1);
}

}  // namespace
}  // namespace shmx
