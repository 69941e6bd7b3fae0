// A handle as bytes and as text, and back. The format is written down in DESIGN.md; whatever comes in is
// hostile until it has passed decode_handle.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "block_state.hpp"
#include "dtype.hpp"
#include "error.hpp"
#include "layout.hpp"

namespace shmx {

// What a tensor looks like in its block.
struct TensorMeta {
  Dtype dtype{};
  std::uint64_t offset = 0;           // bytes from the start of the block
  std::vector<std::int64_t> shape;    // elements
  std::vector<std::int64_t> strides;  // elements; empty: contiguous

  [[nodiscard]] std::uint64_t elements() const;
  // Bytes from the start of the block to the end of the last element; 0 for a tensor without elements.
  [[nodiscard]] std::uint64_t end() const;
};

struct HandleState {
  std::uint32_t host = 0;
  ArenaId arena{};
  DescriptorPlace place;  // of an arena without a name
  BlockIndex block{};
  Generation generation{};
  std::optional<MessageId> message;
  TensorMeta meta;
  // Why there is no data behind the handle, if it was pickled without any.
  ErrorCode reason = ErrorCode::kNone;
};

inline constexpr std::size_t kMaxDimensions = 64;

[[nodiscard]] std::string encode_handle(const HandleState& state);
// Throws InvalidHandle unless every field is well-formed and in range.
[[nodiscard]] HandleState decode_handle(std::string_view bytes);

// One tensor of several in a block, beside the handle of the whole block: which part of it.
[[nodiscard]] std::string encode_part(const TensorMeta& meta);
[[nodiscard]] TensorMeta decode_part(std::string_view bytes);

// The same as ASCII (base64), for pickles of every protocol. All texts of handles start with kTextPrefix.
inline constexpr std::string_view kTextPrefix = "U1gB";
[[nodiscard]] std::string to_text(std::string_view bytes);
[[nodiscard]] std::string from_text(std::string_view text);

}  // namespace shmx
