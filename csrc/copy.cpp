#include "copy.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>

#include "quiet_thread.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shmx {
namespace {

using Stream = void (*)(std::byte*, const std::byte*, std::size_t);

#if defined(__x86_64__)

// Each takes a destination aligned to 64 bytes and a multiple of 256 bytes. The source is read a page ahead: the
// hardware prefetcher stops at page ends, and streaming stores leave the load ports idle.
constexpr std::size_t kChunk = 256;
constexpr std::size_t kAhead = 1024;

__attribute__((target("avx512f"))) void stream_avx512(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kChunk) {
    for (std::size_t line = 0; line < kChunk; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(from + i + kAhead + line), _MM_HINT_NTA);
    }
    const __m512i a = _mm512_loadu_si512(from + i);
    const __m512i b = _mm512_loadu_si512(from + i + 64);
    const __m512i c = _mm512_loadu_si512(from + i + 128);
    const __m512i d = _mm512_loadu_si512(from + i + 192);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + 64), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + 128), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + 192), d);
  }
}

__attribute__((target("avx2"))) void stream_avx2(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kChunk) {
    __m256i lanes[kChunk / 32];
    for (std::size_t line = 0; line < kChunk; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(from + i + kAhead + line), _MM_HINT_NTA);
    }
    for (std::size_t k = 0; k < kChunk / 32; ++k) {
      lanes[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + k * 32));
    }
    for (std::size_t k = 0; k < kChunk / 32; ++k) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + k * 32), lanes[k]);
    }
  }
}

void stream_sse2(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) {
    __m128i lanes[4];
    for (std::size_t k = 0; k < 4; ++k) {
      lanes[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + k * 16));
    }
    for (std::size_t k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + k * 16), lanes[k]);
  }
}

struct Streaming {
  Stream copy;
  const char* kind;
};

Streaming pick_streaming() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return {&stream_avx512, "avx512"};
  if (__builtin_cpu_supports("avx2")) return {&stream_avx2, "avx2"};
  return {&stream_sse2, "sse2"};
}

void fence() { _mm_sfence(); }

#else

// Elsewhere memcpy of the C library chooses its stores by size itself.
constexpr std::size_t kChunk = 256;
struct Streaming {
  Stream copy;
  const char* kind;
};
Streaming pick_streaming() { return {nullptr, "none"}; }
void fence() {}

#endif

const Streaming& streaming() {
  static const Streaming chosen = pick_streaming();
  return chosen;
}

double seconds_of(Stream copy, std::byte* to, const std::byte* from, std::size_t bytes) {
  const auto start = std::chrono::steady_clock::now();
  copy(to, from, bytes);
  fence();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

constexpr std::size_t kSmallestMeasured = 512U << 10;
constexpr std::size_t kLargestMeasured = 8U << 20;
constexpr std::size_t kRounds = 6;

// The smallest size from which non-temporal stores win at it and at every larger size tried, if each copy
// goes to the same place (hot) or behind the one before, round and round in the buffer.
std::size_t measure_threshold(std::byte* buffer, std::size_t buffer_bytes, const std::byte* source, bool hot) {
  const Stream plain = [](std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); };
  std::size_t threshold = 2 * kLargestMeasured;
  std::size_t place = 0;
  for (std::size_t bytes = kLargestMeasured; bytes >= kSmallestMeasured; bytes /= 2) {
    const auto best = [&](Stream copy) {
      double seconds = 1e9;
      for (std::size_t round = 0; round < kRounds; ++round) {
        place = hot ? 0 : (place + bytes) % buffer_bytes;
        const double taken = seconds_of(copy, buffer + place, source, bytes);
        // The first into a place that is hot only makes it so.
        if (!hot || round > 0) seconds = std::min(seconds, taken);
      }
      return seconds;
    };
    if (best(streaming().copy) >= best(plain)) break;
    threshold = bytes;
  }
  return threshold;
}

Thresholds measure_thresholds(Thresholds otherwise) {
  // More than the last-level cache of most machines.
  constexpr std::size_t kBuffer = 64U << 20;
  if (streaming().copy == nullptr) return otherwise;
  constexpr std::size_t kAll = kBuffer + kLargestMeasured;
  void* memory = ::mmap(nullptr, kAll, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return otherwise;
  ::madvise(memory, kAll, MADV_HUGEPAGE);
  std::memset(memory, 1, kAll);
  auto* buffer = static_cast<std::byte*>(memory);
  const Thresholds measured{measure_threshold(buffer, kBuffer, buffer + kBuffer, true),
                            measure_threshold(buffer, kBuffer, buffer + kBuffer, false)};
  ::munmap(memory, kAll);
  return measured;
}

// relaxed throughout: numbers by themselves; a copy that misses a change is slower, not wrong.
constexpr std::size_t kUnknown = 0;
std::atomic<std::size_t> hot_threshold{kUnknown};
std::atomic<std::size_t> cold_threshold{kUnknown};

// From sysfs: sysconf multiplies, in some virtual machines, by processors that are not there.
std::size_t cache_bytes(int level, std::size_t otherwise) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
    std::ifstream level_file(folder + "/level");
    std::ifstream size_file(folder + "/size");
    int found = 0;
    std::size_t kibibytes = 0;
    if (level_file >> found && found == level && size_file >> kibibytes && kibibytes != 0) return kibibytes << 10;
  }
  return otherwise;
}

const Thresholds& guessed_thresholds() {
  static const Thresholds guessed = [] {
    if (streaming().copy == nullptr) {
      constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();
      return Thresholds{kNever, kNever};
    }
    // What exceeds the core's own cache will not be found there by the next reader.
    const std::size_t cold = std::clamp(cache_bytes(2, 1U << 20), std::size_t{1} << 20, kLargestMeasured);
    return Thresholds{std::min(2 * cold, kLargestMeasured), cold};
  }();
  return guessed;
}

void measure_in_background() {
  static std::atomic<bool> begun{false};
  if (begun.exchange(true, std::memory_order_relaxed)) return;
  try {
    quiet_thread("shmx-measure", &measure_non_temporal_thresholds).detach();
  } catch (const std::system_error&) {
    return;  // no thread to be had: the guess stays
  }
}

}  // namespace

void set_non_temporal_threshold(std::size_t bytes) {
  const std::size_t least = std::max<std::size_t>(bytes, 1);
  hot_threshold.store(least, std::memory_order_relaxed);
  cold_threshold.store(least, std::memory_order_relaxed);
}

Thresholds non_temporal_thresholds() {
  const Thresholds known{hot_threshold.load(std::memory_order_relaxed), cold_threshold.load(std::memory_order_relaxed)};
  return {known.hot != kUnknown ? known.hot : guessed_thresholds().hot,
          known.cold != kUnknown ? known.cold : guessed_thresholds().cold};
}

void measure_non_temporal_thresholds() {
  if (hot_threshold.load(std::memory_order_relaxed) != kUnknown) return;
  const Thresholds measured = measure_thresholds(guessed_thresholds());
  // They may have been set meanwhile.
  std::size_t unknown = kUnknown;
  if (!hot_threshold.compare_exchange_strong(unknown, measured.hot, std::memory_order_relaxed)) return;
  unknown = kUnknown;
  cold_threshold.compare_exchange_strong(unknown, measured.cold, std::memory_order_relaxed);
}

const char* non_temporal_kind() { return streaming().kind; }

void copy_plain(void* destination, const void* source, std::size_t bytes) {
  // An empty tensor may have no address, which memcpy does not take even for 0 bytes.
  if (bytes != 0) std::memcpy(destination, source, bytes);
}

void copy_non_temporal(void* destination, const void* source, std::size_t bytes) {
  const Stream stream = streaming().copy;
  if (stream == nullptr || bytes < 2 * kChunk) {
    copy_plain(destination, source, bytes);
    return;
  }
  auto* to = static_cast<std::byte*>(destination);
  const auto* from = static_cast<const std::byte*>(source);
  const std::size_t head = (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64;
  std::memcpy(to, from, head);
  const std::size_t body = (bytes - head) / kChunk * kChunk;
  stream(to + head, from + head, body);
  std::memcpy(to + head + body, from + head + body, bytes - head - body);
  // Non-temporal stores are not ordered by the atomics that publish the block.
  fence();
}

std::uint64_t remembered_bytes() {
  static const std::uint64_t remembered = cache_bytes(3, 32U << 20) / 4;
  return remembered;
}

Destination destination_after(std::uint64_t bytes, Ticks time) {
  // After a tick (16 ms) others have used all of it.
  return bytes <= remembered_bytes() && time == 0 ? Destination::kHot : Destination::kCold;
}

void copy_bytes(void* destination, const void* source, std::size_t bytes, Destination where) {
  copy_piece(destination, source, bytes, bytes, where);
}

void copy_piece(void* destination, const void* source, std::size_t bytes, std::size_t together, Destination where) {
  // Smaller pieces stay plain: the fence at the end of each costs more than it saves.
  constexpr std::size_t kSmallestPiece = 16U << 10;
  std::size_t limit = (where == Destination::kHot ? hot_threshold : cold_threshold).load(std::memory_order_relaxed);
  if (limit == kUnknown) {
    limit = where == Destination::kHot ? guessed_thresholds().hot : guessed_thresholds().cold;
    if (together >= kSmallestMeasured && bytes >= kSmallestPiece) measure_in_background();
  }
  if (together < limit || bytes < kSmallestPiece) {
    copy_plain(destination, source, bytes);
  } else {
    copy_non_temporal(destination, source, bytes);
  }
}

}  // namespace shmx
