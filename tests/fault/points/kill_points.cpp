// Rules 6 and 7 at every point: each operation is performed by a process that is killed at its n-th point, for every n,
// and what others find after each kill is checked.
//
// Points are: the beginning and the end of every system call ("calls"); every instruction of the core after which the
// shared bytes are others than before ("changes": between two system calls a kill leaves nothing but those bytes and
// the locks, so these stand for all instructions); and instructions as such ("instructions": a sample with a random
// offset, or with SHMX_LONG=1 all of them up to kAllUpTo an operation).
//
//     kill_points [operation]     one operation, or all
//     kill_points part parts      every parts-th operation; parts may run at the same time
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <iostream>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "own_shm.hpp"
#include "scene.hpp"
#include "shared_state.hpp"
#include "tracee.hpp"

namespace shmx::test {
namespace {

// To reach an instruction takes all those before it, so that long operations get a smaller sample.
constexpr std::uint64_t kSampledSteps = 200'000;
constexpr std::uint64_t kMostSampled = 8;
constexpr std::uint64_t kAllUpTo = 4000;

// Advances the performer to its n-th point, counted from 0. False: there are fewer.
using Advance = std::function<bool(Tracee&, std::uint64_t)>;

bool to_call(Tracee& tracee, std::uint64_t n) {
  for (std::uint64_t i = 0; i <= n; ++i) {
    if (!tracee.next_call_stop()) return false;
  }
  return true;
}

bool to_instruction(Tracee& tracee, std::uint64_t n) {
  for (std::uint64_t i = 0; i <= n; ++i) {
    if (!tracee.next_instruction([] {})) return false;
  }
  return true;
}

// One pass through the operation: how many instructions there are, and before which of them the shared bytes have
// become others.
struct Course {
  std::uint64_t instructions = 0;
  std::vector<std::uint64_t> changes;
};

Course follow(const Operation& operation) {
  Scene scene(operation);
  Course course;
  {
    Tracee tracee(scene.performer().pid());
    SharedState state;
    (void)state.changed();
    for (; tracee.next_instruction([&] { state.look_for_segments(); }); ++course.instructions) {
      if (state.changed()) course.changes.push_back(course.instructions);
    }
    scene.performer().kill();
  }
  scene.check_after_kill();
  return course;
}

// To the n-th change of a course that was followed before. Hash tables and names differ from pass to pass, so that it
// may come some instructions earlier or later: looking begins in a stretch without changes and counts from there.
bool to_change(Tracee& tracee, const Course& course, std::uint64_t n) {
  constexpr std::uint64_t kDrift = 200;
  const std::vector<std::uint64_t>& changes = course.changes;
  std::uint64_t first = n;
  while (first > 0 && changes[first] - changes[first - 1] < 2 * kDrift) --first;
  for (std::uint64_t i = 0; i + kDrift < changes[first]; ++i) {
    if (!tracee.next_instruction([] {})) return false;
  }
  SharedState state;
  (void)state.changed();
  for (std::uint64_t to_come = n - first + 1; to_come > 0;) {
    if (!tracee.next_instruction([&] { state.look_for_segments(); })) return false;
    to_come -= state.changed() ? 1 : 0;
  }
  return true;
}

struct Tally {
  std::uint64_t points = 0;
  std::uint64_t violations = 0;
};

// Kills at one point. False if it does not exist: then the operation was complete.
bool kill_at(const Operation& operation, const char* kind, const Advance& advance, std::uint64_t n, Tally& tally) {
  bool reached = true;
  try {
    Scene scene(operation);
    {
      Tracee tracee(scene.performer().pid());
      reached = advance(tracee, n);
      scene.performer().kill();
    }
    ++tally.points;
    scene.check_after_kill();
  } catch (const std::exception& error) {
    ++tally.violations;
    std::cout << "VIOLATION: " << operation.name << ", killed at " << kind << ' ' << n << ": " << error.what()
              << std::endl;
    for (const std::string& name : names_in_shm()) ::unlink(("/dev/shm" + name).c_str());
  }
  return reached;
}

Tally kill_at_calls(const Operation& operation) {
  Tally tally;
  for (std::uint64_t n = 0; kill_at(operation, "call", to_call, n, tally); ++n) {
  }
  return tally;
}

Tally kill_at_changes(const Operation& operation, const Course& course) {
  Tally tally;
  const auto advance = [&](Tracee& tracee, std::uint64_t n) { return to_change(tracee, course, n); };
  for (std::uint64_t n = 0; n < course.changes.size(); ++n) (void)kill_at(operation, "change", advance, n, tally);
  return tally;
}

Tally kill_at_instructions(const Operation& operation, const Course& course, bool all, std::mt19937_64& chance) {
  Tally tally;
  const std::uint64_t wanted =
      all ? kAllUpTo : std::clamp<std::uint64_t>(kSampledSteps / (course.instructions + 1), 2, kMostSampled);
  const std::uint64_t stride = std::max<std::uint64_t>(1, course.instructions / wanted);
  for (std::uint64_t n = chance() % stride; n < course.instructions; n += stride) {
    (void)kill_at(operation, "instruction", to_instruction, n, tally);
  }
  return tally;
}

// One after the other, performer and checks are twice as fast as on two processors. Each part has one of its own.
void stay_on_one_processor(std::size_t part) {
  cpu_set_t all;
  if (::sched_getaffinity(0, sizeof all, &all) != 0) return;
  std::size_t before = part % static_cast<std::size_t>(CPU_COUNT(&all));
  for (std::size_t processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (!CPU_ISSET(processor, &all) || before-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    (void)::sched_setaffinity(0, sizeof one, &one);
    return;
  }
}

struct Wanted {
  const char* only = nullptr;
  std::size_t part = 0;
  std::size_t parts = 1;
};

// Nothing if the arguments make no sense.
std::optional<Wanted> parse(int argc, char** argv) {
  if (argc == 1) return Wanted{};
  if (argc == 2) return Wanted{argv[1]};
  const std::size_t part = std::strtoul(argv[1], nullptr, 10);
  const std::size_t parts = std::strtoul(argv[2], nullptr, 10);
  if (argc > 3 || part < 1 || part > parts) return std::nullopt;
  return Wanted{nullptr, part - 1, parts};
}

int run(const Wanted& wanted) {
  const char* const long_run = std::getenv("SHMX_LONG");
  const bool all = long_run != nullptr && std::strcmp(long_run, "1") == 0;
  const char* const given_seed = std::getenv("SHMX_SEED");
  const std::uint64_t seed = given_seed != nullptr ? std::strtoull(given_seed, nullptr, 10) : std::random_device{}();
  std::mt19937_64 chance(seed);
  std::cout << "seed " << seed << " (SHMX_SEED)\n";
  Tally sum;
  bool found = false;
  std::size_t number = 0;
  for (const Operation& operation : operations()) {
    if (wanted.only != nullptr ? std::strcmp(wanted.only, operation.name) != 0
                               : number++ % wanted.parts != wanted.part) {
      continue;
    }
    found = true;
    const auto start = std::chrono::steady_clock::now();
    const Tally calls = kill_at_calls(operation);
    Course course;
    Tally changes;
    Tally instructions;
    if (can_step()) {
      course = follow(operation);
      changes = kill_at_changes(operation, course);
      instructions = kill_at_instructions(operation, course, all, chance);
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    char text[160];
    (void)std::snprintf(text, sizeof text, "%-28s %4lu calls %4lu changes %4lu of %6lu instructions: %.1f s\n",
                        operation.name, calls.points, changes.points, instructions.points, course.instructions,
                        took.count());
    std::cout << text << std::flush;
    for (const Tally& tally : {calls, changes, instructions}) {
      sum.points += tally.points;
      sum.violations += tally.violations;
    }
  }
  std::cout << sum.points << " kills, " << sum.violations << " violations\n";
  if (!found) std::cerr << "no such operation\n";
  return !found || sum.violations != 0 ? 1 : 0;
}

}  // namespace
}  // namespace shmx::test

int main(int argc, char** argv) {
  if (!shmx::test::take_own_shm("64m")) {
    std::cerr << "no /dev/shm of our own here, which these checks need\n";
    return 77;
  }
  const auto wanted = shmx::test::parse(argc, argv);
  if (!wanted) {
    std::cerr << "usage: kill_points [operation | part parts]\n";
    return 2;
  }
  shmx::test::stay_on_one_processor(wanted->part);
  return shmx::test::run(*wanted);
}
