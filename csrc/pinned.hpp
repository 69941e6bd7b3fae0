// Page-locking of arenas for devices: which driver does it, how much, and in which thread.
//
// A data segment is registered once per process, as far as it is reserved: a page that is not would come into being by
// being locked. That is done in the background, or by shmx.attach, never by a request. What is registered where, the
// attachment knows; it unregisters before it unmaps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_driver.hpp"
#include "process.hpp"
#include "segment.hpp"

namespace shmx {

class Attachment;

// A driver refuses, or takes very long over, more than this in one call.
inline constexpr std::uint64_t kMaxChunk = 1ULL << 30;

// One registration that covers a part of a segment. Another library's is used and not owned.
struct PinnedChunk {
  std::byte* base;
  std::uint64_t bytes;
  bool owned;
};

// What all registrations of this process amount to.
struct PinReport {
  std::uint64_t bytes = 0;
  std::uint64_t foreign_bytes = 0;  // of them, registered by somebody else
  std::uint32_t chunks = 0;
  std::uint64_t registrations = 0;  // calls that succeeded, ever
  std::uint64_t nanoseconds = 0;    // in them
  std::uint64_t quarantined_bytes = 0;
  std::string backend;  // "cuda", "hip", "none"
  std::string reason;   // why something is not registered
};

// The registrations of this process, counted. Thread-safe.
class PinLedger {
 public:
  [[nodiscard]] static PinLedger& instance();

  void set_limit(std::uint64_t bytes) { limit_.store(bytes, std::memory_order_relaxed); }
  // How many of `bytes` may be registered; they count from now on.
  [[nodiscard]] std::uint64_t take(std::uint64_t bytes);
  void give(std::uint64_t bytes);
  void note_chunk(const PinnedChunk& chunk, std::uint64_t nanoseconds);
  void note_end(const PinnedChunk& chunk);
  void note_quarantine(std::uint64_t bytes);
  void note_backend(DriverKind kind);
  // Answers whether it is news.
  bool note_reason(const std::string& reason);
  [[nodiscard]] PinReport report();
  // The first reason that nobody has been told yet.
  [[nodiscard]] std::string take_warning();
  // In a forked child: what was registered is the parent's, and one of its threads may have the lock.
  void begin_anew() noexcept;

 private:
  std::atomic<std::uint64_t> limit_{UINT64_MAX};
  std::mutex mutex_;  // a leaf
  PinReport report_;
  std::uint64_t taken_ = 0;
  std::string warning_;
};

// Registers a range in chunks, each within one turn of the arena. All of it or nothing: on failure what was registered
// is unregistered in reverse order, and Error(kDevice) is thrown; `stuck` is set then if some of it stays registered
// all the same: the memory must stay mapped. `name` is for messages.
[[nodiscard]] std::vector<PinnedChunk> register_range(DeviceDriver& driver, int device, std::byte* base,
                                                      std::uint64_t bytes, Access access, const std::string& name,
                                                      bool& stuck, std::uint64_t chunk_bytes = kMaxChunk);
// In reverse order. False if some of it stays registered, or may: the memory must then stay mapped.
[[nodiscard]] bool unregister_chunks(std::vector<PinnedChunk>& chunks, DriverKind kind, int device) noexcept;

// A turn of one process at registering an arena: several at once have been refused for want of memory. Waits for a
// minute at most, as a process that is stopped must not keep the others from it. Threads of one process share it:
// `turns` counts them.
class PinTurn {
 public:
  PinTurn(SegmentFile& control, unsigned& turns, std::mutex& guards_both);
  ~PinTurn();
  PinTurn(const PinTurn&) = delete;
  PinTurn& operator=(const PinTurn&) = delete;

 private:
  UniqueFd fd_;
  unsigned& turns_;
  std::mutex& mutex_;
  bool taken_ = false;
};

// The thread that registers in the background.
class Pinner : public ForkParticipant {
 public:
  // One per process, never destroyed.
  [[nodiscard]] static Pinner& instance();

  // Registers what an attachment has reserved and not registered, some time soon. Costs nothing if that is under way.
  void want(const std::shared_ptr<Attachment>& attachment, DriverKind kind, int device) noexcept;
  // The same now, in the calling thread; false if SHMX_PIN_BYTES allows no more. Throws Error(kDevice).
  static bool pin_now(Attachment& attachment, DriverKind kind, int device);
  // Waits until nothing is wanted; for tests and benchmarks.
  void settle();
  // Ends the thread. The next want() begins another one.
  void stop() noexcept;

  void lock_for_fork() noexcept override { mutex_.lock(); }
  void unlock_in_parent() noexcept override { mutex_.unlock(); }
  void unlock_in_child() noexcept override;

 private:
  struct Wish {
    std::weak_ptr<Attachment> attachment;
    DriverKind kind;
    int device;
  };
  Pinner();
  void run(std::uint64_t ends);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Wish> wishes_;
  unsigned busy_ = 0;       // threads that are about a wish
  std::uint64_t ends_ = 0;  // how often the thread was told to end
  std::unique_ptr<std::thread> thread_;
};

}  // namespace shmx
