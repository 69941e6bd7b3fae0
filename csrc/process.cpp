#include "process.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <new>
#include <unordered_map>

#include "attachment.hpp"
#include "copy.hpp"
#include "destination_pool.hpp"
#include "host.hpp"
#include "in_flight.hpp"
#include "pinned.hpp"
#include "reaper.hpp"

namespace shmx {
namespace {

constexpr std::size_t kBlockLocks = 64;

struct Process {
  std::mutex participants_mutex;
  std::mutex attach_mutex;
  std::mutex probe_mutex;
  std::mutex registry_mutex;
  std::array<std::mutex, kBlockLocks> block_locks;
  std::unordered_map<std::uint64_t, std::shared_ptr<Attachment>> attachments;
  std::vector<ForkParticipant*> participants;
  // One word that the kernel zeroes in every child.
  std::atomic<std::uint32_t>* joined;
  // Filled by the prepare handler for the handlers after the fork.
  std::vector<std::shared_ptr<Attachment>> forking;

  Process();
};

// Never destroyed: destructors of Python objects run after those of static objects.
Process& process() {
  static auto* instance = new Process;
  return *instance;
}

void before_fork() {
  Process& self = process();
  self.participants_mutex.lock();
  for (ForkParticipant* participant : self.participants) participant->lock_for_fork();
  self.attach_mutex.lock();
  self.forking = all_attachments();
  for (const auto& attachment : self.forking) attachment->lock_for_fork();
  self.probe_mutex.lock();
  self.registry_mutex.lock();
  for (std::mutex& lock : self.block_locks) lock.lock();
  for (const auto& attachment : self.forking) attachment->prepare_fork();
}

void unlock_after_fork(Process& self) {
  for (std::mutex& lock : self.block_locks) lock.unlock();
  self.registry_mutex.unlock();
  self.probe_mutex.unlock();
  for (const auto& attachment : self.forking) attachment->unlock_after_fork();
  self.attach_mutex.unlock();
}

void after_fork_in_parent() {
  Process& self = process();
  for (const auto& attachment : self.forking) attachment->parent_after_fork();
  unlock_after_fork(self);
  for (ForkParticipant* participant : self.participants) participant->unlock_in_parent();
  self.forking.clear();
  self.participants_mutex.unlock();
}

void after_fork_in_child() {
  Process& self = process();
  PinLedger::instance().begin_anew();
  for (const auto& attachment : self.forking) {
    if (!attachment->child_after_fork()) self.attachments.erase(value(attachment->control().arena()));
    attachment->set_on_idle(&reap_if_orphaned);
  }
  unlock_after_fork(self);
  // relaxed: the child has one thread.
  self.joined->store(1, std::memory_order_relaxed);
  for (ForkParticipant* participant : self.participants) participant->unlock_in_child();
  self.forking.clear();
  self.participants_mutex.unlock();
}

Process::Process() {
  // Made before the first fork: a child that has to make it may have no memory, and a handler cannot fail.
  (void)PinLedger::instance();
  void* page = ::mmap(nullptr, static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) throw std::bad_alloc();
  ::madvise(page, static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)), MADV_WIPEONFORK);
  joined = new (page) std::atomic<std::uint32_t>(1);
  if (::pthread_atfork(&before_fork, &after_fork_in_parent, &after_fork_in_child) != 0) {
    ::munmap(page, static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)));
    throw std::bad_alloc();
  }
}

}  // namespace

void prepare_process() noexcept {
  const auto attempt = [](auto... makers) {
    const auto one = [](auto make) {
      try {
        (void)make();
      } catch (const std::exception&) {
        return;  // whoever needs it tries again, and tells
      }
    };
    (one(makers), ...);
  };
  attempt(&process, &non_temporal_thresholds, &remembered_bytes, &memory_cgroup_room, &huge_pages_allowed,
          &huge_pages_for_nameless, &InFlight::instance, &Pinner::instance, &DestinationPool::instance);
}

bool process_joined() {
  // relaxed: written before any thread could differ about it.
  return process().joined->load(std::memory_order_relaxed) != 0;
}

std::mutex& block_lock(BlockIndex block) { return process().block_locks[value(block) % kBlockLocks]; }

AllBlockLocks::AllBlockLocks() {
  for (std::mutex& lock : process().block_locks) lock.lock();
}

AllBlockLocks::~AllBlockLocks() {
  for (std::mutex& lock : process().block_locks) lock.unlock();
}

std::mutex& attach_mutex() { return process().attach_mutex; }

std::mutex& probe_mutex() { return process().probe_mutex; }

std::shared_ptr<Attachment> find_attachment(ArenaId arena) {
  Process& self = process();
  const std::lock_guard guard(self.registry_mutex);
  const auto found = self.attachments.find(value(arena));
  return found == self.attachments.end() ? nullptr : found->second;
}

std::shared_ptr<Attachment> attach(ArenaId arena, DescriptorPlace place) {
  if (!process_joined())
    throw Error(ErrorCode::kReleased,
                "this process was made by a bare clone(2), which shmx cannot follow; use fork or spawn");
  if (auto known = find_attachment(arena)) return known;
  // A new producer often means that an old one has ended.
  detach_from_orphans();
  Process& self = process();
  const std::lock_guard guard(self.attach_mutex);
  if (auto known = find_attachment(arena)) return known;
  auto attachment = Attachment::join(arena, place);
  attachment->set_on_idle(&reap_if_orphaned);
  const std::lock_guard registry_guard(self.registry_mutex);
  self.attachments.emplace(value(arena), attachment);
  return attachment;
}

Hold load_block(ArenaId arena, DescriptorPlace place, BlockIndex block, Generation generation,
                std::optional<MessageId> message) {
  for (;;) {
    const auto attachment = attach(arena, place);
    try {
      return attachment->load(block, generation, message);
    } catch (const Error& error) {
      // Another thread has left this membership since it was looked up: join again.
      if (error.code() != ErrorCode::kReleased || !process_joined()) throw;
      forget_attachment(*attachment);
    }
  }
}

void register_attachment(const std::shared_ptr<Attachment>& attachment) {
  Process& self = process();
  const std::lock_guard guard(self.registry_mutex);
  self.attachments.emplace(value(attachment->control().arena()), attachment);
}

void forget_attachment(const Attachment& attachment) {
  Process& self = process();
  std::shared_ptr<Attachment> dropped;  // destroyed after the lock is released
  const std::lock_guard guard(self.registry_mutex);
  const auto found = self.attachments.find(value(attachment.arena()));
  if (found == self.attachments.end() || found->second.get() != &attachment) return;
  dropped = std::move(found->second);
  self.attachments.erase(found);
}

std::vector<std::shared_ptr<Attachment>> all_attachments() {
  Process& self = process();
  const std::lock_guard guard(self.registry_mutex);
  std::vector<std::shared_ptr<Attachment>> all;
  all.reserve(self.attachments.size());
  for (const auto& [id, attachment] : self.attachments) all.push_back(attachment);
  return all;
}

void ForkParticipant::take_part_in_forks() {
  Process& self = process();
  const std::lock_guard guard(self.participants_mutex);
  self.participants.push_back(this);
}

void ForkParticipant::leave_forks() {
  Process& self = process();
  const std::lock_guard guard(self.participants_mutex);
  std::erase(self.participants, this);
}

}  // namespace shmx
