// Copies of tensor bytes: all bytes, in place, nothing beside them.
#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "child_process.hpp"
#include "copy.hpp"

namespace shmx {
namespace {

using Copy = void (*)(void*, const void*, std::size_t);

void copy_hot(void* to, const void* from, std::size_t bytes) { copy_bytes(to, from, bytes, Destination::kHot); }

constexpr std::size_t kGuard = 128;
constexpr unsigned char kGuardByte = 0xA5;

struct Buffers {
  std::vector<unsigned char> source;
  std::vector<unsigned char> destination;
  std::vector<unsigned char> guard;
  std::size_t base;  // the first aligned index of the destination behind its guard

  explicit Buffers(std::size_t bytes)
      : source(bytes + 2 * kGuard), destination(bytes + 4 * kGuard, kGuardByte), guard(bytes + kGuard, kGuardByte) {
    std::mt19937_64 random(3);
    // Never the guard byte, so that what was not copied shows.
    for (unsigned char& byte : source) byte = static_cast<unsigned char>(random() % 0xA5);
    base = kGuard + (64 - (reinterpret_cast<std::uintptr_t>(destination.data()) + kGuard) % 64) % 64;
  }

  void check(Copy copy, std::size_t to, std::size_t from, std::size_t bytes) {
    unsigned char* const start = destination.data() + base + to;
    copy(start, source.data() + from, bytes);
    const bool same = std::memcmp(start, source.data() + from, bytes) == 0;
    const bool before = std::memcmp(start - kGuard, guard.data(), kGuard) == 0;
    const bool after = std::memcmp(start + bytes, guard.data(), kGuard) == 0;
    std::memset(start, kGuardByte, bytes);
    if (same && before && after) return;
    throw std::runtime_error("wrong at " + std::to_string(bytes) + " bytes, to " + std::to_string(to) + ", from " +
                             std::to_string(from));
  }
};

constexpr std::array<std::size_t, 7> kOffsets{0, 1, 7, 16, 31, 32, 63};

void check_small(Copy copy) {
  Buffers buffers(4096 + 64);
  for (std::size_t bytes = 0; bytes <= 4096; ++bytes) {
    for (const std::size_t to : kOffsets) {
      const std::size_t from = (to * 5 + bytes) % 64;
      buffers.check(copy, to, from, bytes);
    }
  }
  for (const std::size_t to : kOffsets) {
    for (const std::size_t from : kOffsets) {
      for (const std::size_t bytes : {511U, 512U, 513U, 767U, 768U, 769U, 1023U, 4096U}) {
        buffers.check(copy, to, from, bytes);
      }
    }
  }
}

void check_large(Copy copy) {
  constexpr std::size_t kLargest = (6U << 20) + 333;
  Buffers buffers(kLargest + 64);
  for (const std::size_t bytes : {65536U, (256U << 10) - 1, 256U << 10, (1U << 20) + 255, 2U << 20, (2U << 20) + 1}) {
    for (const std::size_t to : {0U, 1U, 63U}) {
      buffers.check(copy, to, 64 - to, bytes);
    }
  }
  buffers.check(copy, 17, 3, kLargest);
}

TEST_CASE("plain copies copy every byte and no other") {
  check_small(&copy_plain);
  check_large(&copy_plain);
}

TEST_CASE("streaming copies copy every byte and no other") {
  check_small(&copy_non_temporal);
  check_large(&copy_non_temporal);
}

TEST_CASE("a copy of nothing touches nothing") {
  Buffers buffers(64);
  for (const Copy copy : {&copy_plain, &copy_non_temporal, &copy_hot}) buffers.check(copy, 0, 0, 0);
  // What an empty tensor has for its data.
  copy_hot(nullptr, nullptr, 0);
}

TEST_CASE("the threshold is what was set, and copies are right on both sides of it") {
  for (const std::size_t threshold : {std::size_t{262'144}, std::size_t{1} << 20, std::size_t{1} << 40}) {
    set_non_temporal_threshold(threshold);
    CHECK(non_temporal_thresholds().hot == threshold);
    CHECK(non_temporal_thresholds().cold == threshold);
    check_small(&copy_hot);
    check_large(&copy_hot);
  }
  // 0 asks for streaming always.
  set_non_temporal_threshold(0);
  CHECK(non_temporal_thresholds().hot <= 1);
  check_large(&copy_hot);
}

TEST_CASE("in a process of its own: the measured threshold" * doctest::skip()) {
  const auto in_range = [](std::size_t threshold) {
    if (std::string(non_temporal_kind()) == "none") return threshold == std::numeric_limits<std::size_t>::max();
    return threshold >= 512U << 10 && threshold <= 16U << 20;
  };
  CHECK(in_range(non_temporal_thresholds().hot));
  CHECK(in_range(non_temporal_thresholds().cold));
  measure_non_temporal_thresholds();
  const Thresholds measured = non_temporal_thresholds();
  CHECK(in_range(measured.hot));
  CHECK(in_range(measured.cold));
  measure_non_temporal_thresholds();
  CHECK(non_temporal_thresholds().hot == measured.hot);
}

TEST_CASE("the measured threshold lies in the range that was measured, or there is none") {
  CHECK(test::run_test_case("in a process of its own: the measured threshold") == 0);
}

}  // namespace
}  // namespace shmx
