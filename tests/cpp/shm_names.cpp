#include "shm_names.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace shmx::test {
namespace {

struct Log {
  static constexpr std::uint32_t kRoom = 8192;
  std::atomic<std::uint32_t> count;
  char names[kRoom][48];
};

// Shared with every forked child.
Log& log() {
  static Log* const shared = [] {
    void* memory = ::mmap(nullptr, sizeof(Log), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return new (memory) Log;
  }();
  return *shared;
}

}  // namespace

void forget_created_names() { log().count.store(0); }

bool name_exists(const std::string& name) { return ::access(("/dev/shm" + name).c_str(), F_OK) == 0; }

std::vector<std::string> names_left() {
  std::vector<std::string> left;
  const std::uint32_t count = std::min(log().count.load(), Log::kRoom);
  for (std::uint32_t i = 0; i < count; ++i) {
    if (name_exists(log().names[i])) left.emplace_back(log().names[i]);
  }
  return left;
}

}  // namespace shmx::test

extern "C" {
// The linker's --wrap fixes these names.
int __real_shm_open(const char* name, int flags, mode_t mode);
int __wrap_shm_open(const char* name, int flags, mode_t mode);

int __wrap_shm_open(const char* name, int flags, mode_t mode) {
  const int fd = __real_shm_open(name, flags, mode);
  if (fd >= 0 && (flags & O_CREAT) != 0) {
    shmx::test::Log& log = shmx::test::log();
    const std::uint32_t index = log.count.fetch_add(1);
    if (index >= shmx::test::Log::kRoom || std::strlen(name) >= sizeof log.names[0]) std::abort();
    std::strcpy(log.names[index], name);
  }
  return fd;
}
}
