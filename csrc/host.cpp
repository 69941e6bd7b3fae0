#include "host.hpp"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <ctime>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "error.hpp"
#include "segment.hpp"

namespace shmx {
namespace {

std::uint32_t fnv1a(const std::string& text) {
  std::uint32_t hash = 2166136261U;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619U;
  return hash;
}

// A file of /proc, as large as they are. Nothing where it is not to be had at all; throws where it is not to be had
// now: what is remembered must not depend on whether a descriptor was free at that moment.
std::optional<std::string> read_file(const char* path) {
  const UniqueFd fd(::open(path, O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) {
    if (errno == ENOENT || errno == EACCES || errno == EPERM) return std::nullopt;
    throw system_error("open", path, errno);
  }
  std::string text;
  char buffer[4096];
  for (;;) {
    const ssize_t got = ::read(fd.get(), buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw system_error("read", path, errno);
    if (got == 0) return text;
    text.append(buffer, static_cast<std::size_t>(got));
  }
}

std::optional<std::uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  // "max" (cgroup v2) and absent files both mean: no limit here.
  if (!(file >> word) || word.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  std::istringstream digits(word);
  std::uint64_t number = 0;
  if (!(digits >> number)) return std::nullopt;
  return number;
}

// The limit and use files of this process's memory cgroup and of each ancestor, version 2 or 1.
struct MemoryCgroup {
  std::string limit_file;
  std::string use_file;
  std::string stat_file;
  std::string cache_key;  // page cache that the kernel drops before it refuses
};

std::vector<MemoryCgroup> find_memory_cgroups() {
  std::vector<MemoryCgroup> groups;
  std::istringstream membership(read_file("/proc/self/cgroup").value_or(""));
  std::string line;
  while (std::getline(membership, line)) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    const bool unified = controllers.empty();
    if (!unified && ("," + controllers + ",").find(",memory,") == std::string::npos) continue;
    const std::string mount = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    for (;;) {
      const std::string base = mount + (path == "/" ? "" : path) + "/";
      // Whether there is a limit is read each time: one may be set later.
      groups.push_back(
          unified ? MemoryCgroup{base + "memory.max", base + "memory.current", base + "memory.stat", "inactive_file"}
                  : MemoryCgroup{base + "memory.limit_in_bytes", base + "memory.usage_in_bytes", base + "memory.stat",
                                 "total_inactive_file"});
      if (path == "/" || path.empty()) break;
      path.resize(path.rfind('/') == 0 ? 1 : path.rfind('/'));
    }
  }
  return groups;
}

std::uint64_t read_stat(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  std::uint64_t number = 0;
  while (file >> name >> number) {
    if (name == key) return number;
  }
  return 0;
}

std::uint64_t physical_memory() {
  static const std::uint64_t bytes =
      static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

struct statvfs shm_filesystem() {
  struct statvfs facts{};
  if (::statvfs("/dev/shm", &facts) != 0) throw system_error("statvfs", "/dev/shm", errno);
  return facts;
}

// This boot, and the file at that path.
std::uint32_t identity_of(const char* path) {
  std::string identity = read_file("/proc/sys/kernel/random/boot_id").value_or("");
  identity.resize(std::min(identity.find('\n'), identity.size()));
  struct stat facts{};
  if (::stat(path, &facts) != 0) throw system_error("stat", path, errno);
  return fnv1a(identity + "/" + std::to_string(facts.st_dev) + "/" + std::to_string(facts.st_ino));
}

// The same, found out at first use: a process may take another /dev/shm before that. Not a static of the function,
// which a child would wait for that is forked while another thread finds it out; two threads may.
std::uint32_t remembered_identity(std::atomic<std::uint64_t>& known, const char* path) {
  constexpr std::uint64_t kKnown = 1ULL << 32;
  // relaxed throughout: a number by itself.
  std::uint64_t id = known.load(std::memory_order_relaxed);
  if (id == 0) {
    id = kKnown | identity_of(path);
    known.store(id, std::memory_order_relaxed);
  }
  return static_cast<std::uint32_t>(id);
}

std::atomic<std::uint64_t> known_host{0};
std::atomic<std::uint64_t> known_process_space{0};

}  // namespace

std::uint32_t host_id() { return remembered_identity(known_host, "/dev/shm"); }

std::uint32_t process_space_id() { return remembered_identity(known_process_space, "/proc/self/ns/pid"); }

Ticks ticks_now() {
  timespec now{};
  (void)::clock_gettime(CLOCK_BOOTTIME, &now);
  const auto seconds = static_cast<std::uint64_t>(now.tv_sec);
  const auto fraction = static_cast<std::uint64_t>(now.tv_nsec) * kTicksPerSecond / 1'000'000'000U;
  return static_cast<Ticks>(seconds * kTicksPerSecond + fraction);
}

std::optional<std::uint64_t> memory_cgroup_room() {
  static const std::vector<MemoryCgroup> groups = find_memory_cgroups();
  std::optional<std::uint64_t> room;
  for (const MemoryCgroup& group : groups) {
    const auto limit = read_number(group.limit_file);
    // Version 1 writes "no limit" as a number that no machine has the memory for.
    if (!limit || *limit >= physical_memory()) continue;
    const auto use = read_number(group.use_file);
    if (!use) continue;
    const std::uint64_t held = *use - std::min(*use, read_stat(group.stat_file, group.cache_key));
    const std::uint64_t left = *limit > held ? *limit - held : 0;
    if (!room || left < *room) room = left;
  }
  return room;
}

std::uint64_t available_memory() {
  std::uint64_t available = physical_memory();
  std::istringstream file(read_file("/proc/meminfo").value_or(""));
  std::string key;
  std::uint64_t kibibytes = 0;
  for (std::string rest; file >> key >> kibibytes; std::getline(file, rest)) {
    if (key == "MemAvailable:") available = kibibytes * 1024;
  }
  return std::min(available, memory_cgroup_room().value_or(available));
}

std::uint64_t shm_filesystem_bytes() {
  const struct statvfs facts = shm_filesystem();
  return static_cast<std::uint64_t>(facts.f_blocks) * facts.f_frsize;
}

std::uint64_t shm_filesystem_room() {
  const struct statvfs facts = shm_filesystem();
  return static_cast<std::uint64_t>(facts.f_bavail) * facts.f_frsize;
}

std::uint64_t random_id() {
  std::uint64_t id = 0;
  ssize_t got = 0;
  do {
    got = ::getrandom(&id, sizeof id, 0);
  } while (got < 0 && errno == EINTR);
  if (got != static_cast<ssize_t>(sizeof id)) throw system_error("getrandom", "an arena name", errno);
  return id;
}

}  // namespace shmx
