#include "destination_pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "host.hpp"
#include "space.hpp"

namespace shmx {
namespace {

constexpr std::uint64_t kDefaultLimit = 1ULL << 30;
constexpr Ticks kIdle = 10 * kTicksPerSecond;
constexpr std::size_t kAlignment = 64;
// Below it malloc recycles well by itself.
constexpr std::size_t kSmallest = 64U << 10;
constexpr std::size_t kHugePage = 2U << 20;

std::size_t rounded(std::size_t bytes) {
  const std::size_t step = bytes >= kHugePage ? kHugePage : 4096;
  return (block_bytes(bytes) + step - 1) / step * step;
}

std::byte* map_fresh(std::size_t bytes) {
  const std::size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* reserved = ::mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) throw std::bad_alloc();
  if (slack == 0) return static_cast<std::byte*>(reserved);
  const auto start = reinterpret_cast<std::uintptr_t>(reserved);
  const std::uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) ::munmap(reserved, aligned - start);
  if (const std::size_t tail = start + slack - aligned; tail > 0) {
    ::munmap(reinterpret_cast<void*>(aligned + bytes), tail);
  }
  ::madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);
  return reinterpret_cast<std::byte*>(aligned);
}

}  // namespace

DestinationPool& DestinationPool::instance() {
  static auto* pool = new DestinationPool;
  return *pool;
}

DestinationPool::DestinationPool() : limit_(kDefaultLimit) { take_part_in_forks(); }

DestinationPool::Piece DestinationPool::take(std::size_t bytes) {
  if (bytes < kSmallest) {
    void* memory = nullptr;
    if (::posix_memalign(&memory, kAlignment, std::max(bytes, kAlignment)) != 0) throw std::bad_alloc();
    return {static_cast<std::byte*>(memory), Destination::kHot, 0, 0};
  }
  const std::size_t size = rounded(bytes);
  const Ticks now = ticks_now();
  std::uint64_t written = 0;
  {
    const std::lock_guard guard(mutex_);
    written = written_ += size;
    if (const auto bin = kept_.find(size); bin != kept_.end()) {
      const Kept last = bin->second.back();
      bin->second.pop_back();
      kept_bytes_ -= size;
      if (bin->second.empty()) kept_.erase(bin);
      return {last.memory, destination_after(written - last.written, ticks_since(last.when, now)), written, now};
    }
  }
  return {map_fresh(size), Destination::kCold, written, now};
}

void DestinationPool::give(const Piece& piece, std::size_t bytes) noexcept {
  if (bytes < kSmallest) {
    std::free(piece.memory);
    return;
  }
  const std::size_t size = rounded(bytes);
  {
    const std::lock_guard guard(mutex_);
    const Ticks now = ticks_now();
    if (ticks_since(last_decay_, now) >= kTicksPerSecond) drop_idle(now);
    if (size <= limit_) {
      while (kept_bytes_ + size > limit_) drop_oldest();
      try {
        kept_[size].push_back({piece.memory, now, piece.written, piece.when});
        kept_bytes_ += size;
        return;
      } catch (const std::bad_alloc&) {
        // No memory for the books: it goes back to the system like what is over the limit.
      }
    }
  }
  ::munmap(piece.memory, size);
}

void DestinationPool::drop_idle(Ticks now) {
  last_decay_ = now;
  for (auto bin = kept_.begin(); bin != kept_.end();) {
    auto& [size, kept] = *bin;
    const std::uint64_t bytes = size;
    std::erase_if(kept, [&](const Kept& one) {
      if (ticks_since(one.since, now) < kIdle) return false;
      ::munmap(one.memory, bytes);
      kept_bytes_ -= bytes;
      return true;
    });
    bin = kept.empty() ? kept_.erase(bin) : std::next(bin);
  }
}

void DestinationPool::drop_oldest() {
  const Ticks now = ticks_now();
  const auto oldest = std::max_element(kept_.begin(), kept_.end(), [now](const auto& a, const auto& b) {
    return ticks_since(a.second.front().since, now) < ticks_since(b.second.front().since, now);
  });
  auto& [size, kept] = *oldest;
  ::munmap(kept.front().memory, size);
  kept_bytes_ -= size;
  kept.erase(kept.begin());
  if (kept.empty()) kept_.erase(oldest);
}

void DestinationPool::set_limit(std::uint64_t bytes) {
  const std::lock_guard guard(mutex_);
  limit_ = bytes;
  while (kept_bytes_ > limit_) drop_oldest();
}

void DestinationPool::clear() noexcept {
  const std::lock_guard guard(mutex_);
  for (const auto& [size, kept] : kept_) {
    for (const Kept& one : kept) ::munmap(one.memory, size);
  }
  kept_.clear();
  kept_bytes_ = 0;
}

std::uint64_t DestinationPool::kept_bytes() {
  const std::lock_guard guard(mutex_);
  return kept_bytes_;
}

}  // namespace shmx
