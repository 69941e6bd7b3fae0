// A published tensor as one process sees it: what is pickled, what a load answers, when a hold ends.
#include <doctest/doctest.h>

#include <utility>

#include "process.hpp"
#include "reaper.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"

namespace shmx {
namespace {

using namespace test;

struct Published {
  std::shared_ptr<Arena> arena = Arena::create(small_options());
  Handle handle = make();

  [[nodiscard]] Handle make() const {
    Allocation made = arena->allocate(ByteCount{4096});
    fill(made, 21);
    return {TensorMeta{Dtype{10}, 0, {32, 32}, {}}, std::move(made.hold)};
  }
  [[nodiscard]] BlockEntry& entry() const { return entry_of(handle.require()); }
  [[nodiscard]] HandleState pickle(Readers readers = by_default()) const {
    std::optional<SentMessage> sent;
    return decode_handle(handle.to_bytes(readers, sent));
  }
  [[nodiscard]] std::uint32_t outstanding() const {
    std::uint32_t loads = 0;
    for (const auto& cell : entry().state.cells) loads += MessageCell::unpack(cell.load()).remaining;
    return loads;
  }
};

ErrorCode reason_of(const Handle& handle) {
  return code_of([&] {
    (void)handle.require();
    return 0;
  });
}

TEST_CASE("a pickle names the block, its generation, the tensor, and the loads that will come") {
  const Published published;
  const HandleState state = published.pickle(exactly(3));
  CHECK(state.host == host_id());
  CHECK(state.arena == id_of(*published.arena));
  CHECK(state.block == published.handle.require().block());
  CHECK(state.generation == published.handle.require().generation());
  CHECK(state.meta.shape == std::vector<std::int64_t>{32, 32});
  REQUIRE(state.message.has_value());
  CHECK(published.outstanding() == 3);
  drop_messages(*published.arena);
}

TEST_CASE("rule 4: any number of pickles and hops of one handle, without another block or segment") {
  const Published published;
  const ArenaStats before = published.arena->stats();
  for (int i = 0; i < 100; ++i) {
    const Handle first = Handle::load(published.pickle());
    std::optional<SentMessage> sent;
    const Handle second = Handle::load(decode_handle(first.to_bytes(by_default(), sent)));
    CHECK(second.available());
    CHECK(second.meta().shape == published.handle.meta().shape);
  }
  CHECK(published.outstanding() == 0);
  CHECK(published.arena->stats().blocks == before.blocks);
  CHECK(published.arena->stats().reserved == before.reserved);
}

TEST_CASE("readers(0) announces nothing") {
  const Published published;
  const HandleState state = published.pickle(exactly(0));
  CHECK_FALSE(state.message.has_value());
  CHECK(published.outstanding() == 0);
  CHECK((published.entry().place.flags.load() & kUnannounced) != 0);
  CHECK(Handle::load(state).available());
}

TEST_CASE("a message that is not sent is taken back, and not twice") {
  const Published published;
  std::optional<SentMessage> sent;
  (void)published.handle.to_bytes(exactly(5), sent);
  REQUIRE(sent);
  CHECK(published.outstanding() == 5);
  sent->take_back();
  CHECK(published.outstanding() == 0);
  (void)published.pickle(exactly(2));
  sent->take_back();
  CHECK(published.outstanding() == 2);
  drop_messages(*published.arena);
}

TEST_CASE("discard drops one message that will not be sent") {
  const Published published;
  const HandleState state = published.pickle(exactly(4));
  const HandleState other = published.pickle(exactly(1));
  CHECK(discard(state));
  CHECK_FALSE(discard(state));
  CHECK(published.outstanding() == 1);
  HandleState unannounced = other;
  unannounced.message.reset();
  CHECK_FALSE(discard(unannounced));
  HandleState foreign = other;
  foreign.host += 1;
  CHECK_FALSE(discard(foreign));
  HandleState stale = other;
  stale.generation = Generation{value(other.generation) + 2};
  CHECK_FALSE(discard(stale));
  HandleState beyond = other;
  beyond.block = BlockIndex{kMaxBlocks - 1};
  CHECK_FALSE(discard(beyond));
  HandleState nowhere = other;
  nowhere.arena = ArenaId{1};
  CHECK_FALSE(discard(nowhere));
  CHECK(published.outstanding() == 1);
  CHECK(discard(other));
}

TEST_CASE("rule 8: release is idempotent, and another handle of the block goes on") {
  Published published;
  Handle other = published.handle.share();
  published.handle.release();
  published.handle.release();
  CHECK_FALSE(published.handle.available());
  CHECK(reason_of(published.handle) == ErrorCode::kReleased);
  CHECK(other.available());
  CHECK(is_filled(other.require(), 21));
  CHECK(entry_of(other.require()).state.holds.load() != 0);
  const BlockState& state = entry_of(other.require()).state;
  other.release();
  CHECK(state.holds.load() == 0);
}

TEST_CASE("rule 4: pickling a released handle does not raise, and the load tells why") {
  Published published;
  published.handle.release();
  std::optional<SentMessage> sent;
  const HandleState state = decode_handle(published.handle.to_bytes(exactly(2), sent));
  CHECK_FALSE(sent.has_value());
  CHECK(state.reason == ErrorCode::kReleased);
  const Handle loaded = Handle::load(state);
  CHECK_FALSE(loaded.available());
  CHECK(reason_of(loaded) == ErrorCode::kReleased);
  CHECK(loaded.meta().shape == std::vector<std::int64_t>{32, 32});
  // And on through another hop.
  const HandleState again = decode_handle(loaded.to_bytes(exactly(1), sent));
  CHECK(again.reason == ErrorCode::kReleased);
  CHECK(again.arena == state.arena);
  CHECK(reason_of(loaded.share()) == ErrorCode::kReleased);
}

TEST_CASE("rule 4: pickling a revoked handle carries the reason, and announces nothing") {
  const Published published;
  published.arena->revoke(published.handle.require());
  std::optional<SentMessage> sent;
  const HandleState state = decode_handle(published.handle.to_bytes(exactly(2), sent));
  CHECK_FALSE(sent.has_value());
  CHECK(state.reason == ErrorCode::kStaleHandle);
  CHECK(published.outstanding() == 0);
  CHECK(reason_of(Handle::load(state)) == ErrorCode::kStaleHandle);
  // Its holder still reads.
  CHECK(is_filled(published.handle.require(), 21));
}

TEST_CASE("rule 5: a load never raises because the data is gone; the handle says why") {
  Published published;
  HandleState state = published.pickle(exactly(0));
  SUBCASE("reused") {
    published.handle.release();
    REQUIRE(published.arena->trim() > 0);
    const Handle next = published.make();
    const Handle loaded = Handle::load(state);
    CHECK(reason_of(loaded) == ErrorCode::kStaleHandle);
    CHECK(is_filled(next.require(), 21));
  }
  SUBCASE("another arena") {
    state.arena = ArenaId{1};
    CHECK(reason_of(Handle::load(state)) == ErrorCode::kSegmentLost);
  }
  SUBCASE("another host") {
    state.host += 1;
    CHECK(reason_of(Handle::load(state)) == ErrorCode::kForeignHost);
  }
  SUBCASE("no such block") {
    state.block = BlockIndex{kMaxBlocks - 1};
    CHECK(reason_of(Handle::load(state)) == ErrorCode::kInvalidHandle);
  }
  SUBCASE("no free slot") {
    std::vector<PeerLock> locks;
    ControlSegment& control = published.arena->attachment()->control();
    while (auto seat = PeerLock::take_any(control.file(), Inheritance::kThisProcess)) {
      locks.push_back(std::move(seat->first));
    }
    Child child([&](Line&) {
      expect(reason_of(Handle::load(state)) == ErrorCode::kTooManyPeers);
      expect(reason_of(published.handle) == ErrorCode::kTooManyPeers);
      std::optional<SentMessage> sent;
      expect(decode_handle(published.handle.to_bytes(exactly(1), sent)).reason == ErrorCode::kTooManyPeers);
      expect(!sent);
    });
    child.join();
  }
}

TEST_CASE("every reason a pickle can carry comes out of the handle") {
  const Published published;
  HandleState state = published.pickle(exactly(0));
  for (const ErrorCode reason : {ErrorCode::kArenaFull, ErrorCode::kSegmentLost, ErrorCode::kStaleHandle,
                                 ErrorCode::kForeignHost, ErrorCode::kReleased, ErrorCode::kTooManyPeers}) {
    state.reason = reason;
    const Handle loaded = Handle::load(state);
    CHECK(reason_of(loaded) == reason);
    std::optional<SentMessage> sent;
    CHECK(decode_handle(loaded.to_bytes(by_default(), sent)).reason == reason);
  }
  CHECK(published.outstanding() == 0);
}

TEST_CASE("a tensor that exceeds its block is refused and holds nothing") {
  const Published published;
  HandleState state = published.pickle(exactly(0));
  const BlockState& block = published.entry().state;
  SUBCASE("by its shape") { state.meta.shape = {32, 33}; }
  SUBCASE("by its offset") { state.meta.offset = 4; }
  SUBCASE("by its strides") {
    state.meta.shape = {2, 2};
    state.meta.strides = {1024, 1};
  }
  CHECK(code_of([&] { return Handle::load(state); }) == ErrorCode::kInvalidHandle);
  CHECK(published.arena->attachment()->uses() == 1);
  CHECK(block.holds.load() == hold_bit(kOwnerSlot));
}

TEST_CASE("a tensor that reaches into the rest of its block, where an earlier one may lie, is refused") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{5000});
  REQUIRE(entry_of(made.hold).place.bytes.load() > 5000);
  HandleState state = send(made.hold, exactly(0));
  CHECK(Handle::load(state).available());
  state.meta.shape = {5001};
  CHECK(code_of([&] { return Handle::load(state); }) == ErrorCode::kInvalidHandle);
}

TEST_CASE("a tensor that just fits its block, and one without elements, are loaded") {
  const Published published;
  HandleState state = published.pickle(exactly(0));
  state.meta.offset = 4092;
  state.meta.shape = {1};
  CHECK(Handle::load(state).available());
  state.meta.shape = {0, 1000};
  CHECK(Handle::load(state).available());
}

TEST_CASE("handles outlive their arena's close, and then the arena goes") {
  auto published = std::make_unique<Published>();
  const std::string name = published->arena->name();
  Handle handle = published->handle.share();
  published.reset();
  CHECK(name_exists(name));
  CHECK(handle.available());
  CHECK(is_filled(handle.require(), 21));
  handle.release();
  CHECK_FALSE(name_exists(name));
}

}  // namespace
}  // namespace shmx
