// Writes one small input for each thing that the fuzz targets tell apart: fuzz_seeds DIRECTORY.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "handle_codec.hpp"

namespace shmx {
namespace {

std::string with(unsigned char mode, const std::string& rest) { return std::string(1, static_cast<char>(mode)) + rest; }

std::vector<std::string> handles() {
  HandleState state;
  state.host = 1;
  state.arena = ArenaId{0x0102030405060708};
  state.block = BlockIndex{300};
  state.generation = Generation{70000};
  state.message = MessageId{9, 123456};
  std::vector<std::string> seeds;
  for (const TensorMeta& meta :
       {TensorMeta{Dtype{0}, 0, {}, {}}, TensorMeta{Dtype{1}, 64, {3, 224, 224}, {}},
        TensorMeta{Dtype{2}, 1 << 20, {2, 3, 4}, {12, 4, 1}}, TensorMeta{Dtype{0}, 0, {0, 5}, {}}}) {
    state.meta = meta;
    for (const ErrorCode reason : {ErrorCode::kNone, ErrorCode::kStaleHandle}) {
      state.reason = reason;
      const std::string bytes = encode_handle(state);
      const std::string body = bytes.substr(0, bytes.size() - 4);
      seeds.insert(seeds.end(), {with(0, bytes), with(1, body), with(4, to_text(bytes)), with(5, body)});
    }
    const std::string part = encode_part(meta);
    const std::string body = part.substr(0, part.size() - 4);
    seeds.insert(seeds.end(), {with(2, part), with(3, body), with(4, to_text(part)), with(5, body)});
    state.message.reset();
    state.place = state.place.none() ? DescriptorPlace{4711, 9} : DescriptorPlace{};
  }
  return seeds;
}

// Records as fuzz_arena.cpp reads them: what is damaged, where, and the new value.
std::vector<std::string> arenas() {
  const auto zeros = [](std::size_t count) { return std::string(count, '\0'); };
  std::vector<std::string> seeds{""};
  for (int word = 0; word < 40; ++word) seeds.push_back(zeros(1) + static_cast<char>(word) + "\x05" + zeros(3));
  for (int word = 0; word < 12; ++word)
    seeds.push_back(std::string("\x01") + static_cast<char>(word) + "\x05" + zeros(7));
  for (int word = 0; word < 16; ++word)
    seeds.push_back(std::string("\x02") + static_cast<char>(word) + "\x05" + zeros(7));
  for (int word = 0; word < 15; ++word) seeds.push_back(std::string("\x07") + static_cast<char>(word) + zeros(8));
  seeds.push_back(std::string("\x05\x01\x00\x10\x00\x00", 6));
  seeds.push_back(std::string("\x06\x00\x00\x10\x00", 5));
  // Nothing held and no message, which lets a reaper go all the way.
  std::string idle;
  for (int word = 1; word < 12; ++word) idle += std::string("\x07") + static_cast<char>(word) + zeros(8);
  seeds.push_back(idle);
  for (int word = 0; word < 40; ++word) seeds.push_back(idle + zeros(1) + static_cast<char>(word) + "\x05" + zeros(3));
  return seeds;
}

std::vector<std::string> sizes() {
  return {with(0, "\x01\x05\x10\x02\x01\x08\x20\x08\x30\x08\x40\x08\x01"), with(1, "\x20\xff\xff\xff\x0f"),
          with(2, std::string("\x00\x0f\x04\x0f\x01\x03\x02\x01\x03\x00\x01\x08\x03\x01", 14))};
}

void write(const std::filesystem::path& directory, const std::vector<std::string>& seeds) {
  std::filesystem::create_directories(directory);
  for (std::size_t i = 0; i < seeds.size(); ++i)
    std::ofstream(directory / std::to_string(i), std::ios::binary) << seeds[i];
}

}  // namespace
}  // namespace shmx

int main(int argc, char** argv) {
  if (argc != 2) {
    (void)std::fprintf(stderr, "fuzz_seeds DIRECTORY\n");
    return 2;
  }
  const std::filesystem::path directory(argv[1]);
  shmx::write(directory / "handle", shmx::handles());
  shmx::write(directory / "arena", shmx::arenas());
  shmx::write(directory / "sizes", shmx::sizes());
}
