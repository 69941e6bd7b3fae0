// What a test asks about the threads of its own process, and how it waits for what one of them does.
#pragma once

#include <functional>
#include <string>

namespace shmx::test {

// Other threads with that name.
[[nodiscard]] unsigned threads_named(const std::string& name);
// Waits for it; false if it has not come true within a minute.
[[nodiscard]] bool comes_true(const std::function<bool()>& condition);

}  // namespace shmx::test
