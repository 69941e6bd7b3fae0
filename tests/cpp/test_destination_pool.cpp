// Private memory for materialized tensors: recycled and bounded.
#include <doctest/doctest.h>

#include <cstring>
#include <thread>
#include <vector>

#include "child_process.hpp"
#include "destination_pool.hpp"

namespace shmx {
namespace {

constexpr std::size_t kMiB = 1U << 20;

using Piece = DestinationPool::Piece;

struct Pool {
  DestinationPool& pool = DestinationPool::instance();
  Pool() {
    pool.clear();
    pool.set_limit(64 * kMiB);
  }
  ~Pool() { pool.clear(); }
};

TEST_CASE("memory of every size is aligned and writable to its end") {
  Pool pool;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{65'535}, std::size_t{65'536},
                                  std::size_t{100'000}, 2 * kMiB - 1, 2 * kMiB, 2 * kMiB + 1, 5 * kMiB + 77}) {
    const Piece piece = pool.pool.take(bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(piece.memory) % 64 == 0);
    std::memset(piece.memory, 1, bytes);
    pool.pool.give(piece, bytes);
  }
}

TEST_CASE("memory is used again for tensors of similar size, the most recent first") {
  Pool pool;
  const Piece first = pool.pool.take(kMiB);
  const Piece second = pool.pool.take(kMiB);
  CHECK(first.memory != second.memory);
  pool.pool.give(first, kMiB);
  pool.pool.give(second, kMiB);
  CHECK(pool.pool.kept_bytes() == 2 * kMiB);
  CHECK(pool.pool.take(kMiB - 100).memory == second.memory);
  CHECK(pool.pool.take(kMiB).memory == first.memory);
  CHECK(pool.pool.kept_bytes() == 0);
  pool.pool.give(first, kMiB);
  pool.pool.give(second, kMiB - 100);
}

TEST_CASE("what is kept stays within the limit, the oldest goes first") {
  Pool pool;
  pool.pool.set_limit(3 * kMiB);
  std::vector<Piece> all;
  for (int i = 0; i < 5; ++i) all.push_back(pool.pool.take(kMiB));
  for (const Piece& piece : all) {
    pool.pool.give(piece, kMiB);
    CHECK(pool.pool.kept_bytes() <= 3 * kMiB);
  }
  CHECK(pool.pool.kept_bytes() == 3 * kMiB);
  CHECK(pool.pool.take(kMiB).memory == all[4].memory);
  pool.pool.give(all[4], kMiB);
  const Piece large = pool.pool.take(4 * kMiB);
  pool.pool.give(large, 4 * kMiB);
  CHECK(pool.pool.kept_bytes() == 3 * kMiB);
}

TEST_CASE("a limit of 0 keeps nothing, also of what was kept before") {
  Pool pool;
  pool.pool.give(pool.pool.take(kMiB), kMiB);
  pool.pool.set_limit(0);
  CHECK(pool.pool.kept_bytes() == 0);
  pool.pool.give(pool.pool.take(2 * kMiB), 2 * kMiB);
  CHECK(pool.pool.kept_bytes() == 0);
}

TEST_CASE("threads never get the same memory at a time") {
  Pool pool;
  std::vector<std::jthread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int k = 0; k < 300; ++k) {
        const std::size_t bytes = 65'536U << (k % 3);
        const Piece piece = pool.pool.take(bytes);
        std::memset(piece.memory, i, 256);
        if (piece.memory[0] != static_cast<std::byte>(i) || piece.memory[255] != static_cast<std::byte>(i)) ++wrong;
        pool.pool.give(piece, bytes);
      }
    });
  }
  threads.clear();
  CHECK(wrong.load() == 0);
}

TEST_CASE("a piece is hot if little was written since it was, and cold if it is new or was written long ago") {
  Pool pool;
  const Piece fresh = pool.pool.take(kMiB);
  CHECK(fresh.where == Destination::kCold);
  pool.pool.give(fresh, kMiB);
  Piece again = pool.pool.take(kMiB);
  // Unless the clock has ticked in between.
  for (int i = 0; i < 10 && again.where != Destination::kHot; ++i) {
    pool.pool.give(again, kMiB);
    again = pool.pool.take(kMiB);
  }
  CHECK(again.where == Destination::kHot);
  // Given back at the end: what counts is when it was written.
  const Piece large = pool.pool.take(1024 * kMiB);
  pool.pool.give(again, kMiB);
  pool.pool.give(large, 1024 * kMiB);
  const Piece late = pool.pool.take(kMiB);
  CHECK(late.memory == again.memory);
  CHECK(late.where == Destination::kCold);
  pool.pool.give(late, kMiB);
}

TEST_CASE("rule 10: a forked child goes on with what it inherited") {
  Pool pool;
  const Piece piece = pool.pool.take(kMiB);
  std::memset(piece.memory, 9, kMiB);
  test::Child child([&](test::Line&) {
    test::expect(piece.memory[kMiB - 1] == std::byte{9});
    pool.pool.give(piece, kMiB);
    test::expect(pool.pool.take(kMiB).memory == piece.memory);
    pool.pool.give(piece, kMiB);
  });
  child.join();
  CHECK(piece.memory[0] == std::byte{9});
  pool.pool.give(piece, kMiB);
}

}  // namespace
}  // namespace shmx
