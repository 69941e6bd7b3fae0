#include "survey.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <memory>
#include <mutex>

#include "block_state.hpp"
#include "host.hpp"
#include "peer_lock.hpp"
#include "process.hpp"
#include "segment.hpp"

namespace shmx {
namespace {

constexpr std::uint64_t kLargestCapacity = 1ULL << 46;
constexpr std::uint32_t kBlocksPerRead = 512;  // 64 KiB

// A regular file, opened for reading. Not through open_segment: a pipe that somebody has put in the place of an arena
// must not make the survey wait, and a link must not lead it elsewhere.
UniqueFd open_for_reading(const std::string& name) {
  return UniqueFd(::shm_open(name.c_str(), O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC, 0));
}

bool exists(const std::string& name) {
  struct stat facts{};
  return ::lstat(("/dev/shm" + name).c_str(), &facts) == 0;
}

bool read_exactly(int fd, void* to, std::uint64_t bytes, std::uint64_t offset) {
  auto* next = static_cast<std::byte*>(to);
  while (bytes != 0) {
    const ssize_t got = ::pread(fd, next, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    next += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::uint64_t>(got);
  }
  return true;
}

// Of a copy that nobody else sees.
template <typename T>
T read(const std::atomic<T>& word) {
  return word.load(std::memory_order_relaxed);
}

// One arena, read step by step; a step that answers false has said why.
class Surveyor {
 public:
  explicit Surveyor(const NamedSegments& segments) : arena_(segments.arena), data_(segments.data) {
    result_.name = control_name(arena_);
    add_memory(result_.name);
    for (const std::string& name : data_) add_memory(name);
    result_.attached = find_attachment(arena_) != nullptr;
  }
  // Of an arena without a name.
  Surveyor(ArenaId arena, UniqueFd fd) : arena_(arena), fd_(std::move(fd)) {
    result_.name = control_name(arena_);
    result_.backend = Backend::kMemfd;
    struct stat facts{};
    found_ = ::fstat(fd_.get(), &facts) == 0;
    result_.uid = facts.st_uid;
    result_.memory_bytes = static_cast<std::uint64_t>(facts.st_blocks) * 512;
    result_.attached = find_attachment(arena_) != nullptr;
  }

  // Nothing if all its files have gone since their names were read.
  std::optional<ArenaSurvey> look() {
    if (!found_) return std::nullopt;
    if (result_.backend == Backend::kMemfd) {
      if (check_file() && read_header() && read_blocks()) {
        result_.state = owner_alive_ ? ArenaState::kAlive : ArenaState::kOrphan;
      }
    } else if (!trusted_) {
      result_.state = ArenaState::kForeign;
    } else if (fd_ = open_for_reading(result_.name); !fd_.valid() && errno == ENOENT) {
      // An arena that ends loses its data first, so data that is there now belongs to none.
      if (std::none_of(data_.begin(), data_.end(), exists)) return std::nullopt;
      result_.state = ArenaState::kHeadless;
    } else if (check_file() && read_header() && read_blocks()) {
      result_.state = owner_alive_ ? ArenaState::kAlive : ArenaState::kOrphan;
    }
    return std::move(result_);
  }

 private:
  void add_memory(const std::string& name) {
    struct stat facts{};
    if (::lstat(("/dev/shm" + name).c_str(), &facts) != 0) return;
    found_ = true;
    result_.uid = facts.st_uid;
    trusted_ = is_trusted(facts.st_uid, facts.st_gid, facts.st_mode);
    result_.memory_bytes += static_cast<std::uint64_t>(facts.st_blocks) * 512;
  }

  bool damaged(std::string what) {
    result_.state = ArenaState::kDamaged;
    result_.trouble = std::move(what);
    return false;
  }

  [[nodiscard]] const ControlHeader& header() const {
    return *reinterpret_cast<const ControlHeader*>(header_bytes_.data());
  }
  [[nodiscard]] bool alive(PeerSlot slot) const { return is_alive(fd_.get(), result_.name, slot); }

  bool check_file() {
    struct stat facts{};
    if (!fd_.valid() || ::fstat(fd_.get(), &facts) != 0 || !S_ISREG(facts.st_mode)) {
      return damaged("its control segment cannot be read");
    }
    // What the name led to a moment ago may be another file by now.
    result_.uid = facts.st_uid;
    if (!is_trusted(facts.st_uid, facts.st_gid, facts.st_mode)) {
      result_.state = ArenaState::kForeign;
      return false;
    }
    size_ = static_cast<std::uint64_t>(facts.st_size);
    owner_alive_ = alive(kOwnerSlot);
    return true;
  }

  bool read_header() {
    std::uint64_t magic = 0;
    if (size_ < sizeof magic || (read_exactly(fd_.get(), &magic, sizeof magic, 0) && magic == 0)) {
      result_.state = owner_alive_ ? ArenaState::kStarting : ArenaState::kTorn;
      return false;
    }
    if (magic != kMagic) return damaged("its control segment does not begin as one");
    // The version is in its place in every layout, whatever the size of the rest.
    std::uint32_t version = 0;
    if (!read_exactly(fd_.get(), &version, sizeof version, sizeof magic)) return damaged("its header was cut");
    if (version != kLayoutVersion) {
      result_.state = ArenaState::kOtherVersion;
      result_.trouble =
          "layout version " + std::to_string(version) + ", this shmx reads " + std::to_string(kLayoutVersion);
      return false;
    }
    // Behind the control segment of an arena without names lies its data.
    if (result_.backend == Backend::kMemfd ? size_ < kControlBytes : size_ != kControlBytes)
      return damaged("its control segment is " + std::to_string(size_) + " bytes long");
    if (!read_exactly(fd_.get(), header_bytes_.data(), sizeof(ControlHeader), 0)) return damaged("its header was cut");
    if (header().arena_id != value(arena_)) return damaged("its header names another arena");
    if (header().header_bytes != kHeaderBytes || header().max_blocks != kMaxBlocks ||
        header().capacity > kLargestCapacity || read(header().block_count) > kMaxBlocks ||
        read(header().lifecycle) > Lifecycle::kGone) {
      return damaged("a field of its header is out of range");
    }
    result_.owner_pid = header().owner_pid;
    result_.owner_left = read(header().owner_left) != 0;
    result_.capacity = header().capacity;
    result_.ticket_ttl = static_cast<double>(header().ttl_ticks) / kTicksPerSecond;
    for (const SegmentEntry& segment : header().segments) {
      const SegmentStatus status = read(segment.status);
      if (status > SegmentStatus::kDead) return damaged("its segment table is damaged");
      if (status != SegmentStatus::kLive) continue;
      if (read(segment.committed) > header().capacity) return damaged("its segment table is damaged");
      ++result_.segments;
      result_.reserved_bytes += read(segment.committed);
    }
    return true;
  }

  bool read_blocks() {
    const auto blocks = std::make_unique<BlockEntry[]>(kBlocksPerRead);
    const std::uint32_t count = read(header().block_count);
    for (std::uint32_t first = 0; first < count; first += kBlocksPerRead) {
      const std::uint32_t here = std::min(kBlocksPerRead, count - first);
      if (!read_exactly(fd_.get(), blocks.get(), here * sizeof(BlockEntry),
                        kHeaderBytes + std::uint64_t{first} * sizeof(BlockEntry))) {
        return damaged("its block table was cut");
      }
      const Ticks now = ticks_now();
      for (std::uint32_t i = 0; i < here; ++i) {
        if (!add_block(blocks[i], now)) return damaged("block " + std::to_string(first + i) + " has no sane size");
      }
    }
    for (std::uint32_t slot = 0; slot < kMaxPeers; ++slot) {
      const bool lives = slot == value(kOwnerSlot) ? owner_alive_ : alive(PeerSlot{slot});
      if (!lives && held_[slot].blocks == 0) continue;
      result_.peers.push_back({slot, read(header().peers[slot].pid), lives, held_[slot].blocks, held_[slot].bytes});
    }
    return true;
  }

  bool add_block(const BlockEntry& block, Ticks now) {
    const std::uint64_t holds = read(block.state.holds);
    const std::uint32_t messages_before = result_.messages;
    for (const auto& word : block.state.cells) {
      const MessageCell cell = MessageCell::unpack(read(word));
      if (cell.remaining == 0) continue;
      const Ticks age = ticks_since(cell.time, now);
      ++result_.messages;
      result_.loads_to_come += cell.remaining;
      result_.expired_messages += age >= header().ttl_ticks ? 1 : 0;
      result_.oldest_message = std::max(result_.oldest_message.value_or(0), static_cast<double>(age) / kTicksPerSecond);
    }
    if (holds == 0 && result_.messages == messages_before) return true;
    const std::uint64_t bytes = read(block.place.bytes);
    if (bytes > header().capacity) return false;
    ++result_.blocks_in_use;
    result_.bytes_in_use += bytes;
    for (std::uint64_t left = holds; left != 0; left &= left - 1) {
      Held& held = held_[static_cast<std::size_t>(std::countr_zero(left))];
      ++held.blocks;
      held.bytes += bytes;
    }
    return true;
  }

  struct Held {
    std::uint32_t blocks = 0;
    std::uint64_t bytes = 0;
  };
  ArenaId arena_;
  std::vector<std::string> data_;
  bool found_ = false;
  bool trusted_ = false;
  UniqueFd fd_;
  std::uint64_t size_ = 0;
  bool owner_alive_ = false;
  alignas(ControlHeader) std::array<std::byte, sizeof(ControlHeader)> header_bytes_{};
  std::array<Held, kMaxPeers> held_{};
  ArenaSurvey result_;
};

}  // namespace

std::vector<ArenaSurvey> survey() {
  std::vector<ArenaSurvey> all;
  for (const NamedSegments& segments : list_arenas()) {
    // Held for fork's sake: a child that got the descriptor would keep the memory of an arena that is removed.
    const std::lock_guard guard(attach_mutex());
    if (auto one = Surveyor(segments).look()) all.push_back(std::move(*one));
  }
  for (const NamelessSegment& nameless : list_nameless_arenas()) {
    const std::lock_guard guard(attach_mutex());
    try {
      auto fd = open_nameless_segment(control_name(nameless.arena), nameless.place);
      if (!fd) continue;
      if (auto one = Surveyor(nameless.arena, std::move(*fd)).look()) all.push_back(std::move(*one));
    } catch (const Error& error) {
      // That process has become another's to look into.
      if (error.code() != ErrorCode::kSegmentLost) throw;
    }
  }
  return all;
}

}  // namespace shmx
