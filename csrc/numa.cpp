#include "numa.hpp"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <sstream>
#include <string>

namespace shmx {
namespace {

// From linux/mempolicy.h, which not every system has in its headers.
constexpr int kPreferred = 1;
constexpr unsigned long kNodeOfAddress = 1UL | 2UL;
constexpr unsigned kMostNodes = 1024;

}  // namespace

std::vector<int> memory_nodes() {
  // A list like "0-1,3".
  std::ifstream file("/sys/devices/system/node/has_memory");
  std::vector<int> nodes;
  std::string range;
  while (std::getline(file, range, ',')) {
    std::istringstream text(range);
    int first = 0;
    if (!(text >> first)) break;
    int last = first;
    char dash = 0;
    if (text >> dash >> last; !text) last = first;
    for (int node = first; node <= last && node < static_cast<int>(kMostNodes); ++node) nodes.push_back(node);
  }
  if (nodes.empty()) nodes.push_back(0);
  return nodes;
}

int current_node() {
  unsigned cpu = 0;
  unsigned node = 0;
  return ::getcpu(&cpu, &node) == 0 ? static_cast<int>(node) : 0;
}

void prefer_node(std::byte* base, std::uint64_t bytes, int node) {
  constexpr unsigned kBits = 8 * sizeof(unsigned long);
  std::array<unsigned long, kMostNodes / kBits> mask{};
  mask[static_cast<unsigned>(node) / kBits] = 1UL << (static_cast<unsigned>(node) % kBits);
  // The kernel reads one bit less than it is told.
  ::syscall(SYS_mbind, base, bytes, kPreferred, mask.data(), kMostNodes + 1UL, 0);
}

std::optional<int> node_of(const std::byte* address) {
  int node = 0;
  if (::syscall(SYS_get_mempolicy, &node, nullptr, 0UL, address, kNodeOfAddress) != 0) return std::nullopt;
  return node;
}

}  // namespace shmx
