// A /dev/shm of this process's own. Other users of the library on the host then neither reap what a test leaves on
// purpose nor lose what a test removes by force, and a test can have one that is small.
#pragma once

namespace shmx::test {

// Mounts it for this process and its later children. False where the system does not allow that.
[[nodiscard]] bool take_own_shm(const char* size);

}  // namespace shmx::test
