#include "peer_lock.hpp"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "error.hpp"

namespace shmx {
namespace {

struct flock lock_request(short type, PeerSlot slot) {
  struct flock request{};  // l_pid must be 0 for OFD locks
  request.l_type = type;
  request.l_whence = SEEK_SET;
  request.l_start = static_cast<off_t>(value(slot));
  request.l_len = 1;
  return request;
}

// False if another description holds the byte.
bool try_lock(int fd, const std::string& name, PeerSlot slot) {
  struct flock request = lock_request(F_WRLCK, slot);
  if (::fcntl(fd, F_OFD_SETLK, &request) == 0) return true;
  if (errno == EAGAIN || errno == EACCES) return false;
  throw system_error("fcntl(F_OFD_SETLK)", name, errno);
}

std::size_t page_bytes() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

Error gone(const std::string& control) {
  return {ErrorCode::kSegmentLost,
          "arena " + control + " is gone: its owner has left and nothing in it was in use any more", ENOENT};
}

UniqueFd open_same(SegmentFile& control) {
  try {
    return control.open_again();
  } catch (const Error& error) {
    // It was there when the caller mapped it: whoever removed it was entitled to.
    if (error.code() != ErrorCode::kSegmentLost || control.backend() != Backend::kShm) throw;
    throw gone(control.name());
  }
}

// The lock is taken first and the name checked second: a remover locks first, too, so one of the two sees
// the other.
void* pin_lock(UniqueFd fd, const SegmentFile& control, Inheritance inheritance) {
  if (control.backend() == Backend::kShm && file_facts(fd.get(), control.name()).links == 0) {
    throw gone(control.name());
  }
  void* page = ::mmap(nullptr, page_bytes(), PROT_NONE, MAP_SHARED, fd.get(), 0);
  if (page == MAP_FAILED) throw system_error("mmap", control.name(), errno);
  // Or a child would keep the lock of a parent that has died.
  if (inheritance == Inheritance::kThisProcess && ::madvise(page, page_bytes(), MADV_DONTFORK) != 0) {
    const int failure = errno;
    ::munmap(page, page_bytes());
    throw system_error("madvise", control.name(), failure);
  }
  return page;
}

}  // namespace

PeerLock& PeerLock::operator=(PeerLock&& other) noexcept {
  if (this != &other) {
    release();
    page_ = std::exchange(other.page_, nullptr);
  }
  return *this;
}

std::optional<PeerLock> PeerLock::try_take(SegmentFile& control, PeerSlot slot, Inheritance inheritance) {
  UniqueFd fd = open_same(control);
  if (!try_lock(fd.get(), control.name(), slot)) return std::nullopt;
  return PeerLock(pin_lock(std::move(fd), control, inheritance));
}

std::optional<std::pair<PeerLock, PeerSlot>> PeerLock::take_any(SegmentFile& control, Inheritance inheritance) {
  UniqueFd fd = open_same(control);
  // A sweep elsewhere may have a free slot locked for a moment, so one pass is no proof that all are taken.
  for (int pass = 0; pass < 3; ++pass) {
    for (std::uint32_t i = value(kOwnerSlot) + 1; i < kMaxPeers; ++i) {
      if (!try_lock(fd.get(), control.name(), PeerSlot{i})) continue;
      return std::pair{PeerLock(pin_lock(std::move(fd), control, inheritance)), PeerSlot{i}};
    }
    ::sched_yield();
  }
  return std::nullopt;
}

void PeerLock::keep_from_children() {
  if (page_ != nullptr) ::madvise(page_, page_bytes(), MADV_DONTFORK);
}

void PeerLock::release() {
  if (page_ != nullptr) ::munmap(page_, page_bytes());
  page_ = nullptr;
}

std::optional<ProbeLock> ProbeLock::try_take(SegmentFile& control, PeerSlot slot) {
  const int fd = control.fd();
  if (!try_lock(fd, control.name(), slot)) return std::nullopt;
  return ProbeLock(fd, slot);
}

ProbeLock::~ProbeLock() {
  if (fd_ < 0) return;
  struct flock request = lock_request(F_UNLCK, slot_);
  // The kernel may have no memory for it at this moment (ENOLCK), and a slot that stays locked would pass for a live
  // peer. The descriptor stays open: others may open a file without a name through it.
  constexpr int kMostAttempts = 1000;
  for (int i = 0; i < kMostAttempts && ::fcntl(fd_, F_OFD_SETLK, &request) != 0; ++i) ::sched_yield();
}

bool is_alive(SegmentFile& control, PeerSlot slot) { return is_alive(control.fd(), control.name(), slot); }

bool is_alive(int fd, const std::string& control, PeerSlot slot) {
  struct flock request = lock_request(F_WRLCK, slot);
  if (::fcntl(fd, F_OFD_GETLK, &request) != 0) throw system_error("fcntl(F_OFD_GETLK)", control, errno);
  return request.l_type != F_UNLCK;
}

}  // namespace shmx
