#include "block_lists.hpp"

namespace shmx {

void BlockLists::add(std::uint32_t index, std::uint64_t bytes) {
  if (index >= nodes_.size()) nodes_.resize(index + 1);
  nodes_[index] = Node{bytes, {}, {}};
  append(by_size_[bytes], &Node::same_size, index);
  append(by_age_, &Node::all, index);
}

void BlockLists::remove(std::uint32_t index) {
  const auto sized = by_size_.find(nodes_[index].bytes);
  take_out(sized->second, &Node::same_size, index);
  if (sized->second.head == kNoBlock) by_size_.erase(sized);
  take_out(by_age_, &Node::all, index);
}

void BlockLists::renew(std::uint32_t index) {
  List& sized = by_size_[nodes_[index].bytes];
  take_out(sized, &Node::same_size, index);
  append(sized, &Node::same_size, index);
  take_out(by_age_, &Node::all, index);
  append(by_age_, &Node::all, index);
}

std::uint32_t BlockLists::youngest(std::uint64_t bytes) const {
  const auto sized = by_size_.find(bytes);
  return sized == by_size_.end() ? kNoBlock : sized->second.tail;
}

std::uint32_t BlockLists::in_turn(std::uint64_t bytes) {
  const auto sized = by_size_.find(bytes);
  return sized == by_size_.end() ? kNoBlock : advance(sized->second, &Node::same_size);
}

std::uint32_t BlockLists::in_turn() { return advance(by_age_, &Node::all); }

std::uint32_t BlockLists::advance(List& list, Links Node::* links) const {
  const std::uint32_t index = list.cursor == kNoBlock ? list.head : list.cursor;
  if (index != kNoBlock) list.cursor = (nodes_[index].*links).next;
  return index;
}

void BlockLists::append(List& list, Links Node::* links, std::uint32_t index) {
  nodes_[index].*links = {list.tail, kNoBlock};
  (list.tail == kNoBlock ? list.head : (nodes_[list.tail].*links).next) = index;
  list.tail = index;
}

void BlockLists::take_out(List& list, Links Node::* links, std::uint32_t index) {
  const Links mine = nodes_[index].*links;
  (mine.previous == kNoBlock ? list.head : (nodes_[mine.previous].*links).next) = mine.next;
  (mine.next == kNoBlock ? list.tail : (nodes_[mine.next].*links).previous) = mine.previous;
  if (list.cursor == index) list.cursor = mine.next;
}

}  // namespace shmx
