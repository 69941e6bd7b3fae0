// What tests/fault/test_failed_calls.py needs of Tracee, in C.
#include <cstdint>
#include <cstdio>
#include <exception>

#include "tracee.hpp"

extern "C" {

void shmx_enter_trace() { shmx::test::enter_trace(); }
void shmx_leave_trace() { shmx::test::leave_trace(); }

// The numbers of the child's system calls between the markers, at most `room` of them. How many there were, or -1.
std::int64_t shmx_list_calls(int pid, std::uint64_t* numbers, std::int64_t room) {
  try {
    shmx::test::Tracee tracee(pid);
    std::int64_t count = 0;
    while (tracee.next_call_stop()) {
      if (!tracee.call()) continue;
      if (count < room) numbers[count] = tracee.call()->number;
      ++count;
    }
    tracee.let_go();
    return count;
  } catch (const std::exception& error) {
    (void)std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}

// Fails the n-th of them, if it has the number that it had in the list. Calls may be more or fewer than in that pass,
// as other processes come and go; the last ones are those by which the child stops at the marker. 0, or -1.
int shmx_fail_call(int pid, std::int64_t n, std::uint64_t number, int system_errno) {
  try {
    shmx::test::Tracee tracee(pid);
    bool running = true;
    for (std::int64_t count = 0; running && count <= n;) {
      running = tracee.next_call_stop();
      if (!running || !tracee.call() || count++ < n) continue;
      if (tracee.call()->number == number) tracee.fail_call(system_errno);
    }
    // Where there were fewer calls it is at the marker already.
    if (running) tracee.run_to_end();
    tracee.let_go();
    return 0;
  } catch (const std::exception& error) {
    (void)std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}
}
