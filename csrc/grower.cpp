#include "grower.hpp"

#include <utility>

#include "quiet_thread.hpp"

namespace shmx {

Grower::Grower(std::function<bool()> step)
    : step_(std::move(step)), thread_(quiet_thread("shmx-grower", [this] { run(); })) {}

Grower::~Grower() {
  {
    const std::lock_guard guard(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  thread_.join();
}

void Grower::wake() {
  {
    const std::lock_guard guard(mutex_);
    if (std::exchange(wanted_, true)) return;
  }
  work_.notify_one();
}

void Grower::wait_until_idle() {
  std::unique_lock guard(mutex_);
  idle_.wait(guard, [this] { return !wanted_ && !stepping_; });
}

void Grower::run() {
  std::unique_lock guard(mutex_);
  for (;;) {
    work_.wait(guard, [this] { return wanted_ || stop_; });
    if (stop_) return;
    wanted_ = false;
    stepping_ = true;
    guard.unlock();
    const bool again = step_();
    guard.lock();
    stepping_ = false;
    wanted_ = wanted_ || again;
    if (!wanted_) idle_.notify_all();
  }
}

}  // namespace shmx
