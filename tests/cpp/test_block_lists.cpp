// The order in which an owner looks for a block to use again, against a plain list.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "block_lists.hpp"

namespace shmx {
namespace {

std::vector<std::uint32_t> by_age(const BlockLists& lists) {
  std::vector<std::uint32_t> all;
  for (std::uint32_t index = lists.oldest(); index != kNoBlock; index = lists.next_younger(index)) all.push_back(index);
  return all;
}

std::vector<std::uint32_t> of_size(const BlockLists& lists, std::uint64_t bytes) {
  std::vector<std::uint32_t> all;
  for (std::uint32_t index = lists.youngest(bytes); index != kNoBlock; index = lists.next_older(index)) {
    all.push_back(index);
  }
  return all;
}

using Indices = std::vector<std::uint32_t>;

TEST_CASE("empty lists have nobody") {
  BlockLists lists;
  CHECK(lists.oldest() == kNoBlock);
  CHECK(lists.youngest(256) == kNoBlock);
  CHECK(lists.in_turn() == kNoBlock);
  CHECK(lists.in_turn(256) == kNoBlock);
}

TEST_CASE("blocks are listed by age over all sizes, and youngest first within a size") {
  BlockLists lists;
  lists.add(4, 256);
  lists.add(0, 512);
  lists.add(2, 256);
  CHECK(by_age(lists) == Indices{4, 0, 2});
  CHECK(of_size(lists, 256) == Indices{2, 4});
  CHECK(of_size(lists, 512) == Indices{0});
  lists.renew(4);
  CHECK(by_age(lists) == Indices{0, 2, 4});
  CHECK(of_size(lists, 256) == Indices{4, 2});
  lists.remove(0);
  CHECK(by_age(lists) == Indices{2, 4});
  CHECK(lists.youngest(512) == kNoBlock);
  lists.add(0, 256);
  CHECK(of_size(lists, 256) == Indices{0, 4, 2});
}

TEST_CASE("turns come past every block, whatever is renewed or removed in between") {
  BlockLists lists;
  for (std::uint32_t i = 0; i < 5; ++i) lists.add(i, 256);
  SUBCASE("undisturbed") {
    for (std::uint32_t round = 0; round < 2; ++round) {
      for (std::uint32_t i = 0; i < 5; ++i) {
        CHECK(lists.in_turn() == i);
        CHECK(lists.in_turn(256) == i);
      }
      CHECK(lists.in_turn() == (round == 0 ? 0 : 0));
      CHECK(lists.in_turn(256) == 0);
      for (std::uint32_t i = 1; i < 5; ++i) {
        (void)lists.in_turn();
        (void)lists.in_turn(256);
      }
    }
  }
  SUBCASE("the next in turn is removed") {
    CHECK(lists.in_turn() == 0);
    CHECK(lists.in_turn(256) == 0);
    lists.remove(1);
    CHECK(lists.in_turn() == 2);
    CHECK(lists.in_turn(256) == 2);
  }
  SUBCASE("the last, whose turn it is, is removed") {
    for (int i = 0; i < 4; ++i) (void)lists.in_turn();
    lists.remove(4);
    CHECK(lists.in_turn() == 0);
  }
  SUBCASE("the block whose turn it was is renewed") {
    CHECK(lists.in_turn() == 0);
    lists.renew(0);
    std::set<std::uint32_t> seen;
    for (int i = 0; i < 5; ++i) seen.insert(lists.in_turn());
    CHECK(seen.size() == 5);
  }
}

TEST_CASE("random changes agree with a plain list") {
  std::mt19937_64 random(31);
  BlockLists lists;
  std::vector<std::pair<std::uint32_t, std::uint64_t>> model;  // index and size, oldest first
  for (int step = 0; step < 20'000; ++step) {
    const auto index = static_cast<std::uint32_t>(random() % 24);
    const auto known = std::find_if(model.begin(), model.end(), [&](const auto& one) { return one.first == index; });
    if (known == model.end()) {
      const std::uint64_t bytes = 256 * (1 + random() % 3);
      lists.add(index, bytes);
      model.emplace_back(index, bytes);
    } else if (random() % 3 == 0) {
      lists.remove(index);
      model.erase(known);
    } else {
      const auto one = *known;
      model.erase(known);
      model.push_back(one);
      lists.renew(index);
    }
    if (random() % 4 == 0) {
      const std::uint32_t turn = lists.in_turn();
      REQUIRE((turn == kNoBlock) == model.empty());
      const std::uint32_t sized = lists.in_turn(256);
      REQUIRE((sized == kNoBlock) ==
              std::none_of(model.begin(), model.end(), [](const auto& one) { return one.second == 256; }));
    }
    Indices all;
    for (const auto& one : model) all.push_back(one.first);
    REQUIRE(by_age(lists) == all);
    for (const std::uint64_t bytes : {256U, 512U, 768U}) {
      Indices sized;
      for (const auto& one : model) {
        if (one.second == bytes) sized.insert(sized.begin(), one.first);
      }
      REQUIRE(of_size(lists, bytes) == sized);
    }
  }
}

}  // namespace
}  // namespace shmx
