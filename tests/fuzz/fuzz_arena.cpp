// A control segment that somebody has written over: the files of a valid arena whose owner is gone are damaged as the
// input says, and then surveyed, attached, loaded from, announced in, and reaped. Nothing may crash, hang or touch a
// byte outside, errors are those of a damaged arena, and no name goes but the arena's own.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "arena.hpp"
#include "attachment.hpp"
#include "control.hpp"
#include "handle.hpp"
#include "host.hpp"
#include "own_shm.hpp"
#include "process.hpp"
#include "reaper.hpp"
#include "survey.hpp"

namespace shmx {
namespace {

constexpr std::uint32_t kBlocks = 6;
constexpr std::uint32_t kEntries = 8;
constexpr std::uint64_t kImageBytes = kHeaderBytes + (kEntries * sizeof(BlockEntry));
constexpr std::uint64_t kSegmentBytes = 64 * 1024;
constexpr std::uint64_t kBlockBytes = 4096;
const ArenaId kArena{0x00c0ffee00c0ffeeULL};

void require(bool truth, const char* what) {
  if (truth) return;
  (void)std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

std::string path_of(const std::string& name) { return "/dev/shm" + name; }

bool exists(const std::string& name) {
  struct stat facts{};
  return ::lstat(path_of(name).c_str(), &facts) == 0;
}

std::uint64_t size_of(const std::string& name) {
  struct stat facts{};
  return ::stat(path_of(name).c_str(), &facts) == 0 ? static_cast<std::uint64_t>(facts.st_size) : 0;
}

void write_file(const std::string& name, const void* bytes, std::size_t count, std::uint64_t length) {
  const UniqueFd fd(::open(path_of(name).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  require(fd.valid(), "a file can be written");
  require(::pwrite(fd.get(), bytes, count, 0) == static_cast<ssize_t>(count), "a file can be written");
  require(::ftruncate(fd.get(), static_cast<off_t>(length)) == 0, "a file can be sized");
}

std::string read_file(const std::string& name) {
  const UniqueFd fd(::open(path_of(name).c_str(), O_RDONLY | O_CLOEXEC));
  std::string bytes(64, '\0');
  const ssize_t got = ::pread(fd.get(), bytes.data(), bytes.size(), 0);
  bytes.resize(got < 0 ? 0 : static_cast<std::size_t>(got));
  return bytes;
}

// Names that look like the arena's, or belong to nobody, and must stay as they are.
const std::array<std::string, 9> kStrangers = {"/shmx-00C0FFEE00C0FFEE",
                                               "/shmx-00C0FFEE00C0FFEE.1",
                                               "/shmx-00c0ffee00c0ffee.",
                                               "/shmx-00c0ffee00c0ffee.01",
                                               "/shmx-00c0ffee00c0fff",
                                               "/shmx-00c0ffee00c0ffee1",
                                               "/shmx-00c0ffee00c0ffee.1.1",
                                               "/shmx-00c0ffee00c0ffee.99999999999",
                                               "/shmx"};

// What an owner that was killed leaves behind: two segments, a block held by nobody, by a dead peer, with messages.
struct Image {
  std::vector<std::byte> control = std::vector<std::byte>(kImageBytes);
  std::array<MessageId, kBlocks> messages{};

  Image() {
    ControlSegment made = ControlSegment::create(kArena, {1U << 20, 640});
    made.grow_table(kEntries);
    made.header().block_count.store(kEntries);
    for (std::uint32_t i = 0; i < kBlocks; ++i) {
      BlockEntry& block = made.block(BlockIndex{i});
      block.state.generation.store(2 * i);
      block.place.offset.store(kBlockBytes * (i / 2));
      block.place.bytes.store(kBlockBytes);
      block.place.segment_slot.store(static_cast<std::uint16_t>(i % 2));
      messages[i] = announce(block.state, Generation{2 * i}, 2, ticks_now()).message;
      if (i % 3 == 0) set_hold(block.state, PeerSlot{i});
    }
    for (std::uint32_t slot = 0; slot < 2; ++slot) {
      SegmentEntry& segment = made.header().segments[slot];
      segment.id.store(slot + 1);
      segment.status.store(SegmentStatus::kLive);
      segment.bytes.store(kSegmentBytes);
      segment.committed.store(kSegmentBytes / 2);
    }
    made.publish();
    std::memcpy(control.data(), &made.header(), kImageBytes);
    unlink_segment(made.name());
  }
};

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  [[nodiscard]] bool empty() const { return size_ == 0; }
  std::uint64_t number(unsigned bytes) {
    std::uint64_t all = 0;
    for (unsigned i = 0; i < bytes && size_ > 0; ++i, --size_) all |= std::uint64_t{*data_++} << (8 * i);
    return all;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

struct Damage {
  std::vector<std::byte> control;
  std::uint64_t control_length = kControlBytes;
  std::array<std::uint64_t, 3> data_length{kSegmentBytes, kSegmentBytes, kSegmentBytes};
};

void put(Damage& damage, std::uint64_t at, std::uint64_t value, unsigned bytes) {
  if (at + bytes <= kImageBytes) std::memcpy(damage.control.data() + at, &value, bytes);
}

Damage damaged(const Image& image, Input in) {
  Damage damage{image.control};
  while (!in.empty()) {
    switch (in.number(1) % 8) {
      case 0: {  // a word of the header, before its tables or at the start of them
        const std::uint64_t at = in.number(1) * 4;
        put(damage, at, in.number(4), 4);
        break;
      }
      case 1: {  // a field of the segment table
        const std::uint64_t at = offsetof(ControlHeader, segments) + (in.number(1) % 128 * 4);
        put(damage, at, in.number(8), 4);
        break;
      }
      case 2: {  // a word of a block
        const std::uint64_t at = kHeaderBytes + (in.number(1) % (kBlocks * 16) * 8);
        put(damage, at, in.number(8), 8);
        break;
      }
      case 3: {  // a field of where a block lies, small numbers
        const std::uint64_t at =
            kHeaderBytes + (in.number(1) % kBlocks * sizeof(BlockEntry)) + sizeof(BlockState) + (in.number(1) % 12 * 2);
        put(damage, at, in.number(2), 2);
        break;
      }
      case 4:  // anywhere
        put(damage, in.number(3) % kImageBytes, in.number(8), 8);
        break;
      case 5:
        damage.control_length =
            in.number(1) % 4 == 0 ? kControlBytes + in.number(1) : in.number(4) % (kControlBytes + 1);
        break;
      case 6: {
        const std::uint64_t which = in.number(1) % damage.data_length.size();
        damage.data_length[which] = in.number(3) % (2 * kSegmentBytes);
        break;
      }
      default: {  // the same change of every block
        const std::uint64_t word = in.number(1) % 15;
        const std::uint64_t value = in.number(8);
        for (std::uint32_t i = 0; i < kBlocks; ++i) {
          put(damage, kHeaderBytes + (i * sizeof(BlockEntry)) + (word * 8), value, 8);
        }
      }
    }
  }
  return damage;
}

// The errors that a damaged arena may give; another one would name the wrong trouble.
template <typename Action>
void try_out(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    switch (error.code()) {
      case ErrorCode::kSegmentLost:
      case ErrorCode::kStaleHandle:
      case ErrorCode::kInvalidHandle:
      case ErrorCode::kReleased:
      case ErrorCode::kTooManyPeers:
        return;
      default:
        (void)std::fprintf(stderr, "error %d: %s\n", static_cast<int>(error.code()), error.what());
        std::abort();
    }
  }
}

std::uint64_t sum_of(const std::byte* bytes, std::uint64_t count) {
  std::uint64_t sum = 0;
  for (std::uint64_t i = 0; i < count; i += 512) sum += static_cast<std::uint64_t>(bytes[i]);
  return count == 0 ? sum : sum + static_cast<std::uint64_t>(bytes[count - 1]);
}

volatile std::uint64_t sink;

void use(const Image& image, std::uint32_t block) {
  HandleState state;
  state.host = host_id();
  state.arena = kArena;
  state.block = BlockIndex{block};
  state.generation = Generation{2 * block};
  state.message = image.messages[block];
  state.meta = TensorMeta{Dtype{0}, 16, {static_cast<std::int64_t>(kBlockBytes) - 16}, {}};
  try_out([&] {
    Handle handle = Handle::load(state);
    if (!handle.available()) throw *handle.failure();
    const Hold& hold = handle.require();
    Attachment& attachment = hold.attachment();
    std::byte* const data = attachment.data(hold);
    require(attachment.mapped(hold) == data, "what is mapped is found again");
    const BlockPlace& place = attachment.control().block(hold.block()).place;
    const SegmentEntry& segment = attachment.control().header().segments[place.segment_slot.load()];
    const std::uint64_t length = size_of(data_name(kArena, segment.id.load()));
    require(place.bytes.load() <= length && place.offset.load() <= length - place.bytes.load(),
            "a block lies inside its segment's file");
    sink = sum_of(data, place.bytes.load());
    std::optional<SentMessage> sent;
    (void)decode_handle(handle.to_bytes({3, true}, sent));
    if (sent) sent->take_back();
    const Handle part = handle.part(TensorMeta{Dtype{0}, 0, {64}, {}});
    require(part.available(), "a part that fits is to be had");
  });
  try_out([&] { (void)discard(state); });
}

bool any_name_left() {
  return exists(control_name(kArena)) || exists(data_name(kArena, 1)) || exists(data_name(kArena, 2)) ||
         exists(data_name(kArena, 3));
}

class World {
 public:
  World() {
    if (!test::take_own_shm("1g")) {
      (void)std::fprintf(stderr, "a /dev/shm of its own is needed: root, or unprivileged user namespaces\n");
      std::exit(2);
    }
    image_ = std::make_unique<Image>();
    ArenaOptions options;
    options.capacity = 1U << 20;
    options.segment_bytes = 1U << 18;
    neighbour_ = Arena::create(options);
    kept_ = std::make_unique<Allocation>(neighbour_->allocate(ByteCount{4096}));
    std::memset(kept_->data, 77, 4096);
    for (const std::string& name : kStrangers) write_file(name, name.data(), name.size(), name.size());
  }

  void run(const std::uint8_t* bytes, std::size_t count) {
    const Damage damage = damaged(*image_, Input(bytes, count));
    write_file(control_name(kArena), damage.control.data(), damage.control.size(), damage.control_length);
    for (std::uint32_t i = 0; i < damage.data_length.size(); ++i) {
      write_file(data_name(kArena, i + 1), "data", 4, damage.data_length[i]);
    }
    try_out([&] { look(); });
    for (std::uint32_t block = 0; block < kBlocks; ++block) use(*image_, block);
    try_out([&] { attach(kArena)->map_all(); });
    if (const auto member = find_attachment(kArena)) {
      (void)member->counts();
      leave(*member);
      // A membership stays known where the reaping at its end has failed.
      forget_attachment(*member);
    }
    for (const Expiry expiry : {Expiry::kTimeToLive, Expiry::kNow}) {
      try_out([&] { reap_and_check(expiry); });
    }
    for (const std::string& name :
         {control_name(kArena), data_name(kArena, 1), data_name(kArena, 2), data_name(kArena, 3)}) {
      unlink_segment(name);
    }
    for (const std::string& name : kStrangers) require(read_file(name) == name, "a stranger's file stays as it is");
    require(exists(neighbour_->name()), "another arena keeps its name");
    require(kept_->data[0] == std::byte{77} && kept_->data[4095] == std::byte{77}, "another arena keeps its bytes");
  }

 private:
  void look() {
    for (const ArenaSurvey& seen : survey()) {
      if (seen.name == neighbour_->name()) require(seen.state == ArenaState::kAlive, "another arena is seen as it is");
      if (seen.name != control_name(kArena)) continue;
      require(seen.peers.size() <= kMaxPeers, "there are so many peers at most");
      if (seen.state == ArenaState::kOrphan) {
        require(ControlSegment::open(kArena).has_value(), "what is surveyed as an orphan can be opened");
      }
      if (seen.state == ArenaState::kTorn || seen.state == ArenaState::kOtherVersion) {
        bool opened = false;
        try_out([&] { opened = ControlSegment::open(kArena).has_value(); });
        require(!opened, "what is surveyed as torn or of another version is not opened");
      }
    }
  }

  static void reap_and_check(Expiry expiry) {
    for (const ReapReport& report : reap_all(expiry)) {
      if (report.name != control_name(kArena)) continue;
      if (report.outcome == Reaped::kRemoved) require(!any_name_left(), "rule 7: what is removed leaves no name");
      if (report.outcome == Reaped::kOwnerAlive) {
        // Something without a whole header, that says it is ready.
        require(exists(control_name(kArena)), "what is left alone keeps its name");
      }
    }
  }

  std::unique_ptr<Image> image_;
  std::shared_ptr<Arena> neighbour_;
  std::unique_ptr<Allocation> kept_;
};

World& world() {
  static auto* instance = new World;
  return *instance;
}

}  // namespace
}  // namespace shmx

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  (void)shmx::world();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 512) return -1;
  shmx::world().run(data, size);
  return 0;
}
