// A child process under ptrace: advanced call by call or instruction by instruction, to be killed there, or to have one
// system call fail.
//
// Only instructions of the core's own code are stopped at. What the core calls in other libraries runs through at
// once, to a breakpoint at its return address.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace shmx::test {

// In the child, around what is looked at: stops until the parent lets it go on.
void enter_trace();
void leave_trace();

// True where single steps are supported (x86-64).
[[nodiscard]] bool can_step();

struct Call {
  std::uint64_t number;  // of the system call
  std::uint64_t arguments[6];
  bool takes_lock;   // of fcntl: its request is F_WRLCK
  std::string path;  // of openat
};

class Tracee {
 public:
  // Of a child that calls enter_trace(); waits until it has.
  explicit Tracee(pid_t pid);

  // To the next beginning or end of a system call. False: leave_trace() came first. A call of which the beginning was
  // seen and the end was not has not run when the child is killed now.
  [[nodiscard]] bool next_call_stop();
  // The call at whose beginning the child stands; nothing at an end.
  [[nodiscard]] const std::optional<Call>& call() const { return call_; }
  // At the beginning of a call: it fails and does nothing, but for close(), which Linux never refuses to do, and
  // unlink() with ENOENT, where somebody else has done it.
  void fail_call(int system_errno);

  // To the next instruction of the core. False: leave_trace() came first. `after_foreign` is told whenever other code
  // than the core's has run.
  [[nodiscard]] bool next_instruction(const std::function<void()>& after_foreign);

  // Lets the child run untraced from leave_trace() on.
  void run_to_end();
  void let_go();

 private:
  enum class Stop : std::uint8_t { kTrap, kSystemCall, kMarker };
  [[nodiscard]] Stop resume(int request);
  [[nodiscard]] bool run_to(std::uint64_t address);

  pid_t pid_;
  std::optional<Call> call_;
};

}  // namespace shmx::test
