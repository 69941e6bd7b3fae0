#include "space.hpp"

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

namespace shmx {

FreeSpace::Entries FreeSpace::new_entries() {
  Segment range;
  range.emplace(0, 0);
  Sizes size;
  size.emplace(0, 0, 0);
  return {range.extract(range.begin()), size.extract(size.begin())};
}

void FreeSpace::insert(Segment& segment, std::uint32_t slot, std::uint64_t offset, std::uint64_t bytes,
                       Entries entries) {
  entries.range.key() = offset;
  entries.range.mapped() = bytes;
  segment.insert(std::move(entries.range));
  entries.size.value() = {bytes, slot, offset};
  by_size_.insert(std::move(entries.size));
}

FreeSpace::Entries FreeSpace::erase(Segment& segment, std::uint32_t slot, Segment::iterator range) {
  auto size = by_size_.extract({range->second, slot, range->first});
  return {segment.extract(range), std::move(size)};
}

std::optional<Range> FreeSpace::take(ByteCount bytes) {
  const auto fit = by_size_.lower_bound({value(bytes), 0, 0});
  if (fit == by_size_.end()) return std::nullopt;
  const auto [size, slot, offset] = *fit;
  if (size > value(bytes) && spare_.range.empty()) spare_ = new_entries();
  Segment& segment = segments_[slot];
  Entries entries = erase(segment, slot, segment.find(offset));
  if (size > value(bytes)) {
    insert(segment, slot, offset + value(bytes), size - value(bytes), std::move(entries));
  } else {
    spare_ = std::move(entries);
  }
  return Range{slot, offset, value(bytes)};
}

void FreeSpace::give(const Range& range) {
  std::uint64_t offset = range.offset;
  std::uint64_t bytes = range.bytes;
  Segment& segment = segments_[range.segment_slot];
  if (spare_.range.empty()) spare_ = new_entries();
  if (const auto next = segment.find(offset + bytes); next != segment.end()) {
    bytes += next->second;
    erase(segment, range.segment_slot, next);
  }
  if (const auto after = segment.lower_bound(offset); after != segment.begin()) {
    const auto previous = std::prev(after);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      bytes += previous->second;
      erase(segment, range.segment_slot, previous);
    }
  }
  insert(segment, range.segment_slot, offset, bytes, std::exchange(spare_, {}));
}

std::uint64_t FreeSpace::free_before(std::uint32_t segment_slot, std::uint64_t end) const {
  const auto segment = segments_.find(segment_slot);
  if (segment == segments_.end() || segment->second.empty()) return 0;
  const auto last = std::prev(segment->second.end());
  return last->first + last->second == end ? last->second : 0;
}

void FreeSpace::forget_segment(std::uint32_t segment_slot) {
  const auto segment = segments_.find(segment_slot);
  if (segment == segments_.end()) return;
  for (const auto& [offset, bytes] : segment->second) by_size_.erase({bytes, segment_slot, offset});
  segments_.erase(segment);
}

std::uint64_t FreeSpace::free_in(std::uint32_t segment_slot) const {
  const auto segment = segments_.find(segment_slot);
  if (segment == segments_.end()) return 0;
  std::uint64_t sum = 0;
  for (const auto& [offset, bytes] : segment->second) sum += bytes;
  return sum;
}

std::uint64_t FreeSpace::largest() const { return by_size_.empty() ? 0 : std::get<0>(*by_size_.rbegin()); }

std::uint64_t block_bytes(std::uint64_t tensor_bytes) {
  if (tensor_bytes > UINT64_MAX / 2) return tensor_bytes;  // nobody has room for it, whatever the step
  const std::uint64_t step =
      std::max<std::uint64_t>(kBlockAlignment, std::bit_floor(std::max<std::uint64_t>(tensor_bytes, 1)) / 16);
  return std::max<std::uint64_t>((tensor_bytes + step - 1) / step * step, kBlockAlignment);
}

}  // namespace shmx
