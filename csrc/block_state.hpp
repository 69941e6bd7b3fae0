// The lifetime protocol of one block: holds, messages, reuse. Nothing else.
//
// tests/model/block.pml models these functions step by step; a change here is a change there.
// All accesses are seq_cst: the proofs lean on store-then-load order between different words
// (a loader sets its bit, then reads the generation; the owner closes the generation, then reads
// the bits), which weaker orders do not give.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>

#include "layout.hpp"

namespace shmx {

// Sixty-fourths of a second of CLOCK_BOOTTIME, modulo 2^32 (two years): compare by ticks_since.
using Ticks = std::uint32_t;
inline constexpr Ticks kTicksPerSecond = 64;
// What lies ahead of `now` is new: another process has read the clock after this one.
constexpr Ticks ticks_since(Ticks then, Ticks now) { return now - then < Ticks{1} << 31 ? now - then : 0; }

// One message in flight: {time 32 | tag 20 | remaining 12}. Free when remaining is 0. The tag tells
// this message from earlier ones of the same cell, so that a message loaded too often takes nothing
// from another.
struct MessageCell {
  static constexpr std::uint32_t kMaxReaders = (1U << 12) - 1;
  static constexpr std::uint32_t kTagMask = (1U << 20) - 1;

  std::uint32_t remaining;
  std::uint32_t tag;
  Ticks time;

  static constexpr MessageCell unpack(std::uint64_t word) {
    return {static_cast<std::uint32_t>(word & kMaxReaders), static_cast<std::uint32_t>(word >> 12) & kTagMask,
            static_cast<Ticks>(word >> 32)};
  }
  [[nodiscard]] constexpr std::uint64_t pack() const {
    return (std::uint64_t{time} << 32) | (std::uint64_t{tag & kTagMask} << 12) | remaining;
  }
};

// Names one message: the cell that counts its loads and the tag the cell had then.
struct MessageId {
  std::uint8_t cell;
  std::uint32_t tag;
};

enum class Announced : std::uint8_t { kInCell, kNoCell, kRevoked };
struct Announcement {
  Announced result;
  MessageId message;
};

constexpr bool is_closing_of(std::uint64_t generation, Generation mine) { return generation == value(mine) + 1; }

// True if the block is, or is again, at `mine`: a closing begun by the owner is undone (rescue).
// Requires the caller's hold bit to be set, or the answer is out of date when it returns.
inline bool confirm_generation(BlockState& block, Generation mine) {
  std::uint64_t seen = block.generation.load(std::memory_order_seq_cst);
  for (;;) {
    if (seen == value(mine)) return true;
    if (!is_closing_of(seen, mine)) return false;
    // The owner's last CAS of the reuse protocol then fails, and it gives up.
    if (block.generation.compare_exchange_strong(seen, value(mine), std::memory_order_seq_cst)) return true;
  }
}

inline void set_hold(BlockState& block, PeerSlot slot) {
  // seq_cst: ordered before the read of the generation that follows.
  block.holds.fetch_or(hold_bit(slot), std::memory_order_seq_cst);
}

inline void clear_hold(BlockState& block, PeerSlot slot) {
  // Releases this peer's reads and cell updates to the owner, which reads the word before it reuses.
  block.holds.fetch_and(~hold_bit(slot), std::memory_order_seq_cst);
}

// One load of the message. False: it was loaded as often as announced, or revoked; the load stands
// as an unannounced one.
inline bool take_message(BlockState& block, MessageId message) {
  std::atomic<std::uint64_t>& cell = block.cells[message.cell];
  std::uint64_t word = cell.load(std::memory_order_seq_cst);
  for (;;) {
    MessageCell content = MessageCell::unpack(word);
    if (content.tag != message.tag || content.remaining == 0) return false;
    --content.remaining;
    if (cell.compare_exchange_weak(word, content.pack(), std::memory_order_seq_cst)) return true;
  }
}

// Takes the whole message back: it will not be sent, or nobody is left to load it.
inline bool drop_message(BlockState& block, MessageId message) {
  std::atomic<std::uint64_t>& cell = block.cells[message.cell];
  std::uint64_t word = cell.load(std::memory_order_seq_cst);
  for (;;) {
    MessageCell content = MessageCell::unpack(word);
    if (content.tag != message.tag || content.remaining == 0) return false;
    content.remaining = 0;
    if (cell.compare_exchange_weak(word, content.pack(), std::memory_order_seq_cst)) return true;
  }
}

inline bool has_generation(const BlockState& block, Generation mine) {
  const std::uint64_t seen = block.generation.load(std::memory_order_seq_cst);
  return seen == value(mine) || is_closing_of(seen, mine);
}

// Announces `readers` loads (1 to MessageCell::kMaxReaders) of a message. The caller holds the block,
// so it cannot be reused meanwhile, and a closing needs no rescue: the owner will see the bit.
inline Announcement announce(BlockState& block, Generation mine, std::uint32_t readers, Ticks now) {
  if (!has_generation(block, mine)) return {Announced::kRevoked, {}};
  for (std::uint8_t i = 0; i < kMessageCells; ++i) {
    std::uint64_t word = block.cells[i].load(std::memory_order_seq_cst);
    const MessageCell content = MessageCell::unpack(word);
    if (content.remaining != 0) continue;
    const MessageCell fresh{readers, (content.tag + 1) & MessageCell::kTagMask, now};
    if (!block.cells[i].compare_exchange_strong(word, fresh.pack(), std::memory_order_seq_cst)) continue;
    const MessageId message{i, fresh.tag};
    // A revocation moves the generation first and empties the cells second, so either it empties this
    // cell too or this read sees the new generation: no cell is left that nobody can load.
    if (!has_generation(block, mine)) {
      drop_message(block, message);
      return {Announced::kRevoked, {}};
    }
    return {Announced::kInCell, message};
  }
  return {Announced::kNoCell, {}};
}

// Nobody holds the block and no announced load is outstanding, at some moment during the call.
// Holds first: a holder may leave a message behind when it releases, never the other way round.
inline bool is_idle(const BlockState& block) {
  if (block.holds.load(std::memory_order_seq_cst) != 0) return false;
  for (const auto& cell : block.cells) {
    if (MessageCell::unpack(cell.load(std::memory_order_seq_cst)).remaining != 0) return false;
  }
  return true;
}

// The owner (or whoever has the owner's lock) takes an idle block for itself. Answers the new, even
// generation, or nothing if the block is in use. Whoever dies in between leaves an odd generation,
// which loads undo and a later call completes.
inline std::optional<Generation> retire(BlockState& block) {
  const std::uint64_t open = block.generation.load(std::memory_order_seq_cst) & ~std::uint64_t{1};
  if (!is_idle(block)) return std::nullopt;
  std::uint64_t expected = open;
  if (!block.generation.compare_exchange_strong(expected, open + 1, std::memory_order_seq_cst) &&
      expected != open + 1) {
    return std::nullopt;
  }
  // From here on a loader that comes sees the closing and undoes it; one that came before is seen now.
  if (!is_idle(block)) {
    expected = open + 1;
    block.generation.compare_exchange_strong(expected, open, std::memory_order_seq_cst);
    return std::nullopt;
  }
  expected = open + 1;
  if (!block.generation.compare_exchange_strong(expected, open + 2, std::memory_order_seq_cst)) return std::nullopt;
  return Generation{open + 2};
}

// Makes every handle of the current generation stale and takes all its messages back. Holders keep
// reading: the block is not reused before the last of them has released.
inline void revoke(BlockState& block, Generation mine) {
  std::uint64_t seen = block.generation.load(std::memory_order_seq_cst);
  do {
    if (seen != value(mine) && !is_closing_of(seen, mine)) return;
  } while (!block.generation.compare_exchange_strong(seen, value(mine) + 2, std::memory_order_seq_cst));
  for (std::uint8_t i = 0; i < kMessageCells; ++i) {
    const MessageCell content = MessageCell::unpack(block.cells[i].load(std::memory_order_seq_cst));
    drop_message(block, {i, content.tag});
  }
}

// Takes back the messages that have waited for `ttl` or longer; answers how many.
inline std::uint32_t drop_expired(BlockState& block, Ticks ttl, Ticks now) {
  std::uint32_t dropped = 0;
  for (std::uint8_t i = 0; i < kMessageCells; ++i) {
    const MessageCell content = MessageCell::unpack(block.cells[i].load(std::memory_order_seq_cst));
    if (content.remaining != 0 && ticks_since(content.time, now) >= ttl && drop_message(block, {i, content.tag})) {
      ++dropped;
    }
  }
  return dropped;
}

}  // namespace shmx
