#include "handle_codec.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "error.hpp"

namespace shmx {
namespace {

// The third byte is the version of the format.
constexpr std::string_view kHandleMagic{"SX\x01", 3};
constexpr std::string_view kPartMagic{"SP\x01", 3};
constexpr std::size_t kChecksumBytes = 4;

enum HandleFlag : std::uint8_t {
  kHasMessage = 1,
  kHasStrides = 2,
  kHasReason = 4,
  kHasPlace = 8,
  kAllHandleFlags = 15,
};

// Beyond what Linux gives: process ids end at 2^22, descriptors at 2^30.
constexpr std::uint64_t kLargestPid = 1U << 22;
constexpr std::uint64_t kLargestFd = 1U << 30;

// No tensor reaches this: products of values below it are checked, sums of them cannot overflow.
constexpr std::uint64_t kLargestBytes = 1ULL << 48;

// By half bytes: the table is one cache line, which a process that has just woken up has to fetch.
constexpr std::array<std::uint32_t, 16> kCrcTable = [] {
  std::array<std::uint32_t, 16> table{};
  for (std::uint32_t i = 0; i < table.size(); ++i) {
    std::uint32_t remainder = i;
    for (int bit = 0; bit < 4; ++bit) remainder = (remainder >> 1) ^ ((remainder & 1) != 0 ? 0xEDB88320U : 0U);
    table[i] = remainder;
  }
  return table;
}();

// CRC-32 as in zlib: a check against damage, not against intent.
std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = ~0U;
  for (const char c : bytes) {
    crc ^= static_cast<std::uint8_t>(c);
    crc = (crc >> 4) ^ kCrcTable[crc & 0xF];
    crc = (crc >> 4) ^ kCrcTable[crc & 0xF];
  }
  return ~crc;
}

Error invalid(const char* what) {
  return {ErrorCode::kInvalidHandle, std::string("not a valid shmx handle: ") + what +
                                         "; it was cut, changed on its way, or made by something other than shmx"};
}

class Writer {
 public:
  void byte(std::uint8_t b) { bytes_.push_back(static_cast<char>(b)); }
  void fixed(std::uint64_t number, unsigned width) {
    for (unsigned i = 0; i < width; ++i) byte(static_cast<std::uint8_t>(number >> (8 * i)));
  }
  void varint(std::uint64_t number) {
    for (; number >= 0x80; number >>= 7) byte(static_cast<std::uint8_t>(number | 0x80));
    byte(static_cast<std::uint8_t>(number));
  }
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}
  std::uint8_t byte() {
    if (position_ >= bytes_.size()) throw invalid("it is too short");
    return static_cast<std::uint8_t>(bytes_[position_++]);
  }
  std::uint64_t fixed(unsigned width) {
    std::uint64_t number = 0;
    for (unsigned i = 0; i < width; ++i) number |= std::uint64_t{byte()} << (8 * i);
    return number;
  }
  std::uint64_t varint() {
    std::uint64_t number = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const std::uint8_t b = byte();
      if (shift == 63 && b > 1) break;
      number |= std::uint64_t{b & 0x7FU} << shift;
      if ((b & 0x80) == 0) return number;
    }
    throw invalid("a number is too large");
  }
  std::int64_t bounded(std::uint64_t largest) {
    const std::uint64_t number = varint();
    if (number > largest) throw invalid("a size is out of range");
    return static_cast<std::int64_t>(number);
  }
  [[nodiscard]] bool done() const { return position_ == bytes_.size(); }

 private:
  std::string_view bytes_;
  std::size_t position_ = 0;
};

void check_extents(const TensorMeta& meta) {
  // With a zero among the sizes there are no bytes, and the other sizes may be anything that a tensor can have: torch
  // multiplies them in order for the elements, and from the last to the second, zeros as ones, for the strides.
  const bool empty = std::find(meta.shape.begin(), meta.shape.end(), 0) != meta.shape.end();
  std::uint64_t elements = 1;
  std::int64_t stride = 1;
  for (std::size_t i = 0; i < meta.shape.size(); ++i) {
    const std::int64_t size = meta.shape[i];
    if (__builtin_mul_overflow(elements, static_cast<std::uint64_t>(size), &elements) ||
        (i > 0 && __builtin_mul_overflow(stride, std::max<std::int64_t>(size, 1), &stride)) ||
        (!empty && elements > kLargestBytes)) {
      throw invalid("its shape is out of range");
    }
  }
  if (meta.end() > kLargestBytes) throw invalid("its shape is out of range");
}

}  // namespace

std::uint64_t TensorMeta::elements() const {
  std::uint64_t count = 1;
  for (const std::int64_t size : shape) count *= static_cast<std::uint64_t>(size);
  return count;
}

std::uint64_t TensorMeta::end() const {
  for (const std::int64_t size : shape) {
    if (size == 0) return 0;
  }
  std::uint64_t last = 0;
  if (strides.empty()) {
    last = elements() - 1;
  } else {
    for (std::size_t i = 0; i < shape.size(); ++i) {
      std::uint64_t step = 0;
      if (__builtin_mul_overflow(static_cast<std::uint64_t>(shape[i] - 1), static_cast<std::uint64_t>(strides[i]),
                                 &step) ||
          step > kLargestBytes || (last += step) > kLargestBytes) {
        return UINT64_MAX;
      }
    }
  }
  return offset + (last + 1) * info(dtype).bytes;
}

namespace {

void write_meta(Writer& out, const TensorMeta& meta) {
  out.varint(meta.offset);
  out.byte(value(meta.dtype));
  out.byte(static_cast<std::uint8_t>(meta.shape.size()));
  for (const std::int64_t size : meta.shape) out.varint(static_cast<std::uint64_t>(size));
  for (const std::int64_t stride : meta.strides) out.varint(static_cast<std::uint64_t>(stride));
}

TensorMeta read_meta(Reader& in, bool strided) {
  TensorMeta meta;
  meta.offset = static_cast<std::uint64_t>(in.bounded(kLargestBytes));
  const std::uint8_t dtype = in.byte();
  if (dtype >= kDtypes.size()) throw invalid("its dtype is unknown");
  meta.dtype = Dtype{dtype};
  const std::uint8_t dimensions = in.byte();
  if (dimensions > kMaxDimensions) throw invalid("it has too many dimensions");
  meta.shape.resize(dimensions);
  for (std::int64_t& size : meta.shape) size = in.bounded(INT64_MAX);
  if (strided) {
    if (dimensions == 0) throw invalid("it has strides without dimensions");
    meta.strides.resize(dimensions);
    for (std::int64_t& stride : meta.strides) stride = in.bounded(kLargestBytes);
  }
  check_extents(meta);
  return meta;
}

std::string sealed(Writer out) {
  out.fixed(crc32(out.bytes_), kChecksumBytes);
  return std::move(out.bytes_);
}

// What lies between the magic and the checksum.
Reader opened(std::string_view bytes, std::string_view magic) {
  if (bytes.size() < magic.size() + kChecksumBytes) throw invalid("it is too short");
  if (bytes.substr(0, 2) != magic.substr(0, 2)) throw invalid("it does not start with the handle magic");
  if (bytes[2] != magic[2]) throw invalid("its format version is not 1: use one shmx version everywhere");
  const std::string_view body = bytes.substr(0, bytes.size() - kChecksumBytes);
  Reader checksum(bytes.substr(body.size()));
  if (checksum.fixed(kChecksumBytes) != crc32(body)) throw invalid("its checksum does not match");
  return Reader(body.substr(magic.size()));
}

}  // namespace

std::string encode_handle(const HandleState& state) {
  Writer out;
  out.bytes_.reserve(96);
  out.bytes_.append(kHandleMagic);
  out.byte(static_cast<std::uint8_t>(
      (state.message ? kHasMessage : 0) | (state.meta.strides.empty() ? 0 : kHasStrides) |
      (state.reason != ErrorCode::kNone ? kHasReason : 0) | (state.place.none() ? 0 : kHasPlace)));
  out.fixed(state.host, 4);
  out.fixed(value(state.arena), 8);
  if (!state.place.none()) {
    out.varint(state.place.pid);
    out.varint(state.place.fd);
  }
  out.varint(value(state.block));
  out.varint(value(state.generation));
  if (state.message) {
    out.byte(state.message->cell);
    out.varint(state.message->tag);
  }
  write_meta(out, state.meta);
  if (state.reason != ErrorCode::kNone) out.byte(static_cast<std::uint8_t>(state.reason));
  return sealed(std::move(out));
}

HandleState decode_handle(std::string_view bytes) {
  Reader in = opened(bytes, kHandleMagic);
  HandleState state;
  const std::uint8_t flags = in.byte();
  if ((flags & ~kAllHandleFlags) != 0) throw invalid("it has unknown flags");
  state.host = static_cast<std::uint32_t>(in.fixed(4));
  state.arena = ArenaId{in.fixed(8)};
  if ((flags & kHasPlace) != 0) {
    const std::uint64_t pid = in.varint();
    const std::uint64_t fd = in.varint();
    if (pid == 0 || pid > kLargestPid || fd > kLargestFd) throw invalid("its place is out of range");
    state.place = {static_cast<std::uint32_t>(pid), static_cast<std::uint32_t>(fd)};
  }
  const std::uint64_t block = in.varint();
  if (block >= kMaxBlocks) throw invalid("its block is out of range");
  state.block = BlockIndex{static_cast<std::uint32_t>(block)};
  state.generation = Generation{in.varint()};
  if ((value(state.generation) & 1) != 0) throw invalid("its generation is odd");
  if ((flags & kHasMessage) != 0) {
    const std::uint8_t cell = in.byte();
    const std::uint64_t tag = in.varint();
    if (cell >= kMessageCells || tag > MessageCell::kTagMask) throw invalid("its message is out of range");
    state.message = MessageId{cell, static_cast<std::uint32_t>(tag)};
  }
  state.meta = read_meta(in, (flags & kHasStrides) != 0);
  if ((flags & kHasReason) != 0) {
    const std::uint8_t reason = in.byte();
    if (reason == 0 || reason > static_cast<std::uint8_t>(ErrorCode::kSystem) ||
        reason == static_cast<std::uint8_t>(ErrorCode::kInvalidArgument)) {
      throw invalid("its reason is unknown");
    }
    state.reason = static_cast<ErrorCode>(reason);
  }
  if (!in.done()) throw invalid("it has bytes left over");
  return state;
}

std::string encode_part(const TensorMeta& meta) {
  Writer out;
  out.bytes_.reserve(48);
  out.bytes_.append(kPartMagic);
  out.byte(meta.strides.empty() ? 0 : kHasStrides);
  write_meta(out, meta);
  return sealed(std::move(out));
}

TensorMeta decode_part(std::string_view bytes) {
  Reader in = opened(bytes, kPartMagic);
  const std::uint8_t flags = in.byte();
  if ((flags & ~kHasStrides) != 0) throw invalid("it has unknown flags");
  TensorMeta meta = read_meta(in, (flags & kHasStrides) != 0);
  if (!in.done()) throw invalid("it has bytes left over");
  return meta;
}

namespace {
constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
constexpr std::uint8_t kNoDigit = 0xFF;
constexpr std::array<std::uint8_t, 256> kDigits = [] {
  std::array<std::uint8_t, 256> digits{};
  digits.fill(kNoDigit);
  for (std::size_t i = 0; i < kAlphabet.size(); ++i) {
    digits[static_cast<std::uint8_t>(kAlphabet[i])] = static_cast<std::uint8_t>(i);
  }
  return digits;
}();
}  // namespace

// Base64 of RFC 4648 without padding: the length tells how many bytes the last group holds.
std::string to_text(std::string_view bytes) {
  std::string text((bytes.size() * 4 + 2) / 3, '\0');
  const auto* in = reinterpret_cast<const std::uint8_t*>(bytes.data());
  char* out = text.data();
  std::size_t left = bytes.size();
  for (; left >= 3; left -= 3, in += 3, out += 4) {
    const std::uint32_t bits = std::uint32_t{in[0]} << 16 | std::uint32_t{in[1]} << 8 | in[2];
    out[0] = kAlphabet[bits >> 18];
    out[1] = kAlphabet[bits >> 12 & 63];
    out[2] = kAlphabet[bits >> 6 & 63];
    out[3] = kAlphabet[bits & 63];
  }
  if (left > 0) {
    const std::uint32_t bits = std::uint32_t{in[0]} << 16 | (left == 2 ? std::uint32_t{in[1]} << 8 : 0);
    out[0] = kAlphabet[bits >> 18];
    out[1] = kAlphabet[bits >> 12 & 63];
    if (left == 2) out[2] = kAlphabet[bits >> 6 & 63];
  }
  return text;
}

std::string from_text(std::string_view text) {
  if (text.size() % 4 == 1) throw invalid("its text has an impossible length");
  std::string bytes(text.size() * 3 / 4, '\0');
  char* out = bytes.data();
  const auto* in = reinterpret_cast<const std::uint8_t*>(text.data());
  // Digits stay below 64; what is none shows in the bits above.
  std::uint32_t seen = 0;
  const auto digit = [&seen](std::uint8_t c) {
    seen |= kDigits[c];
    return std::uint32_t{kDigits[c]};
  };
  std::size_t left = text.size();
  for (; left >= 4; left -= 4, in += 4, out += 3) {
    const std::uint32_t bits = digit(in[0]) << 18 | digit(in[1]) << 12 | digit(in[2]) << 6 | digit(in[3]);
    out[0] = static_cast<char>(bits >> 16);
    out[1] = static_cast<char>(bits >> 8);
    out[2] = static_cast<char>(bits);
  }
  std::uint32_t spare = 0;
  if (left > 0) {
    const std::uint32_t bits = digit(in[0]) << 18 | digit(in[1]) << 12 | (left == 3 ? digit(in[2]) << 6 : 0);
    out[0] = static_cast<char>(bits >> 16);
    if (left == 3) out[1] = static_cast<char>(bits >> 8);
    spare = left == 3 ? bits & 0xFF : bits & 0xFFFF;
  }
  if (seen >= kAlphabet.size()) throw invalid("its text has a character that is not base64");
  if (spare != 0) throw invalid("its text has bits left over");
  return bytes;
}

}  // namespace shmx
