// The bytes of a handle: what is written comes back, and nothing else is accepted.
#include <doctest/doctest.h>

#include <array>
#include <initializer_list>
#include <random>
#include <string>

#include "handle_codec.hpp"

namespace shmx {
namespace {

// The format's own words, so that hostile bytes can be made with a checksum that is right.
class Bytes {
 public:
  Bytes() { raw({'S', 'X', 1}); }
  Bytes& raw(std::initializer_list<unsigned> bytes) {
    for (const unsigned b : bytes) text_.push_back(static_cast<char>(b));
    return *this;
  }
  Bytes& fixed(std::uint64_t number, unsigned width) {
    for (unsigned i = 0; i < width; ++i) raw({static_cast<unsigned>(number >> (8 * i)) & 0xFF});
    return *this;
  }
  Bytes& varint(std::uint64_t number) {
    for (; number >= 0x80; number >>= 7) raw({(static_cast<unsigned>(number) & 0x7F) | 0x80});
    return raw({static_cast<unsigned>(number)});
  }
  [[nodiscard]] std::string sealed() const {
    std::uint32_t crc = ~0U;
    for (const char c : text_) {
      crc ^= static_cast<std::uint8_t>(c);
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320U : 0U);
    }
    Bytes whole(*this);
    whole.fixed(~crc, 4);
    return whole.text_;
  }

 private:
  std::string text_;
};

// The parts before and after what a test is about.
struct Fields {
  unsigned flags = 0;
  std::uint64_t pid = 1;
  std::uint64_t fd = 5;
  std::uint64_t block = 3;
  std::uint64_t generation = 8;
  std::uint64_t offset = 0;
  unsigned dtype = 0;

  [[nodiscard]] Bytes up_to_generation() const {
    Bytes bytes;
    bytes.raw({flags}).fixed(0x11223344, 4).fixed(0x0102030405060708, 8);
    if ((flags & 8) != 0) bytes.varint(pid).varint(fd);
    bytes.varint(block).varint(generation);
    return bytes;
  }
  [[nodiscard]] Bytes up_to_dtype() const {
    Bytes bytes = up_to_generation();
    bytes.varint(offset).raw({dtype});
    return bytes;
  }
  [[nodiscard]] std::string with_shape(std::initializer_list<std::uint64_t> shape,
                                       std::initializer_list<std::uint64_t> strides = {}) const {
    Bytes bytes = up_to_dtype();
    bytes.raw({static_cast<unsigned>(shape.size())});
    for (const std::uint64_t size : shape) bytes.varint(size);
    for (const std::uint64_t stride : strides) bytes.varint(stride);
    return bytes.sealed();
  }
};

bool refused(const std::string& bytes) {
  try {
    (void)decode_handle(bytes);
    return false;
  } catch (const Error& error) {
    REQUIRE(error.code() == ErrorCode::kInvalidHandle);
    return true;
  }
}

void check_equal(const HandleState& a, const HandleState& b) {
  REQUIRE(a.host == b.host);
  REQUIRE(a.arena == b.arena);
  REQUIRE(a.place == b.place);
  REQUIRE(a.block == b.block);
  REQUIRE(a.generation == b.generation);
  REQUIRE(a.message.has_value() == b.message.has_value());
  if (a.message) {
    REQUIRE(a.message->cell == b.message->cell);
    REQUIRE(a.message->tag == b.message->tag);
  }
  REQUIRE(a.meta.dtype == b.meta.dtype);
  REQUIRE(a.meta.offset == b.meta.offset);
  REQUIRE(a.meta.shape == b.meta.shape);
  REQUIRE(a.meta.strides == b.meta.strides);
  REQUIRE(a.reason == b.reason);
}

HandleState random_state(std::mt19937_64& random) {
  HandleState state;
  state.host = static_cast<std::uint32_t>(random());
  state.arena = ArenaId{random()};
  if (random() % 2 == 0) {
    state.place = {1 + static_cast<std::uint32_t>(random() % (1U << 22)), static_cast<std::uint32_t>(random() % 5000)};
  }
  state.block = BlockIndex{static_cast<std::uint32_t>(random() % kMaxBlocks)};
  state.generation = Generation{(random() >> (random() % 64)) & ~std::uint64_t{1}};
  if (random() % 2 == 0) {
    state.message = MessageId{static_cast<std::uint8_t>(random() % kMessageCells),
                              static_cast<std::uint32_t>(random() & MessageCell::kTagMask)};
  }
  state.meta.dtype = Dtype{static_cast<std::uint8_t>(random() % kDtypes.size())};
  state.meta.offset = random() % (std::uint64_t{1} << 40);
  const std::size_t dimensions = random() % 8;
  for (std::size_t i = 0; i < dimensions; ++i) state.meta.shape.push_back(static_cast<std::int64_t>(random() % 40));
  if (dimensions != 0 && random() % 3 == 0) {
    for (std::size_t i = 0; i < dimensions; ++i) {
      state.meta.strides.push_back(static_cast<std::int64_t>(random() % 100'000));
    }
  }
  if (random() % 4 == 0) {
    constexpr std::array kReasons{ErrorCode::kArenaFull,    ErrorCode::kSegmentLost, ErrorCode::kStaleHandle,
                                  ErrorCode::kForeignHost,  ErrorCode::kReleased,    ErrorCode::kInvalidHandle,
                                  ErrorCode::kTooManyPeers, ErrorCode::kSystem};
    state.reason = kReasons[random() % kReasons.size()];
  }
  return state;
}

TEST_CASE("every state comes back as it was, as bytes and as text") {
  std::mt19937_64 random(5);
  for (int i = 0; i < 5'000; ++i) {
    const HandleState state = random_state(random);
    const std::string bytes = encode_handle(state);
    check_equal(decode_handle(bytes), state);
    const std::string text = to_text(bytes);
    REQUIRE(text.starts_with(kTextPrefix));
    REQUIRE(from_text(text) == bytes);
  }
}

TEST_CASE("the bytes are those of the written format") {
  HandleState state;
  state.host = 0x11223344;
  state.arena = ArenaId{0x0102030405060708};
  state.block = BlockIndex{3};
  state.generation = Generation{300};
  state.message = MessageId{9, 0xFFFFF};
  state.meta.dtype = Dtype{10};
  state.meta.offset = 256;
  state.meta.shape = {4, 0x4000};
  state.meta.strides = {0x8000, 2};
  state.reason = ErrorCode::kStaleHandle;
  Bytes bytes;
  bytes.raw({7}).fixed(0x11223344, 4).fixed(0x0102030405060708, 8).raw({3, 0xAC, 2});
  bytes.raw({9, 0xFF, 0xFF, 0x3F}).raw({0x80, 2, 10, 2});
  bytes.raw({4, 0x80, 0x80, 1}).raw({0x80, 0x80, 2, 2}).raw({3});
  CHECK(encode_handle(state) == bytes.sealed());
}

TEST_CASE("of an arena without a name they say where it is open, behind the arena") {
  HandleState state;
  state.host = 0x11223344;
  state.arena = ArenaId{0x0102030405060708};
  state.place = {300, 17};
  state.block = BlockIndex{3};
  state.meta.shape = {4};
  Bytes bytes;
  bytes.raw({8}).fixed(0x11223344, 4).fixed(0x0102030405060708, 8).raw({0xAC, 2, 17}).raw({3, 0, 0, 0, 1, 4});
  CHECK(encode_handle(state) == bytes.sealed());
}

TEST_CASE("limits of every field come back") {
  HandleState state;
  state.host = UINT32_MAX;
  state.arena = ArenaId{UINT64_MAX};
  state.block = BlockIndex{kMaxBlocks - 1};
  state.generation = Generation{UINT64_MAX - 1};
  state.message = MessageId{kMessageCells - 1, MessageCell::kTagMask};
  state.meta.dtype = Dtype{static_cast<std::uint8_t>(kDtypes.size() - 1)};
  SUBCASE("no dimension") {}
  SUBCASE("an empty dimension") { state.meta.shape = {0}; }
  SUBCASE("the most dimensions") { state.meta.shape.assign(kMaxDimensions, 1); }
  SUBCASE("the most bytes") { state.meta.shape = {std::int64_t{1} << 24, std::int64_t{1} << 24}; }
  check_equal(decode_handle(encode_handle(state)), state);
}

TEST_CASE("a handle of 8 dimensions takes at most 256 characters of text") {
  HandleState state;
  state.host = UINT32_MAX;
  state.arena = ArenaId{UINT64_MAX};
  state.block = BlockIndex{kMaxBlocks - 1};
  state.generation = Generation{(std::uint64_t{1} << 40) - 2};
  state.message = MessageId{kMessageCells - 1, MessageCell::kTagMask};
  state.meta.offset = std::uint64_t{1} << 40;
  state.meta.shape.assign(8, 40);
  state.meta.strides.assign(8, std::int64_t{1} << 40);
  CHECK(to_text(encode_handle(state)).size() <= 220);
}

TEST_CASE("every truncation is refused") {
  std::mt19937_64 random(6);
  for (int i = 0; i < 60; ++i) {
    const std::string bytes = encode_handle(random_state(random));
    for (std::size_t length = 0; length < bytes.size(); ++length) REQUIRE(refused(bytes.substr(0, length)));
    REQUIRE(refused(bytes + '\0'));
  }
}

TEST_CASE("every change of a single bit is refused") {
  std::mt19937_64 random(7);
  for (int i = 0; i < 30; ++i) {
    const std::string bytes = encode_handle(random_state(random));
    for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      std::string changed = bytes;
      changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << (bit % 8)));
      REQUIRE(refused(changed));
    }
  }
}

TEST_CASE("truncations with a right checksum are refused") {
  std::mt19937_64 random(8);
  for (int i = 0; i < 60; ++i) {
    const std::string bytes = encode_handle(random_state(random));
    for (std::size_t length = 3; length + 4 < bytes.size(); ++length) {
      Bytes cut;
      for (std::size_t at = 3; at < length; ++at) cut.raw({static_cast<std::uint8_t>(bytes[at])});
      REQUIRE(refused(cut.sealed()));
    }
  }
}

TEST_CASE("random bytes with a right checksum never do more than be refused") {
  std::mt19937_64 random(9);
  for (int i = 0; i < 30'000; ++i) {
    Bytes bytes;
    bytes.raw({static_cast<unsigned>(random() % 8)}).fixed(random(), 4).fixed(random(), 8);
    const std::size_t length = random() % 40;
    for (std::size_t k = 0; k < length; ++k) {
      // Small numbers get further than random ones.
      bytes.raw({static_cast<unsigned>(random() % 3 == 0 ? random() & 0xFF : random() % 4)});
    }
    try {
      const HandleState state = decode_handle(bytes.sealed());
      (void)state.meta.elements();
      (void)state.meta.end();
    } catch (const Error& error) {
      REQUIRE(error.code() == ErrorCode::kInvalidHandle);
    }
  }
}

TEST_CASE("the fields that the hostile cases change are accepted as they are") {
  CHECK_FALSE(refused(Fields{}.with_shape({2, 3})));
  CHECK_FALSE(refused(Fields{.flags = 2}.with_shape({2, 3}, {3, 1})));
}

TEST_CASE("a version or magic of another kind is refused") {
  for (const std::size_t at : {0U, 1U, 2U}) {
    std::string bytes = Fields{}.with_shape({2});
    bytes[at] = static_cast<char>(bytes[at] + 1);
    CHECK(refused(bytes));
  }
}

TEST_CASE("hostile values with a right checksum are refused") {
  SUBCASE("unknown flags") {
    for (const unsigned flags : {16U, 32U, 128U}) CHECK(refused(Fields{.flags = flags}.with_shape({2})));
  }
  SUBCASE("a place beyond its range") {
    CHECK_FALSE(refused(Fields{.flags = 8, .pid = 1U << 22, .fd = 1U << 30}.with_shape({2})));
    CHECK_FALSE(refused(Fields{.flags = 8, .fd = 0}.with_shape({2})));
    CHECK(refused(Fields{.flags = 8, .pid = 0}.with_shape({2})));
    CHECK(refused(Fields{.flags = 8, .pid = (1U << 22) + 1}.with_shape({2})));
    CHECK(refused(Fields{.flags = 8, .pid = UINT64_MAX}.with_shape({2})));
    CHECK(refused(Fields{.flags = 8, .fd = (1U << 30) + 1}.with_shape({2})));
    CHECK(refused(Fields{.flags = 8, .fd = UINT64_MAX}.with_shape({2})));
  }
  SUBCASE("a block beyond the table") {
    CHECK(refused(Fields{.block = kMaxBlocks}.with_shape({2})));
    CHECK(refused(Fields{.block = std::uint64_t{1} << 32}.with_shape({2})));
    CHECK(refused(Fields{.block = UINT64_MAX}.with_shape({2})));
  }
  SUBCASE("an odd generation") {
    CHECK(refused(Fields{.generation = 9}.with_shape({2})));
    CHECK(refused(Fields{.generation = UINT64_MAX}.with_shape({2})));
  }
  SUBCASE("a cell or a tag beyond its range") {
    const auto with_message = [](unsigned cell, std::uint64_t tag) {
      Bytes bytes = Fields{.flags = 1}.up_to_generation();
      bytes.raw({cell}).varint(tag).varint(0).raw({0, 1}).varint(2);
      return bytes.sealed();
    };
    CHECK_FALSE(refused(with_message(kMessageCells - 1, MessageCell::kTagMask)));
    CHECK(refused(with_message(kMessageCells, 0)));
    CHECK(refused(with_message(255, 0)));
    CHECK(refused(with_message(0, MessageCell::kTagMask + 1)));
    CHECK(refused(with_message(0, std::uint64_t{1} << 32)));
  }
  SUBCASE("an unknown dtype") {
    CHECK(refused(Fields{.dtype = static_cast<unsigned>(kDtypes.size())}.with_shape({2})));
    CHECK(refused(Fields{.dtype = 255}.with_shape({2})));
  }
  SUBCASE("an offset out of range") {
    CHECK_FALSE(refused(Fields{.offset = std::uint64_t{1} << 47}.with_shape({2})));
    CHECK(refused(Fields{.offset = (std::uint64_t{1} << 48) + 1}.with_shape({2})));
    CHECK(refused(Fields{.offset = UINT64_MAX}.with_shape({2})));
    CHECK(refused(Fields{.offset = std::uint64_t{1} << 48}.with_shape({1})));
  }
  SUBCASE("too many dimensions") {
    Bytes bytes = Fields{}.up_to_dtype();
    bytes.raw({kMaxDimensions + 1});
    for (std::size_t i = 0; i <= kMaxDimensions; ++i) bytes.varint(1);
    CHECK(refused(bytes.sealed()));
  }
  SUBCASE("a shape whose product overflows") {
    constexpr std::uint64_t k32 = std::uint64_t{1} << 32;
    CHECK(refused(Fields{}.with_shape({k32, k32})));
    CHECK(refused(Fields{}.with_shape({k32, k32, k32})));
    CHECK(refused(Fields{}.with_shape({std::uint64_t{1} << 24, std::uint64_t{1} << 24, 2})));
    CHECK(refused(Fields{}.with_shape({(std::uint64_t{1} << 48) + 1})));
    CHECK(refused(Fields{}.with_shape({UINT64_MAX})));
    CHECK(refused(Fields{}.with_shape({std::uint64_t{1} << 63})));
    // Torch multiplies before it comes to the zero.
    CHECK(refused(Fields{}.with_shape({k32, k32, 0})));
    CHECK(refused(Fields{}.with_shape({0, k32, k32})));
    CHECK_FALSE(refused(Fields{}.with_shape({0, k32})));
    // 16 bytes an element: the elements fit, their bytes do not.
    CHECK(refused(Fields{.dtype = 14}.with_shape({std::uint64_t{1} << 45})));
  }
  SUBCASE("strides that reach too far") {
    CHECK(refused(Fields{.flags = 2}.with_shape({2}, {std::uint64_t{1} << 48})));
    CHECK(refused(Fields{.flags = 2}.with_shape({2}, {UINT64_MAX})));
    CHECK(refused(Fields{.flags = 2}.with_shape({std::uint64_t{1} << 24, 2}, {std::uint64_t{1} << 40, 1})));
    CHECK(refused(Fields{.flags = 2}.with_shape({std::uint64_t{1} << 33, 1}, {std::uint64_t{1} << 31, 1})));
    CHECK(refused(Fields{.flags = 2}.with_shape({3, 3}, {std::uint64_t{1} << 46, std::uint64_t{1} << 46})));
  }
  SUBCASE("strides without dimensions, or of another number") {
    CHECK(refused(Fields{.flags = 2}.with_shape({})));
    CHECK(refused(Fields{.flags = 2}.with_shape({2, 3}, {3})));
    CHECK(refused(Fields{.flags = 2}.with_shape({2, 3}, {3, 1, 1})));
    CHECK(refused(Fields{}.with_shape({2, 3}, {3, 1})));
  }
  SUBCASE("an unknown reason") {
    for (const unsigned reason : {0U, 8U, 10U, 255U}) {
      Bytes bytes = Fields{.flags = 4}.up_to_dtype();
      bytes.raw({1, 2, reason});
      CHECK(refused(bytes.sealed()));
    }
  }
  SUBCASE("a number of more than 64 bits") {
    Bytes bytes;
    bytes.raw({0}).fixed(0, 4).fixed(0, 8);
    bytes.raw({0x83, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 2}).raw({8, 0, 0, 0});
    CHECK(refused(bytes.sealed()));
    Bytes endless;
    endless.raw({0}).fixed(0, 4).fixed(0, 8);
    for (int i = 0; i < 20; ++i) endless.raw({0x80});
    CHECK(refused(endless.sealed()));
  }
}

TEST_CASE("extents of a tensor count to the end of its last element") {
  const auto end = [](std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, std::uint64_t offset) {
    // float32
    return TensorMeta{Dtype{10}, offset, std::move(shape), std::move(strides)}.end();
  };
  CHECK(end({}, {}, 0) == 4);
  CHECK(end({}, {}, 256) == 260);
  CHECK(end({2, 3}, {}, 8) == 32);
  CHECK(end({2, 3}, {10, 1}, 0) == 4 * (10 + 2 + 1));
  CHECK(end({2, 3}, {0, 0}, 0) == 4);
  CHECK(end({0, 3}, {}, 256) == 0);
  CHECK(end({5, 0}, {100, 1}, 256) == 0);
  CHECK(TensorMeta{Dtype{10}, 0, {2, 3, 4}, {}}.elements() == 24);
  CHECK(TensorMeta{Dtype{10}, 0, {2, 0, 4}, {}}.elements() == 0);
  CHECK(TensorMeta{Dtype{10}, 0, {}, {}}.elements() == 1);
}

TEST_CASE("a tensor without elements ends at 0, whatever its other sizes and strides say") {
  const std::int64_t huge = std::int64_t{1} << 47;
  CHECK(TensorMeta{Dtype{10}, 0, {0, huge}, {huge, 4}}.end() == 0);
  CHECK(TensorMeta{Dtype{10}, 0, {huge, 0}, {huge, 4}}.end() == 0);
  CHECK(TensorMeta{Dtype{10}, 0, {huge, huge, 0}, {}}.end() == 0);
}

TEST_CASE("text is base64 without padding and every other text is refused") {
  CHECK(to_text("") == "");
  CHECK(to_text("f") == "Zg");
  CHECK(to_text("fo") == "Zm8");
  CHECK(to_text("foo") == "Zm9v");
  CHECK(to_text("foob") == "Zm9vYg");
  CHECK(to_text("fooba") == "Zm9vYmE");
  CHECK(to_text("foobar") == "Zm9vYmFy");
  CHECK(from_text("Zm9vYmFy") == "foobar");
  const auto text_refused = [](const std::string& text) {
    try {
      (void)from_text(text);
      return false;
    } catch (const Error& error) {
      return error.code() == ErrorCode::kInvalidHandle;
    }
  };
  CHECK(text_refused("Z"));
  CHECK(text_refused("Zm9vY"));
  CHECK(text_refused("Zg=="));
  CHECK(text_refused("Zm9 "));
  CHECK(text_refused("Zm9\n"));
  CHECK(text_refused("Zm-_"));
  CHECK(text_refused(std::string("Zm9\0", 4)));
  CHECK(text_refused("Zm9\xFF"));
  // Bits left over in the last character.
  CHECK(text_refused("Zh"));
  CHECK(text_refused("Zm9"));
}

}  // namespace
}  // namespace shmx
