// Peer slots as kernel locks: who holds byte i of the control segment is peer i, and is alive.
//
// A slot is an OFD write lock taken through an open file description used for nothing else. One
// PROT_NONE page is mapped through that description and the descriptor closed: the lock then lives as
// long as this process image. It survives closefrom() and SIGSTOP, is not inherited by fork
// (MADV_DONTFORK), and ends at exec and at any death.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <utility>

#include "layout.hpp"
#include "segment.hpp"

namespace shmx {

enum class Inheritance : std::uint8_t { kThisProcess, kNextFork };

class PeerLock {
 public:
  PeerLock() = default;
  PeerLock(PeerLock&& other) noexcept : page_(std::exchange(other.page_, nullptr)) {}
  PeerLock& operator=(PeerLock&& other) noexcept;
  PeerLock(const PeerLock&) = delete;
  PeerLock& operator=(const PeerLock&) = delete;
  ~PeerLock() { release(); }

  // Takes `slot` if nobody has it. Throws SegmentLost if the segment lost its name meanwhile: a slot in an
  // arena that is being removed is worth nothing. (Where there is no name, loads find out.)
  [[nodiscard]] static std::optional<PeerLock> try_take(SegmentFile& control, PeerSlot slot, Inheritance inheritance);
  // Takes the first free slot of a peer that is not the owner.
  [[nodiscard]] static std::optional<std::pair<PeerLock, PeerSlot>> take_any(SegmentFile& control,
                                                                             Inheritance inheritance);

  [[nodiscard]] bool held() const { return page_ != nullptr; }
  // Ends the inheritance to further children, in a forked child that got its slot by kNextFork.
  void keep_from_children();
  void release();
  // Leaves the page mapped without owning it: for a process that never joined (see process.hpp).
  void forget() { page_ = nullptr; }

 private:
  explicit PeerLock(void* page) : page_(page) {}
  void* page_ = nullptr;
};

// A lock on somebody else's slot for the time of a sweep; through a description of its own, which no
// slot of this process was taken through.
class ProbeLock {
 public:
  // Nothing if the slot's peer is alive (or another process probes it at this moment).
  [[nodiscard]] static std::optional<ProbeLock> try_take(SegmentFile& control, PeerSlot slot);
  ProbeLock(ProbeLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)), slot_(other.slot_) {}
  ProbeLock& operator=(ProbeLock&&) = delete;
  ProbeLock(const ProbeLock&) = delete;
  ProbeLock& operator=(const ProbeLock&) = delete;
  ~ProbeLock();

 private:
  ProbeLock(int fd, PeerSlot slot) : fd_(fd), slot_(slot) {}
  int fd_;
  PeerSlot slot_;
};

// True if a live process holds the slot. One system call, changes nothing.
[[nodiscard]] bool is_alive(SegmentFile& control, PeerSlot slot);
// The same through any description of the control segment, be it open for reading only.
[[nodiscard]] bool is_alive(int fd, const std::string& control, PeerSlot slot);

}  // namespace shmx
