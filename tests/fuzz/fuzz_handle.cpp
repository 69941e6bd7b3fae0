// Bytes and texts of handles and parts: whatever comes in is either refused as invalid or means one thing.
#include <cstdlib>
#include <string>
#include <string_view>

#include "handle_codec.hpp"

namespace shmx {
namespace {

constexpr std::uint64_t kLargestBytes = 1ULL << 48;

void require(bool truth) {
  if (!truth) std::abort();
}

// Noise hardly ever has a checksum that is right; most of the format lies behind it.
std::string sealed(std::string_view body) {
  std::uint32_t crc = ~0U;
  for (const char c : body) {
    crc ^= static_cast<std::uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320U : 0U);
  }
  std::string whole(body);
  for (unsigned i = 0; i < 4; ++i) whole.push_back(static_cast<char>(~crc >> (8 * i)));
  return whole;
}

void check_meta(const TensorMeta& meta) {
  require(meta.end() <= kLargestBytes);
  require(meta.shape.size() <= kMaxDimensions);
  require(meta.strides.empty() || meta.strides.size() == meta.shape.size());
  if (meta.end() != 0) require(meta.elements() <= kLargestBytes);
}

template <typename Action>
void refused_or_done(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    require(error.code() == ErrorCode::kInvalidHandle);
  }
}

void try_handle(const std::string& bytes) {
  refused_or_done([&] {
    const HandleState state = decode_handle(bytes);
    check_meta(state.meta);
    require(value(state.block) < kMaxBlocks && (value(state.generation) & 1) == 0);
    require(!state.message || (state.message->cell < kMessageCells && state.message->tag <= MessageCell::kTagMask));
    const std::string written = encode_handle(state);
    require(written.size() <= bytes.size());
    require(encode_handle(decode_handle(written)) == written);
  });
}

void try_part(const std::string& bytes) {
  refused_or_done([&] {
    const TensorMeta meta = decode_part(bytes);
    check_meta(meta);
    const std::string written = encode_part(meta);
    require(encode_part(decode_part(written)) == written);
  });
}

void try_text(const std::string& text) {
  refused_or_done([&] {
    const std::string bytes = from_text(text);
    require(to_text(bytes) == text);
    try_handle(bytes);
    try_part(bytes);
  });
}

}  // namespace
}  // namespace shmx

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 6) {
    case 0:
      shmx::try_handle(rest);
      break;
    case 1:
      shmx::try_handle(shmx::sealed(rest));
      break;
    case 2:
      shmx::try_part(rest);
      break;
    case 3:
      shmx::try_part(shmx::sealed(rest));
      break;
    case 4:
      shmx::try_text(rest);
      break;
    default:
      shmx::try_text(shmx::to_text(shmx::sealed(rest)));
      shmx::require(shmx::from_text(shmx::to_text(rest)) == rest);
  }
  return 0;
}
