// A process's membership in an arena. Most peers here are second memberships of this process, made by join().
#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "process.hpp"
#include "reaper.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"

namespace shmx {
namespace {

using namespace test;

struct Published {
  std::shared_ptr<Arena> arena = Arena::create(small_options());
  Allocation made = arena->allocate(ByteCount{5000});
  Published() { fill(made, 17); }
  [[nodiscard]] ArenaId id() const { return id_of(*arena); }
  [[nodiscard]] ControlSegment& control() const { return arena->attachment()->control(); }
  [[nodiscard]] BlockEntry& entry() const { return entry_of(made.hold); }
  [[nodiscard]] std::uint64_t bits() const { return entry().state.holds.load() & ~hold_bit(kOwnerSlot); }
};

TEST_CASE("join takes a slot and its end gives it back") {
  const Published published;
  auto first = Attachment::join(published.id());
  auto second = Attachment::join(published.id());
  CHECK(first->slot() != second->slot());
  CHECK_FALSE(first->is_owner());
  CHECK(published.arena->attachment()->is_owner());
  const PeerSlot slot = first->slot();
  CHECK(is_alive(published.control().file(), slot));
  first.reset();
  CHECK_FALSE(is_alive(published.control().file(), slot));
  CHECK(Attachment::join(published.id())->slot() == slot);
}

TEST_CASE("an arena that is not there is lost") {
  CHECK(code_of([] { return Attachment::join(ArenaId{1}); }) == ErrorCode::kSegmentLost);
  CHECK(code_of([] { return attach(ArenaId{1}); }) == ErrorCode::kSegmentLost);
}

TEST_CASE("one peer too many is told so") {
  const Published published;
  std::vector<std::shared_ptr<Attachment>> peers;
  for (std::uint32_t i = 1; i < kMaxPeers; ++i) peers.push_back(Attachment::join(published.id()));
  try {
    (void)Attachment::join(published.id());
    FAIL("joined");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kTooManyPeers);
    CHECK(error.system_errno() == EUSERS);
  }
  peers.pop_back();
  CHECK(Attachment::join(published.id()) != nullptr);
}

TEST_CASE("rule 6: a slot is taken over without what its former peer held") {
  const Published published;
  set_hold(published.entry().state, PeerSlot{1});
  const auto peer = Attachment::join(published.id());
  REQUIRE(peer->slot() == PeerSlot{1});
  CHECK(published.bits() == 0);
}

TEST_CASE("a load holds the block and shows its bytes; the end of the use lets it go") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const HandleState state = send(published.made.hold, exactly(1));
  {
    const Hold hold = load(*peer, state);
    CHECK(published.bits() == hold_bit(peer->slot()));
    CHECK(peer->uses() == 1);
    CHECK(peer->uses_of(hold.block()) == 1);
    CHECK(peer->data(hold) != published.made.data);
    CHECK(is_filled(hold, 17));
  }
  CHECK(published.bits() == 0);
  CHECK(peer->uses() == 0);
}

TEST_CASE("rule 8: uses of one block share a bit, each ends once, and the last clears it") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const HandleState state = send(published.made.hold, exactly(2));
  Hold first = load(*peer, state);
  Hold second = load(*peer, state);
  Hold third = first.share();
  CHECK(peer->uses_of(state.block) == 3);
  first.release();
  first.release();
  CHECK_FALSE(first.held());
  CHECK_FALSE(first.share().held());
  CHECK(peer->uses_of(state.block) == 2);
  Hold moved = std::move(second);
  CHECK(peer->uses_of(state.block) == 2);
  third = std::move(moved);
  CHECK(peer->uses_of(state.block) == 1);
  CHECK(published.bits() == hold_bit(peer->slot()));
  third = Hold();
  CHECK(published.bits() == 0);
  CHECK(peer->uses() == 0);
}

TEST_CASE("rule 3: a stale load is an error and leaves no bit behind") {
  Published published;
  const auto peer = Attachment::join(published.id());
  const HandleState state = send(published.made.hold, exactly(0));
  published.made.hold.release();
  REQUIRE(retire(published.control().block(state.block).state));
  try {
    (void)load(*peer, state);
    FAIL("loaded");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kStaleHandle);
    CHECK(std::string(error.what()).find(published.arena->name()) != std::string::npos);
  }
  CHECK(published.control().holders() == 0);
  CHECK_FALSE(peer->try_hold(state.block, state.generation).has_value());
  CHECK(published.control().holders() == 0);
}

TEST_CASE("rule 1: a stale load leaves the bit of another use of the block alone") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const Hold hold = load(*peer, send(published.made.hold, exactly(1)));
  CHECK(code_of([&] { return peer->load(hold.block(), Generation{100}, std::nullopt); }) == ErrorCode::kStaleHandle);
  CHECK_FALSE(peer->try_hold(hold.block(), Generation{100}).has_value());
  CHECK(published.bits() == hold_bit(peer->slot()));
  CHECK(is_filled(hold, 17));
}

TEST_CASE("a handle of a block that does not exist, or at an odd generation, is refused") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const std::uint32_t count = published.control().block_count();
  for (const std::uint32_t block : {count, kMaxBlocks, UINT32_MAX}) {
    CHECK(code_of([&] { return peer->load(BlockIndex{block}, Generation{0}, std::nullopt); }) ==
          ErrorCode::kInvalidHandle);
  }
  CHECK(code_of([&] { return peer->load(BlockIndex{0}, Generation{1}, std::nullopt); }) == ErrorCode::kInvalidHandle);
}

TEST_CASE("rule 7: a load undoes a closing of the arena that a killed reaper has left") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const HandleState state = send(published.made.hold, exactly(1));
  published.control().header().lifecycle.store(Lifecycle::kClosing);
  CHECK(is_filled(load(*peer, state), 17));
  CHECK(published.control().header().lifecycle.load() == Lifecycle::kOpen);
}

TEST_CASE("rule 5: a load from an arena that is gone is lost and leaves no bit behind") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const HandleState state = send(published.made.hold, exactly(1));
  published.control().header().lifecycle.store(Lifecycle::kGone);
  CHECK(code_of([&] { return load(*peer, state); }) == ErrorCode::kSegmentLost);
  CHECK(published.bits() == 0);
  published.control().header().lifecycle.store(Lifecycle::kOpen);
  drop_messages(*published.arena);
}

TEST_CASE("the bytes are mapped at first use, and found without a system call after that") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const Hold hold = load(*peer, send(published.made.hold, exactly(1)));
  CHECK(peer->mapped(hold) == nullptr);
  std::byte* const data = peer->data(hold);
  CHECK(peer->mapped(hold) == data);
  CHECK(peer->data(hold) == data);
}

TEST_CASE("map_all maps every segment ahead of the first load") {
  const Published published;
  const Allocation other = published.arena->allocate(ByteCount{6 * kMiB});
  const auto peer = Attachment::join(published.id());
  const unsigned before = mapped_segments(published.id()).data;
  peer->map_all();
  CHECK(mapped_segments(published.id()).data == before + 2);
  CHECK(peer->mapped(load(*peer, send(other.hold, exactly(1)))) != nullptr);
  CHECK(peer->mapped(load(*peer, send(published.made.hold, exactly(1)))) != nullptr);
}

TEST_CASE("a block table that is damaged is refused before any byte is touched") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const Hold hold = load(*peer, send(published.made.hold, exactly(1)));
  BlockPlace& place = published.entry().place;
  const auto refused_when = [&](auto& field, auto damaged) {
    const auto right = field.load();
    field.store(damaged);
    const ErrorCode code = code_of([&] { return peer->data(hold); });
    field.store(right);
    return code == ErrorCode::kInvalidHandle;
  };
  SUBCASE("before the segment is mapped") {}
  SUBCASE("after") { (void)peer->data(hold); }
  CHECK(refused_when(place.segment_slot, std::uint16_t{kMaxSegments}));
  CHECK(refused_when(place.segment_slot, std::uint16_t{UINT16_MAX}));
  CHECK(refused_when(place.offset, std::uint64_t{1} << 60));
  CHECK(refused_when(place.offset, UINT64_MAX));
  CHECK(refused_when(place.bytes, UINT64_MAX));
  CHECK(refused_when(place.used, place.bytes.load() + 1));
  CHECK(is_filled(hold, 17));
}

TEST_CASE("a data segment that somebody has removed or truncated is lost") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const Hold hold = load(*peer, send(published.made.hold, exactly(1)));
  const std::string name = data_name(published.id(), 1);
  SUBCASE("removed") { REQUIRE(unlink_segment(name)); }
  SUBCASE("truncated") { REQUIRE(::truncate(("/dev/shm" + name).c_str(), 4096) == 0); }
  CHECK(code_of([&] { return peer->data(hold); }) == ErrorCode::kSegmentLost);
}

TEST_CASE("a peer unmaps a trimmed segment at its next load, and not what it uses") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  Allocation large = published.arena->allocate(ByteCount{6 * kMiB});
  const Hold kept = load(*peer, send(published.made.hold, exactly(1)));
  (void)peer->data(kept);
  {
    const Hold seen = load(*peer, send(large.hold, exactly(1)));
    (void)peer->data(seen);
  }
  large.hold.release();
  CHECK(mapped_segments(published.id()).data == 4);
  CHECK(published.arena->trim() > 0);
  CHECK(mapped_segments(published.id()).deleted == 1);
  const Hold next = load(*peer, send(published.made.hold, exactly(1)));
  CHECK(mapped_segments(published.id()).deleted == 0);
  CHECK(mapped_segments(published.id()).data == 2);
  CHECK(is_filled(kept, 17));
  // The table's slot has another segment now; the peer does not take it for the old one.
  const Allocation again = published.arena->allocate(ByteCount{7 * kMiB});
  fill(again, 33);
  const Hold newer = load(*peer, send(again.hold, exactly(1)));
  CHECK(is_filled(newer, 33));
}

TEST_CASE("a peer unmaps a trimmed segment, though it looks while the next one is being entered in its place") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  Allocation large = published.arena->allocate(ByteCount{6 * kMiB});
  {
    const Hold seen = load(*peer, send(large.hold, exactly(1)));
    (void)peer->data(seen);
  }
  large.hold.release();
  REQUIRE(published.arena->trim() > 0);
  // The owner's next segment: its status comes before its id.
  published.control().header().segments[1].status.store(SegmentStatus::kLive);
  const Hold hold = load(*peer, send(published.made.hold, exactly(1)));
  CHECK(mapped_segments(published.id()).deleted == 0);
  published.control().header().segments[1].status.store(SegmentStatus::kDead);
}

TEST_CASE("map_all does not stumble over segments that are trimmed meanwhile") {
  ArenaOptions options = small_options();
  options.segment_bytes = 8192;
  const auto arena = Arena::create(options);
  const auto peer = Attachment::join(id_of(*arena));
  std::atomic<bool> ended{false};
  std::jthread owner([&] {
    for (int i = 0; i < 2000; ++i) {
      arena->allocate(ByteCount{8192}).hold.release();
      (void)arena->trim();
    }
    ended.store(true);
  });
  std::string failure;
  while (!ended.load() && failure.empty()) {
    try {
      peer->map_all();
    } catch (const Error& error) {
      failure = error.what();
    }
  }
  CHECK(failure == "");
}

TEST_CASE("a membership that has retired holds nothing, and late releases do nothing") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const HandleState state = send(published.made.hold, exactly(3));
  Hold hold = load(*peer, state);
  Hold other = hold.share();
  std::byte* const data = peer->data(hold);
  CHECK_FALSE(peer->retire_if_unused());
  CHECK(peer->usable());
  peer->retire();
  CHECK_FALSE(peer->usable());
  CHECK(published.bits() == 0);
  CHECK_FALSE(is_alive(published.control().file(), peer->slot()));
  CHECK(code_of([&] {
          peer->require_usable();
          return 0;
        }) == ErrorCode::kReleased);
  CHECK(code_of([&] { return load(*peer, state); }) == ErrorCode::kReleased);
  CHECK(data[0] == std::byte{17});
  // The slot is somebody else's by now.
  const auto next = Attachment::join(published.id());
  REQUIRE(next->slot() == peer->slot());
  const Hold theirs = load(*next, state);
  hold.release();
  other.release();
  CHECK(published.bits() == hold_bit(next->slot()));
  drop_messages(*published.arena);
}

TEST_CASE("retire_if_unused retires a membership that uses nothing") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  CHECK(peer->retire_if_unused());
  CHECK_FALSE(peer->usable());
  CHECK_FALSE(peer->retire_if_unused());
}

TEST_CASE("what is to be done at the last release is done at the last and only then") {
  static int calls = 0;
  calls = 0;
  const Published published;
  const auto peer = Attachment::join(published.id());
  peer->set_on_idle([](Attachment&) noexcept { ++calls; });
  Hold first = load(*peer, send(published.made.hold, exactly(1)));
  Hold second = first.share();
  first.release();
  CHECK(calls == 0);
  second.release();
  CHECK(calls == 1);
  {
    const Hold again = load(*peer, send(published.made.hold, exactly(1)));
  }
  CHECK(calls == 2);
}

TEST_CASE("the owner is asked for at most once a second") {
  const Published published;
  const auto peer = Attachment::join(published.id());
  const Ticks now = ticks_now();
  CHECK(peer->may_probe_owner(now));
  CHECK_FALSE(peer->may_probe_owner(now));
  CHECK_FALSE(peer->may_probe_owner(now + kTicksPerSecond - 1));
  CHECK(peer->may_probe_owner(now + kTicksPerSecond));
}

TEST_CASE("a process has one membership in an arena, the owner's own included") {
  Published published;
  CHECK(find_attachment(published.id()) == published.arena->attachment());
  CHECK(attach(published.id()) == published.arena->attachment());
  Child child([&](Line&) {
    // The parent's membership came along, with a slot of its own, because the block is in use.
    const auto own = find_attachment(published.id());
    expect(own == published.arena->attachment());
    // It stays as long as something is in use.
    leave_all();
    expect(find_attachment(published.id()) == own);
    published.made.hold.release();
    leave_all();
    expect(find_attachment(published.id()) == nullptr);
    const auto anew = attach(published.id());
    expect(anew != own);
    expect(attach(published.id()) == anew);
    leave_all();
  });
  child.join();
}

TEST_CASE("a load after the process has left the arena joins it again") {
  Published published;
  const HandleState state = send(published.made.hold, exactly(3));
  const ArenaId id = published.id();
  Child child([&](Line&) {
    published.made.hold.release();
    leave_all();
    for (int i = 0; i < 2; ++i) {
      {
        expect(is_filled(load_block(state.arena, state.place, state.block, state.generation, state.message), 17));
      }
      const auto left = find_attachment(id);
      leave_all();
      expect(!left->usable());
    }
    // Also where another thread has left it between the look-up and the load.
    const auto left = attach(id);
    left->retire();
    {
      expect(is_filled(load_block(state.arena, state.place, state.block, state.generation, state.message), 17));
    }
    expect(find_attachment(id) != left);
    leave_all();
  });
  child.join();
  CHECK(published.bits() == 0);
}

TEST_CASE("a peer's segments are mapped for writing or for reading alone, as is chosen before") {
  const Published published;
  const HandleState state = send(published.made.hold, exactly(2));
  for (const Access access : {Access::kReadOnly, Access::kReadWrite}) {
    set_peer_access(access);
    const auto peer = Attachment::join(published.id());
    const Hold hold = load(*peer, state);
    CHECK(is_filled(hold, 17));
    const auto address = reinterpret_cast<std::uintptr_t>(peer->data(hold));
    std::ifstream maps("/proc/self/maps");
    std::string found;
    for (std::string line; std::getline(maps, line);) {
      unsigned long start = 0;
      unsigned long end = 0;
      char permissions[5] = {};
      REQUIRE(std::sscanf(line.c_str(), "%lx-%lx %4s", &start, &end, permissions) == 3);
      if (address >= start && address < end) found = permissions;
    }
    CHECK(found == (access == Access::kReadOnly ? "r--s" : "rw-s"));
  }
}

TEST_CASE("threads that load, share and release one block leave neither a bit nor a use") {
  Published published;
  const auto peer = Attachment::join(published.id());
  constexpr std::uint32_t kThreads = 4;
  constexpr std::uint32_t kLoads = 500;
  std::vector<HandleState> states;
  for (std::uint32_t i = 0; i < kThreads; ++i) states.push_back(send(published.made.hold, exactly(kLoads)));
  std::atomic<std::uint32_t> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (std::uint32_t i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        for (std::uint32_t k = 0; k < kLoads; ++k) {
          const Hold hold = load(*peer, states[i]);
          const Hold shared = hold.share();
          if (peer->data(shared)[k] != std::byte{17}) ++wrong;
          if ((published.bits() & hold_bit(peer->slot())) == 0) ++wrong;
          // A stale load of the same block in between, which must not clear the bit.
          if (peer->try_hold(hold.block(), Generation{100})) ++wrong;
        }
      });
    }
  }
  CHECK(wrong.load() == 0);
  CHECK(published.bits() == 0);
  CHECK(peer->uses() == 0);
  published.made.hold.release();
  CHECK(retire(published.control().block(states[0].block).state).has_value());
}

TEST_CASE("threads that allocate, send, load and release keep every tensor's bytes") {
  const auto arena = Arena::create(small_options());
  const auto peer = Attachment::join(id_of(*arena));
  std::atomic<std::uint32_t> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        for (int k = 0; k < 200; ++k) {
          const int byte = (i * 64 + k) % 251;
          HandleState state;
          {
            const Allocation made = arena->allocate(ByteCount{static_cast<std::uint64_t>(1000 + (k % 5) * 3000)});
            fill(made, byte);
            state = send(made.hold, k % 2 == 0 ? exactly(1) : by_default());
          }
          if (!is_filled(load(*peer, state), byte)) ++wrong;
        }
      });
    }
  }
  CHECK(wrong.load() == 0);
  CHECK(arena->stats().held_blocks == 0);
  CHECK(arena->stats().messages == 0);
}

}  // namespace
}  // namespace shmx
