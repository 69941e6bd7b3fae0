// The errors of the core: one exception type with a code, an errno and a message that names the
// object, what happened and the remedy. bindings.cpp maps each code to one Python exception class.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace shmx {

enum class ErrorCode : std::uint8_t {
  kNone = 0,
  kArenaFull = 1,
  kSegmentLost = 2,
  kStaleHandle = 3,
  kForeignHost = 4,
  kReleased = 5,
  kInvalidHandle = 6,
  kTooManyPeers = 7,
  kInvalidArgument = 8,
  kSystem = 9,
  kDevice = 10,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, int system_errno = 0)
      : std::runtime_error(message), code_(code), errno_(system_errno) {}
  [[nodiscard]] ErrorCode code() const noexcept { return code_; }
  [[nodiscard]] int system_errno() const noexcept { return errno_; }

 private:
  ErrorCode code_;
  int errno_;
};

// "shm_open of /shmx-12ab: Too many open files (raise the limit with ulimit -n)"
[[nodiscard]] Error system_error(const std::string& call, const std::string& object, int system_errno);

// A reservation of shared memory that the system refused: capacity of /dev/shm, cgroup, or memory. The reason, with its
// remedy, is kept apart for those who know better which object it is about.
class NoSpaceError : public Error {
 public:
  NoSpaceError(const std::string& object, std::uint64_t wanted_bytes, const std::string& reason);
  [[nodiscard]] const char* reason() const noexcept { return what() + reason_begin_; }

 private:
  std::size_t reason_begin_;
};

[[nodiscard]] NoSpaceError no_space_error(const std::string& object, std::uint64_t wanted_bytes,
                                          const std::string& reason);

[[nodiscard]] std::string human_bytes(std::uint64_t bytes);

}  // namespace shmx
