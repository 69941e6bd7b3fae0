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
    std::byte* memory = pool.pool.take(bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(memory) % 64 == 0);
    std::memset(memory, 1, bytes);
    pool.pool.give(memory, bytes);
  }
}

TEST_CASE("memory is used again for tensors of similar size, the most recent first") {
  Pool pool;
  std::byte* const first = pool.pool.take(kMiB);
  std::byte* const second = pool.pool.take(kMiB);
  CHECK(first != second);
  pool.pool.give(first, kMiB);
  pool.pool.give(second, kMiB);
  CHECK(pool.pool.kept_bytes() == 2 * kMiB);
  CHECK(pool.pool.take(kMiB - 100) == second);
  CHECK(pool.pool.take(kMiB) == first);
  CHECK(pool.pool.kept_bytes() == 0);
  pool.pool.give(first, kMiB);
  pool.pool.give(second, kMiB - 100);
}

TEST_CASE("what is kept stays within the limit, the oldest goes first") {
  Pool pool;
  pool.pool.set_limit(3 * kMiB);
  std::vector<std::byte*> all;
  for (int i = 0; i < 5; ++i) all.push_back(pool.pool.take(kMiB));
  for (std::byte* memory : all) {
    pool.pool.give(memory, kMiB);
    CHECK(pool.pool.kept_bytes() <= 3 * kMiB);
  }
  CHECK(pool.pool.kept_bytes() == 3 * kMiB);
  CHECK(pool.pool.take(kMiB) == all[4]);
  pool.pool.give(all[4], kMiB);
  std::byte* const large = pool.pool.take(4 * kMiB);
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
        std::byte* memory = pool.pool.take(bytes);
        std::memset(memory, i, 256);
        if (memory[0] != static_cast<std::byte>(i) || memory[255] != static_cast<std::byte>(i)) ++wrong;
        pool.pool.give(memory, bytes);
      }
    });
  }
  threads.clear();
  CHECK(wrong.load() == 0);
}

TEST_CASE("rule 10: a forked child goes on with what it inherited") {
  Pool pool;
  std::byte* const memory = pool.pool.take(kMiB);
  std::memset(memory, 9, kMiB);
  test::Child child([&](test::Line&) {
    test::expect(memory[kMiB - 1] == std::byte{9});
    pool.pool.give(memory, kMiB);
    test::expect(pool.pool.take(kMiB) == memory);
    pool.pool.give(memory, kMiB);
  });
  child.join();
  CHECK(memory[0] == std::byte{9});
  pool.pool.give(memory, kMiB);
}

}  // namespace
}  // namespace shmx
