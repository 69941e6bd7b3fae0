// The survey: what it says of arenas in every state, and that nothing it finds can harm it or is changed by it.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "control.hpp"
#include "reaper.hpp"
#include "segment.hpp"
#include "small_arena.hpp"
#include "survey.hpp"

namespace shmx {
namespace {

using namespace test;

const ArenaSurvey* find(const std::vector<ArenaSurvey>& all, ArenaId arena) {
  const auto found =
      std::find_if(all.begin(), all.end(), [&](const ArenaSurvey& one) { return one.name == control_name(arena); });
  return found == all.end() ? nullptr : &*found;
}

ArenaSurvey survey_of(ArenaId arena) {
  const std::vector<ArenaSurvey> all = survey();
  const ArenaSurvey* found = find(all, arena);
  REQUIRE(found != nullptr);
  return *found;
}

std::string path_of(ArenaId arena) { return "/dev/shm" + control_name(arena); }

// A published control segment with an entry in each table, and nobody's lock on it.
struct Scratch {
  ArenaId arena{random_id()};
  ControlSegment control = ControlSegment::create(arena, {1U << 20, 640});
  Scratch() {
    control.grow_table(256);
    BlockEntry& block = control.block(BlockIndex{3});
    block.place.bytes.store(4096);
    set_hold(block.state, PeerSlot{5});
    (void)announce(block.state, Generation{0}, 7, ticks_now());
    control.header().peers[5].pid.store(4711);
    control.publish();
  }
  ~Scratch() { unlink_segment(control.name()); }
};

std::string content(ArenaId arena) {
  const UniqueFd fd(::open(path_of(arena).c_str(), O_RDONLY));
  std::string bytes(kHeaderBytes + (256 * sizeof(BlockEntry)), '\0');
  REQUIRE(::pread(fd.get(), bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
  return bytes;
}

TEST_CASE("an arena that is alive: owner, memory, blocks, messages, and who holds what") {
  const auto arena = Arena::create(small_options());
  Allocation kept = arena->allocate(ByteCount{kMiB});
  const Allocation other = arena->allocate(ByteCount{64 * 1024});
  (void)send(kept.hold, exactly(3));
  age_messages(entry_of(kept.hold).state, 20);
  const HandleState sent = send(kept.hold, exactly(2));
  Child peer([&](Line& line) {
    const auto hold = load_block(sent.arena, sent.place, sent.block, sent.generation, sent.message);
    line.say(1);
    (void)line.hear();
  });
  (void)peer.hear();

  const ArenaSurvey seen = survey_of(id_of(*arena));
  CHECK(seen.state == ArenaState::kAlive);
  CHECK(seen.trouble.empty());
  CHECK(seen.attached);
  CHECK(seen.owner_pid == static_cast<std::uint32_t>(::getpid()));
  CHECK(seen.capacity == 16 * kMiB);
  CHECK(seen.ticket_ttl == 300);
  CHECK(seen.segments == 1);
  CHECK(seen.blocks_in_use == 2);
  CHECK(seen.bytes_in_use == arena->stats().in_blocks);
  CHECK(seen.memory_bytes >= arena->stats().reserved + kHeaderBytes);
  CHECK(seen.messages == 2);
  CHECK(seen.loads_to_come == 4);
  CHECK(seen.expired_messages == 0);
  REQUIRE(seen.oldest_message.has_value());
  CHECK(*seen.oldest_message >= 20);
  CHECK(*seen.oldest_message < 60);
  const auto child = std::find_if(seen.peers.begin(), seen.peers.end(), [&](const PeerSurvey& one) {
    return one.pid == static_cast<std::uint32_t>(peer.pid());
  });
  REQUIRE(child != seen.peers.end());
  CHECK(child->alive);
  CHECK(seen.peers.front().slot == 0);
  CHECK(seen.peers.front().alive);
  CHECK(seen.peers.front().blocks == 2);

  SUBCASE("a peer that was killed is dead at once, and what it held is still listed") {
    peer.kill_unreaped();
    const ArenaSurvey after = survey_of(id_of(*arena));
    const auto dead = std::find_if(after.peers.begin(), after.peers.end(), [&](const PeerSurvey& one) {
      return one.pid == static_cast<std::uint32_t>(peer.pid());
    });
    REQUIRE(dead != after.peers.end());
    CHECK_FALSE(dead->alive);
    CHECK(dead->blocks >= 1);
    CHECK(dead->bytes >= kMiB);
  }
  SUBCASE("a peer that is stopped is alive") {
    ::kill(peer.pid(), SIGSTOP);
    const ArenaSurvey after = survey_of(id_of(*arena));
    CHECK(std::all_of(after.peers.begin(), after.peers.end(), [](const PeerSurvey& one) { return one.alive; }));
    ::kill(peer.pid(), SIGCONT);
  }
  peer.kill();
  drop_messages(*arena);
}

TEST_CASE("an orphan") {
  const Scratch scratch;
  const ArenaSurvey seen = survey_of(scratch.arena);
  CHECK(seen.state == ArenaState::kOrphan);
  CHECK_FALSE(seen.attached);
  CHECK_FALSE(seen.owner_left);
  CHECK(seen.blocks_in_use == 1);
  CHECK(seen.bytes_in_use == 4096);
  REQUIRE(seen.peers.size() == 1);
  CHECK(seen.peers[0].slot == 5);
  CHECK(seen.peers[0].pid == 4711);
  CHECK_FALSE(seen.peers[0].alive);
}

TEST_CASE("a creation that is under way, and one that was torn") {
  const ArenaId arena{random_id()};
  ControlSegment control = ControlSegment::create(arena, {1U << 20, 640});
  {
    const auto lock = PeerLock::try_take(control.file(), kOwnerSlot, Inheritance::kThisProcess);
    CHECK(survey_of(arena).state == ArenaState::kStarting);
  }
  CHECK(survey_of(arena).state == ArenaState::kTorn);
  REQUIRE(::truncate(path_of(arena).c_str(), 0) == 0);
  CHECK(survey_of(arena).state == ArenaState::kTorn);
  unlink_segment(control.name());
}

TEST_CASE("data segments without a control segment") {
  const ArenaId arena{random_id()};
  const std::string name = data_name(arena, 4);
  const UniqueFd fd = create_segment(name);
  REQUIRE(::ftruncate(fd.get(), 8192) == 0);
  REQUIRE(::fallocate(fd.get(), 0, 0, 8192) == 0);
  const ArenaSurvey seen = survey_of(arena);
  CHECK(seen.state == ArenaState::kHeadless);
  CHECK(seen.memory_bytes == 8192);
  unlink_segment(name);
}

TEST_CASE("another layout version is told, and nothing behind it is believed") {
  Scratch scratch;
  scratch.control.header().layout_version = 77;
  const ArenaSurvey seen = survey_of(scratch.arena);
  CHECK(seen.state == ArenaState::kOtherVersion);
  CHECK(seen.trouble.find("77") != std::string::npos);
  CHECK(seen.peers.empty());
}

TEST_CASE("another user's arena is not opened") {
  if (::geteuid() != 0) return;  // to give a file away takes root
  const Scratch scratch;
  REQUIRE(::chown(path_of(scratch.arena).c_str(), 12345, 12345) == 0);
  const ArenaSurvey seen = survey_of(scratch.arena);
  CHECK(seen.state == ArenaState::kForeign);
  CHECK(seen.uid == 12345);
  CHECK(seen.peers.empty());
}

TEST_CASE("what is no regular file is damaged, and nobody waits for it") {
  const ArenaId arena{random_id()};
  const std::string path = path_of(arena);
  SUBCASE("a pipe") { REQUIRE(::mkfifo(path.c_str(), 0600) == 0); }
  SUBCASE("a link") { REQUIRE(::symlink("/etc/hostname", path.c_str()) == 0); }
  CHECK(survey_of(arena).state == ArenaState::kDamaged);
  ::unlink(path.c_str());
}

TEST_CASE("a directory in the place of a control segment is damaged") {
  const ArenaId arena{random_id()};
  REQUIRE(::mkdir(path_of(arena).c_str(), 0700) == 0);
  CHECK(survey_of(arena).state == ArenaState::kDamaged);
  ::rmdir(path_of(arena).c_str());
}

TEST_CASE("a control segment of any other length is damaged") {
  for (const std::uint64_t length : {std::uint64_t{8}, std::uint64_t{12}, std::uint64_t{100}, std::uint64_t{4096},
                                     kHeaderBytes, kHeaderBytes + 4096, kControlBytes - 1, kControlBytes + 1}) {
    const Scratch scratch;
    CAPTURE(length);
    REQUIRE(::truncate(path_of(scratch.arena).c_str(), static_cast<off_t>(length)) == 0);
    CHECK(survey_of(scratch.arena).state == ArenaState::kDamaged);
  }
}

TEST_CASE("a survey changes no byte, makes no page, takes no slot, and keeps nothing open") {
  Scratch scratch;
  const std::string before = content(scratch.arena);
  struct stat facts{};
  REQUIRE(::stat(path_of(scratch.arena).c_str(), &facts) == 0);
  const auto pages = facts.st_blocks;
  for (int i = 0; i < 3; ++i) (void)survey();
  CHECK(content(scratch.arena) == before);
  REQUIRE(::stat(path_of(scratch.arena).c_str(), &facts) == 0);
  CHECK(facts.st_blocks == pages);
  for (std::uint32_t slot = 0; slot < kMaxPeers; ++slot) {
    CHECK_FALSE(is_alive(scratch.control.file(), PeerSlot{slot}));
  }
}

struct Field {
  const char* name;
  std::size_t offset;
  std::size_t bytes;
  bool checked;  // a value out of range is told from a good one
};

// Every field of the header; peers and segments stand for all their entries.
const std::array<Field, 19> kFields = {{
    {"magic", offsetof(ControlHeader, magic), 8, true},
    {"layout_version", offsetof(ControlHeader, layout_version), 4, true},
    {"header_bytes", offsetof(ControlHeader, header_bytes), 4, true},
    {"arena_id", offsetof(ControlHeader, arena_id), 8, true},
    {"capacity", offsetof(ControlHeader, capacity), 8, true},
    {"owner_pid", offsetof(ControlHeader, owner_pid), 4, false},
    {"max_blocks", offsetof(ControlHeader, max_blocks), 4, true},
    {"ttl_ticks", offsetof(ControlHeader, ttl_ticks), 4, false},
    {"lifecycle", offsetof(ControlHeader, lifecycle), 4, true},
    {"owner_left", offsetof(ControlHeader, owner_left), 4, false},
    {"block_count", offsetof(ControlHeader, block_count), 4, true},
    {"trim_count", offsetof(ControlHeader, trim_count), 4, false},
    {"owner_active", offsetof(ControlHeader, owner_active), 4, false},
    {"peers.pid", offsetof(ControlHeader, peers), 4, false},
    {"peers.since", offsetof(ControlHeader, peers) + 4, 4, false},
    {"segments.id", offsetof(ControlHeader, segments), 4, false},
    {"segments.status", offsetof(ControlHeader, segments) + 4, 4, true},
    {"segments.bytes", offsetof(ControlHeader, segments) + 8, 8, false},
    {"segments.committed", offsetof(ControlHeader, segments) + 16, 8, false},
}};

bool is_told_apart(ArenaState state) { return state == ArenaState::kDamaged || state == ArenaState::kOtherVersion; }

TEST_CASE("no value of any header field harms the survey, and one out of range is told") {
  Scratch scratch;
  auto* header = reinterpret_cast<std::byte*>(&scratch.control.header());
  for (const Field& field : kFields) {
    std::array<std::byte, 8> good{};
    std::memcpy(good.data(), header + field.offset, field.bytes);
    for (const std::uint64_t bad : {std::uint64_t{0x7f7f7f7f7f7f7f7f}, UINT64_MAX, std::uint64_t{0x8000000080000000},
                                    std::uint64_t{5} << 60 | 5}) {
      CAPTURE(field.name);
      CAPTURE(bad);
      // A number that is a good one of its four bytes.
      if (field.bytes == 4 && field.offset == offsetof(ControlHeader, block_count) && (bad & UINT32_MAX) == 5) continue;
      std::memcpy(header + field.offset, &bad, field.bytes);
      const ArenaSurvey seen = survey_of(scratch.arena);
      if (field.checked) {
        CHECK(is_told_apart(seen.state));
      } else {
        CHECK(seen.state == ArenaState::kOrphan);
      }
      std::memcpy(header + field.offset, good.data(), field.bytes);
    }
    CHECK(survey_of(scratch.arena).state == ArenaState::kOrphan);
  }
}

TEST_CASE("a block in use with a size beyond the capacity is damage; one that is not in use may say anything") {
  Scratch scratch;
  BlockEntry& used = scratch.control.block(BlockIndex{3});
  BlockEntry& unused = scratch.control.block(BlockIndex{4});
  unused.place.bytes.store(UINT64_MAX);
  CHECK(survey_of(scratch.arena).state == ArenaState::kOrphan);
  for (const std::uint64_t bytes : {(std::uint64_t{1} << 20) + 1, UINT64_MAX}) {
    used.place.bytes.store(bytes);
    const ArenaSurvey seen = survey_of(scratch.arena);
    CHECK(seen.state == ArenaState::kDamaged);
    CHECK(seen.trouble.find("block 3") != std::string::npos);
  }
}

TEST_CASE("a message from the future is new") {
  Scratch scratch;
  const MessageCell tomorrow{7, 1, ticks_now() + 5 * kTicksPerSecond};
  scratch.control.block(BlockIndex{3}).state.cells[0].store(tomorrow.pack());
  const ArenaSurvey seen = survey_of(scratch.arena);
  REQUIRE(seen.oldest_message.has_value());
  CHECK(*seen.oldest_message == 0);
  CHECK(seen.expired_messages == 0);
}

TEST_CASE("a control segment full of noise") {
  std::mt19937_64 noise(20261123);  // NOLINT(cert-msc32-c, cert-msc51-cpp): the same in every run
  for (int round = 0; round < 60; ++round) {
    Scratch scratch;
    auto* bytes = reinterpret_cast<std::byte*>(&scratch.control.header());
    // The tables; and in every other round the header with them, up to what tells the version.
    const std::uint64_t first = round % 2 == 0 ? kHeaderBytes : sizeof(std::uint64_t) * 2;
    for (std::uint64_t at = first; at < kHeaderBytes + (256 * sizeof(BlockEntry)); at += sizeof(std::uint64_t)) {
      const std::uint64_t word = noise();
      std::memcpy(bytes + at, &word, sizeof word);
    }
    const ArenaSurvey seen = survey_of(scratch.arena);
    CHECK(seen.state == ArenaState::kDamaged);
  }
}

TEST_CASE("the survey goes on while arenas come and go") {
  Child maker([](Line&) {
    for (;;) {
      const auto arena = Arena::create(small_options());
      const Allocation some = arena->allocate(ByteCount{4096});
    }
  });
  std::set<std::string> seen;
  for (int i = 0; i < 20'000 && seen.size() < 20; ++i) {
    for (const ArenaSurvey& one : survey()) {
      seen.insert(one.name);
      CHECK(one.state != ArenaState::kDamaged);
    }
  }
  CHECK(seen.size() >= 20);
  maker.kill();
  (void)reap_all(Expiry::kNow);
}

TEST_CASE("removals are told once") {
  (void)take_removals();
  std::string name;
  {
    const auto arena = Arena::create(small_options());
    name = arena->name();
  }
  const std::vector<Removal> told = take_removals();
  REQUIRE(told.size() == 1);
  CHECK(told[0].name == name);
  CHECK(told[0].own);
  CHECK(take_removals().empty());

  std::string orphan;
  {
    Child maker([&](Line& line) {
      const auto arena = Arena::create(small_options());
      line.say_text(arena->name());
      (void)line.hear();
    });
    orphan = maker.hear_text();
    maker.kill();
  }
  (void)reap_all(Expiry::kNow);
  const std::vector<Removal> reaped = take_removals();
  REQUIRE(reaped.size() == 1);
  CHECK(reaped[0].name == orphan);
  CHECK_FALSE(reaped[0].own);
}

}  // namespace
}  // namespace shmx
