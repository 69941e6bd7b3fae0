// What exists once per process: its attachments, its process-wide locks, its behaviour at fork and at exit.
//
// Lock order, outermost first: the GIL; a fork participant's lock (arena, destination pool); the attach lock;
// an attachment's map lock; probe_mutex; the registry lock; block locks. The last two are leaves: nothing is
// called, copied or waited for under them.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "layout.hpp"

namespace shmx {

class Attachment;
class Hold;
struct MessageId;

// Makes what is made once per process and found out once per machine, when the module is imported. A child forked while
// another thread was making one of these at first use would wait for that thread for ever.
void prepare_process() noexcept;

// False in a child made by a raw clone, where no at-fork handler ran: such a process must touch neither shared
// memory nor names.
[[nodiscard]] bool process_joined();

// The process-private lock of a block (shared by blocks of equal index modulo the number of locks).
[[nodiscard]] std::mutex& block_lock(BlockIndex block);

class AllBlockLocks {
 public:
  AllBlockLocks();
  ~AllBlockLocks();
  AllBlockLocks(const AllBlockLocks&) = delete;
  AllBlockLocks& operator=(const AllBlockLocks&) = delete;
};

// Held while this process probes peer slots: two probes through one description would not see each other.
[[nodiscard]] std::mutex& probe_mutex();

// The membership in an arena, if this process has one. Never waits for a system call.
[[nodiscard]] std::shared_ptr<Attachment> find_attachment(ArenaId arena);
// The membership, made on first use: by name, or at that place. Throws as Attachment::join.
[[nodiscard]] std::shared_ptr<Attachment> attach(ArenaId arena, DescriptorPlace place = {});
// One load of a handle (Attachment::load) in the arena of that name, joining it if need be.
[[nodiscard]] Hold load_block(ArenaId arena, DescriptorPlace place, BlockIndex block, Generation generation,
                              std::optional<MessageId> message);
// Held while this process takes a peer slot: a fork in between would give the lock's description to the child.
[[nodiscard]] std::mutex& attach_mutex();
// The caller holds attach_mutex().
void register_attachment(const std::shared_ptr<Attachment>& attachment);
void forget_attachment(const Attachment& attachment);
[[nodiscard]] std::vector<std::shared_ptr<Attachment>> all_attachments();

// Something with a lock that must be free in a forked child.
class ForkParticipant {
 public:
  ForkParticipant() = default;
  virtual ~ForkParticipant() = default;
  ForkParticipant(const ForkParticipant&) = delete;
  ForkParticipant& operator=(const ForkParticipant&) = delete;

  virtual void lock_for_fork() noexcept = 0;
  virtual void unlock_in_parent() noexcept = 0;
  // In the child, only the forking thread exists. Runs before the attachments have joined.
  virtual void unlock_in_child() noexcept = 0;

 protected:
  // Called by the complete object: last in its constructor, first in its destructor.
  void take_part_in_forks();
  void leave_forks();
};

}  // namespace shmx
