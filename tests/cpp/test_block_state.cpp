// The protocol of one block, function by function, in one thread. Interleavings are driven by putting the words into
// the state that another process would have left them in.
#include <doctest/doctest.h>

#include <array>
#include <memory>
#include <random>
#include <vector>

#include "block_state.hpp"

namespace shmx {
namespace {

constexpr PeerSlot kPeer{5};
constexpr PeerSlot kOther{63};
constexpr Generation kFirst{0};

std::unique_ptr<BlockState> fresh_block() { return std::make_unique<BlockState>(); }

std::uint64_t generation(const BlockState& block) { return block.generation.load(); }
MessageCell cell(const BlockState& block, std::uint8_t index) { return MessageCell::unpack(block.cells[index].load()); }

// As Attachment::load does it.
bool load(BlockState& block, PeerSlot slot, Generation mine, std::optional<MessageId> message) {
  set_hold(block, slot);
  if (!confirm_generation(block, mine)) {
    clear_hold(block, slot);
    return false;
  }
  if (message) take_message(block, *message);
  return true;
}

MessageId announced(BlockState& block, Generation mine, std::uint32_t readers, Ticks now = 0) {
  const Announcement announcement = announce(block, mine, readers, now);
  REQUIRE(announcement.result == Announced::kInCell);
  return announcement.message;
}

TEST_CASE("a message cell packs every value of its fields and keeps them apart") {
  constexpr std::array<std::uint32_t, 4> kRemaining{0, 1, 2048, MessageCell::kMaxReaders};
  constexpr std::array<std::uint32_t, 4> kTags{0, 1, 1U << 19, MessageCell::kTagMask};
  constexpr std::array<Ticks, 4> kTimes{0, 1, 1U << 31, UINT32_MAX};
  for (const std::uint32_t remaining : kRemaining) {
    for (const std::uint32_t tag : kTags) {
      for (const Ticks time : kTimes) {
        const MessageCell back = MessageCell::unpack(MessageCell{remaining, tag, time}.pack());
        CHECK(back.remaining == remaining);
        CHECK(back.tag == tag);
        CHECK(back.time == time);
      }
    }
  }
  static_assert(MessageCell{0, 0, 0}.pack() == 0, "zeroed memory is free cells");
  static_assert(MessageCell{MessageCell::kMaxReaders, MessageCell::kTagMask, UINT32_MAX}.pack() == UINT64_MAX);
}

TEST_CASE("ticks are compared across their wrap") {
  static_assert(ticks_since(10, 25) == 15);
  static_assert(ticks_since(UINT32_MAX - 5, 4) == 10);
  static_assert(ticks_since(26, 25) == 0);
  static_assert(ticks_since(4, UINT32_MAX - 5) == 0);
}

TEST_CASE("a fresh block is idle at generation 0 with every cell free") {
  const auto block = fresh_block();
  CHECK(is_idle(*block));
  CHECK(has_generation(*block, kFirst));
  CHECK_FALSE(has_generation(*block, Generation{2}));
}

TEST_CASE("announce takes each free cell once and then says that there is none") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  std::array<bool, kMessageCells> seen{};
  for (std::uint32_t i = 0; i < kMessageCells; ++i) {
    const MessageId message = announced(*block, kFirst, i + 1, 100 + i);
    REQUIRE(message.cell < kMessageCells);
    CHECK_FALSE(seen[message.cell]);
    seen[message.cell] = true;
    CHECK(cell(*block, message.cell).remaining == i + 1);
    CHECK(cell(*block, message.cell).time == 100 + i);
    CHECK(cell(*block, message.cell).tag == message.tag);
  }
  std::array<std::uint64_t, kMessageCells> before{};
  for (std::uint32_t i = 0; i < kMessageCells; ++i) before[i] = block->cells[i].load();
  CHECK(announce(*block, kFirst, 1, 0).result == Announced::kNoCell);
  for (std::uint32_t i = 0; i < kMessageCells; ++i) CHECK(block->cells[i].load() == before[i]);
  CHECK(generation(*block) == 0);
}

TEST_CASE("a cell is free for the next message as soon as the last load was made") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  std::array<MessageId, kMessageCells> all{};
  for (MessageId& message : all) message = announced(*block, kFirst, 1);
  REQUIRE(take_message(*block, all[3]));
  const MessageId next = announced(*block, kFirst, 1);
  CHECK(next.cell == all[3].cell);
  CHECK(next.tag == all[3].tag + 1);
}

TEST_CASE("a message can be loaded as often as announced, up to the largest count") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  const MessageId message = announced(*block, kFirst, MessageCell::kMaxReaders, 7);
  for (std::uint32_t left = MessageCell::kMaxReaders; left > 0; --left) {
    REQUIRE(cell(*block, message.cell).remaining == left);
    REQUIRE(take_message(*block, message));
  }
  CHECK_FALSE(take_message(*block, message));
  CHECK(cell(*block, message.cell).remaining == 0);
  CHECK(cell(*block, message.cell).tag == message.tag);
  CHECK(cell(*block, message.cell).time == 7);
}

TEST_CASE("tags of a cell advance and wrap after 2^20 messages") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  for (std::uint32_t tag = 1; tag <= 3; ++tag) {
    const MessageId message = announced(*block, kFirst, 1);
    CHECK(message.cell == 0);
    CHECK(message.tag == tag);
    REQUIRE(take_message(*block, message));
  }
  block->cells[0].store(MessageCell{0, MessageCell::kTagMask, 0}.pack());
  const MessageId wrapped = announced(*block, kFirst, 2);
  CHECK(wrapped.cell == 0);
  CHECK(wrapped.tag == 0);
  CHECK(cell(*block, 0).remaining == 2);
  CHECK(take_message(*block, wrapped));
}

TEST_CASE("rule 2: a message loaded too often takes nothing from another") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  const MessageId old = announced(*block, kFirst, 1);
  const MessageId neighbour = announced(*block, kFirst, 3);
  REQUIRE(take_message(*block, old));
  CHECK_FALSE(take_message(*block, old));

  const MessageId successor = announced(*block, kFirst, 2);
  REQUIRE(successor.cell == old.cell);
  CHECK_FALSE(take_message(*block, old));
  CHECK_FALSE(drop_message(*block, old));
  CHECK(cell(*block, successor.cell).remaining == 2);
  CHECK(cell(*block, neighbour.cell).remaining == 3);
}

TEST_CASE("a dropped message gives nothing to a later load and frees its cell") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  const MessageId message = announced(*block, kFirst, 5);
  REQUIRE(take_message(*block, message));
  CHECK(drop_message(*block, message));
  CHECK_FALSE(drop_message(*block, message));
  CHECK_FALSE(take_message(*block, message));
  clear_hold(*block, kPeer);
  CHECK(is_idle(*block));
}

TEST_CASE("holds of different peers do not touch each other") {
  const auto block = fresh_block();
  for (std::uint32_t i = 0; i < kMaxPeers; ++i) set_hold(*block, PeerSlot{i});
  CHECK(block->holds.load() == UINT64_MAX);
  for (std::uint32_t i = 0; i < kMaxPeers; ++i) {
    clear_hold(*block, PeerSlot{i});
    CHECK((block->holds.load() & hold_bit(PeerSlot{i})) == 0);
    CHECK(is_idle(*block) == (i + 1 == kMaxPeers));
  }
}

TEST_CASE("rule 3: a load after reuse is stale and leaves no trace") {
  const auto block = fresh_block();
  REQUIRE(retire(*block) == Generation{2});
  CHECK_FALSE(load(*block, kPeer, kFirst, std::nullopt));
  CHECK(block->holds.load() == 0);
  CHECK(generation(*block) == 2);
  CHECK(load(*block, kPeer, Generation{2}, std::nullopt));
}

TEST_CASE("a load confirms its own generation and its closing, and nothing else") {
  for (std::uint64_t seen = 0; seen <= 12; ++seen) {
    const auto block = fresh_block();
    block->generation.store(seen);
    const bool confirmed = confirm_generation(*block, Generation{6});
    CAPTURE(seen);
    CHECK(confirmed == (seen == 6 || seen == 7));
    CHECK(generation(*block) == (seen == 7 ? 6 : seen));
    CHECK(has_generation(*block, Generation{6}) == confirmed);
  }
}

TEST_CASE("rule 2: a load rescues a closing generation and the owner's last step then fails") {
  const auto block = fresh_block();
  const MessageId message = announced(*block, kFirst, 1);
  // The owner has closed the block after the message was loaded by somebody else, who is gone again.
  REQUIRE(take_message(*block, message));
  std::uint64_t closing = 0;
  REQUIRE(block->generation.compare_exchange_strong(closing, 1));
  REQUIRE(load(*block, kPeer, kFirst, std::nullopt));
  CHECK(generation(*block) == 0);
  closing = 1;
  CHECK_FALSE(block->generation.compare_exchange_strong(closing, 2));
  CHECK_FALSE(retire(*block).has_value());
}

TEST_CASE("a holder announces although the owner is closing the block, and the owner then gives up") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  block->generation.store(1);
  const Announcement announcement = announce(*block, kFirst, 2, 0);
  CHECK(announcement.result == Announced::kInCell);
  clear_hold(*block, kPeer);
  CHECK_FALSE(retire(*block).has_value());
  CHECK(has_generation(*block, kFirst));
  CHECK(load(*block, kOther, kFirst, announcement.message));
}

TEST_CASE("rule 1: retire is refused while any peer holds the block, and changes nothing") {
  for (std::uint32_t i = 0; i < kMaxPeers; ++i) {
    const auto block = fresh_block();
    set_hold(*block, PeerSlot{i});
    CHECK_FALSE(retire(*block).has_value());
    CHECK(generation(*block) == 0);
    clear_hold(*block, PeerSlot{i});
    CHECK(retire(*block) == Generation{2});
  }
}

TEST_CASE("rule 2: retire is refused while any message has loads to come, and changes nothing") {
  for (std::uint8_t i = 0; i < kMessageCells; ++i) {
    const auto block = fresh_block();
    block->cells[i].store(MessageCell{1, 9, 0}.pack());
    CHECK_FALSE(retire(*block).has_value());
    CHECK(generation(*block) == 0);
    REQUIRE(take_message(*block, {i, 9}));
    CHECK(retire(*block) == Generation{2});
  }
}

TEST_CASE("rule 7: retire completes a closing that a dead owner has left") {
  const auto block = fresh_block();
  block->generation.store(5);
  CHECK(retire(*block) == Generation{6});
  CHECK(generation(*block) == 6);
}

TEST_CASE("rule 1: retire undoes a closing that a dead owner has left while the block is in use") {
  SUBCASE("by a hold") {
    const auto block = fresh_block();
    block->generation.store(5);
    set_hold(*block, kPeer);
    CHECK_FALSE(retire(*block).has_value());
    // Whether even or odd: the holder's handle is good.
    CHECK(has_generation(*block, Generation{4}));
    CHECK(load(*block, kOther, Generation{4}, std::nullopt));
  }
  SUBCASE("by a message") {
    const auto block = fresh_block();
    block->generation.store(5);
    block->cells[2].store(MessageCell{1, 1, 0}.pack());
    CHECK_FALSE(retire(*block).has_value());
    CHECK(load(*block, kOther, Generation{4}, MessageId{2, 1}));
    CHECK(generation(*block) == 4);
  }
}

TEST_CASE("generations in use are even and never return") {
  const auto block = fresh_block();
  for (std::uint64_t i = 1; i <= 100; ++i) REQUIRE(retire(*block) == Generation{2 * i});
  for (std::uint64_t i = 0; i < 100; ++i) CHECK_FALSE(confirm_generation(*block, Generation{2 * i}));
  // Past 32 bits as well: the whole word counts.
  block->generation.store((std::uint64_t{1} << 32) - 2);
  CHECK(retire(*block) == Generation{std::uint64_t{1} << 32});
  CHECK_FALSE(confirm_generation(*block, kFirst));
}

TEST_CASE("revoke makes handles stale and takes messages back, while holders keep the block") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  const MessageId first = announced(*block, kFirst, 3);
  const MessageId second = announced(*block, kFirst, 1);
  revoke(*block, kFirst);
  CHECK(generation(*block) == 2);
  CHECK((block->holds.load() & hold_bit(kPeer)) != 0);
  CHECK_FALSE(load(*block, kOther, kFirst, first));
  CHECK_FALSE(take_message(*block, second));
  CHECK_FALSE(retire(*block).has_value());
  clear_hold(*block, kPeer);
  CHECK(retire(*block) == Generation{4});
}

TEST_CASE("revoke in the middle of a closing leaves an even generation") {
  const auto block = fresh_block();
  block->generation.store(1);
  revoke(*block, kFirst);
  CHECK(generation(*block) == 2);
}

TEST_CASE("revoke of a handle that is stale already touches nobody else's messages") {
  const auto block = fresh_block();
  REQUIRE(retire(*block) == Generation{2});
  set_hold(*block, kPeer);
  const MessageId message = announced(*block, Generation{2}, 2);
  revoke(*block, kFirst);
  CHECK(generation(*block) == 2);
  CHECK(cell(*block, message.cell).remaining == 2);
}

TEST_CASE("announce after a revocation says so and leaves no message behind") {
  const auto block = fresh_block();
  set_hold(*block, kPeer);
  revoke(*block, kFirst);
  CHECK(announce(*block, kFirst, 4, 0).result == Announced::kRevoked);
  for (std::uint8_t i = 0; i < kMessageCells; ++i) CHECK(cell(*block, i).remaining == 0);
}

TEST_CASE("drop_expired takes messages of at least the given age, across the wrap of the clock") {
  const auto block = fresh_block();
  constexpr Ticks kThen = UINT32_MAX - 15;
  constexpr Ticks kNow = 5;  // 21 ticks later
  static_assert(ticks_since(kThen, kNow) == 21);
  block->cells[1].store(MessageCell{3, 1, kThen}.pack());
  block->cells[4].store(MessageCell{1, 1, kNow - 1}.pack());
  block->cells[7].store(MessageCell{0, 1, kThen}.pack());
  CHECK(drop_expired(*block, 22, kNow) == 0);
  CHECK(cell(*block, 1).remaining == 3);
  CHECK(drop_expired(*block, 21, kNow) == 1);
  CHECK(cell(*block, 1).remaining == 0);
  CHECK(cell(*block, 4).remaining == 1);
  CHECK(drop_expired(*block, 0, kNow) == 1);
  CHECK(is_idle(*block));
}

TEST_CASE("rule 2: a message that is announced while others are given up has not expired") {
  const auto block = fresh_block();
  constexpr Ticks kBegun = 1000;
  set_hold(*block, kPeer);
  const MessageId message = announced(*block, kFirst, 1, kBegun + 1);
  CHECK(drop_expired(*block, 300 * kTicksPerSecond, kBegun) == 0);
  CHECK(cell(*block, message.cell).remaining == 1);
}

TEST_CASE("random operations keep the block's words and a plain account of them equal") {
  struct Message {
    MessageId id;
    std::uint32_t remaining;
    std::uint64_t generation;
  };
  std::mt19937_64 random(20240229);
  const auto block = fresh_block();
  std::uint64_t current = 0;
  std::array<std::uint32_t, kMaxPeers> counts{};
  std::vector<Message> messages;
  const auto outstanding = [&] {
    std::uint32_t n = 0;
    for (const Message& message : messages) n += message.generation == current && message.remaining > 0 ? 1 : 0;
    return n;
  };
  const auto held = [&] {
    for (const std::uint32_t count : counts) {
      if (count != 0) return true;
    }
    return false;
  };
  for (int step = 0; step < 50'000; ++step) {
    const PeerSlot slot{static_cast<std::uint32_t>(random() % 6)};
    std::uint32_t& count = counts[value(slot)];
    switch (random() % 6) {
      case 0: {  // the owner, or a holder, sends
        if (count == 0) break;
        const auto readers = static_cast<std::uint32_t>(1 + random() % 3);
        const bool room = outstanding() < kMessageCells;
        const Announcement announcement = announce(*block, Generation{current}, readers, 0);
        REQUIRE(announcement.result == (room ? Announced::kInCell : Announced::kNoCell));
        if (room) messages.push_back({announcement.message, readers, current});
        break;
      }
      case 1: {  // any message is loaded, possibly once too often, possibly long after
        if (messages.empty()) break;
        Message& message = messages[random() % messages.size()];
        const bool current_one = message.generation == current;
        set_hold(*block, slot);
        REQUIRE(confirm_generation(*block, Generation{message.generation}) == current_one);
        if (current_one) {
          REQUIRE(take_message(*block, message.id) == (message.remaining > 0));
          if (message.remaining > 0) --message.remaining;
          ++count;
        } else if (count == 0) {
          clear_hold(*block, slot);
        }
        break;
      }
      case 2:
      case 3:
        if (count != 0 && --count == 0) clear_hold(*block, slot);
        break;
      case 4: {
        const auto fresh = retire(*block);
        REQUIRE(fresh.has_value() == (!held() && outstanding() == 0));
        if (fresh) {
          current += 2;
          REQUIRE(value(*fresh) == current);
          // The owner publishes the new content.
          set_hold(*block, kOwnerSlot);
          ++counts[0];
        }
        break;
      }
      default:
        if (random() % 16 == 0) {
          revoke(*block, Generation{current});
          for (Message& message : messages) {
            if (message.generation == current) message.remaining = 0;
          }
          current += 2;
        } else if (!messages.empty() && random() % 8 == 0) {
          Message& message = messages[random() % messages.size()];
          const bool there = message.generation == current && message.remaining > 0;
          REQUIRE(drop_message(*block, message.id) == there);
          message.remaining = 0;
        }
    }
    if (step % 512 == 511) {
      messages.clear();
      counts.fill(0);
      current += 2;
      block->generation.store(current);
      block->holds.store(0);
      for (auto& word : block->cells) word.store(MessageCell{0, MessageCell::unpack(word.load()).tag, 0}.pack());
    }
  }
}

}  // namespace
}  // namespace shmx
