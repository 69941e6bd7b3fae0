// Copies of tensor bytes: plain stores while the bytes fit the cache, non-temporal stores beyond.
#pragma once

#include <cstddef>
#include <cstdint>

#include "block_state.hpp"

namespace shmx {

// Whether the destination was written so short a time ago that the cache may hold it yet.
enum class Destination : std::uint8_t { kHot, kCold };
// Part of the last level of the cache, which others use too: what was written longer ago is not in it.
[[nodiscard]] std::uint64_t remembered_bytes();
// Of a place that was written so many bytes ago, the ones that it gets now included, and so much time.
[[nodiscard]] Destination destination_after(std::uint64_t bytes, Ticks time);

// Copies `bytes` between buffers that do not overlap. When it returns, the stores are ordered before any
// later store of this thread (non-temporal ones are fenced), so the block may be published.
void copy_bytes(void* destination, const void* source, std::size_t bytes, Destination where);
// The same for one piece of a batch that moves `together` bytes: what does not fit the cache as a whole streams.
void copy_piece(void* destination, const void* source, std::size_t bytes, std::size_t together, Destination where);

// From these sizes on copies use non-temporal stores. Guesses from the size of the cache, until they are set, or
// measured: the first large copy starts a thread that does that in some tens of milliseconds. SIZE_MAX where the
// processor has none.
struct Thresholds {
  std::size_t hot;
  std::size_t cold;
};
[[nodiscard]] Thresholds non_temporal_thresholds();
void set_non_temporal_threshold(std::size_t bytes);
void measure_non_temporal_thresholds();

// The two ways, for the measurement and for benchmarks.
void copy_plain(void* destination, const void* source, std::size_t bytes);
void copy_non_temporal(void* destination, const void* source, std::size_t bytes);
// "avx512", "avx2", "sse2", or "none".
[[nodiscard]] const char* non_temporal_kind();

}  // namespace shmx
