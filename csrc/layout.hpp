// The bytes in shared memory: control-segment header, segment table, block table.
//
// Everything here is read by other processes and by other builds of this library, so each change of
// an offset, a size or a meaning raises kLayoutVersion. All fields that more than one process touches
// are lock-free atomics; nothing here owns anything.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace shmx {

inline constexpr std::uint64_t kMagic = 0x31'6c'74'63'78'6d'68'73;  // "shmxctl1", little endian
inline constexpr std::uint32_t kLayoutVersion = 2;

inline constexpr std::uint32_t kMaxPeers = 64;         // bits of BlockState::holds; the owner is peer 0
inline constexpr std::uint32_t kMessageCells = 10;     // messages of one block in flight at a time
inline constexpr std::uint32_t kMaxBlocks = 1U << 17;  // 16 MiB of table, committed as it is used
inline constexpr std::uint32_t kMaxSegments = 1024;
inline constexpr std::uint64_t kBlockAlignment = 256;  // every block starts and ends on it

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

// The words of the protocol (block_state.hpp). holds: one bit per peer. cells: see MessageCell.
struct BlockState {
  std::atomic<std::uint64_t> generation;
  std::atomic<std::uint64_t> holds;
  std::atomic<std::uint64_t> cells[kMessageCells];
};

// Where a block lies. Written by the owner while the block is its alone, read by peers that hold it.
struct BlockPlace {
  std::atomic<std::uint64_t> offset;    // bytes from the start of the segment
  std::atomic<std::uint64_t> bytes;     // size of the block
  std::atomic<std::uint32_t> last_use;  // Ticks of the last release of an implicitly announced block
  std::atomic<std::uint16_t> segment_slot;
  std::atomic<std::uint16_t> flags;  // BlockFlag
  std::atomic<std::uint64_t> used;   // bytes from the start of the block that handles of it may name
};

enum BlockFlag : std::uint16_t {
  kAnnouncedImplicitly = 1,  // some message was pickled without a reader count: rests before reuse
  kUnannounced = 2,          // some handle travels without a ticket: kept while there is other room
};

struct alignas(128) BlockEntry {
  BlockState state;
  BlockPlace place;
};
static_assert(sizeof(BlockState) == 96 && sizeof(BlockPlace) == 32 && sizeof(BlockEntry) == 128);

enum class SegmentStatus : std::uint32_t { kAbsent = 0, kLive = 1, kDead = 2 };

struct SegmentEntry {
  std::atomic<std::uint32_t> id;  // part of the name; never used twice in one arena; 0: no segment (any more)
  std::atomic<SegmentStatus> status;
  std::atomic<std::uint64_t> bytes;      // size of the mapping
  std::atomic<std::uint64_t> committed;  // bytes from the start that are reserved (fallocate)
};

// Whether the arena may still be loaded from. The closing state makes "nothing is outstanding" one
// decision for all blocks, as the odd generation does for one block.
enum class Lifecycle : std::uint32_t { kOpen = 0, kClosing = 1, kGone = 2 };

struct PeerEntry {
  std::atomic<std::uint32_t> pid;  // for people (`shmx ls`); the slot's lock decides who is alive
  std::atomic<std::uint32_t> since;
};

struct ControlHeader {
  std::atomic<std::uint64_t> magic;  // written last: without it the arena's creation was torn
  std::uint32_t layout_version;
  std::uint32_t header_bytes;  // offset of the block table
  std::uint64_t arena_id;
  std::uint64_t capacity;
  std::uint32_t owner_pid;
  std::uint32_t max_blocks;
  std::uint32_t ttl_ticks;  // ticket time-to-live, for reapers

  alignas(64) std::atomic<Lifecycle> lifecycle;
  std::atomic<std::uint32_t> owner_left;    // the owner has exited or closed the arena
  std::atomic<std::uint32_t> block_count;   // entries [0, block_count) are committed and initialised
  std::atomic<std::uint32_t> trim_count;    // grows whenever a segment is marked dead
  std::atomic<std::uint32_t> owner_active;  // Ticks of the owner's last publication

  alignas(64) PeerEntry peers[kMaxPeers];
  alignas(64) SegmentEntry segments[kMaxSegments];
  // Of an arena without names, which is one file: where in it each segment begins. Otherwise zero.
  alignas(64) std::atomic<std::uint64_t> file_offsets[kMaxSegments];
};

// Page sizes go up to 64 KiB on aarch64; the block table starts on a boundary of the largest.
inline constexpr std::uint64_t kHeaderBytes = 64 * 1024;
static_assert(sizeof(ControlHeader) <= kHeaderBytes);
inline constexpr std::uint64_t kControlBytes = kHeaderBytes + std::uint64_t{kMaxBlocks} * sizeof(BlockEntry);

// Strong integers, so that an index cannot be passed for a generation.
enum class BlockIndex : std::uint32_t {};
enum class Generation : std::uint64_t {};
enum class PeerSlot : std::uint32_t {};
enum class ByteCount : std::uint64_t {};
enum class ArenaId : std::uint64_t {};

// Where the file of an arena without a name is to be had: /proc/<pid>/fd/<fd>. Of an arena with names: none.
struct DescriptorPlace {
  std::uint32_t pid = 0;
  std::uint32_t fd = 0;
  [[nodiscard]] constexpr bool none() const { return pid == 0; }
  friend bool operator==(const DescriptorPlace&, const DescriptorPlace&) = default;
};

constexpr std::uint32_t value(BlockIndex v) { return static_cast<std::uint32_t>(v); }
constexpr std::uint64_t value(Generation v) { return static_cast<std::uint64_t>(v); }
constexpr std::uint32_t value(PeerSlot v) { return static_cast<std::uint32_t>(v); }
constexpr std::uint64_t value(ByteCount v) { return static_cast<std::uint64_t>(v); }
constexpr std::uint64_t value(ArenaId v) { return static_cast<std::uint64_t>(v); }

inline constexpr PeerSlot kOwnerSlot{0};
constexpr std::uint64_t hold_bit(PeerSlot slot) { return std::uint64_t{1} << value(slot); }

}  // namespace shmx
