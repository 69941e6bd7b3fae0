// Which parts of an attachment's mappings are page-locked, and that none of them is unmapped before it is not.
#include <unistd.h>

#include <algorithm>

#include "attachment.hpp"
#include "pinned.hpp"
#include "process.hpp"

namespace shmx {
namespace {

std::uint64_t whole_pages(std::uint64_t bytes) {
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

bool Attachment::pin(DeviceDriver& driver, int device, std::uint64_t chunk_bytes) {
  require_usable();
  bool complete = true;
  map_all();
  const PinTurn turn = take_pin_turn();
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    DataMapping& segment = segments_[slot];
    // Nothing is unmapped while it is held.
    const std::lock_guard guard(pin_mutex_);
    if (!usable()) return false;
    // acquire: pairs with map_segment and add_mapping.
    const std::uint32_t id = segment.segment_id.load(std::memory_order_acquire);
    const SegmentEntry& entry = control_.header().segments[slot];
    if (id == 0 || entry.id.load(std::memory_order_acquire) != id) continue;
    std::byte* base = segment.base.load(std::memory_order_relaxed);
    const std::uint64_t size = segment.bytes.load(std::memory_order_relaxed);
    // acquire: the pages behind it are reserved.
    const std::uint64_t reserved =
        std::min(whole_pages(entry.committed.load(std::memory_order_acquire)), whole_pages(size));
    const std::uint64_t pinned = segment.pinned.load(std::memory_order_relaxed);
    if (base == nullptr || reserved <= pinned) continue;
    PinLedger& ledger = PinLedger::instance();
    const std::uint64_t taken = ledger.take(reserved - pinned);
    const std::uint64_t granted = taken / whole_pages(1) * whole_pages(1);
    ledger.give(taken - granted);
    if (granted < reserved - pinned) {
      ledger.note_reason("SHMX_PIN_BYTES allows no more: the rest of arena " + control_.name() +
                         " is copied by way of a staging buffer");
    }
    complete = complete && granted == reserved - pinned;
    if (granted == 0) continue;
    std::vector<PinnedChunk> chunks;
    try {
      chunks = register_range(driver, device, base + pinned, granted, is_owner() ? Access::kReadWrite : peer_access(),
                              data_name(control_.arena(), id), segment.stuck, chunk_bytes);
    } catch (...) {
      ledger.give(granted);
      throw;
    }
    const std::lock_guard leaf(chunks_mutex_);
    segment.pin_kind = driver.kind();
    segment.pin_device = device;
    segment.chunks.insert(segment.chunks.end(), chunks.begin(), chunks.end());
    // release: pairs with cuts().
    segment.pinned.store(pinned + granted, std::memory_order_release);
  }
  return complete;
}

std::optional<std::vector<std::uint64_t>> Attachment::cuts(const std::byte* begin, std::uint64_t bytes) const {
  const std::lock_guard leaf(chunks_mutex_);
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    const DataMapping& segment = segments_[slot];
    const std::byte* base = segment.base.load(std::memory_order_relaxed);
    if (base == nullptr || begin < base || begin >= base + segment.bytes.load(std::memory_order_relaxed)) continue;
    if (begin + bytes > base + segment.pinned.load(std::memory_order_acquire)) return std::nullopt;
    std::vector<std::uint64_t> offsets;
    for (const PinnedChunk& chunk : segment.chunks) {
      const std::byte* end = chunk.base + chunk.bytes;
      if (end > begin && end < begin + bytes) offsets.push_back(static_cast<std::uint64_t>(end - begin));
    }
    return offsets;
  }
  return std::nullopt;
}

void Attachment::unmap(DataMapping& segment) {
  const std::lock_guard guard(pin_mutex_);
  const bool unpinned = unpin_segment(segment);
  segment.segment_id.store(0, std::memory_order_relaxed);
  segment.base.store(nullptr, std::memory_order_relaxed);
  // Pages that a driver may still have locked stay where they are: their addresses must not become something else.
  if (!unpinned) segment.mapping.forget();
  segment.mapping.reset();
}

bool Attachment::unpin_segment(DataMapping& segment) {
  std::vector<PinnedChunk> chunks;
  {
    const std::lock_guard leaf(chunks_mutex_);
    chunks = std::move(segment.chunks);
    segment.chunks.clear();
  }
  PinLedger::instance().give(segment.pinned.exchange(0, std::memory_order_relaxed));
  const bool stuck = std::exchange(segment.stuck, false);
  return (chunks.empty() || unregister_chunks(chunks, segment.pin_kind, segment.pin_device)) && !stuck;
}

void Attachment::unpin() noexcept {
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    const std::lock_guard guard(pin_mutex_);
    DataMapping& segment = segments_[slot];
    // Kept mapped for what it cannot unregister, and for views.
    if (!unpin_segment(segment)) segment.mapping.forget();
  }
}

void Attachment::forget_pins() noexcept {
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    segments_[slot].chunks.clear();
    segments_[slot].pinned.store(0, std::memory_order_relaxed);
    segments_[slot].stuck = false;
  }
  pin_turns_ = 0;
}

}  // namespace shmx
