#include "small_arena.hpp"

#include <fstream>

namespace shmx::test {

MappedSegments mapped_segments(ArenaId arena) {
  MappedSegments found;
  const std::string prefix = "/dev/shm" + control_name(arena) + ".";
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(prefix) == std::string::npos) continue;
    ++found.data;
    found.deleted += line.find("(deleted)") != std::string::npos ? 1 : 0;
  }
  return found;
}

}  // namespace shmx::test
