#include "attachment.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <numeric>

#include "host.hpp"
#include "process.hpp"

namespace shmx {
namespace {

// relaxed throughout: set when the package is imported, before anything is mapped.
std::atomic<Access> chosen_access{Access::kReadWrite};

Error lost(const std::string& name) {
  return {ErrorCode::kSegmentLost,
          "arena " + name + " is gone: its owner has left and its blocks were cleaned up; send the tensor again",
          ENOENT};
}

}  // namespace

Access peer_access() { return chosen_access.load(std::memory_order_relaxed); }

void set_peer_access(Access access) { chosen_access.store(access, std::memory_order_relaxed); }

Hold& Hold::operator=(Hold&& other) noexcept {
  if (this != &other) {
    release();
    attachment_ = std::move(other.attachment_);
    block_ = other.block_;
    generation_ = other.generation_;
  }
  return *this;
}

Hold Hold::share() const {
  if (!held()) return {};
  attachment_->use(block_);
  return {attachment_, block_, generation_};
}

void Hold::release() {
  if (!held()) return;
  const std::shared_ptr<Attachment> attachment = std::move(attachment_);
  attachment->unuse(block_);
}

std::shared_ptr<Attachment> Attachment::join(ArenaId arena, DescriptorPlace place) {
  auto control = ControlSegment::open(arena, place);
  if (!control) throw place.none() ? lost(control_name(arena)) : lost_place_error(control_name(arena), place);
  auto seat = PeerLock::take_any(control->file(), Inheritance::kThisProcess);
  if (!seat) {
    throw Error(ErrorCode::kTooManyPeers,
                "arena " + control->name() + " has " + std::to_string(kMaxPeers) +
                    " processes attached, the most it takes; let consumers that are done exit, or publish to them "
                    "from a second process",
                EUSERS);
  }
  auto& [lock, slot] = *seat;
  // A former peer may have died with holds in this slot; with the lock taken they are nobody's.
  control->clear_slot(slot);
  PeerEntry& entry = control->header().peers[value(slot)];
  // relaxed: informational.
  entry.pid.store(static_cast<std::uint32_t>(::getpid()), std::memory_order_relaxed);
  entry.since.store(ticks_now(), std::memory_order_relaxed);
  return std::make_shared<Attachment>(std::move(*control), std::move(lock), slot);
}

Attachment::Attachment(ControlSegment control, PeerLock lock, PeerSlot slot)
    : control_(std::move(control)),
      lock_(std::move(lock)),
      slot_(slot),
      counts_(static_cast<std::uint32_t*>(std::calloc(kMaxBlocks, sizeof(std::uint32_t)))),
      segments_(std::make_unique<DataMapping[]>(kMaxSegments)),
      owner_probed_(ticks_now() - kTicksPerSecond) {
  if (!counts_) throw std::bad_alloc();
}

Attachment::~Attachment() {
  // Only the last Hold or the registry gets here, so no use is left; in a process that never joined
  // neither locks nor shared words are ours.
  if (!process_joined()) lock_.forget();
  unpin();
}

bool Attachment::usable() const {
  // relaxed: set once, before anything that depends on it (fork child, process end).
  return !inert_.load(std::memory_order_relaxed) && process_joined();
}

void Attachment::require_usable() const {
  if (usable()) return;
  if (left_out_of_fork_.load(std::memory_order_relaxed)) {
    if (fork_failure_) throw Error(*fork_failure_);
    throw Error(ErrorCode::kTooManyPeers,
                "arena " + control_.name() +
                    " had no free peer slot when this process was forked, so it did not "
                    "inherit its parent's tensors; use fewer processes, or the spawn start method",
                EUSERS);
  }
  throw Error(ErrorCode::kReleased, "arena " + control_.name() + " is not used by this process any more");
}

void Attachment::use(BlockIndex block) {
  if (!usable()) return;
  const std::lock_guard guard(block_lock(block));
  ++counts_[value(block)];
  uses_.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count, not a signal
}

void Attachment::unuse(BlockIndex block) {
  if (!usable()) return;
  BlockEntry& entry = control_.block(block);
  {
    const std::lock_guard guard(block_lock(block));
    if (!usable()) return;
    if (--counts_[value(block)] == 0) {
      // relaxed: read by the owner after it has seen the bit cleared.
      if ((entry.place.flags.load(std::memory_order_relaxed) & kAnnouncedImplicitly) != 0) {
        entry.place.last_use.store(ticks_now(), std::memory_order_relaxed);
      }
      clear_hold(entry.state, slot_);
    }
  }
  // seq_cst: a closing owner sets on_idle and then reads the count; one of the two sees the other.
  if (uses_.fetch_sub(1, std::memory_order_seq_cst) != 1) return;
  if (const auto on_idle = on_idle_.load(std::memory_order_seq_cst); on_idle != nullptr) on_idle(*this);
}

std::uint32_t Attachment::uses_of(BlockIndex block) const {
  const std::lock_guard guard(block_lock(block));
  return counts_[value(block)];
}

Attachment::Counts Attachment::counts() const {
  // relaxed throughout: a report.
  Counts counts{loaded_.load(std::memory_order_relaxed), stale_loads_.load(std::memory_order_relaxed), 0, 0};
  if (!usable()) return counts;
  const std::uint32_t count = control_.block_count();
  for (std::uint32_t i = 0; i < count; ++i) {
    const BlockEntry& entry = control_.block(BlockIndex{i});
    if ((entry.state.holds.load(std::memory_order_relaxed) & hold_bit(slot_)) == 0) continue;
    ++counts.held_blocks;
    counts.held_bytes += entry.place.bytes.load(std::memory_order_relaxed);
  }
  return counts;
}

bool Attachment::confirm_arena() {
  std::atomic<Lifecycle>& lifecycle = control_.header().lifecycle;
  Lifecycle seen = lifecycle.load(std::memory_order_seq_cst);
  for (;;) {
    if (seen == Lifecycle::kOpen) return true;
    if (seen != Lifecycle::kClosing) return false;
    // The reaper's last CAS then fails, and it leaves the arena as it is.
    if (lifecycle.compare_exchange_strong(seen, Lifecycle::kOpen, std::memory_order_seq_cst)) return true;
  }
}

Error Attachment::stale(BlockIndex block) const {
  return {
      ErrorCode::kStaleHandle,
      "block " + std::to_string(value(block)) + " of arena " + control_.name() +
          " was reused or revoked after this handle was made; announce every load when pickling "
          "(shmx.readers(n) or with_readers(n)), or enlarge SHMX_CAPACITY; if it was revoked, the request was aborted"};
}

Hold Attachment::load(BlockIndex block, Generation generation, std::optional<MessageId> message) {
  BlockState& state = control_.block(block).state;
  Hold hold;
  bool arena_open = true;
  {
    const std::lock_guard guard(block_lock(block));
    // First: a process that has left sees zeros in the place of the table.
    require_usable();
    if (value(block) >= control_.block_count() || (value(generation) & 1) != 0) {
      throw Error(ErrorCode::kInvalidHandle, "handle names block " + std::to_string(value(block)) + " of arena " +
                                                 control_.name() + ", which has no such block");
    }
    set_hold(state, slot_);
    if (confirm_generation(state, generation) && (arena_open = confirm_arena())) {
      if (message) take_message(state, *message);
      ++counts_[value(block)];
      // relaxed: counts, not signals
      uses_.fetch_add(1, std::memory_order_relaxed);
      loaded_.fetch_add(1, std::memory_order_relaxed);
      hold = Hold(shared_from_this(), block, generation);
    } else if (counts_[value(block)] == 0) {
      // At a count above 0 the bit belongs to another thread's use.
      clear_hold(state, slot_);
    }
  }
  if (!hold.held()) {
    // The bit that was set for a moment may have kept a reaper from an arena that nobody else would look at again.
    if (uses_.load(std::memory_order_seq_cst) == 0) {
      if (const auto on_idle = on_idle_.load(std::memory_order_seq_cst); on_idle != nullptr) on_idle(*this);
    }
    stale_loads_.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
    throw arena_open ? stale(block) : lost(control_.name());
  }
  // relaxed: a hint; the segment table is read under the mutex in drop_dead_mappings.
  if (control_.header().trim_count.load(std::memory_order_relaxed) != trims_seen_.load(std::memory_order_relaxed)) {
    drop_dead_mappings();
  }
  return hold;
}

Hold Attachment::adopt(BlockIndex block, Generation generation) {
  const std::lock_guard guard(block_lock(block));
  require_usable();
  set_hold(control_.block(block).state, slot_);
  ++counts_[value(block)];
  uses_.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count, not a signal
  return {shared_from_this(), block, generation};
}

std::optional<Hold> Attachment::try_hold(BlockIndex block, Generation generation) {
  BlockState& state = control_.block(block).state;
  const std::lock_guard guard(block_lock(block));
  require_usable();
  set_hold(state, slot_);
  if (confirm_generation(state, generation)) {
    ++counts_[value(block)];
    uses_.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count, not a signal
    return Hold(shared_from_this(), block, generation);
  }
  if (counts_[value(block)] == 0) clear_hold(state, slot_);
  return std::nullopt;
}

std::byte* Attachment::mapped(const Hold& hold) const {
  // relaxed: the place of a held block does not change.
  const BlockPlace& place = control_.block(hold.block()).place;
  const std::uint16_t slot = place.segment_slot.load(std::memory_order_relaxed);
  if (slot >= kMaxSegments) return nullptr;
  const DataMapping& segment = segments_[slot];
  // acquire: pairs with map_segment and add_mapping; the base belongs to that id.
  if (segment.segment_id.load(std::memory_order_acquire) !=
      control_.header().segments[slot].id.load(std::memory_order_relaxed)) {
    return nullptr;
  }
  std::byte* base = segment.base.load(std::memory_order_relaxed);
  const std::uint64_t size = segment.bytes.load(std::memory_order_relaxed);
  const std::uint64_t bytes = place.bytes.load(std::memory_order_relaxed);
  const std::uint64_t offset = place.offset.load(std::memory_order_relaxed);
  const std::uint64_t used = place.used.load(std::memory_order_relaxed);
  if (base == nullptr || used > bytes || bytes > size || offset > size - bytes) return nullptr;
  return base + offset;
}

std::byte* Attachment::data(const Hold& hold) {
  require_usable();
  if (std::byte* known = mapped(hold)) return known;
  const BlockPlace& place = control_.block(hold.block()).place;
  const std::uint64_t offset = place.offset.load(std::memory_order_relaxed);
  const std::uint64_t bytes = place.bytes.load(std::memory_order_relaxed);
  const std::uint64_t used = place.used.load(std::memory_order_relaxed);
  const std::uint16_t slot = place.segment_slot.load(std::memory_order_relaxed);
  const std::lock_guard guard(map_mutex_);
  const DataMapping& segment = map_segment(slot);
  if (used > bytes || bytes > segment.mapping.bytes() || offset > segment.mapping.bytes() - bytes) {
    throw Error(ErrorCode::kInvalidHandle, "block " + std::to_string(value(hold.block())) + " of arena " +
                                               control_.name() +
                                               " lies outside its segment: the block table is damaged");
  }
  return segment.mapping.base() + offset;
}

Attachment::DataMapping& Attachment::map_segment(std::uint32_t slot) {
  if (slot >= kMaxSegments) {
    throw Error(ErrorCode::kInvalidHandle, "arena " + control_.name() + " has a damaged block table");
  }
  DataMapping& segment = segments_[slot];
  const SegmentEntry& entry = control_.header().segments[slot];
  const std::uint32_t id = entry.id.load(std::memory_order_acquire);
  if (segment.segment_id.load(std::memory_order_relaxed) == id && segment.mapping.valid()) return segment;
  const std::uint64_t bytes = entry.bytes.load(std::memory_order_relaxed);
  const auto [fd, name, offset] = control_.open_data(slot, id);
  const FileFacts facts = file_facts(fd.get(), name);
  if (!is_trusted(facts.uid, facts.gid, facts.mode)) {
    throw Error(ErrorCode::kInvalidHandle, "segment " + name + " belongs to another user id");
  }
  if (bytes == 0 || facts.bytes < bytes || facts.bytes - bytes < offset) {
    throw Error(ErrorCode::kSegmentLost,
                "segment " + name + " is shorter than its arena says; somebody outside shmx truncated it", ENOENT);
  }
  // The id changes before the base does, so mapped() never pairs the new id with the old base.
  unmap(segment);
  segment.mapping = Mapping(fd.get(), name, ByteCount{bytes}, peer_access(), offset);
  if (control_.backend() == Backend::kMemfd) advise_huge_pages(segment.mapping.base(), bytes);
  segment.base.store(segment.mapping.base(), std::memory_order_relaxed);
  segment.bytes.store(segment.mapping.bytes(), std::memory_order_relaxed);
  segment.segment_id.store(id, std::memory_order_release);
  return segment;
}

void Attachment::map_all() {
  const std::lock_guard guard(map_mutex_);
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    const SegmentEntry& entry = control_.header().segments[slot];
    if (entry.status.load(std::memory_order_acquire) != SegmentStatus::kLive) continue;
    const std::uint32_t id = entry.id.load(std::memory_order_acquire);
    if (id == 0) continue;
    try {
      const DataMapping& segment = map_segment(slot);
      prefault(segment.mapping.base(),
               std::min(entry.committed.load(std::memory_order_acquire), segment.mapping.bytes()));
    } catch (const Error& error) {
      // Nothing in it is held here, so its owner may have trimmed it since, or be about it.
      const bool live = entry.status.load(std::memory_order_acquire) == SegmentStatus::kLive;
      if (error.code() != ErrorCode::kSegmentLost || (live && entry.id.load(std::memory_order_acquire) == id)) throw;
    }
  }
}

void Attachment::add_mapping(std::uint32_t slot, std::uint32_t id, Mapping mapping) {
  const std::lock_guard guard(map_mutex_);
  DataMapping& segment = segments_[slot];
  unmap(segment);
  segment.mapping = std::move(mapping);
  segment.base.store(segment.mapping.base(), std::memory_order_relaxed);
  segment.bytes.store(segment.mapping.bytes(), std::memory_order_relaxed);
  // release: pairs with mapped().
  segment.segment_id.store(id, std::memory_order_release);
}

void Attachment::drop_dead_mappings() {
  const std::lock_guard guard(map_mutex_);
  // acquire: pairs with the owner's increment; the table then shows what it marked dead.
  trims_seen_.store(control_.header().trim_count.load(std::memory_order_acquire), std::memory_order_relaxed);
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    DataMapping& segment = segments_[slot];
    const std::uint32_t mapped_id = segment.segment_id.load(std::memory_order_relaxed);
    if (mapped_id == 0) continue;
    // Alone: the status may be that of the segment that comes next. relaxed: ordered by the count.
    if (control_.header().segments[slot].id.load(std::memory_order_relaxed) == mapped_id) continue;
    unmap(segment);
  }
}

bool Attachment::retire_under_locks(bool only_if_unused) {
  {
    const AllBlockLocks guard;
    // Under the locks: of two threads that end the same membership, one does.
    if (!usable() || (only_if_unused && uses_.load(std::memory_order_relaxed) != 0)) return false;
    inert_.store(true, std::memory_order_relaxed);
    const std::uint32_t count = control_.block_count();
    for (std::uint32_t i = 0; i < count; ++i) {
      if (counts_[i] != 0) clear_hold(control_.block(BlockIndex{i}).state, slot_);
    }
  }
  lock_.release();
  return true;
}

bool Attachment::retire() { return retire_under_locks(false); }

bool Attachment::retire_if_unused() { return retire_under_locks(true); }

void Attachment::give_memory_back() {
  const std::lock_guard guard(map_mutex_);
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    unmap(segments_[slot]);
  }
  control_.forget_content();
}

bool Attachment::may_probe_owner(Ticks now) {
  // relaxed: two threads that probe at once do no harm.
  if (ticks_since(owner_probed_.load(std::memory_order_relaxed), now) < kTicksPerSecond) return false;
  owner_probed_.store(now, std::memory_order_relaxed);
  return true;
}

void Attachment::prepare_fork() noexcept {
  fork_plan_ = ForkPlan::kNone;
  if (!usable() || uses_.load(std::memory_order_relaxed) == 0) return;
  // A thread between its two counts leaves nothing to inherit; a child with a slot and no use would be in the way of
  // the reaper that this thread is about to be, and never be one itself.
  if (std::all_of(counts_.get(), counts_.get() + control_.block_count(), [](std::uint32_t n) { return n == 0; }))
    return;
  fork_plan_ = ForkPlan::kLeftOut;
  fork_failure_.reset();
  try {
    if (auto seat = PeerLock::take_any(control_.file(), Inheritance::kNextFork)) {
      child_lock_ = std::move(seat->first);
      child_slot_ = seat->second;
      control_.clear_slot(child_slot_);
      const std::uint32_t count = control_.block_count();
      for (std::uint32_t i = 0; i < count; ++i) {
        if (counts_[i] != 0) set_hold(control_.block(BlockIndex{i}).state, child_slot_);
      }
      fork_plan_ = ForkPlan::kJoins;
      return;
    }
  } catch (const Error& error) {
    // fork has no way to fail on our behalf: the child is left out and says so when it is asked.
    child_lock_.release();
    fork_failure_.emplace(error.code(),
                          "arena " + control_.name() +
                              " could not be joined when this process was forked, so it did not inherit its parent's "
                              "tensors: " +
                              error.what(),
                          error.system_errno());
  }
  // Better a fault in the child than bytes that the owner has reused meanwhile.
  for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
    const Mapping& mapping = segments_[slot].mapping;
    if (mapping.valid()) ::madvise(mapping.base(), mapping.bytes(), MADV_DONTFORK);
  }
}

void Attachment::parent_after_fork() noexcept {
  if (fork_plan_ == ForkPlan::kJoins) {
    // The child has the page too, and with it the lock; if there is no child, the next sweep clears the slot.
    child_lock_.release();
  } else if (fork_plan_ == ForkPlan::kLeftOut) {
    for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
      const Mapping& mapping = segments_[slot].mapping;
      if (mapping.valid()) ::madvise(mapping.base(), mapping.bytes(), MADV_DOFORK);
    }
  }
  fork_plan_ = ForkPlan::kNone;
}

bool Attachment::child_after_fork() noexcept {
  lock_.forget();  // the parent's page is not mapped here
  forget_pins();   // no driver works here
  const ForkPlan plan = std::exchange(fork_plan_, ForkPlan::kNone);
  if (plan != ForkPlan::kJoins) {
    control_.file().close();
    // What had left before may have views of its pages still.
    const bool unused = !inert_.exchange(true, std::memory_order_relaxed) && plan == ForkPlan::kNone;
    left_out_of_fork_.store(plan == ForkPlan::kLeftOut, std::memory_order_relaxed);
    for (std::uint32_t slot = 0; slot < kMaxSegments; ++slot) {
      // Memory that nothing here refers to would stay taken for as long as this child lives.
      if (unused) segments_[slot].mapping.reset();
      // MADV_DONTFORK left holes there, which something else may fill.
      if (plan == ForkPlan::kLeftOut) segments_[slot].mapping.forget();
    }
    if (unused) control_.forget_content();
    return false;
  }
  control_.file().renew();  // or a lock probed for here would be the parent's, too
  lock_ = std::move(child_lock_);
  lock_.keep_from_children();
  slot_ = child_slot_;
  // A thread of the parent may have been between a block's count and this one.
  uses_.store(std::accumulate(counts_.get(), counts_.get() + control_.block_count(), std::uint64_t{0}),
              std::memory_order_relaxed);  // relaxed: the only thread
  PeerEntry& entry = control_.header().peers[value(slot_)];
  entry.pid.store(static_cast<std::uint32_t>(::getpid()), std::memory_order_relaxed);  // informational
  entry.since.store(ticks_now(), std::memory_order_relaxed);
  return true;
}

}  // namespace shmx
