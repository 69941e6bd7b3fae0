// The free bytes of an arena's data segments: best fit, coalescing. Private to the owner, not shared, not locked.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <vector>

#include "layout.hpp"

namespace shmx {

struct Range {
  std::uint32_t segment_slot;
  std::uint64_t offset;
  std::uint64_t bytes;
};

class FreeSpace {
 public:
  // Without memory for the books take() and give() throw std::bad_alloc and have changed nothing; the give() after a
  // take() never does.
  // Takes `bytes` from the smallest range that holds them.
  [[nodiscard]] std::optional<Range> take(ByteCount bytes);
  // Gives bytes back, or adds new ones; joins them with free neighbours.
  void give(const Range& range);
  // Free bytes that end exactly at `end` of the segment: growth there needs that much less.
  [[nodiscard]] std::uint64_t free_before(std::uint32_t segment_slot, std::uint64_t end) const;
  // Forgets a segment, all of which is free.
  void forget_segment(std::uint32_t segment_slot);
  [[nodiscard]] std::uint64_t free_in(std::uint32_t segment_slot) const;
  [[nodiscard]] std::uint64_t largest() const;

 private:
  using Segment = std::map<std::uint64_t, std::uint64_t>;                           // offset -> bytes
  using Sizes = std::set<std::tuple<std::uint64_t, std::uint32_t, std::uint64_t>>;  // bytes, slot, offset
  // The entries of one range, out of the books.
  struct Entries {
    Segment::node_type range;
    Sizes::node_type size;
  };
  [[nodiscard]] static Entries new_entries();
  void insert(Segment& segment, std::uint32_t slot, std::uint64_t offset, std::uint64_t bytes, Entries entries);
  Entries erase(Segment& segment, std::uint32_t slot, Segment::iterator range);
  std::map<std::uint32_t, Segment> segments_;
  Sizes by_size_;
  Entries spare_;  // for the next give()
};

// The size of the block for a tensor of so many bytes: a step of at most 1/16, so that blocks of similar
// tensors serve each other.
[[nodiscard]] std::uint64_t block_bytes(std::uint64_t tensor_bytes);

}  // namespace shmx
