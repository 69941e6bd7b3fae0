// The end of an arena: its owner's exit, the clean-up after a dead one, by whom and when.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "process.hpp"
#include "reaper.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"

namespace shmx {
namespace {

using namespace test;

bool arena_exists(ArenaId arena) {
  const auto all = list_arenas();
  return std::any_of(all.begin(), all.end(), [&](const NamedSegments& one) { return one.arena == arena; });
}

// An arena whose owner has been killed, with one block of 5000 bytes, all 55, sent with so many loads to come.
HandleState orphan(std::uint32_t loads) {
  Child owner([loads](Line& line) {
    const auto arena = Arena::create(small_options());
    const Allocation made = arena->allocate(ByteCount{5000});
    fill(made, 55);
    send_to(line, send(made.hold, exactly(loads)));
    (void)line.hear();
  });
  const HandleState state = decode_handle(owner.hear_text());
  owner.kill();
  return state;
}

Reaped reap_now(ArenaId arena, Expiry expiry) {
  auto control = ControlSegment::open(arena);
  REQUIRE(control);
  return reap(*control, 0, expiry);
}

// For what only `shmx gc --force` removes; also the end of tests that leave an orphan on purpose.
void remove_orphan(ArenaId arena) { CHECK(reap_now(arena, Expiry::kNow) == Reaped::kRemoved); }

Hold load_here(const HandleState& state) {
  return load_block(state.arena, state.place, state.block, state.generation, state.message);
}

std::optional<ReapReport> report_of(ArenaId arena, const std::vector<ReapReport>& reports) {
  for (const ReapReport& report : reports) {
    if (report.name == control_name(arena)) return report;
  }
  return std::nullopt;
}

// ---- the owner leaves

TEST_CASE("rule 7: an owner that closes an arena in which nothing is outstanding leaves no name") {
  auto arena = Arena::create(small_options());
  const ArenaId id = id_of(*arena);
  {
    const Allocation made = arena->allocate(ByteCount{kMiB});
  }
  SUBCASE("by close") {
    arena->close();
    CHECK_FALSE(arena_exists(id));
  }
  SUBCASE("by the end of the arena") {
    arena.reset();
    CHECK_FALSE(arena_exists(id));
  }
  SUBCASE("by the end of the process's memberships") {
    leave_all();
    CHECK_FALSE(arena_exists(id));
    CHECK(arena->closed());
  }
  CHECK(find_attachment(id) == nullptr);
}

TEST_CASE("rule 1: a closed arena stays until the last view of this process ends") {
  auto arena = Arena::create(small_options());
  const ArenaId id = id_of(*arena);
  Allocation made = arena->allocate(ByteCount{5000});
  fill(made, 3);
  arena.reset();
  CHECK(arena_exists(id));
  CHECK(is_filled(made.hold, 3));
  made.hold.release();
  CHECK_FALSE(arena_exists(id));
}

TEST_CASE(
    "rule 2: an owner that exits right after it has sent leaves the message loadable, and the last release "
    "removes the arena") {
  Child owner([](Line& line) {
    const auto arena = Arena::create(small_options());
    {
      const Allocation made = arena->allocate(ByteCount{5000});
      fill(made, 55);
      send_to(line, send(made.hold, exactly(2)));
    }
    leave_all();
  });
  const HandleState state = decode_handle(owner.hear_text());
  owner.join();
  CHECK(arena_exists(state.arena));
  {
    const Hold first = load_here(state);
    CHECK(is_filled(first, 55));
  }
  CHECK(arena_exists(state.arena));
  {
    const Hold second = load_here(state);
    CHECK(is_filled(second, 55));
    const Hold third = second.share();
  }
  CHECK_FALSE(arena_exists(state.arena));
  CHECK(find_attachment(state.arena) == nullptr);
  CHECK(code_of([&] { return load_here(state); }) == ErrorCode::kSegmentLost);
}

TEST_CASE("rule 1: a peer reads on after the owner's exit, also when every other block has gone") {
  Child owner([](Line& line) {
    const auto arena = Arena::create(small_options());
    {
      const Allocation made = arena->allocate(ByteCount{5000});
      fill(made, 55);
      send_to(line, send(made.hold, exactly(1)));
    }
    (void)line.hear();
    leave_all();
  });
  const HandleState state = decode_handle(owner.hear_text());
  Hold hold = load_here(state);
  owner.say(1);
  owner.join();
  CHECK(arena_exists(state.arena));
  CHECK(is_filled(hold, 55));
  (void)reap_all(Expiry::kTimeToLive);
  CHECK(is_filled(hold, 55));
  hold.release();
  CHECK_FALSE(arena_exists(state.arena));
}

// ---- the owner is killed

TEST_CASE("rule 7: a killed owner's arena goes with the next arena made, if nothing is outstanding") {
  const HandleState state = orphan(0);
  CHECK(arena_exists(state.arena));
  const auto next = Arena::create(small_options());
  CHECK_FALSE(arena_exists(state.arena));
}

TEST_CASE("rule 2: a killed owner's message can be loaded, and its arena stays for that long") {
  const HandleState state = orphan(1);
  const auto report = report_of(state.arena, reap_all(Expiry::kTimeToLive));
  REQUIRE(report);
  CHECK(report->outcome == Reaped::kInUse);
  CHECK(report->bytes > 0);
  {
    const Hold hold = load_here(state);
    CHECK(is_filled(hold, 55));
    // The owner has been quiet for so long that a release looks after it.
    hold.attachment().control().header().owner_active.fetch_sub(2 * kTicksPerSecond);
  }
  CHECK_FALSE(arena_exists(state.arena));
}

TEST_CASE("rule 6: a killed owner's and a killed peer's holds come back") {
  const HandleState state = orphan(1);
  Child peer([&](Line& line) {
    const Hold hold = load_here(state);
    line.say(1);
    (void)line.hear();
  });
  CHECK(peer.hear() == 1);
  CHECK(reap_now(state.arena, Expiry::kNow) == Reaped::kInUse);
  peer.kill_unreaped();
  CHECK(reap_now(state.arena, Expiry::kTimeToLive) == Reaped::kRemoved);
  CHECK_FALSE(arena_exists(state.arena));
}

TEST_CASE("rule 1: a peer that holds a block of an orphan reads on, whatever is reaped") {
  const HandleState state = orphan(2);
  Child peer([&](Line& line) {
    const Hold hold = load_here(state);
    line.say(1);
    (void)line.hear();
    expect(is_filled(hold, 55));
    (void)line.hear();
  });
  CHECK(peer.hear() == 1);
  CHECK(reap_now(state.arena, Expiry::kNow) == Reaped::kInUse);
  CHECK(arena_exists(state.arena));
  peer.say(1);
  peer.say(1);
  peer.join();
  // The other message was given up by force.
  CHECK(reap_now(state.arena, Expiry::kTimeToLive) == Reaped::kRemoved);
}

TEST_CASE("a living owner's arena is not reaped, by force neither") {
  Child owner([](Line& line) {
    const auto arena = Arena::create(small_options());
    line.say(value(id_of(*arena)));
    (void)line.hear();
  });
  const ArenaId arena{owner.hear()};
  CHECK(reap_now(arena, Expiry::kNow) == Reaped::kOwnerAlive);
  CHECK(arena_exists(arena));
  owner.kill();
  CHECK(reap_now(arena, Expiry::kTimeToLive) == Reaped::kRemoved);
}

TEST_CASE("an arena in which this process takes part is left to it") {
  const HandleState state = orphan(1);
  Hold hold = load_here(state);
  CHECK_FALSE(report_of(state.arena, reap_all(Expiry::kTimeToLive)).has_value());
  CHECK(is_filled(hold, 55));
  hold.release();
  // It holds nothing any more: then it leaves the orphan and removes it.
  (void)reap_all(Expiry::kTimeToLive);
  CHECK_FALSE(arena_exists(state.arena));
  CHECK(find_attachment(state.arena) == nullptr);
}

// ---- messages that nobody loads

TEST_CASE("an orphan without live peers loses its messages after their time-to-live, and not before") {
  const HandleState state = orphan(1);
  ControlSegment control = *ControlSegment::open(state.arena);
  BlockState& block = control.block(state.block).state;
  CHECK(reap(control, 0, Expiry::kTimeToLive) == Reaped::kInUse);
  age_messages(block, 299);
  CHECK(reap(control, 0, Expiry::kTimeToLive) == Reaped::kInUse);
  CHECK(arena_exists(state.arena));
  age_messages(block, 2);
  CHECK(reap(control, 0, Expiry::kTimeToLive) == Reaped::kRemoved);
}

TEST_CASE("rule 2: an orphan with a live peer keeps its messages, however old") {
  const HandleState state = orphan(1);
  const auto peer = Attachment::join(state.arena);
  age_messages(peer->control().block(state.block).state, 10'000);
  CHECK(reap_now(state.arena, Expiry::kTimeToLive) == Reaped::kInUse);
  CHECK(is_filled(load(*peer, state), 55));
  remove_orphan(state.arena);
}

TEST_CASE("by force an orphan's messages go at once") {
  const HandleState state = orphan(3);
  CHECK(reap_now(state.arena, Expiry::kNow) == Reaped::kRemoved);
  CHECK_FALSE(arena_exists(state.arena));
}

// ---- what kills leave in the middle

TEST_CASE("rule 7: a torn creation is removed") {
  const ArenaId arena{random_id()};
  UniqueFd fd = create_segment(control_name(arena));
  SUBCASE("without a size") {}
  SUBCASE("without a reservation") { size_segment(fd.get(), control_name(arena), ByteCount{kControlBytes}); }
  SUBCASE("without a magic") {
    fd.reset();
    REQUIRE(unlink_segment(control_name(arena)));
    (void)ControlSegment::create(arena, {kMiB, 640});
  }
  CHECK(code_of([&] { return attach(arena); }) == ErrorCode::kSegmentLost);
  const auto report = report_of(arena, reap_all(Expiry::kTimeToLive));
  REQUIRE(report);
  CHECK(report->outcome == Reaped::kRemoved);
  CHECK_FALSE(arena_exists(arena));
}

TEST_CASE("a creation that is under way is not taken for a torn one") {
  const ArenaId arena{random_id()};
  ControlSegment control = ControlSegment::create(arena, {kMiB, 640});
  auto lock = PeerLock::try_take(control.file(), kOwnerSlot, Inheritance::kThisProcess);
  REQUIRE(lock);
  const auto report = report_of(arena, reap_all(Expiry::kTimeToLive));
  REQUIRE(report);
  CHECK(report->outcome == Reaped::kOwnerAlive);
  CHECK(arena_exists(arena));
  lock->release();
  CHECK(report_of(arena, reap_all(Expiry::kTimeToLive))->outcome == Reaped::kRemoved);
}

TEST_CASE("rule 7: a closing that a killed reaper has left is completed") {
  const HandleState state = orphan(0);
  ControlSegment control = *ControlSegment::open(state.arena);
  control.header().lifecycle.store(Lifecycle::kClosing);
  CHECK(reap(control, 0, Expiry::kTimeToLive) == Reaped::kRemoved);
}

TEST_CASE("a reaper does not try for ever where the lifecycle was overwritten, before it opens the arena or after") {
  const HandleState state = orphan(0);
  ControlSegment control = *ControlSegment::open(state.arena);
  control.header().lifecycle.store(Lifecycle{77});
  CHECK(code_of([&] { return reap(control, 0, Expiry::kNow); }) == ErrorCode::kInvalidHandle);
  for (const ReapReport& report : reap_all(Expiry::kNow)) {
    if (report.name == control_name(state.arena)) CHECK(report.outcome == Reaped::kNotOurs);
  }
  CHECK(name_exists(control_name(state.arena)));
  control.header().lifecycle.store(Lifecycle::kOpen);
  remove_orphan(state.arena);
}

TEST_CASE("rule 2: a closing that a killed reaper has left does not cost a message") {
  const HandleState state = orphan(1);
  ControlSegment control = *ControlSegment::open(state.arena);
  control.header().lifecycle.store(Lifecycle::kClosing);
  CHECK(reap(control, 0, Expiry::kTimeToLive) == Reaped::kInUse);
  {
    const Hold hold = load_here(state);
    CHECK(is_filled(hold, 55));
    CHECK(control.header().lifecycle.load() == Lifecycle::kOpen);
  }
  (void)reap_all(Expiry::kTimeToLive);
  CHECK_FALSE(arena_exists(state.arena));
}

TEST_CASE("rule 7: names that a killed reaper has left are removed, and loads find the arena gone") {
  const HandleState state = orphan(1);
  ControlSegment control = *ControlSegment::open(state.arena);
  control.header().lifecycle.store(Lifecycle::kGone);
  SUBCASE("all of them") {}
  SUBCASE("the control segment") { REQUIRE(unlink_segment(data_name(state.arena, 1))); }
  CHECK(code_of([&] { return load_here(state); }) == ErrorCode::kSegmentLost);
  (void)reap_all(Expiry::kTimeToLive);
  CHECK_FALSE(arena_exists(state.arena));
  CHECK(find_attachment(state.arena) == nullptr);
}

TEST_CASE("data segments without a control segment are removed by force") {
  const ArenaId arena{random_id()};
  const UniqueFd fd = create_segment(data_name(arena, 4));
  CHECK(report_of(arena, reap_all(Expiry::kTimeToLive))->outcome == Reaped::kNotOurs);
  CHECK(arena_exists(arena));
  CHECK(report_of(arena, reap_all(Expiry::kNow))->outcome == Reaped::kRemoved);
  CHECK_FALSE(arena_exists(arena));
}

// ---- what is not ours

TEST_CASE("an arena of another layout version is neither used nor removed") {
  const ArenaId arena{random_id()};
  ControlSegment control = ControlSegment::create(arena, {kMiB, 640});
  control.header().layout_version = kLayoutVersion + 1;
  control.publish();
  CHECK(code_of([&] { return attach(arena); }) == ErrorCode::kInvalidHandle);
  const auto report = report_of(arena, reap_all(Expiry::kTimeToLive));
  REQUIRE(report);
  CHECK(report->outcome == Reaped::kNotOurs);
  CHECK(arena_exists(arena));
  unlink_segment(control.name());
}

TEST_CASE("another user's arena is neither used nor removed") {
  const HandleState state = orphan(0);
  const std::string path = "/dev/shm" + control_name(state.arena);
  if (::chown(path.c_str(), 65'534, 65'534) != 0) {
    MESSAGE("only root can give a file away: not tested");
    remove_orphan(state.arena);
    return;
  }
  CHECK(code_of([&] { return attach(state.arena); }) == ErrorCode::kInvalidHandle);
  CHECK(report_of(state.arena, reap_all(Expiry::kTimeToLive))->outcome == Reaped::kNotOurs);
  CHECK(arena_exists(state.arena));
  REQUIRE(::chown(path.c_str(), 0, 0) == 0);
  remove_orphan(state.arena);
}

// ---- many at a time

TEST_CASE("reapers at the same time remove an arena once and leave nothing") {
  for (int round = 0; round < 10; ++round) {
    const HandleState state = orphan(0);
    std::vector<std::unique_ptr<Child>> reapers;
    for (int i = 0; i < 4; ++i) {
      reapers.push_back(std::make_unique<Child>([&](Line& line) {
        (void)line.hear();
        (void)reap_all(Expiry::kTimeToLive);
        // A reaper that found the lock taken may be done before the one that has it.
        (void)line.hear();
        (void)reap_all(Expiry::kTimeToLive);
      }));
    }
    for (auto& reaper : reapers) reaper->say(1);
    for (auto& reaper : reapers) reaper->say(1);
    for (auto& reaper : reapers) reaper->join();
    (void)reap_all(Expiry::kTimeToLive);
    CHECK_FALSE(arena_exists(state.arena));
  }
}

TEST_CASE("rule 2: an arena that one thread closes while another lets go of its last block keeps what was sent") {
  for (int round = 0; round < 300; ++round) {
    auto arena = Arena::create(small_options());
    Allocation made = arena->allocate(ByteCount{5000});
    fill(made, 55);
    const HandleState state = send(made.hold, exactly(1));
    std::atomic<int> ready{0};
    const auto together = [&ready] {
      ++ready;
      while (ready.load() < 2) std::this_thread::yield();
    };
    {
      std::jthread releasing([&] {
        together();
        made.hold.release();
      });
      together();
      arena->close();
    }
    arena.reset();
    REQUIRE(arena_exists(state.arena));
    {
      REQUIRE(is_filled(load_here(state), 55));
    }
    REQUIRE_FALSE(arena_exists(state.arena));
  }
}

TEST_CASE("rule 2: peers that load and release an orphan's last messages at the same time all read it") {
  constexpr std::uint32_t kPeers = 4;
  for (int round = 0; round < 10; ++round) {
    Child owner([](Line& line) {
      const auto arena = Arena::create(small_options());
      {
        const Allocation made = arena->allocate(ByteCount{5000});
        fill(made, 55);
        send_to(line, send(made.hold, exactly(kPeers)));
      }
      leave_all();
    });
    const HandleState state = decode_handle(owner.hear_text());
    owner.join();
    std::vector<std::unique_ptr<Child>> peers;
    for (std::uint32_t i = 0; i < kPeers; ++i) {
      peers.push_back(std::make_unique<Child>([&](Line& line) {
        (void)line.hear();
        {
          const Hold hold = load_here(state);
          expect(is_filled(hold, 55));
        }
        leave_all();
      }));
    }
    for (auto& peer : peers) peer->say(1);
    for (auto& peer : peers) peer->join();
    CHECK_FALSE(arena_exists(state.arena));
  }
}

TEST_CASE("rules 6 and 7: whoever is killed at whatever moment, one reaping later nothing is left") {
  for (std::uint32_t round = 0; round < 12; ++round) {
    Child owner([](Line& line) {
      const auto arena = Arena::create(small_options());
      line.say(value(id_of(*arena)));
      for (int i = 0;; ++i) {
        const Allocation made = arena->allocate(ByteCount{static_cast<std::uint64_t>(1000 + i % 7 * 5000)});
        fill(made, i % 251);
        send_to(line, send(made.hold, exactly(1)));
        line.say(static_cast<std::uint64_t>(i % 251));
        if (i % 16 == 15) (void)arena->trim();
      }
    });
    const ArenaId arena{owner.hear()};
    // From here on the peer reads the owner's line, which it has inherited.
    Child peer([&owner](Line& line) {
      for (std::uint64_t seen = 0;; ++seen) {
        const HandleState state = receive_from(owner.line());
        const auto byte = static_cast<int>(owner.line().hear());
        const Hold hold = load_here(state);
        expect(is_filled(hold, byte));
        line.say(seen);
      }
    });
    for (std::uint32_t i = 0; i < 5 + 17 * round; ++i) (void)peer.hear();
    (round % 2 == 0 ? owner : peer).kill();
    (round % 2 == 0 ? peer : owner).kill();
    CHECK(reap_now(arena, Expiry::kNow) == Reaped::kRemoved);
    CHECK_FALSE(arena_exists(arena));
  }
}

}  // namespace
}  // namespace shmx
