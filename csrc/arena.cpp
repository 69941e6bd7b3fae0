#include "arena.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.hpp"
#include "host.hpp"
#include "numa.hpp"
#include "peer_lock.hpp"
#include "reaper.hpp"

namespace shmx {
namespace {

constexpr std::uint64_t kDefaultCapacity = 64ULL << 30;
constexpr std::uint64_t kLargestCapacity = 1ULL << 46;
// A /dev/shm below it was sized without shared tensors in mind: 64 MiB is the default of a container.
constexpr std::uint64_t kSmallShm = 1ULL << 30;
// How many blocks one allocation looks at before it prefers to grow.
constexpr std::uint32_t kRecentLooks = 3;
constexpr std::uint32_t kTurnLooks = 6;
constexpr std::uint32_t kReclaimLooks = 64;

Ticks to_ticks(double seconds) {
  return static_cast<Ticks>(std::clamp(seconds * kTicksPerSecond + 0.999, 0.0, 2147483647.0));
}

std::uint64_t round_up(std::uint64_t bytes, std::uint64_t step) { return (bytes + step - 1) / step * step; }

std::uint64_t default_capacity(Backend backend) {
  const std::uint64_t bytes = backend == Backend::kShm ? shm_filesystem_bytes() : available_memory();
  return std::min(bytes / 2, kDefaultCapacity);
}

// False too where there is no /dev/shm.
bool shm_can_hold(std::uint64_t capacity) {
  try {
    if (capacity != 0) return shm_filesystem_room() >= capacity;
    return shm_filesystem_bytes() >= kSmallShm || default_capacity(Backend::kShm) >= default_capacity(Backend::kMemfd);
  } catch (const Error&) {
    return false;
  }
}

Backend chosen(const ArenaOptions& options) {
  if (options.group && options.backend == BackendChoice::kMemfd) {
    throw Error(ErrorCode::kInvalidArgument,
                "a group needs backend shm: what has no name is opened through /proc, which only the same user id may");
  }
  if (options.group) return Backend::kShm;
  if (options.backend == BackendChoice::kAuto) return shm_can_hold(options.capacity) ? Backend::kShm : Backend::kMemfd;
  return options.backend == BackendChoice::kShm ? Backend::kShm : Backend::kMemfd;
}

ArenaOptions checked(ArenaOptions options, Backend backend) {
  if (options.capacity == 0) {
    options.capacity = default_capacity(backend);
    options.half_of_shm = backend == Backend::kShm && options.capacity < kDefaultCapacity;
  }
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  if (options.capacity < page || options.capacity > kLargestCapacity) {
    throw Error(ErrorCode::kInvalidArgument, "capacity must lie between " + human_bytes(page) + " and " +
                                                 human_bytes(kLargestCapacity) + ", not " +
                                                 std::to_string(options.capacity) + " bytes");
  }
  options.capacity = options.capacity / page * page;
  if (options.segment_bytes < kBlockAlignment || options.segment_bytes > kLargestCapacity) {
    throw Error(ErrorCode::kInvalidArgument, "segment_bytes must lie between 256 bytes and 64 TiB");
  }
  if (!(options.ticket_ttl >= 0) || !(options.reuse_delay >= 0)) {
    throw Error(ErrorCode::kInvalidArgument, "ticket_ttl and reuse_delay are seconds, not negative");
  }
  if (options.group && !in_group(*options.group)) {
    throw Error(ErrorCode::kInvalidArgument,
                "group " + std::to_string(*options.group) +
                    " is not one of this process's groups; add its user to it (docker run --group-add, Kubernetes "
                    "supplementalGroups)");
  }
  options.segment_bytes = round_up(std::min(options.segment_bytes, options.capacity), page);
  const std::vector<int> nodes = memory_nodes();
  if (!options.numa_node) {
    // With one node there is nothing to ask the kernel for.
    if (nodes.size() > 1) options.numa_node = current_node();
  } else if (std::find(nodes.begin(), nodes.end(), *options.numa_node) == nodes.end()) {
    std::string known;
    for (const int node : nodes) known += (known.empty() ? "" : ", ") + std::to_string(node);
    throw Error(ErrorCode::kInvalidArgument,
                "numa_node " + std::to_string(*options.numa_node) + " has no memory here; the nodes are " + known);
  }
  return options;
}

}  // namespace

std::shared_ptr<Arena> Arena::create(ArenaOptions options) {
  // What dead processes have left makes no choice.
  (void)reap_all(Expiry::kTimeToLive);
  const Backend backend = chosen(options);
  options = checked(options, backend);
  for (;;) {
    const ArenaId id{random_id()};
    std::unique_lock guard(attach_mutex());
    const std::string name = control_name(id);
    std::optional<ControlSegment> control;
    std::shared_ptr<Attachment> attachment;
    try {
      // A reaper that came upon the name before it was locked has removed it: take another one.
      std::optional<PeerLock> lock;
      try {
        control = ControlSegment::create(id, {options.capacity, to_ticks(options.ticket_ttl), options.group, backend});
        lock = PeerLock::try_take(control->file(), kOwnerSlot, Inheritance::kThisProcess);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kSegmentLost) throw;
      }
      if (!lock) continue;
      PeerEntry& peer = control->header().peers[value(kOwnerSlot)];
      peer.pid.store(static_cast<std::uint32_t>(::getpid()), std::memory_order_relaxed);  // informational
      peer.since.store(ticks_now(), std::memory_order_relaxed);
      control->publish();
      attachment = std::make_shared<Attachment>(std::move(*control), std::move(*lock), kOwnerSlot);
      register_attachment(attachment);
      // Before the arena takes part in forks: its own lock comes before this one.
      guard.unlock();
      std::shared_ptr<Arena> arena(new Arena(options, attachment));
      attachment->set_owner(arena);
      if (options.reserve != 0) {
        const std::lock_guard reserving(arena->mutex_);
        arena->want_growth();
      }
      return arena;
    } catch (...) {
      if (attachment) {
        leave(*attachment);
      } else if (backend == Backend::kShm) {
        unlink_segment(name);
      }
      throw;
    }
  }
}

Arena::Arena(ArenaOptions options, std::shared_ptr<Attachment> attachment)
    : options_(options),
      reuse_delay_(to_ticks(options.reuse_delay)),
      ttl_(to_ticks(options.ticket_ttl)),
      attachment_(std::move(attachment)) {
  take_part_in_forks();
}

Arena::~Arena() {
  leave_forks();
  close();
}

BlockEntry& Arena::entry(std::uint32_t index) const { return attachment_->control().block(BlockIndex{index}); }

void Arena::require_open() const {
  if (attachment_->usable() && !attachment_->is_owner()) {
    throw Error(ErrorCode::kReleased, "arena " + attachment_->control().name() +
                                          " belongs to the parent process; a forked child makes its own");
  }
  if (closed()) {
    throw Error(ErrorCode::kReleased, "arena " + attachment_->control().name() + " is closed; make another one");
  }
}

std::uint64_t Arena::checked_block_bytes(ByteCount bytes) const {
  if (value(bytes) > options_.capacity) {
    throw no_space_error(attachment_->control().name(), value(bytes),
                         "the arena's capacity is " + human_bytes(options_.capacity) +
                             "; raise it (SHMX_CAPACITY or shmx.configure(capacity=...))" + capacity_origin());
  }
  // A step beyond the capacity could never be had, though the tensor itself can.
  return std::min(block_bytes(value(bytes)), options_.capacity);
}

std::optional<Allocation> Arena::try_allocate(ByteCount bytes) {
  const std::unique_lock guard(mutex_, std::try_to_lock);
  if (!guard.owns_lock()) return std::nullopt;
  require_open();
  auto made = allocate_without_growth(checked_block_bytes(bytes));
  if (made) limit(*made, bytes);
  return made;
}

Allocation Arena::allocate(ByteCount bytes) {
  Allocation made = allocate_block(checked_block_bytes(bytes));
  limit(made, bytes);
  return made;
}

// The rest of a block may show an earlier tensor: no handle reaches it.
void Arena::limit(const Allocation& made, ByteCount bytes) const {
  // relaxed: as in place_block.
  entry(value(made.hold.block())).place.used.store(value(bytes), std::memory_order_relaxed);
}

Allocation Arena::allocate_block(std::uint64_t size) {
  {
    const std::lock_guard guard(mutex_);
    require_open();
    if (auto found = allocate_without_growth(size)) return std::move(*found);
  }
  const std::lock_guard growing(growth_mutex_);
  const std::lock_guard guard(mutex_);
  require_open();
  // The growth that was under way may have been enough.
  if (auto found = allocate_without_growth(size)) return std::move(*found);
  // Growth is the moment to find out about dead peers: their blocks are cheaper than new ones.
  if (sweep_dead_peers() != 0) {
    if (auto found = allocate_without_growth(size)) return std::move(*found);
  }
  make_entry(size);
  // Room there may be already: what was missing was reserved memory for its entry.
  if (const auto range = space_.take(ByteCount{size})) return place_block(*range);
  if (grow(size)) return place_block(*space_.take(ByteCount{size}));

  (void)sweep_dead_peers();
  if (auto range = reclaim_oldest(size)) return place_block(*range);
  if (expire() != 0) {
    if (auto range = reclaim_oldest(size)) return place_block(*range);
  }
  // Everything idle is free now, though not in one piece: whole segments may make room for another shape.
  drop_empty_segments();
  if (grow(size)) return place_block(*space_.take(ByteCount{size}));
  throw full(size, growth_refusal_);
}

void Arena::make_entry(std::uint64_t size) {
  if (!spare_entries_.empty() || books_.size() < kMaxBlocks) return;
  for (std::uint32_t index = lists_.oldest(); index != kNoBlock; index = lists_.next_younger(index)) {
    if (may_reuse(index, Reuse::kUnderPressure, 0) && retire_block(index)) return;
  }
  throw full(size, "all " + std::to_string(kMaxBlocks) + " blocks are in use; release handles and views");
}

std::optional<Allocation> Arena::allocate_without_growth(std::uint64_t size) {
  if (const auto index = reuse_same_size(size)) return hand_out(*index);
  if (const auto range = space_.take(ByteCount{size})) {
    // A table that is full of committed entries needs a system call for the next step.
    if (spare_entries_.empty() && books_.size() >= control().block_count()) {
      space_.give(*range);
      return std::nullopt;
    }
    return place_block(*range);
  }
  if (const auto range = reclaim_some(size)) return place_block(*range);
  return std::nullopt;
}

bool Arena::may_reuse(std::uint32_t index, Reuse reuse, Ticks now) const {
  const BlockEntry& block = entry(index);
  if (!is_idle(block.state)) return false;
  if (reuse == Reuse::kUnderPressure) return true;
  // relaxed: written by peers before they cleared the bit that is_idle has seen cleared.
  const std::uint16_t flags = block.place.flags.load(std::memory_order_relaxed);
  if ((flags & kUnannounced) != 0) return false;
  if ((flags & kAnnouncedImplicitly) == 0) return true;
  return ticks_since(block.place.last_use.load(std::memory_order_relaxed), now) >= reuse_delay_;
}

std::optional<std::uint32_t> Arena::reuse_same_size(std::uint64_t size) {
  const Ticks now = ticks_now();
  const auto try_block = [&](std::uint32_t index) {
    if (!may_reuse(index, Reuse::kPolite, now) || !retire(entry(index).state)) return false;
    // The next allocation of this size looks here first, while the bytes are in the cache.
    lists_.renew(index);
    ++reused_;
    return true;
  };
  std::uint32_t index = lists_.youngest(size);
  for (std::uint32_t looks = 0; looks < kRecentLooks && index != kNoBlock; ++looks) {
    if (try_block(index)) return index;
    index = lists_.next_older(index);
  }
  for (std::uint32_t looks = 0; looks < kTurnLooks && index != kNoBlock; ++looks) {
    index = lists_.in_turn(size);
    if (index != kNoBlock && try_block(index)) return index;
  }
  return std::nullopt;
}

std::optional<Range> Arena::reclaim_some(std::uint64_t size) {
  const Ticks now = ticks_now();
  for (std::uint32_t looks = 0; looks < kReclaimLooks; ++looks) {
    const std::uint32_t index = lists_.in_turn();
    if (index == kNoBlock) break;
    if (!may_reuse(index, Reuse::kPolite, now) || !retire_block(index)) continue;
    if (auto range = space_.take(ByteCount{size})) return range;
  }
  return std::nullopt;
}

std::optional<Range> Arena::reclaim_oldest(std::uint64_t size) {
  std::uint32_t next = kNoBlock;
  for (std::uint32_t index = lists_.oldest(); index != kNoBlock; index = next) {
    next = lists_.next_younger(index);
    if (!may_reuse(index, Reuse::kUnderPressure, 0) || !retire_block(index)) continue;
    if (auto range = space_.take(ByteCount{size})) return range;
  }
  return std::nullopt;
}

bool Arena::retire_block(std::uint32_t index) {
  if (!retire(entry(index).state)) return false;
  free_block(index);
  return true;
}

void Arena::free_block(std::uint32_t index) {
  Book& book = books_[index];
  // First: without memory for the books the block stays what it is.
  space_.give(book.range);
  lists_.remove(index);
  if (!book.key.empty()) keys_.erase(book.key);
  segments_[book.range.segment_slot].blocks.erase(book.range.offset);
  placed_ -= book.range.bytes;
  book = Book{};
  spare_entries_.push_back(index);
}

std::uint32_t Arena::enter_block(const Range& range) {
  if (spare_entries_.empty()) {
    const auto fresh = static_cast<std::uint32_t>(books_.size());
    control().grow_table(fresh + 1);
    // For all of them at once: a block that is freed then needs no memory.
    if (spare_entries_.capacity() <= fresh) spare_entries_.reserve(2 * (std::size_t{fresh} + 1));
    books_.emplace_back();
    spare_entries_.push_back(fresh);
  }
  const std::uint32_t index = spare_entries_.back();
  auto& blocks = segments_[range.segment_slot].blocks;
  blocks.emplace(range.offset, index);
  try {
    lists_.add(index, range.bytes);
  } catch (...) {
    blocks.erase(range.offset);
    throw;
  }
  spare_entries_.pop_back();
  return index;
}

Allocation Arena::place_block(const Range& range) {
  std::uint32_t index = 0;
  try {
    index = enter_block(range);
  } catch (...) {
    space_.give(range);
    throw;
  }
  Book& book = books_[index];
  book.live = true;
  book.range = range;
  placed_ += range.bytes;
  peak_placed_ = std::max(peak_placed_, placed_);
  BlockPlace& place = entry(index).place;
  // relaxed: nobody has a handle of this block's generation yet, and handles travel through a channel that orders.
  place.offset.store(range.offset, std::memory_order_relaxed);
  place.bytes.store(range.bytes, std::memory_order_relaxed);
  place.segment_slot.store(static_cast<std::uint16_t>(range.segment_slot), std::memory_order_relaxed);
  want_growth();
  return hand_out(index);
}

Allocation Arena::hand_out(std::uint32_t index) {
  Book& book = books_[index];
  if (!book.key.empty()) {
    keys_.erase(book.key);
    book.key.clear();
  }
  BlockEntry& block = entry(index);
  // relaxed: as in place_block.
  block.place.flags.store(0, std::memory_order_relaxed);
  const Generation generation{block.state.generation.load(std::memory_order_relaxed)};
  const Ticks now = ticks_now();
  const std::uint64_t since = std::exchange(book.written_at, written_ += book.range.bytes);
  const Ticks then = std::exchange(book.written_when, now);
  Allocation allocation{attachment_->adopt(BlockIndex{index}, generation),
                        segments_[book.range.segment_slot].base + book.range.offset,
                        since == 0 ? Destination::kCold : destination_after(written_ - since, ticks_since(then, now))};
  if (options_.scrub) std::memset(allocation.data, 0, book.range.bytes);
  // relaxed: a hint for peers that wonder whether the owner is alive.
  control().header().owner_active.store(now, std::memory_order_relaxed);
  ++published_;
  return allocation;
}

void Arena::note_addresses(const std::byte* base, std::uint64_t bytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(base);
  // relaxed: the thread that asks about an address of this segment got it from the allocation.
  lowest_address_.store(std::min(lowest_address_.load(std::memory_order_relaxed), start), std::memory_order_relaxed);
  highest_address_.store(std::max(highest_address_.load(std::memory_order_relaxed), start + bytes),
                         std::memory_order_relaxed);
}

bool Arena::may_contain(const void* address) const {
  const auto where = reinterpret_cast<std::uintptr_t>(address);
  return where >= lowest_address_.load(std::memory_order_relaxed) &&
         where < highest_address_.load(std::memory_order_relaxed);
}

void Arena::drop_segment(std::uint32_t slot) {
  const std::lock_guard prepared(prepare_mutex_);
  Segment& segment = segments_[slot];
  SegmentEntry& shared = control().header().segments[slot];
  // release: a peer that does not find the name finds here why.
  shared.status.store(SegmentStatus::kDead, std::memory_order_release);
  try {
    control().remove_data(segment.id, segment.base, segment.committed);
  } catch (...) {
    // release: as it was.
    shared.status.store(SegmentStatus::kLive, std::memory_order_release);
    throw;
  }
  space_.forget_segment(slot);
  // Not with the next segment: a peer that looks between its status and its id would take the old one for live.
  shared.id.store(0, std::memory_order_relaxed);
  // release: peers unmap at their next call; nobody holds a block in it.
  control().header().trim_count.fetch_add(1, std::memory_order_release);
  reserved_ -= segment.committed;
  segment = Segment{};
  attachment_->drop_dead_mappings();
}

void Arena::drop_empty_segments() {
  for (std::uint32_t slot = 0; slot < segments_.size(); ++slot) {
    if (segments_[slot].id != 0 && segments_[slot].blocks.empty()) drop_segment(slot);
  }
}

std::uint64_t Arena::trim() {
  const std::lock_guard growing(growth_mutex_);
  const std::lock_guard guard(mutex_);
  require_open();
  (void)sweep_dead_peers();
  const std::uint64_t before = reserved_;
  for (const Segment& segment : segments_) {
    // Only a segment that becomes wholly free is worth the blocks that could have been loaded again.
    const auto& blocks = segment.blocks;
    if (!std::all_of(blocks.begin(), blocks.end(), [&](const auto& b) { return is_idle(entry(b.second).state); })) {
      continue;
    }
    std::vector<std::uint32_t> indices;
    indices.reserve(blocks.size());
    for (const auto& [offset, index] : blocks) indices.push_back(index);
    for (const std::uint32_t index : indices) retire_block(index);
  }
  drop_empty_segments();
  return before - reserved_;
}

std::uint32_t Arena::sweep_dead_peers() {
  const std::lock_guard guard(probe_mutex());
  const std::uint32_t dead = control().sweep(hold_bit(kOwnerSlot));
  if (dead != 0) last_dead_ = ticks_now();
  swept_ += dead;
  return dead;
}

std::uint32_t Arena::expire() {
  const Ticks now = ticks_now();
  std::uint32_t dropped = 0;
  for (std::uint32_t index = 0; index < books_.size(); ++index) {
    if (!books_[index].live) continue;
    const std::uint32_t here = drop_expired(entry(index).state, ttl_, now);
    if (here != 0 && !expiry_noticed_) {
      expiry_noticed_ = true;
      expiry_notice_ = "arena " + name() + " needed room and gave up a message that nobody loaded for " +
                       std::to_string(ttl_ / kTicksPerSecond) + " s (block " + std::to_string(index) + ", " +
                       human_bytes(books_[index].range.bytes) +
                       "); announce only loads that happen, discard() what is not sent, or raise SHMX_TICKET_TTL";
    }
    dropped += here;
  }
  expired_ += dropped;
  return dropped;
}

std::uint32_t Arena::sweep(bool expire_messages) {
  const std::lock_guard guard(mutex_);
  require_open();
  const std::uint32_t dead = sweep_dead_peers();
  if (expire_messages) (void)expire();
  return dead;
}

std::optional<std::string> Arena::take_expiry_notice() {
  const std::lock_guard guard(mutex_);
  return std::exchange(expiry_notice_, std::nullopt);
}

std::optional<Arena::Keyed> Arena::find_key(const std::string& key) {
  const std::lock_guard guard(mutex_);
  require_open();
  const auto known = keys_.find(key);
  if (known == keys_.end()) return std::nullopt;
  const std::uint32_t index = known->second;
  BlockState& state = entry(index).state;
  // A block without a free cell could not announce another message: a fresh copy can.
  const bool cell_free = std::any_of(std::begin(state.cells), std::end(state.cells), [](const auto& cell) {
    return MessageCell::unpack(cell.load(std::memory_order_relaxed)).remaining == 0;
  });
  auto hold = cell_free ? attachment_->try_hold(
                              BlockIndex{index},
                              Generation{state.generation.load(std::memory_order_seq_cst) & ~std::uint64_t{1}})
                        : std::nullopt;
  if (!hold) return std::nullopt;
  lists_.renew(index);
  return Keyed{std::move(*hold), books_[index].description};
}

void Arena::note_key(const std::string& key, const Hold& hold, std::string description) {
  const std::lock_guard guard(mutex_);
  const std::uint32_t index = value(hold.block());
  std::string noted = key;
  // All that needs memory is done: a key is never in one of the two books only.
  const auto [entry_of_key, fresh] = keys_.try_emplace(key, index);
  if (!fresh) books_[entry_of_key->second].key.clear();
  entry_of_key->second = index;
  if (!books_[index].key.empty()) keys_.erase(books_[index].key);
  books_[index].key = std::move(noted);
  books_[index].description = std::move(description);
  entry(index).place.flags.fetch_or(kUnannounced, std::memory_order_relaxed);  // relaxed: read by this process
}

std::optional<Arena::Located> Arena::locate(const void* address) {
  const std::lock_guard guard(mutex_);
  const auto* byte = static_cast<const std::byte*>(address);
  for (Segment& segment : segments_) {
    if (segment.id == 0 || byte < segment.base || byte >= segment.base + segment.committed) continue;
    const auto offset = static_cast<std::uint64_t>(byte - segment.base);
    const auto after = segment.blocks.upper_bound(offset);
    if (after == segment.blocks.begin()) return std::nullopt;
    const auto& [start, index] = *std::prev(after);
    const std::uint64_t bytes = books_[index].range.bytes;
    if (offset >= start + bytes || attachment_->uses_of(BlockIndex{index}) == 0) return std::nullopt;
    // relaxed: held by this process, so it does not change, but for a revocation.
    const Generation generation{entry(index).state.generation.load(std::memory_order_relaxed) & ~std::uint64_t{1}};
    auto hold = attachment_->try_hold(BlockIndex{index}, generation);
    if (!hold) return std::nullopt;
    return Located{std::move(*hold), offset - start, bytes};
  }
  return std::nullopt;
}

void Arena::revoke(const Hold& hold) {
  const std::lock_guard guard(mutex_);
  require_open();
  shmx::revoke(entry(value(hold.block())).state, hold.generation());
  ++revoked_;
  Book& book = books_[value(hold.block())];
  if (!book.key.empty()) {
    keys_.erase(book.key);
    book.key.clear();
  }
}

void Arena::close() {
  {
    const std::lock_guard guard(mutex_);
    if (closed_.exchange(true, std::memory_order_relaxed)) return;
  }
  stop_growing();
  if (!attachment_->usable() || !attachment_->is_owner()) return;
  // Views of this process may still be alive: then the last of them takes the arena away.
  const auto end = backend() == Backend::kShm ? &leave : &leave_when_done;
  attachment_->set_on_idle(end);
  if (attachment_->uses() == 0) end(*attachment_);
}

void Arena::lock_for_fork() noexcept {
  growth_mutex_.lock();
  mutex_.lock();
  prepare_mutex_.lock();
}

void Arena::unlock_in_parent() noexcept {
  prepare_mutex_.unlock();
  mutex_.unlock();
  growth_mutex_.unlock();
}

void Arena::unlock_in_child() noexcept {
  closed_.store(true, std::memory_order_relaxed);
  // Its thread is the parent's.
  [[maybe_unused]] const Grower* const abandoned = grower_.release();
  prepare_mutex_.unlock();
  mutex_.unlock();
  growth_mutex_.unlock();
}

}  // namespace shmx
