// A thread that does an arena's growth ahead of need, off the path of the requests. What a step of growth is, the
// arena knows; here is only the thread: it sleeps until it is woken and then steps until there is nothing to do.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace shmx {

class Grower {
 public:
  // `step` answers whether it did something. It is called by the thread alone, and must not throw.
  explicit Grower(std::function<bool()> step);
  // Waits for the step that is under way.
  ~Grower();
  Grower(const Grower&) = delete;
  Grower& operator=(const Grower&) = delete;

  void wake();
  // Waits until there is nothing to do.
  void wait_until_idle();

 private:
  void run();

  const std::function<bool()> step_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable idle_;
  bool wanted_ = false;
  bool stepping_ = false;
  bool stop_ = false;
  std::thread thread_;  // last: it uses the rest
};

}  // namespace shmx
