// The control segment: who may open what, and what is done to all its blocks at once.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <optional>

#include "block_state.hpp"
#include "control.hpp"
#include "error.hpp"
#include "host.hpp"
#include "peer_lock.hpp"
#include "process.hpp"

namespace shmx {
namespace {

struct Scratch {
  ArenaId arena{random_id()};
  ControlSegment control = ControlSegment::create(arena, {1U << 20, 640});
  ~Scratch() { unlink_segment(control.name()); }
};

ErrorCode code_of_open(ArenaId arena) {
  try {
    (void)ControlSegment::open(arena);
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::kNone;
}

TEST_CASE("a published control segment opens with what its creator wrote") {
  Scratch scratch;
  scratch.control.publish();
  const auto other = ControlSegment::open(scratch.arena);
  REQUIRE(other);
  CHECK(other->header().capacity == 1U << 20);
  CHECK(other->header().ttl_ticks == 640);
  CHECK(other->header().owner_pid == static_cast<std::uint32_t>(::getpid()));
  CHECK(other->block_count() == 0);
  CHECK(other->identity() == scratch.control.identity());
}

TEST_CASE("no such name is no error, a torn creation is a lost segment") {
  CHECK_FALSE(ControlSegment::open(ArenaId{random_id()}).has_value());
  const Scratch scratch;
  CHECK(code_of_open(scratch.arena) == ErrorCode::kSegmentLost);
  struct Empty {
    ArenaId arena{random_id()};
    UniqueFd fd = create_segment(control_name(arena));
    ~Empty() { unlink_segment(control_name(arena)); }
  } const empty;
  CHECK(code_of_open(empty.arena) == ErrorCode::kSegmentLost);
}

TEST_CASE("a header that is not of this layout is refused") {
  Scratch scratch;
  ControlHeader& header = scratch.control.header();
  SUBCASE("another version") { header.layout_version = kLayoutVersion + 1; }
  SUBCASE("another arena's") { header.arena_id = 1; }
  SUBCASE("another block table") { header.header_bytes = kHeaderBytes / 2; }
  SUBCASE("another size of the block table") { header.max_blocks = kMaxBlocks + 1; }
  SUBCASE("a lifecycle that is none") { header.lifecycle.store(Lifecycle{3}); }
  scratch.control.publish();
  SUBCASE("another magic") { header.magic.store(kMagic + 1); }
  CHECK(code_of_open(scratch.arena) == ErrorCode::kInvalidHandle);
}

TEST_CASE("another version says which and what to do") {
  Scratch scratch;
  scratch.control.header().layout_version = 77;
  scratch.control.publish();
  try {
    (void)ControlSegment::open(scratch.arena);
    FAIL("opened");
  } catch (const Error& error) {
    const std::string message = error.what();
    CHECK(message.find("77") != std::string::npos);
    CHECK(message.find(scratch.control.name()) != std::string::npos);
  }
}

TEST_CASE("a control segment that somebody has truncated is refused before it is touched") {
  Scratch scratch;
  scratch.control.publish();
  SUBCASE("to nothing") { REQUIRE(::truncate(("/dev/shm" + scratch.control.name()).c_str(), 0) == 0); }
  SUBCASE("within the header") { REQUIRE(::truncate(("/dev/shm" + scratch.control.name()).c_str(), 4096) == 0); }
  SUBCASE("within the block table") {
    REQUIRE(::truncate(("/dev/shm" + scratch.control.name()).c_str(), kHeaderBytes + 4096) == 0);
  }
  const ErrorCode code = code_of_open(scratch.arena);
  CHECK((code == ErrorCode::kSegmentLost || code == ErrorCode::kInvalidHandle));
}

TEST_CASE("a block count beyond the table is cut to it") {
  Scratch scratch;
  scratch.control.publish();
  scratch.control.header().block_count.store(UINT32_MAX);
  CHECK(scratch.control.block_count() == kMaxBlocks);
  scratch.control.header().block_count.store(0);
}

TEST_CASE("rule 9: the table is reserved as it grows, and its new entries are fresh blocks") {
  Scratch scratch;
  const auto reserved = [&] {
    struct stat facts{};
    REQUIRE(::fstat(scratch.control.file().fd(), &facts) == 0);
    return static_cast<std::uint64_t>(facts.st_blocks) * 512;
  };
  CHECK(reserved() == kHeaderBytes);
  scratch.control.grow_table(1);
  const std::uint32_t first = scratch.control.block_count();
  CHECK(first >= 1);
  CHECK(reserved() >= kHeaderBytes + first * sizeof(BlockEntry));
  scratch.control.grow_table(first);
  CHECK(scratch.control.block_count() == first);
  scratch.control.grow_table(first + 1);
  CHECK(scratch.control.block_count() > first);
  CHECK(reserved() >= kHeaderBytes + scratch.control.block_count() * sizeof(BlockEntry));
  for (std::uint32_t i = 0; i < scratch.control.block_count(); ++i) {
    const BlockState& state = scratch.control.block(BlockIndex{i}).state;
    CHECK(is_idle(state));
    CHECK(state.generation.load() == 0);
  }
  scratch.control.grow_table(kMaxBlocks);
  CHECK(scratch.control.block_count() == kMaxBlocks);
  try {
    scratch.control.grow_table(kMaxBlocks + 1);
    FAIL("grown beyond the table");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kArenaFull);
  }
}

TEST_CASE("clear_slot takes one peer's bits from every block and no other") {
  Scratch scratch;
  scratch.control.grow_table(300);
  for (const std::uint32_t i : {0U, 5U, 299U}) {
    for (const std::uint32_t peer : {1U, 2U, 63U}) set_hold(scratch.control.block(BlockIndex{i}).state, PeerSlot{peer});
  }
  scratch.control.clear_slot(PeerSlot{2});
  CHECK(scratch.control.holders() == (hold_bit(PeerSlot{1}) | hold_bit(PeerSlot{63})));
  for (const std::uint32_t i : {0U, 5U, 299U}) {
    CHECK(scratch.control.block(BlockIndex{i}).state.holds.load() == (hold_bit(PeerSlot{1}) | hold_bit(PeerSlot{63})));
  }
}

TEST_CASE("rule 6: a sweep frees the holds of slots without a lock, and spares the others") {
  Scratch scratch;
  scratch.control.publish();
  scratch.control.grow_table(10);
  const auto alive = PeerLock::try_take(scratch.control.file(), PeerSlot{4}, Inheritance::kThisProcess);
  REQUIRE(alive);
  for (const std::uint32_t peer : {2U, 3U, 4U, 5U}) {
    set_hold(scratch.control.block(BlockIndex{1}).state, PeerSlot{peer});
    set_hold(scratch.control.block(BlockIndex{7}).state, PeerSlot{peer});
  }
  {
    const std::lock_guard guard(probe_mutex());
    CHECK(scratch.control.sweep(hold_bit(PeerSlot{3})) == 2);
    CHECK(scratch.control.sweep(hold_bit(PeerSlot{3})) == 0);
  }
  const std::uint64_t left = hold_bit(PeerSlot{3}) | hold_bit(PeerSlot{4});
  CHECK(scratch.control.holders() == left);
  // The locks of the sweep are gone.
  for (const std::uint32_t peer : {2U, 5U}) {
    CHECK(PeerLock::try_take(scratch.control.file(), PeerSlot{peer}, Inheritance::kThisProcess).has_value());
  }
}

}  // namespace
}  // namespace shmx
