// What an arena says of itself: its statistics, and who holds what when it is full.
#include <array>
#include <bit>
#include <cstdint>
#include <string>

#include "arena.hpp"
#include "error.hpp"
#include "numa.hpp"

namespace shmx {

NoSpaceError Arena::full(std::uint64_t size, const std::string& reason) {
  std::uint64_t own = 0;
  std::uint64_t foreign = 0;
  std::uint32_t waiting = 0;
  std::uint64_t waiting_bytes = 0;
  std::array<std::uint64_t, kMaxPeers> held{};
  for (std::uint32_t index = 0; index < books_.size(); ++index) {
    if (!books_[index].live) continue;
    const std::uint64_t bytes = books_[index].range.bytes;
    const std::uint64_t holds = entry(index).state.holds.load(std::memory_order_relaxed);  // a report
    own += (holds & hold_bit(kOwnerSlot)) != 0 ? bytes : 0;
    foreign += (holds & ~hold_bit(kOwnerSlot)) != 0 ? bytes : 0;
    for (std::uint32_t peer = 1; peer < kMaxPeers; ++peer) {
      if ((holds & hold_bit(PeerSlot{peer})) != 0) held[peer] += bytes;
    }
    if (holds == 0 && !is_idle(entry(index).state)) {
      ++waiting;
      waiting_bytes += bytes;
    }
  }
  std::string peers;
  std::uint64_t in_sum = 0;
  for (std::uint32_t peer = 1; peer < kMaxPeers; ++peer) {
    if (held[peer] == 0) continue;
    peers += (peers.empty() ? " (pid " : ", pid ") +
             std::to_string(control().header().peers[peer].pid.load(std::memory_order_relaxed)) + ": " +
             human_bytes(held[peer]);
    in_sum += held[peer];
  }
  std::string who = "; held by this process " + human_bytes(own) + ", by its consumers " + human_bytes(foreign) +
                    (in_sum > foreign ? " together, some of it by several" : "") + peers + (peers.empty() ? "" : ")");
  who += ", by " + std::to_string(waiting) + " messages not loaded yet " + human_bytes(waiting_bytes);
  return no_space_error(name(), size, reason + who + "; timeout= waits for room");
}

std::string Arena::capacity_used_up() const {
  return "the capacity of " + human_bytes(options_.capacity) +
         " is used up; release handles and views, or raise it (SHMX_CAPACITY)" + capacity_origin();
}

// Nobody who has set no capacity knows where it comes from.
std::string Arena::capacity_origin() const {
  return options_.half_of_shm ? "; it is half of /dev/shm, which docker run --shm-size enlarges" : "";
}

ArenaStats Arena::stats() {
  const std::lock_guard guard(mutex_);
  ArenaStats stats{};
  stats.name = name();
  stats.backend = backend();
  stats.capacity = options_.capacity;
  stats.reserved = reserved_;
  stats.largest_free = space_.largest();
  for (const Segment& segment : segments_) {
    if (segment.committed != 0 && !stats.numa_node) stats.numa_node = node_of(segment.base);
  }
  std::uint64_t holders = 0;
  for (std::uint32_t index = 0; index < books_.size(); ++index) {
    if (!books_[index].live) continue;
    const BlockState& state = entry(index).state;
    const std::uint64_t holds = state.holds.load(std::memory_order_relaxed);  // relaxed here: a report
    holders |= holds;
    ++stats.blocks;
    stats.held_blocks += holds != 0 ? 1 : 0;
    stats.in_blocks += is_idle(state) ? 0 : books_[index].range.bytes;
    for (const auto& cell : state.cells) {
      stats.messages += MessageCell::unpack(cell.load(std::memory_order_relaxed)).remaining != 0 ? 1 : 0;
    }
  }
  for (const Segment& segment : segments_) stats.segments += segment.id != 0 ? 1 : 0;
  stats.peers = static_cast<std::uint32_t>(std::popcount(holders));
  stats.published = published_;
  stats.reused = reused_;
  stats.swept = swept_;
  stats.expired = expired_;
  stats.revoked = revoked_;
  stats.peak_reserved = peak_reserved_;
  stats.peak_in_blocks = peak_placed_;
  return stats;
}

}  // namespace shmx
