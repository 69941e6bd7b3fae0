// Rule 9 and what goes with it: each operation is performed by a process in which one system call fails, or one
// allocation, at every occurrence and with every errno that can happen there. Wanted is an error of the right class or
// none, a second attempt that succeeds, nothing leaked, and a state in which everybody else goes on as ever.
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "own_shm.hpp"
#include "scene.hpp"
#include "shared_state.hpp"
#include "tracee.hpp"

namespace shmx::test {
namespace {

struct CallKind {
  const char* name;
  std::vector<int> errnos;
};

// What the manuals list and what can happen to these calls. Nothing for those that cannot fail.
const CallKind* kind_of(const Call& call) {
  static const CallKind create{"openat(O_CREAT)", {EMFILE, ENFILE, ENOMEM, EACCES, ENOSPC, EEXIST}};
  static const CallKind open{"openat", {EMFILE, ENFILE, ENOMEM, EACCES, ENOENT}};
  // The identity of the host stands there: without it no process has one, which is no failure of one call.
  static const CallKind proc{"openat of /proc", {EMFILE, ENFILE, ENOMEM}};
  static const CallKind lock{"fcntl(F_OFD_SETLK, F_WRLCK)", {EAGAIN, ENOLCK}};
  static const CallKind other_fcntl{"fcntl", {ENOLCK}};
  static const std::map<std::uint64_t, CallKind> others{
      {SYS_ftruncate, {"ftruncate", {EFBIG, EPERM, EINVAL, ENOMEM}}},
      {SYS_fallocate, {"fallocate", {ENOSPC, ENOMEM, EINTR, EFBIG, EPERM, EOPNOTSUPP, ENOSYS}}},
      {SYS_mmap, {"mmap", {ENOMEM, EAGAIN, ENFILE, EPERM}}},
      {SYS_munmap, {"munmap", {ENOMEM}}},
      {SYS_madvise, {"madvise", {ENOMEM, EAGAIN, EINVAL, EFAULT}}},
      {SYS_mprotect, {"mprotect", {ENOMEM}}},
      {SYS_newfstatat, {"fstat", {ENOMEM}}},
      {SYS_fstat, {"fstat", {ENOMEM}}},
      {SYS_statfs, {"statfs", {ENOMEM, EIO}}},
      {SYS_unlink, {"unlink", {EACCES, EPERM, ENOENT, ENOMEM, EBUSY}}},
      {SYS_pread64, {"pread", {EIO, EINTR}}},
      {SYS_read, {"read", {EIO, EINTR}}},
      {SYS_lseek, {"lseek", {EIO}}},
      {SYS_getdents64, {"getdents", {ENOMEM, EIO}}},
      {SYS_getrandom, {"getrandom", {EINTR, ENOSYS}}},
      {SYS_mbind, {"mbind", {ENOMEM, EPERM, ENOSYS}}},
      {SYS_get_mempolicy, {"get_mempolicy", {EPERM, ENOSYS}}},
      {SYS_close, {"close", {EINTR, EIO}}},
      {SYS_clone, {"clone", {EAGAIN, ENOMEM}}},
      {SYS_clone3, {"clone", {EAGAIN, ENOMEM, ENOSYS}}},
  };
  if (call.path.starts_with("/proc/")) return &proc;
  if (call.number == SYS_openat) return (call.arguments[2] & O_CREAT) != 0 ? &create : &open;
  if (call.number == SYS_fcntl) return call.arguments[1] == F_OFD_SETLK && call.takes_lock ? &lock : &other_fcntl;
  const auto found = others.find(call.number);
  return found == others.end() ? nullptr : &found->second;
}

// brk is not one of the core's calls: how often the C library's heap grows depends on what it was before. (It answers
// with where the heap ends, besides; an errno would be taken for that.)
bool is_of_the_core(const Call& call) { return call.number != SYS_brk; }

bool cannot_fail(const Call& call) {
  static const std::set<std::uint64_t> numbers{
      SYS_getpid, SYS_gettid,        SYS_geteuid, SYS_tgkill,      SYS_rt_sigprocmask,   SYS_sysinfo,
      SYS_futex,  SYS_clock_gettime, SYS_getcpu,  SYS_sched_yield, SYS_sched_getaffinity};
  return numbers.contains(call.number);
}

// Whether an outcome may come of a call that failed so. No error at all is one: what failed was not needed, or done
// otherwise.
std::string wrong_about(const Outcome& outcome, const CallKind& call, int system_errno) {
  const std::string what = "error " + std::to_string(static_cast<int>(outcome.code)) + ", errno " +
                           std::to_string(outcome.system_errno) + ": " + outcome.text;
  switch (outcome.kind) {
    case Outcome::Kind::kDone:
      return {};
    case Outcome::Kind::kBadAlloc:
      return system_errno == ENOMEM || std::strcmp(call.name, "mmap") == 0 ? "" : "bad_alloc for another error";
    case Outcome::Kind::kNoThread:
      return "an exception of the thread library";
    case Outcome::Kind::kOther:
      return "another exception: " + outcome.text;
    case Outcome::Kind::kError:
      break;
  }
  switch (outcome.code) {
    case ErrorCode::kSystem:
      // glibc's shm_unlink says EACCES for it.
      if (outcome.system_errno != system_errno && !(system_errno == EPERM && outcome.system_errno == EACCES)) {
        return "not the errno that was: " + what;
      }
      if (outcome.text.find("/dev/shm") == std::string::npos && outcome.text.find("/shmx-") == std::string::npos &&
          outcome.text.find("/proc/") == std::string::npos && outcome.text.find(" name") == std::string::npos) {
        return "names no object: " + what;
      }
      return {};
    case ErrorCode::kArenaFull:
      return system_errno == ENOSPC || system_errno == ENOMEM ? "" : "full for another error: " + what;
    case ErrorCode::kSegmentLost:
      return system_errno == ENOENT ? "" : "lost for another error: " + what;
    default:
      return "the wrong class: " + what;
  }
}

void expect_no_more(const char* what, std::uint64_t has, std::uint64_t allowed) {
  if (has > allowed) {
    throw std::runtime_error("leaks: " + std::to_string(has) + ' ' + what + ", " + std::to_string(allowed) +
                             " where nothing failed");
  }
}

// What an operation leads to where nothing fails.
struct Course {
  std::vector<Call> calls;
  Possessions after;
  Possessions end;
  std::uint64_t allocations;
};

Course follow(const Operation& operation) {
  Scene scene(operation);
  std::vector<Call> calls;
  Tracee tracee(scene.performer().pid());
  while (tracee.next_call_stop()) {
    if (tracee.call() && is_of_the_core(*tracee.call())) calls.push_back(*tracee.call());
  }
  tracee.let_go();
  const Outcome outcome = scene.hear_outcome();
  if (outcome.kind != Outcome::Kind::kDone) throw std::runtime_error("it fails by itself: " + outcome.text);
  return {std::move(calls), outcome.after, scene.check_after_return(), outcome.allocations};
}

struct Tally {
  std::uint64_t points = 0;
  std::uint64_t violations = 0;
};

void report(Tally& tally, const Operation& operation, const std::string& failure, const std::exception& error) {
  ++tally.violations;
  std::cout << "VIOLATION: " << operation.name << ", " << failure << ": " << error.what() << std::endl;
  for (const std::string& name : names_in_shm()) ::unlink(("/dev/shm" + name).c_str());
}

// Books of the library that stay for the next time may be of another size.
constexpr std::uint64_t kHeapSlack = 4096;

void check_possessions(const Course& usual, const Scene& scene, const Outcome& outcome, const Possessions& end,
                       bool frees) {
  expect_no_more("descriptors after it", outcome.after.descriptors,
                 std::max(scene.before().descriptors, usual.after.descriptors) + (frees ? 1 : 0));
  if (outcome.kind != Outcome::Kind::kDone && outcome.after.loads != scene.before().loads) {
    throw std::runtime_error("rule 2: " + std::to_string(outcome.after.loads) + " loads are announced or held, not " +
                             std::to_string(scene.before().loads));
  }
  expect_no_more("descriptors at the end", end.descriptors, usual.end.descriptors + (frees ? 1 : 0));
  expect_no_more("mappings at the end", end.mappings, usual.end.mappings + (frees ? 1 : 0));
  expect_no_more("bytes of heap at the end", end.heap, usual.end.heap + kHeapSlack);
}

void fail_call(const Operation& operation, const Course& usual, std::uint64_t n, const CallKind& kind, int system_errno,
               Tally& tally) {
  ++tally.points;
  try {
    Scene scene(operation);
    Tracee tracee(scene.performer().pid());
    for (std::uint64_t calls = 0; calls <= n;) {
      if (!tracee.next_call_stop()) throw std::runtime_error("not the calls of the time before");
      calls += tracee.call() && is_of_the_core(*tracee.call()) ? 1 : 0;
    }
    if (tracee.call()->number != usual.calls[n].number) throw std::runtime_error("not the calls of the time before");
    tracee.fail_call(system_errno);
    tracee.run_to_end();
    tracee.let_go();
    const Outcome outcome = scene.hear_outcome();
    if (const std::string wrong = wrong_about(outcome, kind, system_errno); !wrong.empty()) {
      throw std::runtime_error(wrong);
    }
    // What fails to free keeps what it should have freed.
    const bool frees = usual.calls[n].number == SYS_munmap || usual.calls[n].number == SYS_newfstatat;
    check_possessions(usual, scene, outcome, scene.check_after_return(), frees);
  } catch (const std::exception& error) {
    report(tally, operation,
           "call " + std::to_string(n) + " (" + kind.name + ": " + ::strerrorname_np(system_errno) + ")", error);
  }
}

Tally fail_calls(const Operation& operation, const Course& usual) {
  Tally tally;
  for (std::uint64_t n = 0; n < usual.calls.size(); ++n) {
    if (cannot_fail(usual.calls[n])) continue;
    const CallKind* kind = kind_of(usual.calls[n]);
    if (kind == nullptr) {
      ++tally.violations;
      std::cout << "VIOLATION: no list of errors for system call " << usual.calls[n].number << std::endl;
      continue;
    }
    for (const int system_errno : kind->errnos) fail_call(operation, usual, n, *kind, system_errno, tally);
  }
  return tally;
}

Tally fail_allocations(const Operation& operation, const Course& usual) {
  Tally tally;
  for (std::uint64_t n = 1; n <= usual.allocations; ++n) {
    try {
      ++tally.points;
      set_failing_allocation(n);
      Scene scene(operation);
      Tracee tracee(scene.performer().pid());
      tracee.run_to_end();
      tracee.let_go();
      const Outcome outcome = scene.hear_outcome();
      if (outcome.kind != Outcome::Kind::kDone && outcome.kind != Outcome::Kind::kBadAlloc) {
        throw std::runtime_error("another error than bad_alloc: " + outcome.text);
      }
      check_possessions(usual, scene, outcome, scene.check_after_return(), false);
    } catch (const std::exception& error) {
      report(tally, operation, "allocation " + std::to_string(n), error);
    }
  }
  set_failing_allocation(0);
  return tally;
}

int run(int argc, char** argv) {
  const char* const only = argc > 1 ? argv[1] : nullptr;
  Tally sum;
  bool found = false;
  for (const Operation& operation : operations()) {
    if (only != nullptr && std::strcmp(only, operation.name) != 0) continue;
    found = true;
    const Course usual = follow(operation);
    const Tally calls = fail_calls(operation, usual);
    const Tally allocations = fail_allocations(operation, usual);
    char text[160];
    (void)std::snprintf(text, sizeof text, "%-28s %5lu failed calls %4lu failed allocations\n", operation.name,
                        calls.points, allocations.points);
    std::cout << text << std::flush;
    for (const Tally& tally : {calls, allocations}) {
      sum.points += tally.points;
      sum.violations += tally.violations;
    }
  }
  std::cout << sum.points << " failures, " << sum.violations << " violations\n";
  if (!found) std::cerr << "no such operation\n";
  return !found || sum.violations != 0 ? 1 : 0;
}

}  // namespace
}  // namespace shmx::test

int main(int argc, char** argv) {
  if (!shmx::test::can_step()) return 77;
  if (!shmx::test::take_own_shm("64m")) {
    std::cerr << "no /dev/shm of our own here, which these checks need\n";
    return 77;
  }
  // The C library then maps nothing for a large allocation, or not, depending on those before.
  ::mallopt(M_MMAP_MAX, 0);
  return shmx::test::run(argc, argv);
}
