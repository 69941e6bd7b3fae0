// The free bytes of an arena, and the sizes of blocks.
#include <doctest/doctest.h>

#include <random>
#include <vector>

#include "space.hpp"

namespace shmx {
namespace {

TEST_CASE("take answers nothing when no range is large enough") {
  FreeSpace space;
  CHECK_FALSE(space.take(ByteCount{1}).has_value());
  space.give({0, 0, 256});
  space.give({0, 512, 256});
  CHECK_FALSE(space.take(ByteCount{257}).has_value());
  CHECK(space.free_in(0) == 512);
}

TEST_CASE("take prefers the smallest range that fits and leaves the rest of it") {
  FreeSpace space;
  space.give({0, 0, 1024});
  space.give({1, 4096, 512});
  space.give({2, 0, 4096});
  const auto range = space.take(ByteCount{256});
  REQUIRE(range);
  CHECK(range->segment_slot == 1);
  CHECK(range->offset == 4096);
  CHECK(range->bytes == 256);
  CHECK(space.free_in(1) == 256);
  CHECK(space.take(ByteCount{256})->offset == 4096 + 256);
  CHECK(space.free_in(1) == 0);
  CHECK(space.take(ByteCount{1024})->segment_slot == 0);
}

TEST_CASE("a range that is given back joins its free neighbours") {
  FreeSpace space;
  space.give({0, 0, 3072});
  REQUIRE(space.take(ByteCount{3072}));
  bool before = false;
  bool after = false;
  SUBCASE("none") {}
  SUBCASE("before") { before = true; }
  SUBCASE("after") { after = true; }
  SUBCASE("both") { before = after = true; }
  if (before) space.give({0, 0, 1024});
  if (after) space.give({0, 2048, 1024});
  space.give({0, 1024, 1024});
  CHECK(space.largest() == 1024U * (1 + (before ? 1 : 0) + (after ? 1 : 0)));
  CHECK(space.free_in(0) == space.largest());
}

TEST_CASE("ranges of different segments never join") {
  FreeSpace space;
  space.give({0, 0, 1024});
  space.give({1, 1024, 1024});
  CHECK(space.largest() == 1024);
}

TEST_CASE("free_before tells how many free bytes end at the end of what is reserved") {
  FreeSpace space;
  CHECK(space.free_before(0, 4096) == 0);
  space.give({0, 1024, 1024});
  CHECK(space.free_before(0, 4096) == 0);
  CHECK(space.free_before(0, 2048) == 1024);
  space.give({0, 3072, 1024});
  CHECK(space.free_before(0, 4096) == 1024);
}

TEST_CASE("a forgotten segment gives nothing any more") {
  FreeSpace space;
  space.give({0, 0, 1024});
  space.give({0, 2048, 1024});
  space.give({1, 0, 256});
  space.forget_segment(0);
  CHECK(space.largest() == 256);
  CHECK(space.free_in(0) == 0);
  CHECK_FALSE(space.take(ByteCount{512}).has_value());
  space.forget_segment(7);
}

TEST_CASE("random takes and gives agree with a map of single units") {
  constexpr std::uint32_t kSegments = 3;
  constexpr std::uint64_t kUnits = 96;
  std::mt19937_64 random(7);
  FreeSpace space;
  std::vector<std::vector<bool>> is_free(kSegments, std::vector<bool>(kUnits, true));
  for (std::uint32_t slot = 0; slot < kSegments; ++slot) space.give({slot, 0, kUnits * kBlockAlignment});
  std::vector<Range> taken;
  // Lengths of the free runs, as the map of units shows them.
  const auto runs = [&](std::uint32_t slot) {
    std::vector<std::uint64_t> lengths;
    std::uint64_t run = 0;
    for (std::uint64_t unit = 0; unit <= kUnits; ++unit) {
      if (unit < kUnits && is_free[slot][unit]) {
        ++run;
      } else if (run != 0) {
        lengths.push_back(run);
        run = 0;
      }
    }
    return lengths;
  };
  for (int step = 0; step < 20'000; ++step) {
    std::uint64_t longest = 0;
    for (std::uint32_t slot = 0; slot < kSegments; ++slot) {
      std::uint64_t sum = 0;
      for (const std::uint64_t run : runs(slot)) {
        longest = std::max(longest, run);
        sum += run;
      }
      REQUIRE(space.free_in(slot) == sum * kBlockAlignment);
    }
    REQUIRE(space.largest() == longest * kBlockAlignment);
    if (random() % 2 == 0 || taken.empty()) {
      const std::uint64_t wanted = 1 + random() % 20;
      std::uint64_t best = kUnits + 1;
      for (std::uint32_t slot = 0; slot < kSegments; ++slot) {
        for (const std::uint64_t run : runs(slot)) {
          if (run >= wanted) best = std::min(best, run);
        }
      }
      const auto range = space.take(ByteCount{wanted * kBlockAlignment});
      REQUIRE(range.has_value() == (best <= kUnits));
      if (!range) continue;
      const std::uint64_t start = range->offset / kBlockAlignment;
      REQUIRE(range->bytes == wanted * kBlockAlignment);
      std::uint64_t run = 0;
      while (start + run < kUnits && is_free[range->segment_slot][start + run]) ++run;
      REQUIRE(run == best);
      for (std::uint64_t unit = 0; unit < wanted; ++unit) is_free[range->segment_slot][start + unit] = false;
      taken.push_back(*range);
    } else {
      const std::size_t index = random() % taken.size();
      const Range range = taken[index];
      taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(index));
      space.give(range);
      for (std::uint64_t unit = 0; unit < range.bytes / kBlockAlignment; ++unit) {
        is_free[range.segment_slot][range.offset / kBlockAlignment + unit] = true;
      }
    }
  }
}

TEST_CASE("a block has at least one unit and whole units") {
  CHECK(block_bytes(0) == kBlockAlignment);
  CHECK(block_bytes(1) == kBlockAlignment);
  CHECK(block_bytes(kBlockAlignment) == kBlockAlignment);
  CHECK(block_bytes(kBlockAlignment + 1) == 2 * kBlockAlignment);
}

TEST_CASE("a block is never smaller than its tensor and at most a sixteenth larger, or one unit") {
  std::mt19937_64 random(11);
  const auto check = [](std::uint64_t tensor) {
    const std::uint64_t block = block_bytes(tensor);
    REQUIRE(block >= tensor);
    REQUIRE(block % kBlockAlignment == 0);
    REQUIRE(block - tensor <= std::max(kBlockAlignment, tensor / 16));
    // A block that came back serves a tensor of its own size.
    REQUIRE(block_bytes(block) == block);
  };
  for (std::uint64_t tensor = 0; tensor < 20'000; ++tensor) check(tensor);
  for (int shift = 8; shift < 47; ++shift) {
    for (const std::uint64_t near : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{2}}) {
      check((std::uint64_t{1} << shift) - 1 + near);
    }
    for (int i = 0; i < 200; ++i) check((std::uint64_t{1} << shift) + random() % (std::uint64_t{1} << shift));
  }
}

TEST_CASE("a block that would not fit 64 bits is not mistaken for a small one") {
  CHECK(block_bytes(UINT64_MAX) >= (std::uint64_t{1} << 60));
  CHECK(block_bytes(UINT64_MAX - (std::uint64_t{1} << 58)) >= (std::uint64_t{1} << 60));
}

}  // namespace
}  // namespace shmx
