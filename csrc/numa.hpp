// Which NUMA node memory lies on. The kernel is asked directly (mbind(2), get_mempolicy(2)), so that no libnuma is
// needed; a machine or container without NUMA has one node, 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace shmx {

// The nodes that have memory; at least {0}.
[[nodiscard]] std::vector<int> memory_nodes();
// The node of the processor that this thread runs on.
[[nodiscard]] int current_node();
// Pages of a shared mapping that do not exist yet are taken from that node while it has any, whoever asks for them.
// Best effort: without the permission (seccomp) they come from where the asking thread runs.
void prefer_node(std::byte* base, std::uint64_t bytes, int node);
// Where the page at an address lies; nothing if that cannot be told.
[[nodiscard]] std::optional<int> node_of(const std::byte* address);

}  // namespace shmx
