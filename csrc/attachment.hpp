// One process's membership in an arena: its peer slot, its count of uses per block, its mappings.
//
// A block's private count and its bit in shared memory change together under a process-private lock of
// that block (block_lock), which is never held across a system call, a copy or Python code.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "block_state.hpp"
#include "control.hpp"
#include "error.hpp"
#include "layout.hpp"
#include "peer_lock.hpp"
#include "pinned.hpp"
#include "process.hpp"
#include "segment.hpp"

namespace shmx {

class Arena;
class Attachment;

// One use of a block by this process: a handle, a view or a copy in flight. The block's bytes stay as they
// are while it lives. Move-only; share() makes another use of the same block.
class Hold {
 public:
  Hold() = default;
  // Takes over one use that is already counted.
  Hold(std::shared_ptr<Attachment> attachment, BlockIndex block, Generation generation)
      : attachment_(std::move(attachment)), block_(block), generation_(generation) {}
  Hold(Hold&& other) noexcept = default;
  Hold& operator=(Hold&& other) noexcept;
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  ~Hold() { release(); }

  [[nodiscard]] bool held() const { return attachment_ != nullptr; }
  [[nodiscard]] Hold share() const;
  void release();

  [[nodiscard]] Attachment& attachment() const { return *attachment_; }
  [[nodiscard]] BlockIndex block() const { return block_; }
  [[nodiscard]] Generation generation() const { return generation_; }

 private:
  std::shared_ptr<Attachment> attachment_;
  BlockIndex block_{};
  Generation generation_{};
};

// How segments of other processes' arenas are mapped from now on.
void set_peer_access(Access access);
[[nodiscard]] Access peer_access();

class Attachment : public std::enable_shared_from_this<Attachment> {
 public:
  // Joins an existing arena. Throws SegmentLost, TooManyPeers, InvalidHandle.
  [[nodiscard]] static std::shared_ptr<Attachment> join(ArenaId arena, DescriptorPlace place = {});
  // The owner's own membership, with the owner slot already locked.
  Attachment(ControlSegment control, PeerLock lock, PeerSlot slot);
  ~Attachment();
  Attachment(const Attachment&) = delete;
  Attachment& operator=(const Attachment&) = delete;

  // One load of a handle: makes a use of the block if it still has that generation, and takes one from the
  // message. Throws StaleHandle, SegmentLost, InvalidHandle.
  [[nodiscard]] Hold load(BlockIndex block, Generation generation, std::optional<MessageId> message);
  // The owner's first use of a block that it has just retired.
  [[nodiscard]] Hold adopt(BlockIndex block, Generation generation);
  // A use of a block that may have been reused; nothing if it was.
  [[nodiscard]] std::optional<Hold> try_hold(BlockIndex block, Generation generation);

  // The bytes of a held block. Maps its segment at first use (system calls); mapped() never does, and answers
  // null if that is still to be done. Throws SegmentLost, InvalidHandle.
  [[nodiscard]] std::byte* data(const Hold& hold);
  [[nodiscard]] std::byte* mapped(const Hold& hold) const;
  // Maps every live segment and enters its pages.
  void map_all();
  // Owner: adds a segment that it has created and mapped.
  void add_mapping(std::uint32_t segment_slot, std::uint32_t segment_id, Mapping mapping);
  // Unmaps segments that their owner has marked dead.
  void drop_dead_mappings();

  [[nodiscard]] ControlSegment& control() { return control_; }
  [[nodiscard]] ArenaId arena() const { return control_.arena(); }
  [[nodiscard]] PeerSlot slot() const { return slot_; }
  [[nodiscard]] bool is_owner() const { return slot_ == kOwnerSlot; }
  // Uses of all blocks together.
  // seq_cst: a closing owner asks after it has set on_idle, see unuse().
  [[nodiscard]] std::uint64_t uses() const { return uses_.load(std::memory_order_seq_cst); }
  [[nodiscard]] std::uint32_t uses_of(BlockIndex block) const;

  // What this process has done in the arena, and has of it now.
  struct Counts {
    std::uint64_t loaded;
    std::uint64_t stale_loads;
    std::uint32_t held_blocks;
    std::uint64_t held_bytes;
  };
  [[nodiscard]] Counts counts() const;

  // Page-locked parts (attachment_pins.cpp). pin: registers what is reserved and not registered yet; throws
  // Error(kDevice), with nothing of the segment at fault registered that was not before, and
  // answers whether all of it is registered now. unpin: unregisters all.
  bool pin(DeviceDriver& driver, int device, std::uint64_t chunk_bytes = kMaxChunk);
  void unpin() noexcept;
  // Held while pages of the arena are registered.
  [[nodiscard]] PinTurn take_pin_turn() { return {control_.file(), pin_turns_, probe_mutex()}; }
  // Where registrations meet in a range, as offsets from its begin; nothing if some of it is not registered.
  [[nodiscard]] std::optional<std::vector<std::uint64_t>> cuts(const std::byte* begin, std::uint64_t bytes) const;
  // No more registration in the background, until it is allowed again.
  void refuse_pinning() { pinning_.store(false, std::memory_order_relaxed); }
  void allow_pinning() { pinning_.store(true, std::memory_order_relaxed); }
  // relaxed: a wish that comes late or in vain does no harm.
  [[nodiscard]] bool may_pin() const { return pinning_.load(std::memory_order_relaxed); }

  // Throws if this process cannot use the arena any more (it was forked with no free slot; see error).
  void require_usable() const;
  [[nodiscard]] bool usable() const;
  // Drops every use and gives up the slot; live Hold objects and mappings stay valid but mean nothing to
  // others any more. At the end of the process, or when the arena is gone. False if that was done before.
  bool retire();
  // retire(), unless a use has begun meanwhile.
  bool retire_if_unused();
  // After retire(), with no use left: unmaps the data, and puts private zeros in the place of the control segment,
  // which a caller that comes late may still look at.
  void give_memory_back();
  // At most once a second, for the cost of a system call.
  [[nodiscard]] bool may_probe_owner(Ticks now);
  // The allocator of this arena, in the process that owns it.
  void set_owner(std::weak_ptr<Arena> owner) { owner_ = std::move(owner); }
  [[nodiscard]] std::shared_ptr<Arena> owner() const { return owner_.lock(); }
  // The owner has closed an arena without a name while messages are on their way, and keeps it open for them.
  [[nodiscard]] bool lingers() const { return lingers_.load(std::memory_order_relaxed); }
  void linger() { lingers_.store(true, std::memory_order_relaxed); }
  // What to do when the last use ends. Called without locks; must not throw.
  void set_on_idle(void (*on_idle)(Attachment&) noexcept) { on_idle_.store(on_idle, std::memory_order_seq_cst); }

  // Fork (process.cpp): lock first; prepare runs in the parent with all block locks held.
  void lock_for_fork() noexcept {
    map_mutex_.lock();
    pin_mutex_.lock();
    chunks_mutex_.lock();
  }
  void unlock_after_fork() noexcept {
    chunks_mutex_.unlock();
    pin_mutex_.unlock();
    map_mutex_.unlock();
  }
  void prepare_fork() noexcept;
  void parent_after_fork() noexcept;
  // False: the child is no member; it attaches anew if it needs to.
  bool child_after_fork() noexcept;

 private:
  friend class Hold;
  struct DataMapping {
    std::atomic<std::uint32_t> segment_id{0};
    std::atomic<std::byte*> base{nullptr};
    std::atomic<std::uint64_t> bytes{0};
    Mapping mapping;
    std::atomic<std::uint64_t> pinned{0};  // bytes from the start that are registered
    std::vector<PinnedChunk> chunks;       // guarded by chunks_mutex_
    DriverKind pin_kind = DriverKind::kCuda;
    int pin_device = 0;
    bool stuck = false;  // something stays registered that is in no chunk; guarded by pin_mutex_
  };
  enum class ForkPlan : std::uint8_t { kNone, kJoins, kLeftOut };

  void use(BlockIndex block);
  void unuse(BlockIndex block);
  bool confirm_arena();
  bool retire_under_locks(bool only_if_unused);
  [[nodiscard]] Error stale(BlockIndex block) const;
  DataMapping& map_segment(std::uint32_t segment_slot);
  // Unregisters, then unmaps.
  void unmap(DataMapping& segment);
  // False: some of it may still be registered.
  bool unpin_segment(DataMapping& segment);
  void forget_pins() noexcept;

  struct FreeDeleter {
    void operator()(void* memory) const { std::free(memory); }
  };

  ControlSegment control_;
  PeerLock lock_;
  PeerSlot slot_;
  // calloc: pages of the table appear as blocks are used.
  std::unique_ptr<std::uint32_t[], FreeDeleter> counts_;
  std::atomic<std::uint64_t> uses_{0};
  // Beside uses_, which a load writes anyway: no other cache line, and none that another process sees.
  std::atomic<std::uint64_t> loaded_{0};
  std::atomic<std::uint64_t> stale_loads_{0};
  std::weak_ptr<Arena> owner_;
  std::atomic<bool> inert_{false};
  std::atomic<bool> left_out_of_fork_{false};
  std::atomic<bool> lingers_{false};
  std::atomic<void (*)(Attachment&) noexcept> on_idle_{nullptr};

  std::mutex map_mutex_;  // held across system calls
  std::unique_ptr<DataMapping[]> segments_;
  std::mutex pin_mutex_;             // held while a range is registered or unregistered, after map_mutex_
  mutable std::mutex chunks_mutex_;  // a leaf
  unsigned pin_turns_ = 0;           // guarded by probe_mutex()
  std::atomic<bool> pinning_{true};
  std::atomic<std::uint32_t> trims_seen_{0};
  std::atomic<Ticks> owner_probed_;

  ForkPlan fork_plan_ = ForkPlan::kNone;
  PeerLock child_lock_;
  PeerSlot child_slot_{};
  std::optional<Error> fork_failure_;  // why the child is left out, if not for want of a slot
};

}  // namespace shmx
