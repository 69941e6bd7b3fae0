// One published tensor as this process sees it: what SharedTensor is without Python.
//
// A handle either holds its block, or carries the reason why there is nothing to hold. Not thread-safe: the
// binding calls it under the GIL; the Hold it hands out may be used without.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "attachment.hpp"
#include "error.hpp"
#include "handle_codec.hpp"

namespace shmx {

// A message that was announced and may be taken back as long as it is not sent.
class SentMessage {
 public:
  SentMessage(std::weak_ptr<Attachment> attachment, BlockIndex block, MessageId message)
      : attachment_(std::move(attachment)), block_(block), message_(message) {}
  void take_back() noexcept;

 private:
  std::weak_ptr<Attachment> attachment_;
  BlockIndex block_;
  MessageId message_;
};

// How often a message will be loaded: said by the caller, or one by default.
struct Readers {
  std::uint32_t count = 1;
  bool explicit_count = false;
};

class Handle {
 public:
  // Of a block that this process has published.
  Handle(TensorMeta meta, Hold hold) : meta_(std::move(meta)), hold_(std::move(hold)) { remember(); }
  // One load of a handle that came in a message. Never throws because the data is gone: the handle then carries
  // the reason. Throws InvalidHandle if the handle cannot be true (its tensor exceeds its block).
  [[nodiscard]] static Handle load(const HandleState& state);
  // Another handle of the same block.
  [[nodiscard]] Handle share() const { return part(meta_); }
  // A handle of another tensor in the same block; without data it carries the same reason as this one. Throws
  // InvalidHandle if the tensor exceeds the block.
  [[nodiscard]] Handle part(TensorMeta meta) const;

  [[nodiscard]] const TensorMeta& meta() const { return meta_; }
  [[nodiscard]] const HandleState& origin() const { return origin_; }
  [[nodiscard]] bool available() const { return hold_.held() && hold_.attachment().usable(); }
  // The hold, or the reason as an exception.
  [[nodiscard]] const Hold& require() const;
  // Why there is no data; nothing while there is.
  [[nodiscard]] std::optional<Error> failure() const;
  void release();

  // The bytes of a message with this handle. The message, if it was announced, is appended to `sent`.
  // Never throws because the data is gone.
  [[nodiscard]] std::string to_bytes(Readers readers, std::optional<SentMessage>& sent) const;

 private:
  Handle(TensorMeta meta, Error failure) : meta_(std::move(meta)), failure_(std::move(failure)) {}
  void remember();

  TensorMeta meta_;
  Hold hold_;
  HandleState origin_;  // names the block; without meta and message
  std::optional<Error> failure_;
};

// Takes back one message that will not be sent. False: it was loaded, revoked or never announced.
bool discard(const HandleState& state);

}  // namespace shmx
