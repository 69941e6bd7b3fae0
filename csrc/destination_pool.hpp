// Private memory for materialized tensors: recycled, on huge pages where it is large, bounded, and given back
// when idle. A fresh destination costs ten times the copy in page faults.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "block_state.hpp"
#include "copy.hpp"
#include "host.hpp"
#include "process.hpp"

namespace shmx {

class DestinationPool : public ForkParticipant {
 public:
  // One pool per process, never destroyed: tensors may outlive every static object.
  [[nodiscard]] static DestinationPool& instance();

  struct Piece {
    std::byte* memory;
    Destination where;
    std::uint64_t written;  // a mark on the pool's clock of bytes
    Ticks when;
  };
  // Memory of at least `bytes`, aligned to 64, content undefined, to be written at once. Throws std::bad_alloc.
  [[nodiscard]] Piece take(std::size_t bytes);
  // Gives it back; `bytes` as at take().
  void give(const Piece& piece, std::size_t bytes) noexcept;

  // How many bytes stay for reuse at most. 0 keeps none.
  void set_limit(std::uint64_t bytes);
  // Unmaps what is kept.
  void clear() noexcept;
  [[nodiscard]] std::uint64_t kept_bytes();

  void lock_for_fork() noexcept override { mutex_.lock(); }
  void unlock_in_parent() noexcept override { mutex_.unlock(); }
  void unlock_in_child() noexcept override { mutex_.unlock(); }

 private:
  DestinationPool();
  struct Kept {
    std::byte* memory;
    Ticks since;
    std::uint64_t written;
    Ticks when;
  };
  void drop_idle(Ticks now);
  void drop_oldest();

  std::mutex mutex_;
  std::map<std::uint64_t, std::vector<Kept>> kept_;  // by size; the most recent last
  std::uint64_t kept_bytes_ = 0;
  std::uint64_t written_ = 0;  // bytes of all pieces taken
  std::uint64_t limit_;
  Ticks last_decay_ = ticks_now();
};

}  // namespace shmx
