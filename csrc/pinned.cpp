#include "pinned.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

#include "attachment.hpp"
#include "quiet_thread.hpp"

namespace shmx {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kLongestTurn = std::chrono::seconds(60);
// Behind the bytes of the peer slots.
constexpr off_t kTurnByte = kMaxPeers;

struct flock turn_request(short type) {
  struct flock request{};  // l_pid must be 0 for OFD locks
  request.l_type = type;
  request.l_whence = SEEK_SET;
  request.l_start = kTurnByte;
  request.l_len = 1;
  return request;
}

}  // namespace

// ---- PinLedger

PinLedger& PinLedger::instance() {
  static auto* ledger = new PinLedger;
  return *ledger;
}

std::uint64_t PinLedger::take(std::uint64_t bytes) {
  const std::lock_guard guard(mutex_);
  const std::uint64_t limit = limit_.load(std::memory_order_relaxed);
  const std::uint64_t granted = std::min(bytes, limit - std::min(limit, taken_));
  taken_ += granted;
  return granted;
}

void PinLedger::give(std::uint64_t bytes) {
  const std::lock_guard guard(mutex_);
  taken_ -= std::min(taken_, bytes);
}

void PinLedger::note_chunk(const PinnedChunk& chunk, std::uint64_t nanoseconds) {
  const std::lock_guard guard(mutex_);
  report_.bytes += chunk.bytes;
  ++report_.chunks;
  if (chunk.owned) {
    ++report_.registrations;
    report_.nanoseconds += nanoseconds;
  } else {
    report_.foreign_bytes += chunk.bytes;
  }
}

void PinLedger::note_end(const PinnedChunk& chunk) {
  const std::lock_guard guard(mutex_);
  report_.bytes -= chunk.bytes;
  --report_.chunks;
  if (!chunk.owned) report_.foreign_bytes -= chunk.bytes;
}

void PinLedger::note_quarantine(std::uint64_t bytes) {
  const std::lock_guard guard(mutex_);
  report_.quarantined_bytes += bytes;
}

void PinLedger::note_backend(DriverKind kind) {
  const std::lock_guard guard(mutex_);
  report_.backend = name_of(kind);
}

bool PinLedger::note_reason(const std::string& reason) {
  const std::lock_guard guard(mutex_);
  if (report_.reason == reason) return false;
  report_.reason = reason;
  warning_ = reason;
  return true;
}

PinReport PinLedger::report() {
  const std::lock_guard guard(mutex_);
  PinReport report = report_;
  if (report.backend.empty()) report.backend = "none";
  return report;
}

std::string PinLedger::take_warning() {
  const std::lock_guard guard(mutex_);
  return std::exchange(warning_, {});
}

void PinLedger::begin_anew() noexcept {
  const std::uint64_t limit = limit_.load(std::memory_order_relaxed);
  // Not destroyed first: it may be half changed.
  std::construct_at(this);
  set_limit(limit);
}

// ---- registration

std::vector<PinnedChunk> register_range(DeviceDriver& driver, int device, std::byte* base, std::uint64_t bytes,
                                        Access access, const std::string& name, bool& stuck,
                                        std::uint64_t chunk_bytes) {
  std::vector<PinnedChunk> chunks;
  chunks.reserve((bytes + chunk_bytes - 1) / chunk_bytes);
  const DeviceDriver::Scope scope(driver, device);
  for (std::uint64_t offset = 0; offset < bytes; offset += chunk_bytes) {
    PinnedChunk chunk{base + offset, std::min(chunk_bytes, bytes - offset), true};
    const auto before = Clock::now();
    const DriverCode code = driver.register_pages(chunk.base, chunk.bytes, access == Access::kReadOnly);
    const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - before);
    if (code != DriverCode::kSuccess) {
      chunk.owned = false;
      // Somebody else in this process has registered it: as good as our own, as long as it covers all of it.
      if (code != DriverCode::kAlreadyRegistered || !driver.is_registered(chunk.base, chunk.bytes)) {
        const bool undone = unregister_chunks(chunks, driver.kind(), device);
        stuck = stuck || !undone;
        std::string message = driver.failure(driver.register_name(), name, code).what();
        if (!undone) message += "; what was registered before it stays so";
        throw Error(ErrorCode::kDevice, message);
      }
    }
    PinLedger::instance().note_chunk(chunk, static_cast<std::uint64_t>(spent.count()));
    chunks.push_back(chunk);
  }
  return chunks;
}

bool unregister_chunks(std::vector<PinnedChunk>& chunks, DriverKind kind, int device) noexcept {
  std::uint64_t left = 0;
  try {
    const bool owns = std::any_of(chunks.begin(), chunks.end(), [](const PinnedChunk& chunk) { return chunk.owned; });
    DeviceDriver* driver = owns ? DeviceDriver::known(kind) : nullptr;
    std::optional<DeviceDriver::Scope> scope;
    if (driver != nullptr) scope.emplace(*driver, device);
    while (!chunks.empty()) {
      const PinnedChunk chunk = chunks.back();
      chunks.pop_back();
      PinLedger::instance().note_end(chunk);
      if (!chunk.owned) continue;
      const DriverCode code = driver == nullptr ? DriverCode::kDeinitialized : driver->unregister_pages(chunk.base);
      // Not registered: somebody has undone it, and nothing is left to undo.
      if (code == DriverCode::kSuccess || code == DriverCode::kNotRegistered) continue;
      left += chunk.bytes;
      if (driver == nullptr) continue;
      const Error error = driver->failure(driver->unregister_name(), "a segment that is unmapped", code);
      PinLedger::instance().note_reason(std::string(error.what()) + "; its addresses are not used again");
    }
  } catch (const std::exception& error) {
    for (const PinnedChunk& chunk : chunks) {
      PinLedger::instance().note_end(chunk);
      if (chunk.owned) left += chunk.bytes;
    }
    chunks.clear();
    PinLedger::instance().note_reason(error.what());
  }
  if (left != 0) PinLedger::instance().note_quarantine(left);
  return left == 0;
}

PinTurn::PinTurn(SegmentFile& control, unsigned& turns, std::mutex& guards_both) : turns_(turns), mutex_(guards_both) {
  {
    const std::lock_guard guard(mutex_);
    fd_ = UniqueFd(::fcntl(control.fd(), F_DUPFD_CLOEXEC, 0));
  }
  if (!fd_.valid()) return;
  const auto deadline = Clock::now() + kLongestTurn;
  for (auto pause = std::chrono::microseconds(200);; pause = std::min(2 * pause, std::chrono::microseconds(20000))) {
    {
      const std::lock_guard guard(mutex_);
      struct flock request = turn_request(F_WRLCK);
      taken_ = ::fcntl(fd_.get(), F_OFD_SETLK, &request) == 0;
      if (taken_) ++turns_;
      if (taken_ || (errno != EAGAIN && errno != EACCES) || Clock::now() >= deadline) return;
    }
    std::this_thread::sleep_for(pause);
  }
}

PinTurn::~PinTurn() {
  if (!taken_) return;
  const std::lock_guard guard(mutex_);
  if (--turns_ != 0) return;
  // Not by closing: the description is that of the control segment, which stays open.
  struct flock request = turn_request(F_UNLCK);
  ::fcntl(fd_.get(), F_OFD_SETLK, &request);
}

// ---- Pinner

Pinner& Pinner::instance() {
  static auto* pinner = new Pinner;
  return *pinner;
}

Pinner::Pinner() { take_part_in_forks(); }

void Pinner::unlock_in_child() noexcept {
  // The thread is the parent's, and so is whoever waits here: to wake or to destroy would be to wait for them.
  (void)thread_.release();  // NOLINT(bugprone-unused-return-value)
  std::construct_at(&changed_);
  wishes_.clear();
  busy_ = 0;
  mutex_.unlock();
}

void Pinner::want(const std::shared_ptr<Attachment>& attachment, DriverKind kind, int device) noexcept {
  try {
    {
      const std::lock_guard guard(mutex_);
      for (const Wish& wish : wishes_) {
        if (wish.kind == kind && !wish.attachment.owner_before(attachment) &&
            !attachment.owner_before(wish.attachment)) {
          return;
        }
      }
      wishes_.push_back({attachment, kind, device});
      if (!thread_)
        thread_ = std::make_unique<std::thread>(quiet_thread("shmx-pinner", [this, ends = ends_] { run(ends); }));
    }
    changed_.notify_all();
  } catch (const std::exception& error) {
    // Without a thread nothing is registered, and every copy is pageable.
    PinLedger::instance().note_reason(error.what());
  }
}

void Pinner::run(std::uint64_t ends) {
  std::unique_lock guard(mutex_);
  for (;;) {
    changed_.wait(guard, [this, ends] { return ends_ != ends || !wishes_.empty(); });
    if (ends_ != ends) return;
    const Wish wish = wishes_.front();
    wishes_.erase(wishes_.begin());
    ++busy_;
    guard.unlock();
    // It may have been refused since.
    if (const auto attachment = wish.attachment.lock(); attachment && attachment->may_pin()) {
      try {
        (void)pin_now(*attachment, wish.kind, wish.device);
      } catch (const std::exception& error) {
        // Told by the next call that may warn; copies are pageable until then and after.
        attachment->refuse_pinning();
        PinLedger::instance().note_reason(error.what());
      }
    }
    guard.lock();
    --busy_;
    changed_.notify_all();
  }
}

bool Pinner::pin_now(Attachment& attachment, DriverKind kind, int device) {
  DeviceDriver* driver = DeviceDriver::get(kind);
  if (driver == nullptr) throw Error(ErrorCode::kDevice, DeviceDriver::why_not(kind));
  PinLedger::instance().note_backend(kind);
  return attachment.pin(*driver, device);
}

void Pinner::settle() {
  std::unique_lock guard(mutex_);
  changed_.wait(guard, [this] { return busy_ == 0 && (wishes_.empty() || !thread_); });
}

void Pinner::stop() noexcept {
  std::unique_ptr<std::thread> ended;
  {
    const std::lock_guard guard(mutex_);
    ++ends_;
    wishes_.clear();
    ended = std::move(thread_);
  }
  changed_.notify_all();
  if (ended) ended->join();
}

}  // namespace shmx
