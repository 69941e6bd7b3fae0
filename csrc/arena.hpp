// The owner's side of an arena: which block a tensor gets, growth, trim. Allocation happens here and nowhere
// else; the books are private to this process, only the block table and the segment table are shared.
//
// Which idle block is used again: one whose messages were all announced explicitly may be taken at once, and
// the most recently used are looked at first (their bytes are still in the cache); one with an implicit
// announcement rests for reuse_delay after its last release; one with unannounced handles (a key, readers(0))
// is kept while there is room elsewhere. Under pressure every idle block may be taken, in order of age.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "attachment.hpp"
#include "block_lists.hpp"
#include "block_state.hpp"
#include "copy.hpp"
#include "error.hpp"
#include "grower.hpp"
#include "layout.hpp"
#include "process.hpp"
#include "space.hpp"

namespace shmx {

// kAuto: names in /dev/shm, unless that cannot hold the capacity.
enum class BackendChoice : std::uint8_t { kShm, kMemfd, kAuto };

struct ArenaOptions {
  std::uint64_t capacity = 0;                // 0: the lesser of 64 GiB and half of /dev/shm, or of available memory
  std::uint64_t segment_bytes = 256U << 20;  // size of a data segment; reserved only as used
  double ticket_ttl = 300;                   // seconds
  double reuse_delay = 0.1;                  // seconds
  bool scrub = false;                        // clear blocks before they are used again
  std::uint64_t reserve = 0;                 // bytes to take from the system ahead of need, in the background
  std::optional<int> numa_node;              // where the memory is to lie; by default where the producer runs
  std::optional<gid_t> group;                // whose members may attach, too; by default this user id alone
  BackendChoice backend = BackendChoice::kShm;
  bool half_of_shm = false;  // found by create(): nobody chose the capacity
};

struct Allocation {
  Hold hold;
  std::byte* data;
  Destination where;
};

struct ArenaStats {
  std::string name;
  Backend backend;
  std::uint64_t capacity;
  std::uint64_t reserved;   // bytes of shared memory taken from the system
  std::uint64_t in_blocks;  // bytes of blocks that hold a tensor or may be loaded yet
  std::uint64_t largest_free;
  std::optional<int> numa_node;  // where the first page of the arena lies
  std::uint32_t segments;
  std::uint32_t blocks;
  std::uint32_t held_blocks;
  std::uint32_t messages;  // messages with loads to come
  std::uint32_t peers;     // processes that hold a block
  std::uint64_t published;
  std::uint64_t reused;
  std::uint64_t swept;
  std::uint64_t expired;
  std::uint64_t revoked;
  std::uint64_t peak_reserved;
  std::uint64_t peak_in_blocks;  // of all blocks at once, be they in use or kept to be used again
};

class Arena : public ForkParticipant, public std::enable_shared_from_this<Arena> {
 public:
  [[nodiscard]] static std::shared_ptr<Arena> create(ArenaOptions options);
  ~Arena() override;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A block for `bytes`, its content undefined (zero with scrub). try_allocate makes no system call and answers
  // nothing if it would need one; allocate throws ArenaFull.
  [[nodiscard]] std::optional<Allocation> try_allocate(ByteCount bytes);
  [[nodiscard]] Allocation allocate(ByteCount bytes);

  // A use of the block that was published under the key, if it still exists, and what note_key stored with it.
  struct Keyed {
    Hold hold;
    std::string description;
  };
  [[nodiscard]] std::optional<Keyed> find_key(const std::string& key);
  void note_key(const std::string& key, const Hold& hold, std::string description);

  // The use and the offset in its block of an address inside this arena's memory, if this process holds it.
  struct Located {
    Hold hold;
    std::uint64_t offset;
    std::uint64_t block_bytes;
  };
  [[nodiscard]] std::optional<Located> locate(const void* address);
  // False for most addresses outside: a look without a lock.
  [[nodiscard]] bool may_contain(const void* address) const;

  void revoke(const Hold& hold);
  // Retires idle blocks and gives wholly free segments back to the system; answers how many bytes.
  std::uint64_t trim();
  // Frees what dead peers held and, if asked, gives up the messages that have outlived their time-to-live.
  // Answers how many peers were dead.
  std::uint32_t sweep(bool expire_messages);
  // Once: which block lost a message to its time-to-live.
  [[nodiscard]] std::optional<std::string> take_expiry_notice();
  // No more allocation. The arena leaves the system when nothing in it is in use any more.
  void close();
  // Waits until nothing more is to be taken ahead of need. Not at the same time as close().
  void wait_for_growth();
  // No more allocation, nor growth ahead of need; waits for the step that is under way.
  void stop_growing();
  // Also after the process has left all its arenas.
  [[nodiscard]] bool closed() const { return closed_.load(std::memory_order_relaxed) || !attachment_->usable(); }

  [[nodiscard]] ArenaStats stats();
  [[nodiscard]] const std::shared_ptr<Attachment>& attachment() const { return attachment_; }
  [[nodiscard]] const ArenaOptions& options() const { return options_; }
  [[nodiscard]] std::string name() const { return attachment_->control().name(); }
  [[nodiscard]] Backend backend() const { return attachment_->control().backend(); }

  void lock_for_fork() noexcept override;
  void unlock_in_parent() noexcept override;
  void unlock_in_child() noexcept override;

 private:
  struct Book {
    bool live = false;
    Range range{};
    std::string key;
    std::string description;
    std::uint64_t written_at = 0;  // written_ when it was last handed out; 0: never
    Ticks written_when = 0;
  };
  struct Segment {
    std::uint32_t id = 0;
    std::uint64_t bytes = 0;
    std::uint64_t committed = 0;
    std::byte* base = nullptr;
    std::map<std::uint64_t, std::uint32_t> blocks;  // offset -> index
  };
  static constexpr Ticks kPauseAfterSweep = kTicksPerSecond / 10;
  enum class Reuse : std::uint8_t { kPolite, kUnderPressure };

  Arena(ArenaOptions options, std::shared_ptr<Attachment> attachment);

  void require_open() const;
  [[nodiscard]] std::uint64_t checked_block_bytes(ByteCount bytes) const;
  // Makes sure that a block can get an entry of the table, if need be that of an idle block.
  void make_entry(std::uint64_t size);
  [[nodiscard]] Allocation allocate_block(std::uint64_t size);
  [[nodiscard]] std::optional<Allocation> allocate_without_growth(std::uint64_t size);
  void limit(const Allocation& made, ByteCount bytes) const;
  [[nodiscard]] std::optional<std::uint32_t> reuse_same_size(std::uint64_t size);
  [[nodiscard]] std::optional<Range> reclaim_some(std::uint64_t size);
  [[nodiscard]] std::optional<Range> reclaim_oldest(std::uint64_t size);
  [[nodiscard]] bool may_reuse(std::uint32_t index, Reuse reuse, Ticks now) const;
  bool retire_block(std::uint32_t index);
  void free_block(std::uint32_t index);
  // Enters a block in all the books, or in none.
  [[nodiscard]] std::uint32_t enter_block(const Range& range);
  [[nodiscard]] Allocation place_block(const Range& range);
  [[nodiscard]] Allocation hand_out(std::uint32_t index);
  // Where so many bytes can be had behind the reserved part of a segment, and how many of them are free there already.
  struct Growth {
    std::uint32_t slot;
    std::uint64_t free;
  };
  [[nodiscard]] std::optional<Growth> growth_in_segments(std::uint64_t size) const;
  bool grow(std::uint64_t size);
  void commit(std::uint32_t slot, std::uint64_t bytes);
  void enter(std::uint32_t slot, std::uint64_t bytes);
  [[nodiscard]] bool grows_ahead() const;
  [[nodiscard]] std::uint64_t ahead() const;
  [[nodiscard]] bool plenty_left(std::uint64_t bytes) const;
  void want_growth();
  bool grow_ahead() noexcept;
  std::uint32_t add_segment(std::uint64_t bytes);
  void note_addresses(const std::byte* base, std::uint64_t bytes);
  void drop_segment(std::uint32_t slot);
  void drop_empty_segments();
  std::uint32_t sweep_dead_peers();
  std::uint32_t expire();
  [[nodiscard]] NoSpaceError full(std::uint64_t size, const std::string& reason);
  [[nodiscard]] std::string capacity_used_up() const;
  [[nodiscard]] std::string capacity_origin() const;
  [[nodiscard]] ControlSegment& control() { return attachment_->control(); }
  [[nodiscard]] BlockEntry& entry(std::uint32_t index) const;

  const ArenaOptions options_;
  const Ticks reuse_delay_;
  const Ticks ttl_;
  const std::shared_ptr<Attachment> attachment_;
  std::atomic<bool> closed_{false};
  std::atomic<std::uintptr_t> lowest_address_{UINTPTR_MAX};
  std::atomic<std::uintptr_t> highest_address_{0};

  // Held by whoever grows or drops segments, across system calls, before mutex_.
  std::mutex growth_mutex_;
  // Held while new bytes are prepared in the background, and before a segment is unmapped; the last of the three.
  std::mutex prepare_mutex_;
  std::mutex mutex_;  // all below is guarded by it
  std::unique_ptr<Grower> grower_;
  std::vector<Book> books_;
  std::vector<std::uint32_t> spare_entries_;
  BlockLists lists_;
  FreeSpace space_;
  std::vector<Segment> segments_;
  std::uint32_t next_segment_id_ = 1;
  std::uint64_t reserved_ = 0;
  std::unordered_map<std::string, std::uint32_t> keys_;
  std::optional<Ticks> last_dead_;  // when a sweep has found somebody dead
  std::string growth_refusal_;
  std::optional<std::string> expiry_notice_;
  bool expiry_noticed_ = false;
  std::uint64_t published_ = 0;
  std::uint64_t written_ = 0;  // bytes of all blocks handed out
  std::uint64_t reused_ = 0;
  std::uint64_t swept_ = 0;
  std::uint64_t expired_ = 0;
  std::uint64_t revoked_ = 0;
  std::uint64_t peak_reserved_ = 0;
  std::uint64_t placed_ = 0;  // bytes of all blocks
  std::uint64_t peak_placed_ = 0;
};

}  // namespace shmx
