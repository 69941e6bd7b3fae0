#include "handle.hpp"

#include <cerrno>

#include "host.hpp"
#include "process.hpp"
#include "reaper.hpp"

namespace shmx {
namespace {

Error foreign_host(const HandleState& state) {
  if (!state.place.none()) {
    return {ErrorCode::kForeignHost,
            "arena " + control_name(state.arena) +
                " has no name (backend memfd), and its owner is on another host or in another PID namespace; give both "
                "containers one PID namespace (docker run --pid=container:NAME), or use backend=\"shm\" "
                "(SHMX_BACKEND=shm) and one /dev/shm (docker run --ipc=host)",
            ENOENT};
  }
  return {ErrorCode::kForeignHost,
          "arena " + control_name(state.arena) +
              " is on another host or in another /dev/shm; give both containers one IPC namespace (docker run "
              "--ipc=host or a shared /dev/shm volume), or send the tensor itself across hosts",
          ENOENT};
}

// What a handle was pickled with, said again where it is used.
Error carried(const HandleState& state) {
  const std::string name = "arena " + control_name(state.arena);
  switch (state.reason) {
    case ErrorCode::kReleased:
      return {ErrorCode::kReleased, "this handle of " + name + " was released before it was pickled; pickle it first"};
    case ErrorCode::kStaleHandle:
      return {ErrorCode::kStaleHandle, "this handle of " + name +
                                           " was stale or revoked when it was pickled; announce every load "
                                           "(shmx.readers(n)), or send the tensor again"};
    case ErrorCode::kForeignHost:
      return foreign_host(state);
    case ErrorCode::kTooManyPeers:
      return {ErrorCode::kTooManyPeers,
              "the process that pickled this handle of " + name + " had found no free peer slot; use fewer consumers",
              EUSERS};
    default:
      break;
  }
  const int system_errno = state.reason == ErrorCode::kArenaFull ? ENOSPC : ENOENT;
  return {state.reason, "this handle of " + name + " had lost its data before it was pickled; send the tensor again",
          system_errno};
}

// What the handle of an arena that can be reached from here says.
std::uint32_t own_host(const HandleState& state) { return state.place.none() ? host_id() : process_space_id(); }

void require_inside(const Hold& hold, const TensorMeta& meta) {
  const ControlSegment& control = hold.attachment().control();
  // relaxed: the place of a held block does not change.
  if (meta.end() <= control.block(hold.block()).place.used.load(std::memory_order_relaxed)) return;
  throw Error(ErrorCode::kInvalidHandle, "not a valid shmx handle: its tensor is larger than what block " +
                                             std::to_string(value(hold.block())) + " of arena " + control.name() +
                                             " was published with");
}

}  // namespace

void SentMessage::take_back() noexcept {
  const auto attachment = attachment_.lock();
  if (!attachment || !attachment->usable()) return;
  drop_message(attachment->control().block(block_).state, message_);
  // It may have been the last thing that kept an orphan.
  if (attachment->uses() == 0 && !attachment->is_owner()) reap_if_orphaned(*attachment);
}

void Handle::remember() {
  const ControlSegment& control = hold_.attachment().control();
  origin_.host = control.host();
  origin_.arena = control.arena();
  origin_.place = control.place();
  origin_.block = hold_.block();
  origin_.generation = hold_.generation();
}

Handle Handle::load(const HandleState& state) {
  std::optional<Error> failure;
  Hold hold;
  // Before the load: a message that is taken must not be lost for want of memory.
  HandleState origin = state;
  origin.message.reset();
  TensorMeta meta = state.meta;
  if (state.reason != ErrorCode::kNone) {
    failure = carried(state);
  } else {
    try {
      if (state.host != own_host(state)) throw foreign_host(state);
      hold = load_block(state.arena, state.place, state.block, state.generation, state.message);
    } catch (const Error& error) {
      failure = error;
    }
  }
  if (failure) {
    Handle lost(std::move(meta), std::move(*failure));
    lost.origin_ = std::move(origin);
    return lost;
  }
  require_inside(hold, state.meta);
  Handle handle(std::move(meta), std::move(hold));
  return handle;
}

Handle Handle::part(TensorMeta meta) const {
  if (available()) {
    require_inside(hold_, meta);
    return {std::move(meta), hold_.share()};
  }
  Handle lost(std::move(meta), *failure());
  lost.origin_ = origin_;
  return lost;
}

const Hold& Handle::require() const {
  if (auto failure = this->failure()) throw std::move(*failure);
  return hold_;
}

std::optional<Error> Handle::failure() const {
  if (hold_.held()) {
    if (hold_.attachment().usable()) return std::nullopt;
    try {
      hold_.attachment().require_usable();
    } catch (const Error& error) {
      return error;
    }
  }
  if (failure_) return failure_;
  return Error(ErrorCode::kReleased, "this handle of arena " + control_name(origin_.arena) +
                                         " was released; take views and copies before release()");
}

void Handle::release() { hold_.release(); }

std::string Handle::to_bytes(Readers readers, std::optional<SentMessage>& sent) const {
  HandleState state = origin_;
  state.meta = meta_;
  if (!available()) {
    state.reason = failure()->code();
    return encode_handle(state);
  }
  BlockEntry& block = hold_.attachment().control().block(hold_.block());
  const Ticks now = ticks_now();
  // relaxed: read by the owner after this process has released the block.
  if (!readers.explicit_count) {
    block.place.last_use.store(now, std::memory_order_relaxed);
    block.place.flags.fetch_or(kAnnouncedImplicitly, std::memory_order_relaxed);
  }
  if (readers.count == 0) {
    block.place.flags.fetch_or(kUnannounced, std::memory_order_relaxed);
    return encode_handle(state);
  }
  const Announcement announced = announce(block.state, hold_.generation(), readers.count, now);
  switch (announced.result) {
    case Announced::kInCell:
      state.message = announced.message;
      sent.emplace(hold_.attachment().weak_from_this(), hold_.block(), announced.message);
      break;
    case Announced::kNoCell:
      block.place.flags.fetch_or(kUnannounced, std::memory_order_relaxed);
      break;
    case Announced::kRevoked:
      state.reason = ErrorCode::kStaleHandle;
      break;
  }
  try {
    return encode_handle(state);
  } catch (...) {
    // No memory: there are no bytes that anybody could load.
    if (state.message) drop_message(block.state, *state.message);
    sent.reset();
    throw;
  }
}

bool discard(const HandleState& state) {
  if (!state.message || state.host != own_host(state) || state.reason != ErrorCode::kNone) return false;
  std::shared_ptr<Attachment> attachment;
  try {
    attachment = attach(state.arena, state.place);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kSegmentLost) return false;
    throw;
  }
  if (value(state.block) >= attachment->control().block_count()) return false;
  BlockState& block = attachment->control().block(state.block).state;
  const bool dropped = has_generation(block, state.generation) && drop_message(block, *state.message);
  // It may have been the last thing that kept an orphan.
  if (attachment->uses() == 0) reap_if_orphaned(*attachment);
  return dropped;
}

}  // namespace shmx
