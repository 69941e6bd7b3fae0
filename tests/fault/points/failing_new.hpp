// The program's operator new, which counts and can be made to fail; the core's allocations come here, too.
#pragma once

#include <cstdint>

namespace shmx::test {

// Counts from now on; the `failing`-th allocation throws std::bad_alloc. 0: none.
void count_allocations(std::uint64_t failing);
// How many there were. Ends the counting.
[[nodiscard]] std::uint64_t allocations();

}  // namespace shmx::test
