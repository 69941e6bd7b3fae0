// What a killed process leaves behind in memory: the bytes of every control segment in /dev/shm. Between two system
// calls, a process killed before and one killed after an instruction that changes none of them leave the same.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "segment.hpp"

namespace shmx::test {

class SharedState {
 public:
  SharedState() { look_for_segments(); }
  // After other code has run: segments may have come, grown or gone.
  void look_for_segments();
  // Since the last time.
  [[nodiscard]] bool changed();

 private:
  struct Watched {
    UniqueFd fd;
    Mapping mapping;
    std::vector<std::byte> seen;
  };
  std::map<std::string, Watched> segments_;
};

// The names of ours in /dev/shm, and the bytes in use there, those of segments without a name included.
[[nodiscard]] std::vector<std::string> names_in_shm();
[[nodiscard]] std::uint64_t bytes_in_shm();

}  // namespace shmx::test
