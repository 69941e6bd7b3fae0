// Growth ahead of need: a thread takes memory from the system before a request asks for it, and only where there is
// plenty; it is gone before the arena is, and a forked child has none.
#include <dirent.h>
#include <doctest/doctest.h>
#include <signal.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "numa.hpp"
#include "own_shm.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"
#include "threads.hpp"

namespace shmx {
namespace {

using namespace test;

ArenaOptions growing_options() {
  ArenaOptions options;
  options.capacity = 256 * kMiB;
  options.segment_bytes = 32 * kMiB;
  return options;
}

// Once the thread has nothing to do.
std::uint64_t settled(Arena& arena) {
  arena.wait_for_growth();
  return arena.stats().reserved;
}

TEST_CASE("what is to be reserved is there without a request") {
  ArenaOptions options = growing_options();
  options.reserve = 70 * kMiB;
  const auto arena = Arena::create(options);
  CHECK(comes_true([&] { return arena->stats().reserved >= options.reserve; }));
  CHECK(settled(*arena) <= options.reserve + 4 * kMiB);
  CHECK(arena->stats().blocks == 0);
  // A request then takes no system call.
  CHECK(arena->try_allocate(ByteCount{20 * kMiB}).has_value());
}

TEST_CASE("more than the capacity is not reserved") {
  ArenaOptions options = growing_options();
  options.capacity = 64 * kMiB;
  options.reserve = 1024 * kMiB;
  const auto arena = Arena::create(options);
  CHECK(comes_true([&] { return arena->stats().reserved == options.capacity; }));
  std::vector<Allocation> all;
  for (int i = 0; i < 64; ++i) all.push_back(arena->allocate(ByteCount{kMiB}));
  CHECK(code_of([&] { return arena->allocate(ByteCount{kMiB}); }) == ErrorCode::kArenaFull);
}

TEST_CASE("an arena that is used gets room ahead of need, and one that idles grows no further") {
  const auto arena = Arena::create(growing_options());
  std::vector<Allocation> held;
  for (int i = 0; i < 20; ++i) held.push_back(arena->allocate(ByteCount{kMiB}));
  CHECK(comes_true([&] { return arena->stats().largest_free >= 2 * kMiB; }));
  (void)arena->allocate(ByteCount{3 * kMiB / 4});
  const std::uint64_t reserved = settled(*arena);
  CHECK(reserved <= 40 * kMiB);
  // One block, again and again.
  for (int i = 0; i < 100; ++i) (void)arena->allocate(ByteCount{3 * kMiB / 4});
  CHECK(settled(*arena) == reserved);
}

TEST_CASE("every block of an arena that grows from two sides lies alone and keeps its bytes") {
  const auto arena = Arena::create(growing_options());
  std::vector<std::pair<Allocation, int>> held;
  std::uint64_t bytes = 0;
  for (int i = 0; bytes < 200 * kMiB; ++i) {
    const std::uint64_t size = (1 + i * 7919 % 97) * (kMiB / 16);
    bytes += size;
    held.emplace_back(arena->allocate(ByteCount{size}), i % 251);
    fill(held.back().first, i % 251);
  }
  for (const auto& [allocation, byte] : held) CHECK(is_filled(allocation.hold, byte));
  held.clear();
  (void)settled(*arena);
  const std::uint64_t reserved = arena->stats().reserved;
  CHECK(arena->trim() == reserved);
  CHECK(arena->stats().reserved == 0);
}

TEST_CASE("nothing is taken ahead of need where it would be missed") {
  Child child([](Line& line) {
    const bool small = take_own_shm("24m");
    line.say(small ? 1 : 0);
    if (!small) return;
    ArenaOptions options = growing_options();
    options.reserve = 200 * kMiB;
    const auto arena = Arena::create(options);
    std::vector<Allocation> held;
    held.push_back(arena->allocate(ByteCount{kMiB}));
    (void)settled(*arena);
    // A quarter of what is left at most: the rest is for requests, this arena's or another's.
    expect(shm_filesystem_room() >= 12 * kMiB);
    held.push_back(arena->allocate(ByteCount{shm_filesystem_room() / 2}));
    fill(held.back(), 9);
  });
  const bool small = child.hear() == 1;
  child.join();
  if (!small) MESSAGE("not checked: no mount namespace to be had here");
}

TEST_CASE("a closed arena has no thread, and one that closes while it grows leaves nothing") {
  for (int round = 0; round < 50; ++round) {
    ArenaOptions options = growing_options();
    options.reserve = 256 * kMiB;
    const auto arena = Arena::create(options);
    const std::string name = arena->name();
    for (int i = 0; i < round % 5; ++i) (void)arena->allocate(ByteCount{kMiB});
    arena->close();
    // A thread that was joined may be listed for a moment yet.
    CHECK(comes_true([] { return threads_named("shmx-grower") == 0; }));
    CHECK_FALSE(name_exists(name));
  }
}

TEST_CASE("rule 10: a child that is forked while its parent's arena grows has no part in that") {
  for (int round = 0; round < 20; ++round) {
    ArenaOptions options = growing_options();
    options.reserve = 128 * kMiB;
    const auto arena = Arena::create(options);
    const Allocation made = arena->allocate(ByteCount{5000});
    fill(made, 3);
    Child child([&](Line&) {
      expect(threads_named("shmx-grower") == 0);
      expect(is_filled(made.hold, 3));
      const auto own = Arena::create(growing_options());
      expect(own->allocate(ByteCount{5000}).hold.held());
      own->close();
    });
    child.join();
    CHECK(comes_true([&] { return arena->stats().reserved >= options.reserve; }));
  }
}

TEST_CASE("rule 6: what a killed peer held is used again before the arena grows ahead of need") {
  const auto arena = Arena::create(growing_options());
  std::vector<HandleState> sent;
  for (int i = 0; i < 40; ++i) sent.push_back(send(arena->allocate(ByteCount{kMiB}).hold, exactly(1)));
  Child child([&](Line& line) {
    std::vector<Hold> holds;
    holds.reserve(sent.size());
    for (const HandleState& state : sent) {
      holds.push_back(load_block(state.arena, state.place, state.block, state.generation, state.message));
    }
    line.say(1);
    (void)line.hear();
  });
  REQUIRE(child.hear() == 1);
  const std::uint64_t reserved = settled(*arena);
  child.kill();
  std::vector<Allocation> held;
  for (int i = 0; i < 40; ++i) held.push_back(arena->allocate(ByteCount{kMiB}));
  CHECK(settled(*arena) < reserved + 20 * kMiB);
  CHECK(arena->stats().swept == 1);
}

TEST_CASE("the thread takes no signals of the program") {
  const auto arena = Arena::create([] {
    ArenaOptions options = growing_options();
    options.reserve = 8 * kMiB;
    return options;
  }());
  CHECK(comes_true([] { return threads_named("shmx-grower") == 1; }));
  const std::unique_ptr<DIR, int (*)(DIR*)> tasks(::opendir("/proc/self/task"), &::closedir);
  while (const dirent* task = ::readdir(tasks.get())) {
    const std::string folder = std::string("/proc/self/task/") + task->d_name;
    std::string line;
    std::ifstream comm(folder + "/comm");
    if (!std::getline(comm, line) || line != "shmx-grower") continue;
    std::ifstream status(folder + "/status");
    while (std::getline(status, line) && !line.starts_with("SigBlk:")) continue;
    const std::uint64_t blocked = std::stoull(line.substr(7), nullptr, 16);
    CHECK((blocked & (1U << (SIGINT - 1))) != 0);
    CHECK((blocked & (1U << (SIGTERM - 1))) != 0);
  }
}

TEST_CASE("an arena lies on the node that was asked for, and on none that is not there") {
  const int node = memory_nodes().back();
  ArenaOptions options = small_options();
  options.numa_node = node;
  const auto arena = Arena::create(options);
  CHECK_FALSE(arena->stats().numa_node.has_value());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  const auto found = arena->stats().numa_node;
  CHECK((!found || *found == node));
  for (const int wrong : {-1, node + 1, 1'000'000}) {
    options.numa_node = wrong;
    CHECK(code_of([&] { return Arena::create(options); }) == ErrorCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace shmx
