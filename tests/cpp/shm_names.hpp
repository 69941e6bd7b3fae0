// Which names in /dev/shm this process and its forked children have created. Other test runs on the host have
// names of the same form there, so looking at the directory alone tells nothing.
#pragma once

#include <string>
#include <vector>

namespace shmx::test {

void forget_created_names();
// Those of the names created since that are still there.
[[nodiscard]] std::vector<std::string> names_left();
[[nodiscard]] bool name_exists(const std::string& name);

}  // namespace shmx::test
