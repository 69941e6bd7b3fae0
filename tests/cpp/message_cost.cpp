// A number of messages of one small tensor without Python, for tests/test_instructions.py to count the instructions
// of: share, pickle, release, load, release.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "arena.hpp"
#include "copy.hpp"
#include "handle.hpp"
#include "process.hpp"
#include "reaper.hpp"

namespace shmx {
namespace {

using Content = std::array<std::byte, 64>;

bool send_and_load(Arena& arena, const Content& content) {
  // As bindings.cpp does it: without a system call if that is possible.
  auto room = arena.try_allocate(ByteCount{content.size()});
  Allocation made = room ? std::move(*room) : arena.allocate(ByteCount{content.size()});
  copy_bytes(made.data, content.data(), content.size(), made.where);
  Handle published(TensorMeta{Dtype{0}, 0, {static_cast<std::int64_t>(content.size())}, {}}, std::move(made.hold));
  std::optional<SentMessage> sent;
  const std::string text = to_text(published.to_bytes({1, true}, sent));
  published.release();

  Handle loaded = Handle::load(decode_handle(from_text(text)));
  const Hold& hold = loaded.require();
  const bool same = std::memcmp(hold.attachment().data(hold), content.data(), content.size()) == 0;
  loaded.release();
  return same;
}

}  // namespace
}  // namespace shmx

int main(int argc, char** argv) {
  const long messages = argc == 2 ? std::strtol(argv[1], nullptr, 10) : 0;
  if (messages <= 0) {
    (void)std::fprintf(stderr, "usage: message_cost MESSAGES\n");
    return 2;
  }
  shmx::ArenaOptions options;
  options.capacity = 16U << 20;
  options.segment_bytes = 4U << 20;
  auto arena = shmx::Arena::create(options);
  shmx::Content content{};
  int status = 0;
  for (long i = 0; i < messages; ++i) {
    content[0] = static_cast<std::byte>(i);
    if (!shmx::send_and_load(*arena, content)) status = 1;
  }
  arena.reset();
  shmx::leave_all();
  return status;
}
