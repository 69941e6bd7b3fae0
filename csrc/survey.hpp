// What lies in /dev/shm, seen from outside: every arena, its owner, its peers, what it holds and waits for. And arenas
// without a name, as far as a process of this user that may be looked into has them open.
//
// Files are read, never mapped: another process may cut or overwrite them at any moment, and a page that is only
// looked at must not come into being. No slot is taken, no word is changed. Nothing read is trusted: it is checked
// before it is used as a size, a count or an index, and only the kernel says who is alive and how much memory it is.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "layout.hpp"
#include "segment.hpp"

namespace shmx {

enum class ArenaState : std::uint8_t {
  kAlive,
  kOrphan,        // its owner is gone
  kStarting,      // no header yet, its creator is at it
  kTorn,          // no header, and its creator is gone
  kHeadless,      // data segments without a control segment
  kForeign,       // another user id's: not opened
  kOtherVersion,  // of a shmx with another layout
  kDamaged,       // not what shmx writes
};

struct PeerSurvey {
  std::uint32_t slot;
  std::uint32_t pid;  // as the peer wrote it, in its PID namespace
  bool alive;         // by the lock of its slot
  std::uint32_t blocks;
  std::uint64_t bytes;
};

struct ArenaSurvey {
  std::string name;
  Backend backend = Backend::kShm;
  ArenaState state = ArenaState::kDamaged;
  std::string trouble;  // what is wrong with a damaged one, or which version another one has
  uid_t uid = 0;
  std::uint64_t memory_bytes = 0;  // of all its files, as the kernel counts
  bool attached = false;           // this process takes part in it

  // The rest is told of arenas that are alive or orphans.
  std::uint32_t owner_pid = 0;
  bool owner_left = false;  // it ended in order, not by a kill
  std::uint64_t capacity = 0;
  std::uint64_t reserved_bytes = 0;  // of the capacity: data, without the control segment
  double ticket_ttl = 0;
  std::uint32_t segments = 0;
  std::uint32_t blocks_in_use = 0;  // held, or with loads to come
  std::uint64_t bytes_in_use = 0;
  std::uint32_t messages = 0;  // with loads to come
  std::uint32_t expired_messages = 0;
  std::uint64_t loads_to_come = 0;
  std::optional<double> oldest_message;  // seconds
  std::vector<PeerSurvey> peers;         // alive, or holding something
};

[[nodiscard]] std::vector<ArenaSurvey> survey();

}  // namespace shmx
