// Facts of this host and this moment: identity, clock, memory limit. Reads the system, changes nothing.
#pragma once

#include <cstdint>
#include <optional>

#include "block_state.hpp"

namespace shmx {

// Tells one host (boot) and one /dev/shm from another: handles carry it, so that a handle from
// elsewhere is known as such instead of as a missing segment.
[[nodiscard]] std::uint32_t host_id();

// The same for arenas without names, which are reached through /proc: tells one PID namespace from another.
[[nodiscard]] std::uint32_t process_space_id();

// CLOCK_BOOTTIME, so that a suspended machine does not stretch a time-to-live.
[[nodiscard]] Ticks ticks_now();

// Bytes that the process's memory cgroup still allows (the tightest of its ancestors), or nothing where
// there is no limit. Advisory: other processes of the group allocate too.
[[nodiscard]] std::optional<std::uint64_t> memory_cgroup_room();

// Bytes that can be taken before the machine or the memory cgroup runs out. Advisory, as above.
[[nodiscard]] std::uint64_t available_memory();

// Size of the file system at /dev/shm, and what it has left.
[[nodiscard]] std::uint64_t shm_filesystem_bytes();
[[nodiscard]] std::uint64_t shm_filesystem_room();

// Unpredictable 64 bits for names.
[[nodiscard]] std::uint64_t random_id();

}  // namespace shmx
