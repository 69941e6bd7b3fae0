// What the tests of the arena share: a small arena, messages as they travel, and fingers in the shared words where
// a test would otherwise have to wait for the clock.
#pragma once

#include <cstring>
#include <optional>
#include <string>

#include "arena.hpp"
#include "attachment.hpp"
#include "child_process.hpp"
#include "handle.hpp"
#include "host.hpp"

namespace shmx::test {

inline constexpr std::uint64_t kMiB = 1U << 20;

inline ArenaOptions small_options() {
  ArenaOptions options;
  options.capacity = 16 * kMiB;
  options.segment_bytes = 4 * kMiB;
  return options;
}

inline ArenaId id_of(const Arena& arena) { return arena.attachment()->control().arena(); }
inline BlockEntry& entry_of(const Hold& hold) { return hold.attachment().control().block(hold.block()); }

// Pickles a handle of the block and lets the handle go again.
inline HandleState send(const Hold& hold, Readers readers) {
  const auto bytes = static_cast<std::int64_t>(entry_of(hold).place.used.load());
  const Handle handle(TensorMeta{Dtype{0}, 0, {bytes}, {}}, hold.share());
  std::optional<SentMessage> sent;
  return decode_handle(handle.to_bytes(readers, sent));
}
// For messages that a test announces and does not load: they would keep the arena alive.
inline void drop_messages(Arena& arena) {
  ControlSegment& control = arena.attachment()->control();
  for (std::uint32_t i = 0; i < control.block_count(); ++i) {
    (void)drop_expired(control.block(BlockIndex{i}).state, 0, ticks_now());
  }
}
inline Readers exactly(std::uint32_t count) { return {count, true}; }
inline Readers by_default() { return {}; }

inline void send_to(Line& line, const HandleState& state) { line.say_text(encode_handle(state)); }
inline HandleState receive_from(Line& line) { return decode_handle(line.hear_text()); }

inline void fill(const Allocation& allocation, int byte) {
  std::memset(allocation.data, byte, entry_of(allocation.hold).place.bytes.load());
}
inline bool is_filled(const Hold& hold, int byte) {
  const std::byte* data = hold.attachment().data(hold);
  const std::uint64_t bytes = entry_of(hold).place.bytes.load();
  for (std::uint64_t i = 0; i < bytes; ++i) {
    if (data[i] != static_cast<std::byte>(byte)) return false;
  }
  return true;
}

inline Hold load(Attachment& peer, const HandleState& state) {
  return peer.load(state.block, state.generation, state.message);
}

// Makes every message of the block older.
inline void age_messages(BlockState& state, double seconds) {
  for (auto& word : state.cells) {
    MessageCell cell = MessageCell::unpack(word.load());
    cell.time -= static_cast<Ticks>(seconds * kTicksPerSecond);
    word.store(cell.pack());
  }
}
// Moves the block's last release into the past.
inline void age_release(BlockEntry& entry, double seconds) {
  entry.place.last_use.fetch_sub(static_cast<Ticks>(seconds * kTicksPerSecond));
}

template <typename Action>
ErrorCode code_of(const Action& action) {
  try {
    (void)action();
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::kNone;
}

// How many mappings of this process show a segment of the arena, and how many of them one that has lost its name.
struct MappedSegments {
  unsigned data = 0;
  unsigned deleted = 0;
};
[[nodiscard]] MappedSegments mapped_segments(ArenaId arena);

}  // namespace shmx::test
