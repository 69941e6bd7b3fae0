#include "reaper.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <new>

#include "arena.hpp"
#include "attachment.hpp"
#include "block_state.hpp"
#include "error.hpp"
#include "host.hpp"
#include "peer_lock.hpp"
#include "process.hpp"

namespace shmx {
namespace {

constexpr std::size_t kNotedRemovals = 64;

bool all_blocks_idle(const ControlSegment& control) {
  const std::uint32_t count = control.block_count();
  for (std::uint32_t i = 0; i < count; ++i) {
    if (!is_idle(control.block(BlockIndex{i}).state)) return false;
  }
  return true;
}

// The reuse protocol for the whole arena: close, look again, commit. A load in between undoes the closing.
bool close_arena(ControlSegment& control) {
  std::atomic<Lifecycle>& lifecycle = control.header().lifecycle;
  const Lifecycle seen = lifecycle.load(std::memory_order_seq_cst);
  // A reaper before us was killed between the decision and the last name.
  if (seen == Lifecycle::kGone) return true;
  // No closing would ever succeed, and reap() would try for ever.
  if (seen > Lifecycle::kGone) {
    throw Error(ErrorCode::kInvalidHandle,
                "arena " + control.name() + " is damaged: its lifecycle is none; remove its files from /dev/shm");
  }
  if (!all_blocks_idle(control)) return false;
  Lifecycle expected = Lifecycle::kOpen;
  // Left at closing by a reaper that was killed: go on from there.
  lifecycle.compare_exchange_strong(expected, Lifecycle::kClosing, std::memory_order_seq_cst);
  if (all_blocks_idle(control)) {
    expected = Lifecycle::kClosing;
    return lifecycle.compare_exchange_strong(expected, Lifecycle::kGone, std::memory_order_seq_cst);
  }
  expected = Lifecycle::kClosing;
  lifecycle.compare_exchange_strong(expected, Lifecycle::kOpen, std::memory_order_seq_cst);
  return false;
}

bool has_live_peer(ControlSegment& control, std::uint64_t spared) {
  for (std::uint32_t i = value(kOwnerSlot) + 1; i < kMaxPeers; ++i) {
    if ((spared & hold_bit(PeerSlot{i})) == 0 && is_alive(control.file(), PeerSlot{i})) return true;
  }
  return false;
}

void drop_messages(ControlSegment& control, std::uint64_t spared, Expiry expiry) {
  if (expiry == Expiry::kNever || (expiry == Expiry::kTimeToLive && has_live_peer(control, spared))) return;
  const Ticks ttl = expiry == Expiry::kNow ? 0 : control.header().ttl_ticks;
  const std::uint32_t count = control.block_count();
  const Ticks now = ticks_now();
  for (std::uint32_t i = 0; i < count; ++i) drop_expired(control.block(BlockIndex{i}).state, ttl, now);
}

// Data segments first and the control segment last, so that a reaper killed in between leaves a name to go on from.
void unlink_arena(ArenaId arena, const std::string& control) {
  for (const NamedSegments& segments : list_arenas()) {
    if (segments.arena != arena) continue;
    for (const std::string& name : segments.data) unlink_segment(name);
  }
  unlink_segment(control);
}

// Guarded by probe_mutex(), which every removal holds. Never destroyed, as in process.cpp.
std::vector<Removal>& removals() {
  static auto* instance = new std::vector<Removal>;
  return *instance;
}

void note_removal(Removal removal) {
  try {
    std::vector<Removal>& noted = removals();
    if (noted.size() >= kNotedRemovals) noted.erase(noted.begin());
    noted.push_back(std::move(removal));
  } catch (const std::bad_alloc&) {
    return;  // what is missing in a log is no failure of the removal
  }
}

// None where there is no memory for the list: the next call, or the next reaper, does what is to be done.
std::vector<std::shared_ptr<Attachment>> attachments_to_leave() noexcept {
  try {
    return all_attachments();
  } catch (const std::bad_alloc&) {
    return {};
  }
}

std::uint64_t reserved_bytes(const ControlSegment& control) {
  std::uint64_t bytes = 0;
  for (const SegmentEntry& entry : control.header().segments) {
    // relaxed: a report.
    if (entry.status.load(std::memory_order_relaxed) == SegmentStatus::kLive) {
      bytes += entry.committed.load(std::memory_order_relaxed);
    }
  }
  return bytes;
}

// A control segment without a header: its creator was killed, or is at it right now and then has the owner lock
// or will find the name gone once it has it.
Reaped reap_torn(ArenaId arena) {
  const std::string name = control_name(arena);
  auto fd = open_segment(name);
  if (!fd) return Reaped::kRemoved;
  const FileFacts facts = file_facts(fd->get(), name);
  if (facts.uid != ::geteuid()) return Reaped::kNotOurs;
  SegmentFile file(name, std::move(*fd));
  const std::lock_guard guard(probe_mutex());
  const auto owner = ProbeLock::try_take(file, kOwnerSlot);
  if (!owner) return Reaped::kOwnerAlive;
  if (facts.bytes >= sizeof(std::uint64_t)) {
    std::uint64_t magic = 0;
    if (::pread(file.fd(), &magic, sizeof magic, 0) != sizeof magic || magic != 0) {
      return facts.bytes < kHeaderBytes ? Reaped::kNotOurs : Reaped::kOwnerAlive;
    }
  }
  unlink_arena(arena, name);
  note_removal({name, 0, false});
  return Reaped::kRemoved;
}

// Without a control segment nobody can attach; whoever has the data mapped keeps it.
Reaped reap_headless(const NamedSegments& segments) {
  const std::lock_guard guard(probe_mutex());
  for (const std::string& name : segments.data) {
    struct stat facts{};
    // Root may remove what others have made, which is no reason to.
    if (::lstat(("/dev/shm" + name).c_str(), &facts) == 0 && facts.st_uid != ::geteuid()) return Reaped::kNotOurs;
  }
  for (const std::string& name : segments.data) unlink_segment(name);
  note_removal({control_name(segments.arena), 0, false});
  return Reaped::kRemoved;
}

Reaped reap_by_name(ArenaId arena, Expiry expiry, std::uint64_t& bytes) {
  try {
    auto control = ControlSegment::open(arena);
    if (!control) return Reaped::kRemoved;
    bytes = reserved_bytes(*control);
    return reap(*control, 0, expiry);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kSegmentLost) return reap_torn(arena);
    if (error.code() == ErrorCode::kInvalidHandle || error.code() == ErrorCode::kSystem) return Reaped::kNotOurs;
    throw;
  }
}

void leave_if_done(Attachment& attachment, Expiry expiry) noexcept {
  try {
    if (!attachment.usable() || attachment.uses() != 0) return;
    {
      const std::lock_guard guard(probe_mutex());
      ControlSegment& control = attachment.control();
      const std::uint64_t own = hold_bit(attachment.slot());
      control.sweep(own);
      drop_messages(control, own, expiry);
      if (!all_blocks_idle(control)) return;
    }
    leave(attachment);
  } catch (const std::exception&) {
    return;  // as in reap_if_orphaned
  }
}

}  // namespace

Reaped reap(ControlSegment& control, std::uint64_t spared, Expiry expiry) {
  for (;;) {
    {
      const std::lock_guard guard(probe_mutex());
      // /dev/shm is sticky: another member of the group could empty the arena but not take its names away.
      if (file_facts(control.file().fd(), control.name()).uid != ::geteuid()) return Reaped::kNotOurs;
      const auto owner = ProbeLock::try_take(control.file(), kOwnerSlot);
      if (!owner) return Reaped::kOwnerAlive;
      control.clear_slot(kOwnerSlot);
      control.sweep(spared | hold_bit(kOwnerSlot));
      drop_messages(control, spared, expiry);
      if (close_arena(control)) {
        const auto member = find_attachment(control.arena());
        const bool own = member != nullptr && member->is_owner();
        if (control.backend() == Backend::kShm) unlink_arena(control.arena(), control.name());
        // Without a name, each of its peers sees the end of it; its owner's is the one to tell of.
        if (own || control.backend() == Backend::kShm) note_removal({control.name(), reserved_bytes(control), own});
        return Reaped::kRemoved;
      }
    }
    // A peer that released while the lock was taken could not take it, and counts on this second look.
    if (!all_blocks_idle(control)) return Reaped::kInUse;
  }
}

void reap_if_orphaned(Attachment& attachment) noexcept {
  try {
    const ControlHeader& header = attachment.control().header();
    // seq_cst: after the clearing of the hold; the leaving owner sets it before it looks at the holds.
    if (header.owner_left.load(std::memory_order_seq_cst) == 0) {
      // An owner that was killed sets nothing. One that has been quiet for a second is worth a system call.
      const Ticks now = ticks_now();
      if (ticks_since(header.owner_active.load(std::memory_order_relaxed), now) < kTicksPerSecond) return;
      if (!attachment.may_probe_owner(now)) return;
    }
    // This peer is alive and may load what is still on its way: nothing expires.
    if (reap(attachment.control(), hold_bit(attachment.slot()), Expiry::kNever) == Reaped::kRemoved) {
      (void)attachment.retire();
      forget_attachment(attachment);
    }
  } catch (const std::exception&) {
    // The arena stays for the next reaper; a release has no way to fail.
    return;
  }
}

void detach_from_orphans() noexcept {
  for (const auto& attachment : attachments_to_leave()) {
    if (attachment->is_owner() && attachment->lingers()) leave_if_done(*attachment, Expiry::kOutlived);
    if (attachment->is_owner() || attachment->uses() != 0) continue;
    try {
      {
        const std::lock_guard guard(probe_mutex());
        if (is_alive(attachment->control().file(), kOwnerSlot)) continue;
      }
      // There is no way back into an arena without a name. So its peers stay, and do not stay for one another.
      const bool returns = attachment->control().backend() == Backend::kShm;
      const Reaped outcome =
          reap(attachment->control(), hold_bit(attachment->slot()), returns ? Expiry::kTimeToLive : Expiry::kOutlived);
      if (!returns && outcome != Reaped::kRemoved) continue;
    } catch (const Error& error) {
      // An arena whose name is gone is one to leave; for any other trouble it stays for the next reaper.
      if (error.code() != ErrorCode::kSegmentLost) continue;
    } catch (const std::exception&) {
      continue;
    }
    // Checked again under the block locks: another thread may have loaded meanwhile.
    if (attachment->retire_if_unused()) forget_attachment(*attachment);
  }
}

void leave_when_done(Attachment& attachment) noexcept {
  attachment.linger();
  leave_if_done(attachment, Expiry::kTimeToLive);
}

void leave(Attachment& attachment) noexcept {
  try {
    if (const auto arena = attachment.owner()) arena->stop_growing();
    // Another thread may be leaving at this moment: the one that has ended the membership does the rest.
    if (!attachment.retire()) return;
    const bool owner = attachment.is_owner();
    // seq_cst: before the look at the holds in reap(), see reap_if_orphaned.
    if (owner) attachment.control().header().owner_left.store(1, std::memory_order_seq_cst);
    try {
      (void)reap(attachment.control(), 0, Expiry::kTimeToLive);
    } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
      // The arena is left to the next reaper, which may be one of this process: it is no member any more.
    }
    {
      const std::lock_guard guard(probe_mutex());
      attachment.control().file().close();
    }
    // Only now: a fork in between finds it in the registry and closes the child's descriptor.
    forget_attachment(attachment);
    if (owner && attachment.uses() == 0) attachment.give_memory_back();
  } catch (const std::exception&) {
    return;  // as in reap_if_orphaned
  }
}

void leave_all() noexcept {
  for (const auto& attachment : attachments_to_leave()) {
    if (attachment->is_owner() || attachment->uses() == 0) leave(*attachment);
  }
}

std::vector<Removal> take_removals() {
  const std::lock_guard guard(probe_mutex());
  return std::exchange(removals(), {});
}

std::vector<ReapReport> reap_all(Expiry expiry) {
  detach_from_orphans();
  std::vector<ReapReport> reports;
  // Held for fork's sake: a child must not get the descriptors that are open in here.
  const std::lock_guard guard(attach_mutex());
  for (const NamedSegments& segments : list_arenas()) {
    // An arena this process takes part in is in use as long as it does.
    if (find_attachment(segments.arena)) continue;
    ReapReport report{control_name(segments.arena), Reaped::kNotOurs, 0};
    if (segments.has_control) {
      report.outcome = reap_by_name(segments.arena, expiry, report.bytes);
    } else if (expiry == Expiry::kNow) {
      report.outcome = reap_headless(segments);
    }
    reports.push_back(std::move(report));
  }
  return reports;
}

}  // namespace shmx
