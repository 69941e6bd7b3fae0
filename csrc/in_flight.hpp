// Uses of blocks by copies that a device makes: each ends when an event behind the copy, in its stream, has completed.
//
// Completion is noticed by whoever copies next, and by a thread that asks the driver without the GIL. A use whose event
// cannot be asked any more (the device is broken) never ends: better a block too few than other bytes under a copy.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "attachment.hpp"
#include "cuda_driver.hpp"
#include "process.hpp"

namespace shmx {

class InFlight : public ForkParticipant {
 public:
  // One per process, never destroyed.
  [[nodiscard]] static InFlight& instance();

  // Takes the holds over until what `stream` has to do by now is done. If it throws, Error(kDevice) or for want of a
  // thread or memory, they stay with the caller.
  void depart(std::vector<Hold>& holds, DeviceDriver& driver, int device, void* stream);
  // Ends the uses whose copies are done.
  void poll() noexcept;
  // Waits for the copies that are under way; false if some were not done by then. Ends the thread in any case.
  bool drain(std::chrono::milliseconds longest) noexcept;
  // Never ends these: what the device does with their bytes cannot be known any more.
  void keep(std::vector<Hold>& holds) noexcept;

  struct Report {
    std::uint64_t copies;  // under way
    std::uint64_t kept;    // whose uses never end
    std::string trouble;   // the last answer to a question about an event that was neither yes nor no
  };
  [[nodiscard]] Report report();

  void lock_for_fork() noexcept override { mutex_.lock(); }
  void unlock_in_parent() noexcept override { mutex_.unlock(); }
  void unlock_in_child() noexcept override;

 private:
  struct Copy {
    std::vector<Hold> holds;
    DeviceDriver* driver;
    int device;
    void* stream;
    void* event;
  };
  InFlight();
  // True if the copies that are left may complete by themselves.
  bool poll_once() noexcept;
  void run(std::uint64_t ends);

  std::mutex mutex_;
  std::condition_variable departed_;
  std::list<Copy> copies_;  // in order of departure
  std::vector<std::vector<Hold>> kept_;
  std::string trouble_;
  std::uint64_t ends_ = 0;  // how often the thread was told to end
  std::unique_ptr<std::thread> thread_;
};

}  // namespace shmx
