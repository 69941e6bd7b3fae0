// Arithmetic of sizes: extents of strided tensors against 128-bit numbers, steps of block sizes, and the free bytes of
// an arena against a plain map of bytes.
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "handle_codec.hpp"
#include "space.hpp"

namespace shmx {
namespace {

__extension__ typedef unsigned __int128 Wide;

void require(bool truth) {
  if (!truth) std::abort();
}

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  [[nodiscard]] bool empty() const { return size_ == 0; }
  std::uint8_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  // Of any magnitude: the first byte says how many bits.
  std::uint64_t number() {
    const unsigned bits = byte() % 65;
    std::uint64_t raw = 0;
    for (unsigned i = 0; i < (bits + 7) / 8; ++i) raw |= std::uint64_t{byte()} << (8 * i);
    return bits == 64 ? raw : raw & ((std::uint64_t{1} << bits) - 1);
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

constexpr std::uint64_t kLargestBytes = 1ULL << 48;

void try_extent(Input in) {
  TensorMeta meta;
  meta.dtype = Dtype{static_cast<std::uint8_t>(in.byte() % kDtypes.size())};
  meta.offset = in.number() % (kLargestBytes + 1);
  meta.shape.resize(in.byte() % (kMaxDimensions + 1));
  const bool strided = in.byte() % 2 == 1 && !meta.shape.empty();
  for (auto& size : meta.shape) size = static_cast<std::int64_t>(in.number() & INT64_MAX);
  if (strided) {
    meta.strides.resize(meta.shape.size());
    for (auto& stride : meta.strides) stride = static_cast<std::int64_t>(in.number() % (kLargestBytes + 1));
  }
  bool empty = false;
  // As torch multiplies, zeros included for the elements, and as ones for the strides.
  bool multiplies = true;
  Wide in_order = 1;
  Wide stride = 1;
  Wide elements = 1;
  Wide last = 0;
  for (std::size_t i = 0; i < meta.shape.size(); ++i) {
    const auto size = static_cast<std::uint64_t>(meta.shape[i]);
    empty = empty || size == 0;
    in_order *= size;
    if (i > 0) stride *= size == 0 ? 1 : size;
    if (in_order > UINT64_MAX || stride > static_cast<std::uint64_t>(INT64_MAX)) {
      multiplies = false;
      break;
    }
    // Beyond the bound it stays beyond it.
    if (size != 0 && elements <= kLargestBytes) elements *= size;
    if (strided && size != 0 && last <= kLargestBytes)
      last += Wide{size - 1} * Wide{static_cast<std::uint64_t>(meta.strides[i])};
  }
  if (!strided) last = elements - 1;
  const Wide end = empty ? 0 : meta.offset + (last + 1) * info(meta.dtype).bytes;
  const bool fits = multiplies && (empty || (elements <= kLargestBytes && end <= kLargestBytes));
  std::optional<TensorMeta> back;
  try {
    back = decode_part(encode_part(meta));
  } catch (const Error& error) {
    require(error.code() == ErrorCode::kInvalidHandle);
  }
  require(back.has_value() == fits);
  if (back) require(back->end() == end && back->shape == meta.shape && back->strides == meta.strides);
}

void try_block_bytes(Input in) {
  const std::uint64_t bytes = in.number();
  const std::uint64_t block = block_bytes(bytes);
  require(block >= bytes);
  if (bytes > UINT64_MAX / 2) return;
  require(block % kBlockAlignment == 0 && block >= kBlockAlignment);
  require(Wide{block - bytes} * 16 <= Wide{bytes} + 16 * kBlockAlignment);
  require(block_bytes(block) == block);
}

void try_space(Input in) {
  constexpr std::size_t kUnits = 96;
  constexpr std::uint32_t kSegments = 3;
  FreeSpace space;
  std::array<std::array<bool, kUnits>, kSegments> free{};
  std::vector<Range> taken;
  std::array<std::uint64_t, kSegments> committed{};
  while (!in.empty()) {
    const std::uint8_t what = in.byte();
    const std::uint64_t units = 1 + in.byte() % 16;
    if (what % 4 == 0) {  // growth
      const std::uint32_t slot = what / 4 % kSegments;
      const std::uint64_t end = std::min<std::uint64_t>(committed[slot] + units, kUnits);
      if (end == committed[slot]) continue;
      space.give({slot, committed[slot] * kBlockAlignment, (end - committed[slot]) * kBlockAlignment});
      for (; committed[slot] < end; ++committed[slot]) free[slot][committed[slot]] = true;
    } else if (what % 4 != 3) {
      const bool fits = space.largest() >= units * kBlockAlignment;
      const auto range = space.take(ByteCount{units * kBlockAlignment});
      require(range.has_value() == fits);
      if (!range) continue;
      require(range->bytes == units * kBlockAlignment && range->offset % kBlockAlignment == 0);
      for (std::uint64_t i = range->offset / kBlockAlignment; i < range->offset / kBlockAlignment + units; ++i) {
        require(i < committed[range->segment_slot] && free[range->segment_slot][i]);
        free[range->segment_slot][i] = false;
      }
      taken.push_back(*range);
    } else if (!taken.empty()) {
      const std::size_t index = units % taken.size();
      const Range range = taken[index];
      taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(index));
      space.give(range);
      for (std::uint64_t i = 0; i < range.bytes / kBlockAlignment; ++i) {
        free[range.segment_slot][range.offset / kBlockAlignment + i] = true;
      }
    }
    std::uint64_t longest = 0;
    for (std::uint32_t slot = 0; slot < kSegments; ++slot) {
      std::uint64_t sum = 0;
      std::uint64_t run = 0;
      for (std::uint64_t i = 0; i < committed[slot]; ++i) {
        run = free[slot][i] ? run + 1 : 0;
        sum += free[slot][i] ? 1 : 0;
        longest = std::max(longest, run);
      }
      require(space.free_in(slot) == sum * kBlockAlignment);
      require(space.free_before(slot, committed[slot] * kBlockAlignment) == run * kBlockAlignment);
    }
    require(space.largest() == longest * kBlockAlignment);
  }
}

}  // namespace
}  // namespace shmx

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const shmx::Input in(data + 1, size - 1);
  switch (data[0] % 3) {
    case 0:
      shmx::try_extent(in);
      break;
    case 1:
      shmx::try_block_bytes(in);
      break;
    default:
      shmx::try_space(in);
  }
  return 0;
}
