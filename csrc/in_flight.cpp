#include "in_flight.hpp"

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "quiet_thread.hpp"

namespace shmx {
namespace {

// Short against a copy of a megabyte, long against the question.
constexpr auto kShortestPause = std::chrono::microseconds(50);
constexpr auto kLongestPause = std::chrono::microseconds(2000);
// A driver that answers neither yes nor no may do so the next time; one that is broken never does.
constexpr int kMostHopeless = 100;

}  // namespace

InFlight& InFlight::instance() {
  static auto* in_flight = new InFlight;
  return *in_flight;
}

InFlight::InFlight() { take_part_in_forks(); }

void InFlight::unlock_in_child() noexcept {
  // The copies are the parent's, and so is the thread; the child has inherited uses that it makes no use of.
  (void)thread_.release();  // NOLINT(bugprone-unused-return-value)
  const std::list<Copy> copies = std::exchange(copies_, {});
  const std::vector<std::vector<Hold>> kept = std::exchange(kept_, {});
  mutex_.unlock();
}

void InFlight::depart(std::vector<Hold>& holds, DeviceDriver& driver, int device, void* stream) {
  const DeviceDriver::Scope scope(driver, device);
  void* event = driver.record_event(stream);
  try {
    // In one go: or a drain might end the thread in between.
    const std::lock_guard guard(mutex_);
    if (!thread_) {
      thread_ = std::make_unique<std::thread>(quiet_thread("shmx-copies", [this, ends = ends_] { run(ends); }));
    }
    copies_.push_back({{}, &driver, device, stream, event});
    copies_.back().holds = std::exchange(holds, {});
  } catch (...) {
    driver.destroy_event(event);
    throw;
  }
  departed_.notify_one();
}

bool InFlight::poll_once() noexcept {
  // Released without the lock: the last use of an arena may end with this one.
  std::list<Copy> done;
  bool hopeful = false;
  try {
    const std::lock_guard guard(mutex_);
    // Of the copy before: most are of one device.
    std::optional<DeviceDriver::Scope> scope;
    DeviceDriver* driver = nullptr;
    int device = 0;
    // Nothing that departed on one of these later can be done.
    std::vector<std::tuple<DeviceDriver*, int, void*>> busy;
    for (auto next = copies_.begin(); next != copies_.end();) {
      const auto copy = next++;
      const std::tuple stream(copy->driver, copy->device, copy->stream);
      if (std::find(busy.begin(), busy.end(), stream) != busy.end()) continue;
      if (copy->driver != driver || copy->device != device) {
        driver = nullptr;
        scope.reset();
        try {
          scope.emplace(*copy->driver, copy->device);
        } catch (const Error& error) {
          // A device that is broken says nothing about the next one.
          trouble_ = error.what();
          continue;
        }
        driver = copy->driver;
        device = copy->device;
      }
      const DriverCode code = driver->query_event(copy->event);
      if (code == DriverCode::kSuccess) {
        driver->destroy_event(copy->event);
        done.splice(done.end(), copies_, copy);
      } else if (code == DriverCode::kNotReady) {
        hopeful = true;
        busy.push_back(stream);
      } else {
        trouble_ = driver->failure(driver->query_name(), "a copy from shared memory", code).what();
      }
    }
  } catch (const std::exception& error) {
    // The next look may find the driver in a better state.
    const std::lock_guard guard(mutex_);
    trouble_ = error.what();
  }
  return hopeful;
}

void InFlight::poll() noexcept {
  if (DeviceDriver::usable()) (void)poll_once();
}

void InFlight::run(std::uint64_t ends) {
  auto pause = kShortestPause;
  std::unique_lock guard(mutex_);
  for (;;) {
    departed_.wait(guard, [this, ends] { return ends_ != ends || !copies_.empty(); });
    if (ends_ != ends) return;
    const std::size_t before = copies_.size();
    guard.unlock();
    const bool hopeful = poll_once();
    guard.lock();
    const bool progress = copies_.size() != before;
    pause = progress ? kShortestPause : std::min(2 * pause, hopeful ? kLongestPause : 50 * kLongestPause);
    if (copies_.empty()) continue;
    departed_.wait_for(guard, pause, [this, ends, before] { return ends_ != ends || copies_.size() > before; });
  }
}

bool InFlight::drain(std::chrono::milliseconds longest) noexcept {
  if (!DeviceDriver::usable()) return true;
  const auto deadline = std::chrono::steady_clock::now() + longest;
  bool empty = false;
  std::unique_ptr<std::thread> ended;
  for (int hopeless = 0;;) {
    if (!poll_once()) ++hopeless;
    {
      const std::lock_guard guard(mutex_);
      empty = copies_.empty();
      if (empty || hopeless > kMostHopeless || std::chrono::steady_clock::now() >= deadline) {
        ++ends_;
        ended = std::move(thread_);
        break;
      }
    }
    std::this_thread::sleep_for(kShortestPause);
  }
  departed_.notify_all();
  if (ended) ended->join();
  return empty;
}

void InFlight::keep(std::vector<Hold>& holds) noexcept {
  const std::lock_guard guard(mutex_);
  kept_.push_back(std::exchange(holds, {}));
}

InFlight::Report InFlight::report() {
  const std::lock_guard guard(mutex_);
  return {copies_.size(), kept_.size(), trouble_};
}

}  // namespace shmx
