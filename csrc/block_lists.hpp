// The order in which an owner looks for a block to use again: by size, youngest first and from a cursor that goes
// round, and over all sizes by age. Indices only; what a block is, the arena knows. Private to the owner, not locked.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace shmx {

inline constexpr std::uint32_t kNoBlock = UINT32_MAX;

class BlockLists {
 public:
  // Adds a block of that size as the youngest.
  void add(std::uint32_t index, std::uint64_t bytes);
  void remove(std::uint32_t index);
  // Makes it the youngest again.
  void renew(std::uint32_t index);

  // Blocks of one size: the youngest, and the next older one; kNoBlock at the end.
  [[nodiscard]] std::uint32_t youngest(std::uint64_t bytes) const;
  [[nodiscard]] std::uint32_t next_older(std::uint32_t index) const { return nodes_[index].same_size.previous; }
  // The next block of that size in turn: repeated calls come past all of them.
  [[nodiscard]] std::uint32_t in_turn(std::uint64_t bytes);

  // Blocks of all sizes: the oldest, and the next younger one.
  [[nodiscard]] std::uint32_t oldest() const { return by_age_.head; }
  [[nodiscard]] std::uint32_t next_younger(std::uint32_t index) const { return nodes_[index].all.next; }
  [[nodiscard]] std::uint32_t in_turn();

 private:
  struct Links {
    std::uint32_t previous = kNoBlock;
    std::uint32_t next = kNoBlock;
  };
  struct List {
    std::uint32_t head = kNoBlock;
    std::uint32_t tail = kNoBlock;
    std::uint32_t cursor = kNoBlock;
  };
  struct Node {
    std::uint64_t bytes = 0;
    Links same_size;
    Links all;
  };
  std::uint32_t advance(List& list, Links Node::* links) const;
  void append(List& list, Links Node::* links, std::uint32_t index);
  void take_out(List& list, Links Node::* links, std::uint32_t index);

  std::vector<Node> nodes_;
  std::unordered_map<std::uint64_t, List> by_size_;
  List by_age_;
};

}  // namespace shmx
