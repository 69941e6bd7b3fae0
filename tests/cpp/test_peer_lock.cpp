// Peer slots as kernel locks, with real processes: a lock lives exactly as long as the process image that took it.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>
#include <vector>

#include "child_process.hpp"
#include "control.hpp"
#include "error.hpp"
#include "host.hpp"
#include "peer_lock.hpp"

namespace shmx {
namespace {

using test::Child;
using test::expect;
using test::Line;

constexpr PeerSlot kSlot{7};

struct Scratch {
  ArenaId arena{random_id()};
  ControlSegment control = ControlSegment::create(arena, {1U << 20, 640});
  Scratch() { control.publish(); }
  ~Scratch() { unlink_segment(control.name()); }

  [[nodiscard]] std::optional<PeerLock> take(PeerSlot slot, Inheritance inheritance = Inheritance::kThisProcess) {
    return PeerLock::try_take(control.file(), slot, inheritance);
  }
  [[nodiscard]] bool alive(PeerSlot slot = kSlot) { return is_alive(control.file(), slot); }
};

ErrorCode code_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::kNone;
}

// What a forked process that must outlive its parent does: it ends when the test hangs up.
[[noreturn]] void stay_until_hung_up(Line& line) {
  try {
    line.hear_end();
  } catch (const std::exception&) {
    ::_exit(1);
  }
  ::_exit(0);
}

// The test is the subreaper of its grandchildren.
void reap_grandchild(pid_t pid) {
  int status = 0;
  REQUIRE(::waitpid(pid, &status, 0) == pid);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("a slot is taken once, also by the same process") {
  Scratch scratch;
  CHECK_FALSE(scratch.alive());
  auto lock = scratch.take(kSlot);
  REQUIRE(lock);
  CHECK(lock->held());
  CHECK(scratch.alive());
  CHECK_FALSE(scratch.take(kSlot).has_value());
  CHECK(scratch.take(PeerSlot{8}).has_value());
  lock->release();
  CHECK_FALSE(lock->held());
  CHECK_FALSE(scratch.alive());
  CHECK(scratch.take(kSlot).has_value());
  lock->release();
}

TEST_CASE("a lock moves with its object") {
  Scratch scratch;
  auto lock = scratch.take(kSlot);
  REQUIRE(lock);
  PeerLock moved(std::move(*lock));
  lock.reset();
  CHECK(scratch.alive());
  PeerLock assigned;
  assigned = std::move(moved);
  CHECK(scratch.alive());
  assigned = PeerLock();
  CHECK_FALSE(scratch.alive());
}

TEST_CASE("take_any takes the first free slot that is not the owner's, and nothing when all are taken") {
  Scratch scratch;
  std::vector<PeerLock> locks;
  for (std::uint32_t i = 1; i < kMaxPeers; ++i) {
    auto seat = PeerLock::take_any(scratch.control.file(), Inheritance::kThisProcess);
    REQUIRE(seat);
    CHECK(seat->second == PeerSlot{i});
    locks.push_back(std::move(seat->first));
  }
  CHECK_FALSE(PeerLock::take_any(scratch.control.file(), Inheritance::kThisProcess).has_value());
  CHECK_FALSE(scratch.alive(kOwnerSlot));
  locks[9].release();
  const auto seat = PeerLock::take_any(scratch.control.file(), Inheritance::kThisProcess);
  REQUIRE(seat);
  CHECK(seat->second == PeerSlot{10});
}

TEST_CASE("another process sees the lock and cannot take it") {
  Scratch scratch;
  const auto lock = scratch.take(kSlot);
  Child child([&](Line&) {
    scratch.control.file().close();
    expect(scratch.alive());
    expect(!scratch.take(kSlot));
    expect(!ProbeLock::try_take(scratch.control.file(), kSlot));
  });
  child.join();
}

TEST_CASE("rule 6: a lock ends with SIGKILL, although the zombie is unreaped and its child lives") {
  Scratch scratch;
  auto [mine, grandchilds] = test::make_line();
  Child child([&](Line& line) {
    const auto lock = scratch.take(kSlot);
    expect(lock.has_value());
    const pid_t grandchild = ::fork();
    if (grandchild == 0) {
      {
        const Line closed(std::move(mine));
      }
      grandchilds.say(1);
      stay_until_hung_up(grandchilds);
    }
    line.say(static_cast<std::uint64_t>(grandchild));
    (void)line.hear();
  });
  const auto grandchild = static_cast<pid_t>(child.hear());
  {
    const Line closed(std::move(grandchilds));
  }
  CHECK(mine.hear() == 1);
  CHECK(scratch.alive());
  child.kill_unreaped();
  CHECK_FALSE(scratch.alive());
  CHECK(::kill(grandchild, 0) == 0);
  CHECK(::kill(child.pid(), 0) == 0);
  {
    const Line hang_up(std::move(mine));
  }
  reap_grandchild(grandchild);
}

TEST_CASE("a lock survives the closing of every descriptor and a stopped process") {
  Scratch scratch;
  Child child([&](Line&) {
    const auto lock = scratch.take(kSlot);
    expect(lock.has_value());
    expect(::syscall(SYS_close_range, 3U, ~0U, 0U) == 0);
    ::raise(SIGSTOP);
  });
  child.wait_stopped();
  CHECK(scratch.alive());
  CHECK_FALSE(scratch.take(kSlot).has_value());
  child.kill_unreaped();
  CHECK_FALSE(scratch.alive());
}

TEST_CASE("a lock ends at exec") {
  Scratch scratch;
  int output[2];
  REQUIRE(::pipe2(output, O_CLOEXEC) == 0);
  Child child([&](Line& line) {
    const auto lock = scratch.take(kSlot);
    expect(lock.has_value());
    line.say(1);
    (void)line.hear();
    // What comes out there comes from the new program, which then waits for input that never comes.
    int input[2];
    expect(::pipe(input) == 0);
    expect(::dup2(input[0], STDIN_FILENO) == STDIN_FILENO);
    expect(::dup2(output[1], STDOUT_FILENO) == STDOUT_FILENO);
    ::execl("/bin/sh", "sh", "-c", "echo; read nothing", static_cast<char*>(nullptr));
    expect(false);
  });
  ::close(output[1]);
  CHECK(child.hear() == 1);
  CHECK(scratch.alive());
  child.say(1);
  char newline = 0;
  CHECK(::read(output[0], &newline, 1) == 1);
  ::close(output[0]);
  CHECK_FALSE(scratch.alive());
  CHECK(::kill(child.pid(), 0) == 0);
  child.kill();
}

TEST_CASE("rule 10: a lock for this process alone is not inherited by fork") {
  Scratch scratch;
  auto lock = scratch.take(kSlot);
  REQUIRE(lock);
  Child child([&](Line& line) {
    lock->forget();
    line.say(1);
    (void)line.hear();
  });
  CHECK(child.hear() == 1);
  CHECK(scratch.alive());
  lock->release();
  CHECK_FALSE(scratch.alive());
  child.say(1);
  child.join();
}

TEST_CASE("rule 10: a lock for the next fork is inherited, outlives the parent, and stops at the grandchild") {
  Scratch scratch;
  auto [mine, childs] = test::make_line();
  auto [mine_too, grandchilds] = test::make_line();
  Child parent([&](Line& line) {
    auto lock = scratch.take(kSlot, Inheritance::kNextFork);
    expect(lock.has_value());
    const pid_t child = ::fork();
    if (child == 0) {
      {
        const Line closed(std::move(mine));
      }
      lock->keep_from_children();
      const pid_t grandchild = ::fork();
      if (grandchild == 0) {
        {
          const Line closed(std::move(childs));
        }
        {
          const Line closed(std::move(mine_too));
        }
        grandchilds.say(1);
        stay_until_hung_up(grandchilds);
      }
      {
        const Line closed(std::move(grandchilds));
      }
      {
        const Line closed(std::move(mine_too));
      }
      childs.say(static_cast<std::uint64_t>(grandchild));
      stay_until_hung_up(childs);
    }
    line.say(static_cast<std::uint64_t>(child));
    (void)line.hear();
  });
  const auto child = static_cast<pid_t>(parent.hear());
  {
    const Line closed(std::move(childs));
  }
  {
    const Line closed(std::move(grandchilds));
  }
  const auto grandchild = static_cast<pid_t>(mine.hear());
  CHECK(mine_too.hear() == 1);
  parent.kill();
  CHECK(scratch.alive());
  CHECK_FALSE(scratch.take(kSlot).has_value());
  {
    const Line hang_up(std::move(mine));
  }
  reap_grandchild(child);
  CHECK_FALSE(scratch.alive());
  CHECK(::kill(grandchild, 0) == 0);
  {
    const Line hang_up(std::move(mine_too));
  }
  reap_grandchild(grandchild);
}

TEST_CASE("rule 10: the parent's release leaves the child its inherited lock") {
  Scratch scratch;
  auto lock = scratch.take(kSlot, Inheritance::kNextFork);
  REQUIRE(lock);
  Child child([&](Line& line) {
    lock->keep_from_children();
    line.say(1);
    (void)line.hear();
    lock->release();
    line.say(2);
    (void)line.hear();
  });
  CHECK(child.hear() == 1);
  lock->release();
  CHECK(scratch.alive());
  child.say(1);
  CHECK(child.hear() == 2);
  CHECK_FALSE(scratch.alive());
  child.say(1);
  child.join();
}

TEST_CASE("a probe ends with its object and leaves the slot free") {
  Scratch scratch;
  {
    const auto probe = ProbeLock::try_take(scratch.control.file(), kSlot);
    REQUIRE(probe);
    CHECK_FALSE(scratch.take(kSlot).has_value());
  }
  const auto lock = scratch.take(kSlot);
  REQUIRE(lock);
  CHECK_FALSE(ProbeLock::try_take(scratch.control.file(), kSlot).has_value());
  CHECK(ProbeLock::try_take(scratch.control.file(), PeerSlot{8}).has_value());
  CHECK(scratch.alive());
}

TEST_CASE("asking whether a peer lives takes nothing") {
  Scratch scratch;
  CHECK_FALSE(scratch.alive());
  const auto lock = scratch.take(kSlot);
  CHECK(lock.has_value());
}

TEST_CASE("rule 7: no slot is given in a control segment that has lost its name") {
  Scratch scratch;
  REQUIRE(unlink_segment(scratch.control.name()));
  CHECK(code_of([&] { (void)scratch.take(kSlot); }) == ErrorCode::kSegmentLost);
  CHECK(code_of([&] { (void)PeerLock::take_any(scratch.control.file(), Inheritance::kThisProcess); }) ==
        ErrorCode::kSegmentLost);
}

TEST_CASE("rule 7: no slot is given in another file of the same name") {
  Scratch scratch;
  REQUIRE(unlink_segment(scratch.control.name()));
  ControlSegment other = ControlSegment::create(scratch.arena, {1U << 20, 640});
  CHECK(code_of([&] { (void)scratch.take(kSlot); }) == ErrorCode::kSegmentLost);
  CHECK(PeerLock::try_take(other.file(), kSlot, Inheritance::kThisProcess).has_value());
}

TEST_CASE("a failed attempt leaves no descriptor and no lock") {
  Scratch scratch;
  const auto lock = scratch.take(kSlot);
  for (int i = 0; i < 100; ++i) CHECK_FALSE(scratch.take(kSlot).has_value());
  CHECK_FALSE(scratch.alive(PeerSlot{8}));
}

}  // namespace
}  // namespace shmx
