#include "control.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "block_state.hpp"
#include "error.hpp"
#include "host.hpp"
#include "peer_lock.hpp"
#include "process.hpp"

namespace shmx {
namespace {

// Table entries are reserved in steps: 256 entries are 32 KiB.
constexpr std::uint32_t kTableStep = 256;
// In a file that holds everything, segments begin where a huge page can.
constexpr std::uint64_t kSegmentAlignment = 2U << 20;

// Forked children keep the mapping, and with it its open file description. The descriptor, through which slots are
// probed, has another one: or a slot that a process was probing when it was killed would pass for a live peer as long
// as such a child lives. Throws SegmentLost if the file has lost its name.
Mapping map_control(SegmentFile& file, std::uint64_t bytes) {
  const UniqueFd fd = file.open_again();
  return {fd.get(), file.name(), ByteCount{bytes}, Access::kReadWrite};
}

}  // namespace

ControlSegment::ControlSegment(ArenaId arena, SegmentFile file, FileIdentity identity, Mapping mapping)
    : arena_(arena),
      host_(file.backend() == Backend::kShm ? host_id() : process_space_id()),
      file_(std::move(file)),
      identity_(identity),
      mapping_(std::move(mapping)) {}

ControlSegment ControlSegment::create(ArenaId arena, const ControlOptions& options) {
  const std::string name = control_name(arena);
  const bool named = options.backend == Backend::kShm;
  UniqueFd fd = named ? create_segment(name) : create_nameless_segment(name);
  try {
    const DescriptorPlace place = named ? DescriptorPlace{} : place_of(fd.get());
    SegmentFile file(name, std::move(fd), place);
    if (options.group) open_to_group(file.fd(), name, *options.group);
    size_segment(file.fd(), name, ByteCount{kControlBytes});
    reserve_segment(file.fd(), name, 0, ByteCount{kHeaderBytes}, options.backend);
    Mapping mapping = map_control(file, kControlBytes);
    const FileIdentity identity = file_facts(file.fd(), name).identity;
    ControlSegment control(arena, std::move(file), identity, std::move(mapping));
    ControlHeader& header = control.header();
    header.layout_version = kLayoutVersion;
    header.header_bytes = kHeaderBytes;
    header.arena_id = value(arena);
    header.capacity = options.capacity;
    header.owner_pid = static_cast<std::uint32_t>(::getpid());
    header.max_blocks = kMaxBlocks;
    header.ttl_ticks = options.ttl_ticks;
    return control;
  } catch (...) {
    if (named) unlink_segment(name);
    throw;
  }
}

std::optional<ControlSegment> ControlSegment::open(ArenaId arena, DescriptorPlace place) {
  const std::string name = control_name(arena);
  auto fd = place.none() ? open_segment(name) : open_nameless_segment(name, place);
  if (!fd) return std::nullopt;
  const FileFacts facts = file_facts(fd->get(), name);
  if (!is_trusted(facts.uid, facts.gid, facts.mode)) {
    throw Error(ErrorCode::kInvalidHandle, "arena " + name + " belongs to user id " + std::to_string(facts.uid) +
                                               "; arenas are private to one user id, or to a group that all processes "
                                               "are in and have set (SHMX_GROUP)");
  }
  // Read, not mapped: a page of a torn creation may not be reserved, and touching it could fault.
  std::uint64_t magic = 0;
  const ssize_t got = ::pread(fd->get(), &magic, sizeof magic, 0);
  if (got < 0) throw system_error("pread", name, errno);
  if (got != sizeof magic || magic == 0 || facts.bytes < kHeaderBytes) {
    throw Error(ErrorCode::kSegmentLost, "arena " + name + " is not ready: its creation was interrupted", ENOENT);
  }
  SegmentFile file(name, std::move(*fd), place);
  Mapping mapping;
  try {
    mapping = map_control(file, std::min(facts.bytes, kControlBytes));
  } catch (const Error& error) {
    // Removed since it was opened, by whoever was entitled to.
    if (error.code() != ErrorCode::kSegmentLost || !place.none()) throw;
    return std::nullopt;
  }
  ControlSegment control(arena, std::move(file), facts.identity, std::move(mapping));
  const ControlHeader& header = control.header();
  // acquire: pairs with publish(); the fields below are complete once the magic is there.
  magic = header.magic.load(std::memory_order_acquire);
  if (magic == kMagic && header.layout_version != kLayoutVersion) {
    throw Error(ErrorCode::kInvalidHandle, "arena " + name + " has layout version " +
                                               std::to_string(header.layout_version) + ", this shmx reads " +
                                               std::to_string(kLayoutVersion) +
                                               "; run the same shmx version in all processes");
  }
  // Behind the control segment of an arena without names lies its data.
  const bool whole = place.none() ? facts.bytes == kControlBytes : facts.bytes >= kControlBytes;
  if (magic != kMagic || !whole || header.arena_id != value(arena) || header.header_bytes != kHeaderBytes ||
      header.max_blocks != kMaxBlocks || header.lifecycle.load(std::memory_order_relaxed) > Lifecycle::kGone) {
    throw Error(ErrorCode::kInvalidHandle,
                "arena " + name +
                    " is damaged: its control segment was cut or overwritten by something other "
                    "than shmx; restart the process that owns it, or remove its files from /dev/shm");
  }
  return control;
}

std::uint32_t ControlSegment::block_count() const {
  // acquire: pairs with grow_table(); entries below the count are reserved and zeroed.
  return std::min(header().block_count.load(std::memory_order_acquire), kMaxBlocks);
}

void ControlSegment::publish() {
  // release: everything written before is seen by whoever sees the magic.
  header().magic.store(kMagic, std::memory_order_release);
}

void ControlSegment::grow_table(std::uint32_t count) {
  const std::uint32_t now = block_count();
  if (count <= now) return;
  if (count > kMaxBlocks) {
    throw no_space_error(name(), 0, "all " + std::to_string(kMaxBlocks) + " blocks are in use; release handles");
  }
  const std::uint32_t target = std::min((count + kTableStep - 1) / kTableStep * kTableStep, kMaxBlocks);
  reserve_segment(file_.fd(), name(), kHeaderBytes + std::uint64_t{now} * sizeof(BlockEntry),
                  ByteCount{std::uint64_t{target - now} * sizeof(BlockEntry)}, backend());
  // release: pairs with block_count().
  header().block_count.store(target, std::memory_order_release);
}

std::uint64_t ControlSegment::holders() const {
  std::uint64_t bits = 0;
  const std::uint32_t count = block_count();
  for (std::uint32_t i = 0; i < count; ++i) {
    bits |= block(BlockIndex{i}).state.holds.load(std::memory_order_seq_cst);
  }
  return bits;
}

void ControlSegment::clear_slot(PeerSlot slot) {
  const std::uint32_t count = block_count();
  for (std::uint32_t i = 0; i < count; ++i) {
    BlockState& state = block(BlockIndex{i}).state;
    // relaxed: only this slot's bit matters, and nobody else writes it while the caller has the slot's lock.
    if ((state.holds.load(std::memory_order_relaxed) & hold_bit(slot)) != 0) clear_hold(state, slot);
  }
}

std::uint32_t ControlSegment::sweep(std::uint64_t spared) {
  std::uint32_t dead = 0;
  for (std::uint64_t suspects = holders() & ~spared; suspects != 0; suspects &= suspects - 1) {
    const PeerSlot slot{static_cast<std::uint32_t>(std::countr_zero(suspects))};
    if (const auto lock = ProbeLock::try_take(file_, slot)) {
      clear_slot(slot);
      ++dead;
    }
  }
  return dead;
}

DataFile ControlSegment::create_data(std::uint32_t slot, std::uint32_t id, ByteCount bytes) {
  const std::string name = data_name(arena_, id);
  if (backend() == Backend::kShm) {
    UniqueFd fd = create_segment(name);
    try {
      open_like(fd.get(), name, file_facts(file_.fd(), this->name()));
      size_segment(fd.get(), name, bytes);
    } catch (...) {
      unlink_segment(name);
      throw;
    }
    return {std::move(fd), name, 0};
  }
  DataFile data = [&] {
    const std::lock_guard guard(probe_mutex());
    return DataFile{file_.open_again(), name, 0};
  }();
  // Never where another segment has been: a peer may still have that mapped.
  data.offset = (file_facts(data.fd.get(), name).bytes + kSegmentAlignment - 1) / kSegmentAlignment * kSegmentAlignment;
  size_segment(data.fd.get(), name, ByteCount{data.offset + value(bytes)});
  // relaxed: the segment's id is published after it.
  header().file_offsets[slot].store(data.offset, std::memory_order_relaxed);
  return data;
}

DataFile ControlSegment::open_data(std::uint32_t slot, std::uint32_t id) {
  const std::string name = data_name(arena_, id);
  if (backend() == Backend::kShm) {
    auto fd = open_segment(name);
    if (!fd) throw lost_name_error(name);
    return {std::move(*fd), name, 0};
  }
  // relaxed: the caller has read the segment's id.
  const std::uint64_t offset = header().file_offsets[slot].load(std::memory_order_relaxed);
  if (offset < kControlBytes || offset % kSegmentAlignment != 0) {
    throw Error(ErrorCode::kInvalidHandle, "arena " + this->name() + " has a damaged segment table");
  }
  const std::lock_guard guard(probe_mutex());
  return {file_.open_again(), name, offset};
}

void ControlSegment::remove_data(std::uint32_t id, std::byte* base, std::uint64_t bytes) {
  const std::string name = data_name(arena_, id);
  if (backend() == Backend::kShm) {
    unlink_segment(name);
  } else if (bytes != 0 && ::madvise(base, bytes, MADV_REMOVE) != 0) {
    throw system_error("madvise(MADV_REMOVE)", name, errno);
  }
}

}  // namespace shmx
