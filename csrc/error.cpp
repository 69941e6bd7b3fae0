#include "error.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace shmx {
namespace {

const char* remedy(int system_errno) {
  switch (system_errno) {
    case EMFILE:
      return "; this process has no descriptor left: raise `ulimit -n`";
    case ENFILE:
      return "; the system has no descriptor left: raise fs.file-max";
    case ENOMEM:
      return "; no memory or no mapping left: see vm.max_map_count and the memory limit of this container";
    case EACCES:
    case EPERM:
      return "; arenas are private to one user id: run both processes as the same user, or share a group (SHMX_GROUP)";
    case ENOSYS:
    case EOPNOTSUPP:
      return "; shmx needs Linux with a tmpfs at /dev/shm";
    default:
      return "";
  }
}

}  // namespace

Error system_error(const std::string& call, const std::string& object, int system_errno) {
  // std::strerror is not thread-safe; the GNU strerror_r answers a string in any case.
  char buffer[128];
  const char* text = strerror_r(system_errno, buffer, sizeof buffer);
  return {ErrorCode::kSystem, call + " of " + object + ": " + text + remedy(system_errno), system_errno};
}

NoSpaceError::NoSpaceError(const std::string& object, std::uint64_t wanted_bytes, const std::string& reason)
    : Error(ErrorCode::kArenaFull, "arena " + object + ": no room for " + human_bytes(wanted_bytes) + ": " + reason,
            ENOSPC),
      reason_begin_(std::strlen(what()) - reason.size()) {}

NoSpaceError no_space_error(const std::string& object, std::uint64_t wanted_bytes, const std::string& reason) {
  return {object, wanted_bytes, reason};
}

std::string human_bytes(std::uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto scaled = static_cast<double>(bytes);
  unsigned unit = 0;
  while (scaled >= 1024 && unit < 4) {
    scaled /= 1024;
    ++unit;
  }
  char text[32];
  (void)std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", scaled, kUnits[unit]);
  return text;
}

}  // namespace shmx
