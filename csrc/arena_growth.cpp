// How an arena grows: bytes are reserved and entered into this process's page table in steps behind the part of a
// segment that is reserved already, or in a new segment; on the path of a request only what it needs, the rest
// ahead of need by the grower's thread.
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "arena.hpp"
#include "error.hpp"
#include "host.hpp"
#include "numa.hpp"

namespace shmx {
namespace {

// A huge page: where a step ends, the next one can begin with one.
constexpr std::uint64_t kStep = 2U << 20;
constexpr std::uint64_t kLargestAhead = 32U << 20;
// One step of the background: a request that must wait for it waits for a millisecond or two.
constexpr std::uint64_t kBackgroundStep = 4U << 20;
constexpr std::uint32_t kEntriesAhead = 64;
// Below this capacity there is little to gain, and every byte ahead of need is missing elsewhere.
constexpr std::uint64_t kSmallestGrowingAhead = 64U << 20;

std::uint64_t page_size() { return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)); }

std::uint64_t whole_pages(std::uint64_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

std::uint64_t whole_steps(std::uint64_t bytes) { return (bytes + kStep - 1) / kStep * kStep; }

}  // namespace

bool Arena::grows_ahead() const { return options_.capacity >= kSmallestGrowingAhead; }

std::uint64_t Arena::ahead() const { return std::clamp(reserved_ / 4, kStep, kLargestAhead); }

// What the system has to have left before anything is taken from it ahead of need.
bool Arena::plenty_left(std::uint64_t bytes) const {
  if (backend() == Backend::kMemfd) return available_memory() / 4 >= bytes;
  const auto room = memory_cgroup_room();
  return shm_filesystem_room() / 4 >= bytes && (!room || *room / 4 >= bytes);
}

std::optional<Arena::Growth> Arena::growth_in_segments(std::uint64_t size) const {
  // Where the most bytes are free already.
  std::optional<Growth> best;
  for (std::uint32_t slot = 0; slot < segments_.size(); ++slot) {
    const Segment& segment = segments_[slot];
    if (segment.id == 0 || segment.committed == segment.bytes) continue;
    const std::uint64_t tail = space_.free_before(slot, segment.committed);
    if (segment.bytes - segment.committed + tail < size || (best && tail <= best->free)) continue;
    best = Growth{slot, tail};
  }
  return best;
}

bool Arena::grow(std::uint64_t size) {
  try {
    if (const auto place = growth_in_segments(size)) {
      commit(place->slot, size - place->free);
      return true;
    }
    if (reserved_ + size > options_.capacity) {
      growth_refusal_ = capacity_used_up();
      return false;
    }
    const std::uint32_t slot = add_segment(std::max(options_.segment_bytes, whole_pages(size)));
    try {
      commit(slot, size);
    } catch (...) {
      drop_segment(slot);
      throw;
    }
    return true;
  } catch (const NoSpaceError& error) {
    growth_refusal_ = error.reason();
    return false;
  }
}

void Arena::commit(std::uint32_t slot, std::uint64_t bytes) {
  const Segment& segment = segments_[slot];
  if (reserved_ + bytes > options_.capacity) throw no_space_error(name(), bytes, capacity_used_up());
  // More than the request needs is only taken where it is to be had.
  const std::uint64_t room = std::min(segment.bytes - segment.committed, options_.capacity - reserved_);
  std::uint64_t step = std::min(grows_ahead() ? whole_steps(bytes) : whole_pages(std::max(bytes, ahead())), room);
  const DataFile file = control().open_data(slot, segment.id);
  const std::uint64_t offset = file.offset + segment.committed;
  try {
    reserve_segment(file.fd.get(), file.name, offset, ByteCount{step}, backend());
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kArenaFull || step == bytes) throw;
    step = bytes;
    reserve_segment(file.fd.get(), file.name, offset, ByteCount{step}, backend());
  }
  prefault_new(segment.base + segment.committed, step);
  enter(slot, step);
}

// The books of bytes that are reserved now.
void Arena::enter(std::uint32_t slot, std::uint64_t bytes) {
  Segment& segment = segments_[slot];
  space_.give({slot, segment.committed, bytes});
  segment.committed += bytes;
  reserved_ += bytes;
  peak_reserved_ = std::max(peak_reserved_, reserved_);
  // release: peers that read it may touch that many bytes.
  control().header().segments[slot].committed.store(segment.committed, std::memory_order_release);
}

void Arena::want_growth() {
  if (!grows_ahead() || closed()) return;
  if (reserved_ >= std::min(options_.reserve, options_.capacity) && space_.largest() >= ahead() / 2) return;
  if (!grower_) {
    try {
      grower_ = std::make_unique<Grower>([this] { return grow_ahead(); });
    } catch (const std::exception&) {
      return;  // no thread or no memory to be had: requests go on growing the arena themselves
    }
  }
  grower_->wake();
}

bool Arena::grow_ahead() noexcept {
  try {
    std::unique_lock growing(growth_mutex_);
    std::unique_lock guard(mutex_);
    const bool below_reserve = reserved_ < std::min(options_.reserve, options_.capacity);
    if (closed() || (!below_reserve && space_.largest() >= ahead())) return false;
    (void)sweep_dead_peers();
    // What dead peers held a moment ago may be enough.
    if (!below_reserve && last_dead_ && ticks_since(*last_dead_, ticks_now()) < kPauseAfterSweep) return false;
    control().grow_table(std::min(static_cast<std::uint32_t>(books_.size()) + kEntriesAhead, kMaxBlocks));
    std::uint64_t bytes = below_reserve ? kBackgroundStep : std::min(kBackgroundStep, whole_steps(ahead()));
    bytes = std::min(bytes, options_.capacity - reserved_);
    if (bytes == 0 || !plenty_left(bytes)) return false;
    const auto place = growth_in_segments(page_size());
    const std::uint32_t slot = place ? place->slot : add_segment(options_.segment_bytes);
    const std::uint64_t offset = segments_[slot].committed;
    bytes = std::min(bytes, segments_[slot].bytes - offset);
    std::byte* const base = segments_[slot].base;
    const std::uint32_t id = segments_[slot].id;
    // So that no request counts on these bytes meanwhile.
    reserved_ += bytes;
    guard.unlock();
    bool reserved = false;
    try {
      const DataFile file = control().open_data(slot, id);
      reserve_segment(file.fd.get(), file.name, file.offset + offset, ByteCount{bytes}, backend());
      reserved = true;
    } catch (const std::exception&) {
      // A request that needs the bytes will say what is wrong.
      reserved = false;
    }
    guard.lock();
    reserved_ -= bytes;
    if (!reserved || closed()) return false;
    enter(slot, bytes);
    const std::lock_guard preparing(prepare_mutex_);
    guard.unlock();
    growing.unlock();
    // Without the locks of requests: where memory is fragmented a huge page may take long to find, and whoever needs
    // the bytes before that takes them as they are.
    gather_into_huge_pages(base + offset, bytes);
    prefault_new(base + offset, bytes);
    return true;
  } catch (const std::exception&) {
    return false;  // as above
  }
}

void Arena::wait_for_growth() {
  Grower* grower = nullptr;
  {
    const std::lock_guard guard(mutex_);
    grower = grower_.get();
  }
  if (grower != nullptr) grower->wait_until_idle();
}

void Arena::stop_growing() {
  std::unique_ptr<Grower> ended;
  {
    const std::lock_guard guard(mutex_);
    closed_.store(true, std::memory_order_relaxed);
    ended = std::move(grower_);
  }
  // Its destructor waits for a step, which takes the locks.
}

std::uint32_t Arena::add_segment(std::uint64_t bytes) {
  auto slot = static_cast<std::uint32_t>(
      std::find_if(segments_.begin(), segments_.end(), [](const Segment& s) { return s.id == 0; }) - segments_.begin());
  if (slot == kMaxSegments) {
    throw no_space_error(
        name(), bytes,
        "all " + std::to_string(kMaxSegments) + " segments are in use; raise segment_bytes (SHMX_SEGMENT_BYTES)");
  }
  if (slot == segments_.size()) segments_.emplace_back();
  const std::uint32_t id = next_segment_id_++;
  const DataFile file = control().create_data(slot, id, ByteCount{bytes});
  try {
    Mapping mapping(file.fd.get(), file.name, ByteCount{bytes}, Access::kReadWrite, file.offset);
    if (backend() == Backend::kMemfd) advise_huge_pages(mapping.base(), bytes);
    if (options_.numa_node) prefer_node(mapping.base(), bytes, *options_.numa_node);
    segments_[slot] = Segment{id, bytes, 0, mapping.base(), {}};
    note_addresses(mapping.base(), bytes);
    attachment_->add_mapping(slot, id, std::move(mapping));
  } catch (...) {
    control().remove_data(id, nullptr, 0);
    throw;
  }
  SegmentEntry& shared = control().header().segments[slot];
  shared.bytes.store(bytes, std::memory_order_relaxed);
  shared.committed.store(0, std::memory_order_relaxed);
  shared.status.store(SegmentStatus::kLive, std::memory_order_relaxed);
  // release: whoever sees the id sees the rest.
  shared.id.store(id, std::memory_order_release);
  return slot;
}

}  // namespace shmx
