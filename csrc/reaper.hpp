// Removing arenas that nobody needs: the owner's own exit and the clean-up after dead owners are one procedure.
#pragma once

#include <string>
#include <vector>

#include "control.hpp"
#include "layout.hpp"

namespace shmx {

class Attachment;

enum class Reaped : std::uint8_t {
  kRemoved,     // nothing was outstanding; all names are gone
  kInUse,       // holds or messages are left: the arena stays an orphan
  kOwnerAlive,  // or another process is reaping it right now
  kNotOurs,     // another user's, in group mode too, another layout version, or not readable
};

// kOutlived: as kTimeToLive, though there are live peers.
enum class Expiry : std::uint8_t { kNever, kTimeToLive, kOutlived, kNow };

// Takes the owner lock, sweeps, and removes the arena if nothing is outstanding. `spared` are this process's own
// slots. Without live peers, messages are given up as `expiry` says; kNow gives them up in any case.
[[nodiscard]] Reaped reap(ControlSegment& control, std::uint64_t spared, Expiry expiry);

// For Attachment::set_on_idle: this process has just let go of its last block of the arena.
void reap_if_orphaned(Attachment& attachment) noexcept;

// Leaves arenas in which this process holds nothing and whose owner is gone, and reaps them.
void detach_from_orphans() noexcept;

// The owner has closed an arena without a name. What is on its way can be loaded as long as this process has it open:
// leave(), if nothing is; otherwise a later call looks again.
void leave_when_done(Attachment& attachment) noexcept;

// This process ends, or closes its arena: gives up every hold and removes what nobody else needs.
void leave(Attachment& attachment) noexcept;
// At the end of the process: leaves its own arenas, and those of others in which it holds nothing. What it still
// holds there ends with the process, so exit handlers that run later may read it.
void leave_all() noexcept;

struct ReapReport {
  std::string name;
  Reaped outcome;
  std::uint64_t bytes;  // reserved memory of the arena
};
// Reaps every arena in /dev/shm whose owner is gone.
[[nodiscard]] std::vector<ReapReport> reap_all(Expiry expiry);

// An arena whose names this process has removed: its own, or an orphan.
struct Removal {
  std::string name;
  std::uint64_t bytes;  // that were reserved
  bool own;
};
// Each of them once, the oldest first; only the latest are kept. For logs: a release may remove an arena, and has no
// way to say so.
[[nodiscard]] std::vector<Removal> take_removals();

}  // namespace shmx
