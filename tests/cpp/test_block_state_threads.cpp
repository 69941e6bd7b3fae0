// The protocol of blocks under concurrency. Threads stand in for processes, and the payload is plain memory: under
// TSan any use that the protocol does not order is a race, and without TSan wrong content is seen by comparison.
//
// A run ends after so many rounds, or after so many seconds: on a busy machine threads that yield to each other mostly
// yield to others. SHMX_TEST_SEED, SHMX_TEST_ROUNDS and SHMX_TEST_SECONDS repeat or lengthen it.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "block_state.hpp"
#include "child_process.hpp"

namespace shmx {
namespace {

constexpr std::uint32_t kBlocks = 3;
constexpr std::uint32_t kPeers = 4;
constexpr std::size_t kPayloadWords = 32;

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

// ---- what the owner runs: the protocol, or the protocol with a fault put in

struct Protocol {
  static std::optional<Generation> retire(BlockState& block) { return shmx::retire(block); }
  static bool take_slot(std::mutex& slot) { return slot.try_lock(); }
  static void give_slot(std::mutex& slot) { slot.unlock(); }
};

// Sweeps peers that are alive.
struct SweepsAnybody : Protocol {
  static bool take_slot(std::mutex& /*slot*/) { return true; }
  static void give_slot(std::mutex& /*slot*/) {}
};

void let_others_run() {
  for (int i = 0; i < 3; ++i) std::this_thread::yield();
}

// A copy of shmx::retire that can leave out the second look, with the scheduler called where that would show.
template <bool kLooksAgain>
struct Mutable : Protocol {
  static std::optional<Generation> retire(BlockState& block) {
    const std::uint64_t open = block.generation.load(std::memory_order_seq_cst) & ~std::uint64_t{1};
    if (!is_idle(block)) return std::nullopt;
    let_others_run();
    std::uint64_t expected = open;
    if (!block.generation.compare_exchange_strong(expected, open + 1, std::memory_order_seq_cst) &&
        expected != open + 1) {
      return std::nullopt;
    }
    if (kLooksAgain && !is_idle(block)) {
      expected = open + 1;
      block.generation.compare_exchange_strong(expected, open, std::memory_order_seq_cst);
      return std::nullopt;
    }
    let_others_run();
    expected = open + 1;
    if (!block.generation.compare_exchange_strong(expected, open + 2, std::memory_order_seq_cst)) return std::nullopt;
    return Generation{open + 2};
  }
};

// ---- the processes

struct Handle {
  std::uint32_t block = 0;
  Generation generation{};
  std::optional<MessageId> message;
  bool must_load = false;  // announced, loaded exactly as often as announced, and never revoked
};

// A channel between processes: it orders what was written before a send with what is read after the receipt.
class Channel {
 public:
  void send(const Handle& handle) {
    const std::lock_guard guard(mutex_);
    handles_.push_back(handle);
  }
  std::optional<Handle> receive() {
    const std::lock_guard guard(mutex_);
    if (handles_.empty()) return std::nullopt;
    const Handle handle = handles_.front();
    handles_.pop_front();
    return handle;
  }

 private:
  std::mutex mutex_;
  std::deque<Handle> handles_;
};

struct Options {
  std::uint64_t seed = 1;
  std::uint32_t rounds = 1;  // blocks published
  std::uint32_t seconds = 2;
  bool revokes = false;
  bool expires = false;  // messages outlive their time-to-live
  bool deaths = false;   // peers leave their bits behind, which others sweep
};

struct Outcome {
  std::uint64_t wrong_reads = 0;
  std::uint64_t lost_loads = 0;  // of handles that must load
  std::uint64_t published = 0;
  std::uint64_t loads = 0;
  std::uint64_t stale = 0;
  std::uint64_t forwards = 0;
  std::uint64_t without_cell = 0;
  std::uint64_t expired = 0;
  std::uint64_t deaths = 0;
  std::uint64_t still_in_use = 0;  // blocks, after everybody has released everything

  [[nodiscard]] bool broken() const { return wrong_reads + lost_loads + still_in_use != 0; }
};

struct World {
  std::array<BlockState, kBlocks> blocks{};
  std::array<std::array<std::uint64_t, kPayloadWords>, kBlocks> payload{};
  std::array<Channel, kPeers> inboxes;
  // Locked by a peer as long as it lives: the kernel's lock of its slot.
  std::array<std::mutex, kPeers> slots;
  std::atomic<Ticks> clock{0};
  std::atomic<bool> owner_done{false};
  std::atomic<bool> broken{false};  // a rule was; a message that nobody can load any more may then block the owner
  // Threads that still may send: a peer ends when it is the last and its inbox is empty.
  std::atomic<std::uint32_t> senders{kPeers};
  Options options;
};

std::uint64_t content(std::uint32_t block, Generation generation) {
  return (value(generation) * 0x9E3779B97F4A7C15ULL) ^ block;
}

using Random = std::mt19937_64;

// Sends a message that `holder` announces: loaded exactly as often as announced, or more often, or unannounced.
void send_message(World& world, Random& random, std::uint32_t block, Generation generation, Outcome& outcome) {
  const auto kind = random() % 8;
  Handle handle{block, generation, std::nullopt, false};
  const auto readers = static_cast<std::uint32_t>(1 + random() % 3);
  std::uint32_t copies = readers;
  if (kind != 0) {
    const Announcement announcement = announce(world.blocks[block], generation, readers, world.clock.load());
    if (announcement.result == Announced::kInCell) {
      handle.message = announcement.message;
      handle.must_load = kind > 2 && !world.options.revokes && !world.options.expires;
      copies += kind <= 2 ? 2 : 0;
    } else {
      ++outcome.without_cell;
    }
  }
  for (std::uint32_t i = 0; i < copies; ++i) world.inboxes[random() % kPeers].send(handle);
}

void clear_slot(World& world, PeerSlot slot) {
  for (BlockState& block : world.blocks) clear_hold(block, slot);
}

template <typename Rules>
void sweep(World& world) {
  for (std::uint32_t i = 0; i < kPeers; ++i) {
    if (!Rules::take_slot(world.slots[i])) continue;
    clear_slot(world, PeerSlot{i + 1});
    Rules::give_slot(world.slots[i]);
  }
}

constexpr Ticks kTimeToLive = 20;

std::uint64_t expire(World& world) {
  std::uint64_t dropped = 0;
  for (BlockState& block : world.blocks) dropped += drop_expired(block, kTimeToLive, world.clock.load());
  return dropped;
}

class Peer {
 public:
  Peer(World& world, std::uint32_t number)
      : world_(world), number_(number), slot_{number + 1}, random_(world.options.seed * 1000 + number) {}

  void run() {
    bool sends = true;
    std::unique_lock life(world_.slots[number_]);
    for (;;) {
      const bool closing = world_.owner_done.load();
      if (world_.options.deaths && random_() % 64 == 0) be_killed_and_replaced(life);
      if (closing && sends) {
        sends = false;
        world_.senders.fetch_sub(1);
      }
      const auto handle = world_.inboxes[number_].receive();
      if (handle) {
        load(*handle);
      } else if (closing && world_.senders.load() == 0) {
        // Nobody sends any more; what was sent before the count came to 0 is in the inbox by now.
        const auto last = world_.inboxes[number_].receive();
        if (!last) break;
        load(*last);
      } else {
        std::this_thread::yield();
      }
      while (!held_.empty() && (random_() % 3 != 0 || held_.size() > 6)) {
        const std::size_t index = random_() % held_.size();
        check(held_[index]);
        // Well below one new load for each, or messages would breed and the owner never retire.
        if (sends && random_() % 8 == 0) {
          ++outcome.forwards;
          send_message(world_, random_, held_[index].block, held_[index].generation, outcome);
        }
        release(index);
      }
      // Handles kept for later, and loaded without announcement until the block was reused. Tried most of all when no
      // message is under way, which is when the owner can retire.
      if (!closing && handle && random_() % 4 == 0) late_.push_back({handle->block, handle->generation, {}, false});
      if (!closing && !late_.empty() && random_() % 4 == 0) {
        const std::size_t index = late_.size() - 1 - random_() % std::min<std::size_t>(late_.size(), 2);
        if (!load(late_[index])) late_.erase(late_.begin() + static_cast<std::ptrdiff_t>(index));
      }
    }
    while (!held_.empty()) {
      check(held_.back());
      release(held_.size() - 1);
    }
  }

  Outcome outcome;

 private:
  void be_killed_and_replaced(std::unique_lock<std::mutex>& life) {
    ++outcome.deaths;
    held_.clear();
    counts_.fill(0);
    life.unlock();
    let_others_run();
    life.lock();
    clear_slot(world_, slot_);
  }

  bool load(const Handle& handle) {
    BlockState& block = world_.blocks[handle.block];
    set_hold(block, slot_);
    if (!confirm_generation(block, handle.generation)) {
      if (counts_[handle.block] == 0) clear_hold(block, slot_);
      ++outcome.stale;
      if (handle.must_load) {
        ++outcome.lost_loads;
        world_.broken.store(true);
      }
      return false;
    }
    if (handle.message) take_message(block, *handle.message);
    ++counts_[handle.block];
    ++outcome.loads;
    held_.push_back(handle);
    check(handle);
    return true;
  }

  void check(const Handle& handle) {
    const std::uint64_t expected = content(handle.block, handle.generation);
    for (const std::uint64_t& word : world_.payload[handle.block]) {
      if (word != expected) {
        ++outcome.wrong_reads;
        world_.broken.store(true);
        return;
      }
    }
  }

  void release(std::size_t index) {
    const std::uint32_t block = held_[index].block;
    held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(index));
    if (--counts_[block] == 0) clear_hold(world_.blocks[block], slot_);
  }

  World& world_;
  std::uint32_t number_;
  PeerSlot slot_;
  Random random_;
  std::array<std::uint32_t, kBlocks> counts_{};
  std::vector<Handle> held_;
  std::vector<Handle> late_;
};

template <typename Rules>
void run_owner(World& world, Outcome& outcome) {
  Random random(world.options.seed);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(world.options.seconds);
  while (outcome.published < world.options.rounds && !world.broken.load() &&
         std::chrono::steady_clock::now() < deadline) {
    const auto index = static_cast<std::uint32_t>(random() % kBlocks);
    BlockState& block = world.blocks[index];
    const auto generation = Rules::retire(block);
    if (!generation) {
      if (world.options.deaths) sweep<Rules>(world);
      if (world.options.expires) outcome.expired += expire(world);
      std::this_thread::yield();
      continue;
    }
    ++outcome.published;
    world.clock.fetch_add(1);
    for (std::uint64_t& word : world.payload[index]) word = content(index, *generation);
    set_hold(block, kOwnerSlot);
    const auto messages = random() % 3;
    for (std::uint64_t i = 0; i <= messages; ++i) send_message(world, random, index, *generation, outcome);
    if (world.options.revokes && random() % 4 == 0) revoke(block, *generation);
    clear_hold(block, kOwnerSlot);
  }
  world.owner_done.store(true);
}

template <typename Rules>
Outcome run_world(const Options& options) {
  World world;
  world.options = options;
  for (std::uint32_t i = 0; i < kBlocks; ++i) world.payload[i].fill(content(i, Generation{0}));
  std::vector<std::unique_ptr<Peer>> peers;
  Outcome total;
  {
    std::vector<std::jthread> threads;
    for (std::uint32_t i = 0; i < kPeers; ++i) peers.push_back(std::make_unique<Peer>(world, i));
    for (auto& peer : peers) threads.emplace_back([&peer] { peer->run(); });
    // A reaper beside the owner: sweeps and expiries may meet each other.
    if (options.deaths || options.expires) {
      threads.emplace_back([&world] {
        while (!world.owner_done.load()) {
          if (world.options.deaths) sweep<Rules>(world);
          if (world.options.expires) (void)expire(world);
          std::this_thread::yield();
        }
      });
    }
    run_owner<Rules>(world, total);
  }
  for (const auto& peer : peers) {
    total.wrong_reads += peer->outcome.wrong_reads;
    total.lost_loads += peer->outcome.lost_loads;
    total.loads += peer->outcome.loads;
    total.stale += peer->outcome.stale;
    total.forwards += peer->outcome.forwards;
    total.without_cell += peer->outcome.without_cell;
    total.deaths += peer->outcome.deaths;
  }
  for (const BlockState& block : world.blocks) total.still_in_use += is_idle(block) ? 0 : 1;
  return total;
}

constexpr std::uint32_t kRounds = 20'000;

template <typename Rules>
void check_rules(Options options, std::uint64_t seeds = 2) {
  const std::uint64_t first = from_environment("SHMX_TEST_SEED", 1);
  const auto rounds = static_cast<std::uint32_t>(from_environment("SHMX_TEST_ROUNDS", kRounds));
  const auto seconds = static_cast<std::uint32_t>(from_environment("SHMX_TEST_SECONDS", 2));
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    CAPTURE(seed);
    options.seed = seed;
    options.rounds = rounds;
    options.seconds = seconds;
    const Outcome outcome = run_world<Rules>(options);
    MESSAGE("published ", outcome.published, ", loads ", outcome.loads, ", stale ", outcome.stale, ", forwards ",
            outcome.forwards, ", without a cell ", outcome.without_cell, ", deaths ", outcome.deaths);
    CHECK(outcome.wrong_reads == 0);
    CHECK(outcome.lost_loads == 0);
    CHECK(outcome.still_in_use == 0);
    // Otherwise the run has shown nothing.
    CHECK(outcome.published > 0);
    CHECK(outcome.loads > outcome.published);
    CHECK(outcome.forwards > 0);
    CHECK((outcome.deaths > 0) == options.deaths);
    // A run that was cut short may not have come to a late load of a reused block.
    CHECK((outcome.stale > 0 || outcome.published < rounds));
  }
}

TEST_CASE("rules 1 to 3: holders read their own generation and announced loads succeed, under random traffic") {
  check_rules<Protocol>({});
}

TEST_CASE("rules 1 and 3 with revocations: holders read their own generation") {
  check_rules<Protocol>({.revokes = true});
}

TEST_CASE("rules 1 to 3 and 6: what a killed peer held comes back, whoever sweeps, and no other peer loses anything") {
  check_rules<Protocol>({.deaths = true});
}

TEST_CASE("rules 1, 3 and 6 with everything at once: revocations, expiries, deaths and sweeps") {
  check_rules<Protocol>({.revokes = true, .expires = true, .deaths = true});
}

TEST_CASE("the mutable copy of retire without a fault keeps the rules") { check_rules<Mutable<true>>({}, 1); }

// Fails; the last test runs it in a process of its own and wants it to.
TEST_CASE("mutant: the holds are not read again after closing" * doctest::skip()) {
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    if (run_world<Mutable<false>>({.seed = seed, .rounds = kRounds}).broken()) FAIL("caught with seed ", seed);
  }
}

TEST_CASE("mutant: peers that are alive are swept" * doctest::skip()) {
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    if (run_world<SweepsAnybody>({.seed = seed, .rounds = kRounds, .deaths = true}).broken())
      FAIL("caught with seed ", seed);
  }
}

TEST_CASE("this test is known to catch a retire and a sweep that are wrong") {
  CHECK(test::run_test_case("mutant: the holds are not read again after closing") != 0);
  CHECK(test::run_test_case("mutant: peers that are alive are swept") != 0);
  // And the way it is run does not fail by itself.
  CHECK(test::run_test_case("no test has this name") == 0);
}

}  // namespace
}  // namespace shmx
