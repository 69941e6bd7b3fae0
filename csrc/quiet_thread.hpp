// Threads of the core: they take no signals, which are for the threads of the program, and show their name.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace shmx {

// `name`: at most 15 characters. Throws std::system_error if there is no thread to be had.
template <typename Run>
[[nodiscard]] std::thread quiet_thread(const char* name, Run run) {
  const struct Blocked {
    Blocked() {
      sigset_t all;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~Blocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
    Blocked(const Blocked&) = delete;
    Blocked& operator=(const Blocked&) = delete;
    sigset_t before{};
  } blocked;  // a thread inherits the mask of its creator
  std::thread thread(std::move(run));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace shmx
