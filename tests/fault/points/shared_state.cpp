#include "shared_state.hpp"

#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "layout.hpp"

namespace shmx::test {
namespace {

constexpr std::uint64_t kBlockOfStat = 512;
// As many entries of the block table as any of the operations makes.
constexpr std::uint64_t kMostWatched = kHeaderBytes + 1024 * sizeof(BlockEntry);

// Beyond what is reserved, a look alone would make pages.
std::uint64_t reserved_part(int fd) {
  struct stat facts{};
  if (::fstat(fd, &facts) != 0) return 0;
  const std::uint64_t reserved = static_cast<std::uint64_t>(facts.st_blocks) * kBlockOfStat;
  return std::min({static_cast<std::uint64_t>(facts.st_size), reserved, kMostWatched});
}

}  // namespace

std::vector<std::string> names_in_shm() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    names.push_back(entry.path().string().substr(sizeof "/dev/shm" - 1));
  }
  return names;
}

std::uint64_t bytes_in_shm() {
  struct statvfs facts{};
  if (::statvfs("/dev/shm", &facts) != 0) throw std::system_error(errno, std::generic_category(), "statvfs");
  return static_cast<std::uint64_t>(facts.f_blocks - facts.f_bfree) * facts.f_frsize;
}

void SharedState::look_for_segments() {
  for (const std::string& name : names_in_shm()) {
    if (name.find('.') != std::string::npos) continue;
    Watched& watched = segments_[name];
    if (!watched.fd.valid()) {
      auto fd = open_segment(name);
      if (!fd) continue;
      watched.fd = std::move(*fd);
    }
    const std::uint64_t bytes = reserved_part(watched.fd.get());
    if (bytes < kHeaderBytes || bytes == watched.mapping.bytes()) continue;
    watched.mapping = Mapping(watched.fd.get(), name, ByteCount{bytes}, Access::kReadOnly);
  }
}

bool SharedState::changed() {
  bool any = false;
  for (auto& [name, watched] : segments_) {
    const std::uint64_t bytes = watched.mapping.bytes();
    if (bytes == 0) continue;
    const std::byte* now = watched.mapping.base();
    if (watched.seen.size() == bytes && std::memcmp(watched.seen.data(), now, bytes) == 0) continue;
    watched.seen.assign(now, now + bytes);
    any = true;
  }
  return any;
}

}  // namespace shmx::test
