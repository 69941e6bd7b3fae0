// The element types a handle can name: stable numbers for the wire, sizes, and their DLPack spelling.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

namespace shmx {

// Numbers are part of the handle format (DESIGN.md): add at the end, never reuse.
enum class Dtype : std::uint8_t {};

struct DtypeInfo {
  const char* torch_name;
  std::uint8_t dl_code;
  std::uint8_t dl_bits;
  std::uint16_t dl_lanes;
  std::uint8_t bytes;
};

// DLPack type codes: 0 int, 1 uint, 2 float, 4 bfloat, 5 complex, 6 bool, 10-14 float8, 17 float4.
inline constexpr std::array<DtypeInfo, 22> kDtypes{{
    {"uint8", 1, 8, 1, 1},           {"int8", 0, 8, 1, 1},
    {"int16", 0, 16, 1, 2},          {"int32", 0, 32, 1, 4},
    {"int64", 0, 64, 1, 8},          {"uint16", 1, 16, 1, 2},
    {"uint32", 1, 32, 1, 4},         {"uint64", 1, 64, 1, 8},
    {"float16", 2, 16, 1, 2},        {"bfloat16", 4, 16, 1, 2},
    {"float32", 2, 32, 1, 4},        {"float64", 2, 64, 1, 8},
    {"complex32", 5, 32, 1, 4},      {"complex64", 5, 64, 1, 8},
    {"complex128", 5, 128, 1, 16},   {"bool", 6, 8, 1, 1},
    {"float8_e4m3fn", 10, 8, 1, 1},  {"float8_e4m3fnuz", 11, 8, 1, 1},
    {"float8_e5m2", 12, 8, 1, 1},    {"float8_e5m2fnuz", 13, 8, 1, 1},
    {"float8_e8m0fnu", 14, 8, 1, 1}, {"float4_e2m1fn_x2", 17, 4, 2, 1},
}};

inline constexpr Dtype kBytesDtype{0};

constexpr std::uint8_t value(Dtype dtype) { return static_cast<std::uint8_t>(dtype); }
constexpr const DtypeInfo& info(Dtype dtype) { return kDtypes[value(dtype)]; }

}  // namespace shmx
