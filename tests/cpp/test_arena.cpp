// The owner's side: which block a tensor gets, growth, reuse, pressure, trim.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "own_shm.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"

namespace shmx {
namespace {

using namespace test;

std::shared_ptr<Arena> small_arena() { return Arena::create(small_options()); }

// Allocates blocks of `bytes` until the arena is full.
std::vector<Allocation> fill_up(Arena& arena, std::uint64_t bytes) {
  std::vector<Allocation> all;
  for (;;) {
    try {
      all.push_back(arena.allocate(ByteCount{bytes}));
    } catch (const Error& error) {
      REQUIRE(error.code() == ErrorCode::kArenaFull);
      return all;
    }
  }
}

TEST_CASE("options that mean nothing are refused") {
  const auto refused = [](auto change) {
    ArenaOptions options = small_options();
    change(options);
    return code_of([&] { return Arena::create(options); }) == ErrorCode::kInvalidArgument;
  };
  CHECK(refused([](ArenaOptions& o) { o.capacity = 100; }));
  CHECK(refused([](ArenaOptions& o) { o.capacity = UINT64_MAX; }));
  CHECK(refused([](ArenaOptions& o) { o.segment_bytes = 0; }));
  CHECK(refused([](ArenaOptions& o) { o.segment_bytes = UINT64_MAX; }));
  CHECK(refused([](ArenaOptions& o) { o.ticket_ttl = -1; }));
  CHECK(refused([](ArenaOptions& o) { o.ticket_ttl = std::nan(""); }));
  CHECK(refused([](ArenaOptions& o) { o.reuse_delay = -0.1; }));
  CHECK_FALSE(refused([](ArenaOptions& o) { o.ticket_ttl = std::numeric_limits<double>::infinity(); }));
  CHECK_FALSE(refused([](ArenaOptions& o) { o.reuse_delay = 0; }));
}

TEST_CASE("a new arena has one name and reserves nothing for data") {
  const auto arena = small_arena();
  CHECK(name_exists(arena->name()));
  const ArenaStats stats = arena->stats();
  CHECK(stats.reserved == 0);
  CHECK(stats.segments == 0);
  CHECK(stats.blocks == 0);
  CHECK(stats.capacity == 16 * kMiB);
}

TEST_CASE("blocks do not overlap, lie on their alignment, and are held by their maker") {
  const auto arena = small_arena();
  std::vector<Allocation> all;
  std::map<std::byte*, std::uint64_t> extents;
  for (const std::uint64_t bytes : {0U, 1U, 255U, 256U, 257U, 5000U, 70'000U, 1'000'000U, 3U}) {
    all.push_back(arena->allocate(ByteCount{bytes}));
    const Allocation& made = all.back();
    CHECK(reinterpret_cast<std::uintptr_t>(made.data) % kBlockAlignment == 0);
    CHECK(entry_of(made.hold).state.holds.load() == hold_bit(kOwnerSlot));
    CHECK(arena->attachment()->data(made.hold) == made.data);
    const std::uint64_t size = entry_of(made.hold).place.bytes.load();
    CHECK(size >= bytes);
    extents[made.data] = size;
    fill(made, static_cast<int>(all.size()));
  }
  std::byte* end = nullptr;
  for (const auto& [start, size] : extents) {
    CHECK(start >= end);
    end = start + size;
  }
  for (std::size_t i = 0; i < all.size(); ++i) CHECK(is_filled(all[i].hold, static_cast<int>(i + 1)));
}

TEST_CASE("try_allocate answers nothing where the arena would have to grow") {
  const auto arena = small_arena();
  CHECK_FALSE(arena->try_allocate(ByteCount{1000}).has_value());
  {
    const Allocation made = arena->allocate(ByteCount{1000});
  }
  CHECK(arena->try_allocate(ByteCount{1000}).has_value());
  // The table of blocks grows by a system call, too.
  std::vector<Allocation> all;
  while (auto made = arena->try_allocate(ByteCount{256})) all.push_back(std::move(*made));
  CHECK(all.size() >= 200);
  CHECK(arena->stats().largest_free > 256);
  all.push_back(arena->allocate(ByteCount{256}));
  CHECK(arena->try_allocate(ByteCount{256}).has_value());
}

TEST_CASE("a block that was never sent, or only with reader counts, is used again at once, most recent first") {
  const auto arena = small_arena();
  const auto peer = Attachment::join(id_of(*arena));
  std::byte* first = nullptr;
  std::byte* second = nullptr;
  {
    const Allocation a = arena->allocate(ByteCount{5000});
    const Allocation b = arena->allocate(ByteCount{5000});
    first = a.data;
    second = b.data;
    {
      const Hold loaded = load(*peer, send(a.hold, exactly(1)));
    }
    {
      const Hold loaded = load(*peer, send(b.hold, exactly(1)));
    }
  }
  const Allocation again = arena->allocate(ByteCount{5000});
  CHECK(again.data == second);
  CHECK(value(again.hold.generation()) == 2);
  CHECK(arena->allocate(ByteCount{5000}).data == first);
  CHECK(arena->stats().blocks == 2);
  CHECK(arena->stats().reused == 2);
}

TEST_CASE("tensors of similar size use each other's blocks") {
  const auto arena = small_arena();
  std::byte* data = nullptr;
  {
    data = arena->allocate(ByteCount{1'000'000}).data;
  }
  CHECK(arena->allocate(ByteCount{1'001'000}).data == data);
}

TEST_CASE("rule 2: a block with an outstanding message is not used again") {
  const auto arena = small_arena();
  HandleState state;
  std::byte* data = nullptr;
  {
    const Allocation made = arena->allocate(ByteCount{5000});
    fill(made, 42);
    data = made.data;
    state = send(made.hold, exactly(2));
  }
  for (int i = 0; i < 5; ++i) CHECK(arena->allocate(ByteCount{5000}).data != data);
  const auto peer = Attachment::join(id_of(*arena));
  {
    CHECK(is_filled(load(*peer, state), 42));
  }
  CHECK(arena->allocate(ByteCount{5000}).data != data);
  {
    const Hold last = load(*peer, state);
    CHECK(is_filled(last, 42));
    CHECK(arena->allocate(ByteCount{5000}).data != data);
  }
  const Allocation a = arena->allocate(ByteCount{5000});
  const Allocation b = arena->allocate(ByteCount{5000});
  CHECK((a.data == data || b.data == data));
  CHECK(code_of([&] { return load(*peer, state); }) == ErrorCode::kStaleHandle);
}

TEST_CASE("rule 3: a block with an implicit announcement rests after its last release, for the late loads") {
  const auto arena = small_arena();
  const auto peer = Attachment::join(id_of(*arena));
  BlockEntry* entry = nullptr;
  HandleState state;
  std::byte* data = nullptr;
  {
    const Allocation made = arena->allocate(ByteCount{5000});
    entry = &entry_of(made.hold);
    data = made.data;
    fill(made, 1);
    state = send(made.hold, by_default());
  }
  {
    const Hold first = load(*peer, state);
  }
  // The broadcast was announced as one load and comes again.
  for (int i = 0; i < 3; ++i) {
    CHECK(arena->allocate(ByteCount{5000}).data != data);
    CHECK(is_filled(load(*peer, state), 1));
  }
  age_release(*entry, 1);
  CHECK(is_filled(load(*peer, state), 1));
  // The release of that load counts again.
  CHECK(arena->allocate(ByteCount{5000}).data != data);
  age_release(*entry, 1);
  const Allocation a = arena->allocate(ByteCount{5000});
  const Allocation b = arena->allocate(ByteCount{5000});
  CHECK((a.data == data || b.data == data));
}

TEST_CASE("a new tensor in a block forgets how the old one was announced") {
  ArenaOptions options = small_options();
  options.reuse_delay = 0;
  const auto arena = Arena::create(options);
  const auto peer = Attachment::join(id_of(*arena));
  Allocation made = arena->allocate(ByteCount{5000});
  BlockEntry& entry = entry_of(made.hold);
  (void)load(*peer, send(made.hold, by_default()));
  CHECK(entry.place.flags.load() == kAnnouncedImplicitly);
  made.hold.release();
  made = arena->allocate(ByteCount{5000});
  CHECK(&entry_of(made.hold) == &entry);
  CHECK(entry.place.flags.load() == 0);
}

TEST_CASE("rule 3: a block with unannounced handles is kept while there is other room, and taken under pressure") {
  const auto arena = small_arena();
  const auto peer = Attachment::join(id_of(*arena));
  HandleState state;
  {
    const Allocation made = arena->allocate(ByteCount{kMiB});
    fill(made, 9);
    state = send(made.hold, exactly(0));
    CHECK_FALSE(state.message.has_value());
  }
  // Up to the last free byte.
  std::vector<Allocation> others;
  for (int i = 0; i < 15; ++i) {
    others.push_back(arena->allocate(ByteCount{kMiB}));
    CHECK(is_filled(load(*peer, state), 9));
  }
  CHECK(arena->stats().reserved == arena->stats().capacity);
  {
    const Hold in_use = load(*peer, state);
    CHECK(code_of([&] { return arena->allocate(ByteCount{kMiB}); }) == ErrorCode::kArenaFull);
    CHECK(is_filled(in_use, 9));
  }
  const Allocation taken = arena->allocate(ByteCount{kMiB});
  CHECK(code_of([&] { return load(*peer, state); }) == ErrorCode::kStaleHandle);
}

TEST_CASE("a message without a free cell is unannounced, and its block is kept like one") {
  const auto arena = small_arena();
  HandleState last;
  {
    const Allocation made = arena->allocate(ByteCount{1000});
    for (std::uint32_t i = 0; i < kMessageCells; ++i) CHECK(send(made.hold, exactly(1)).message.has_value());
    last = send(made.hold, exactly(1));
    CHECK_FALSE(last.message.has_value());
    CHECK((entry_of(made.hold).place.flags.load() & kUnannounced) != 0);
  }
  const auto peer = Attachment::join(id_of(*arena));
  CHECK(load(*peer, last).held());
  drop_messages(*arena);
}

TEST_CASE("under pressure idle blocks go in order of age") {
  const auto arena = small_arena();
  std::vector<HandleState> states;
  {
    std::vector<Allocation> all;
    for (int i = 0; i < 16; ++i) {
      all.push_back(arena->allocate(ByteCount{kMiB}));
      states.push_back(send(all.back().hold, exactly(0)));
    }
  }
  const auto peer = Attachment::join(id_of(*arena));
  std::vector<Allocation> later;
  for (std::size_t i = 0; i < 4; ++i) {
    later.push_back(arena->allocate(ByteCount{kMiB}));
    for (std::size_t k = 0; k < states.size(); ++k) {
      CAPTURE(i);
      CAPTURE(k);
      CHECK((code_of([&] { return load(*peer, states[k]); }) == ErrorCode::kStaleHandle) == (k <= i));
    }
  }
}

TEST_CASE("rule 9: a full arena says so with ENOSPC, who holds what and what to do, and works again after a release") {
  const auto arena = small_arena();
  std::vector<Allocation> all = fill_up(*arena, kMiB);
  CHECK(all.size() == 16);
  (void)send(all[0].hold, exactly(1));
  all[0].hold.release();
  const auto peer = Attachment::join(id_of(*arena));
  const Hold held = load(*peer, send(all[1].hold, exactly(1)));
  all[1].hold.release();
  try {
    (void)arena->allocate(ByteCount{kMiB});
    FAIL("allocated");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kArenaFull);
    CHECK(error.system_errno() == ENOSPC);
    const std::string message = error.what();
    CHECK(message.find(arena->name()) != std::string::npos);
    CHECK(message.find("this process 14.0 MiB") != std::string::npos);
    CHECK(message.find("its consumers 1.0 MiB") != std::string::npos);
    CHECK(message.find("1 messages not loaded yet 1.0 MiB") != std::string::npos);
    CHECK(message.find("SHMX_CAPACITY") != std::string::npos);
  }
  all[5].hold.release();
  CHECK(arena->allocate(ByteCount{kMiB}).hold.held());
  drop_messages(*arena);
}

// With a /dev/shm of 8 MiB, in a process of its own.
void in_small_shm(const std::function<void()>& body) {
  Child child([&](Line& line) {
    const bool small = take_own_shm("8m");
    line.say(small ? 1 : 0);
    if (small) body();
  });
  if (child.hear() == 0) MESSAGE("this system gives no /dev/shm of our own: not tested");
  child.join();
}

TEST_CASE("rule 9: an arena that /dev/shm cannot hold is full, not broken, and what it has stays good") {
  in_small_shm([] {
    ArenaOptions options = small_options();
    options.capacity = 64 * kMiB;
    options.segment_bytes = 32 * kMiB;
    const auto arena = Arena::create(options);
    std::vector<Allocation> all;
    const auto allocate = [&](std::uint64_t bytes) {
      return code_of([&] {
        all.push_back(arena->allocate(ByteCount{bytes}));
        fill(all.back(), static_cast<int>(all.size()));
        return 0;
      });
    };
    while (allocate(kMiB / 2) == ErrorCode::kNone) expect(all.size() < 20);
    expect(all.size() > 10);
    expect(allocate(kMiB / 2) == ErrorCode::kArenaFull);
    for (std::size_t i = 0; i < all.size(); ++i) expect(is_filled(all[i].hold, static_cast<int>(i + 1)));
    // One that would need a segment of its own leaves no name when it is refused.
    expect(allocate(40 * kMiB) == ErrorCode::kArenaFull);
    expect(!name_exists(data_name(id_of(*arena), 2)));
    expect(arena->stats().segments == 1);
    all.clear();
    expect(allocate(kMiB / 2) == ErrorCode::kNone);
  });
}

TEST_CASE("rule 9: an arena that cannot even be made leaves nothing") {
  in_small_shm([] {
    const std::string name = control_name(ArenaId{random_id()});
    {
      const UniqueFd fd = create_segment(name);
      size_segment(fd.get(), name, ByteCount{8 * kMiB});
      reserve_segment(fd.get(), name, 0, ByteCount{8 * kMiB - 4096}, Backend::kShm);
      // The reaper takes that for a torn creation: give it a magic.
      const std::uint64_t magic = 1;
      expect(::pwrite(fd.get(), &magic, sizeof magic, 0) == sizeof magic);
    }
    expect(code_of([] { return Arena::create(small_options()); }) == ErrorCode::kArenaFull);
    expect(list_arenas().size() == 1);
    unlink_segment(name);
    expect(Arena::create(small_options()) != nullptr);
  });
}

TEST_CASE("requests beyond the capacity are refused, however large") {
  const auto arena = small_arena();
  for (const std::uint64_t bytes :
       {16 * kMiB + 1, std::uint64_t{1} << 46, std::uint64_t{1} << 63, UINT64_MAX - 1, UINT64_MAX}) {
    CHECK(code_of([&] { return arena->allocate(ByteCount{bytes}); }) == ErrorCode::kArenaFull);
    CHECK(code_of([&] { return arena->try_allocate(ByteCount{bytes}); }) == ErrorCode::kArenaFull);
  }
  CHECK(arena->stats().blocks == 0);
  CHECK(arena->allocate(ByteCount{16 * kMiB}).hold.held());
}

TEST_CASE("free neighbours join, so that a large tensor fits where small ones were") {
  ArenaOptions options = small_options();
  options.capacity = 4 * kMiB;
  const auto arena = Arena::create(options);
  {
    const std::vector<Allocation> small = fill_up(*arena, kMiB / 4);
  }
  const Allocation large = arena->allocate(ByteCount{4 * kMiB});
  fill(large, 3);
  CHECK(arena->stats().segments == 1);
  CHECK(arena->stats().reserved == 4 * kMiB);
  CHECK(arena->stats().blocks == 1);
}

TEST_CASE("a tensor larger than a data segment gets a segment of its own, which later serves small ones") {
  const auto arena = small_arena();
  std::byte* data = nullptr;
  {
    const Allocation large = arena->allocate(ByteCount{6 * kMiB});
    fill(large, 1);
    data = large.data;
    CHECK(arena->stats().segments == 1);
    const Allocation next = arena->allocate(ByteCount{5 * kMiB});
    CHECK(arena->stats().segments == 2);
  }
  const Allocation small = arena->allocate(ByteCount{1000});
  CHECK(small.hold.held());
  CHECK(arena->allocate(ByteCount{6 * kMiB}).hold.held());
  CHECK(arena->stats().segments <= 3);
  CHECK(arena->stats().reserved <= arena->stats().capacity);
  (void)data;
}

TEST_CASE("whole segments make room for a tensor of another shape") {
  const auto arena = small_arena();
  {
    const std::vector<Allocation> small = fill_up(*arena, kMiB);
  }
  CHECK(arena->stats().segments == 4);
  const Allocation large = arena->allocate(ByteCount{10 * kMiB});
  fill(large, 7);
  CHECK(arena->stats().reserved <= arena->stats().capacity);
}

TEST_CASE("the table of blocks grows with the arena") {
  const auto arena = small_arena();
  std::vector<Allocation> all;
  for (int i = 0; i < 1500; ++i) {
    all.push_back(arena->allocate(ByteCount{1000}));
    fill(all.back(), i % 251);
  }
  for (int i = 0; i < 1500; ++i) CHECK(is_filled(all[static_cast<std::size_t>(i)].hold, i % 251));
}

TEST_CASE("rule 1: random tensors of random sizes keep their bytes until they are let go") {
  struct Live {
    Allocation made;
    int byte;
  };
  std::mt19937_64 random(77);
  const auto arena = small_arena();
  std::vector<Live> live;
  std::uint64_t refusals = 0;
  for (int step = 0; step < 4000; ++step) {
    if (random() % 100 < 55) {
      const std::uint64_t bytes = std::uint64_t{1} << (random() % 21);
      try {
        live.push_back({arena->allocate(ByteCount{bytes + random() % bytes}), static_cast<int>(random() % 256)});
        fill(live.back().made, live.back().byte);
      } catch (const Error& error) {
        REQUIRE(error.code() == ErrorCode::kArenaFull);
        ++refusals;
      }
    } else if (!live.empty()) {
      const std::size_t index = random() % live.size();
      REQUIRE(is_filled(live[index].made.hold, live[index].byte));
      std::swap(live[index], live.back());
      live.pop_back();
    }
    if (live.size() > 60 && random() % 50 == 0) live.erase(live.begin(), live.begin() + 40);
    if (random() % 200 == 0) (void)arena->trim();
    if (step % 100 == 0) {
      const ArenaStats stats = arena->stats();
      REQUIRE(stats.reserved <= stats.capacity);
      REQUIRE(stats.held_blocks == live.size());
    }
  }
  CHECK(refusals > 0);
  for (const Live& one : live) CHECK(is_filled(one.made.hold, one.byte));
  live.clear();
  CHECK(arena->trim() > 0);
  CHECK(arena->stats().reserved == 0);
}

TEST_CASE("trim gives wholly idle segments back and leaves the others alone") {
  const auto arena = small_arena();
  std::vector<Allocation> all = fill_up(*arena, kMiB);
  REQUIRE(arena->stats().segments == 4);
  const HandleState outstanding = send(all[5].hold, exactly(1));
  const HandleState late = send(all[0].hold, exactly(0));
  const std::string gone = data_name(id_of(*arena), 1);
  CHECK(name_exists(gone));
  CHECK(arena->trim() == 0);
  for (std::size_t i = 0; i < 8; ++i) all[i].hold.release();
  CHECK(arena->trim() == 4 * kMiB);
  CHECK_FALSE(name_exists(gone));
  CHECK(arena->stats().segments == 3);
  const auto peer = Attachment::join(id_of(*arena));
  CHECK(code_of([&] { return load(*peer, late); }) == ErrorCode::kStaleHandle);
  CHECK(load(*peer, outstanding).held());
  // An identifier is never used twice: a peer could take the new segment for the old one.
  const std::vector<Allocation> again = fill_up(*arena, kMiB);
  CHECK_FALSE(name_exists(gone));
  CHECK(name_exists(data_name(id_of(*arena), 5)));
}

TEST_CASE("an expired message gives its block back under pressure, and the warning comes once") {
  const auto arena = small_arena();
  std::vector<HandleState> states;
  {
    const std::vector<Allocation> all = fill_up(*arena, kMiB);
    for (const Allocation& made : all) states.push_back(send(made.hold, exactly(1)));
  }
  CHECK(code_of([&] { return arena->allocate(ByteCount{kMiB}); }) == ErrorCode::kArenaFull);
  CHECK_FALSE(arena->take_expiry_notice().has_value());
  BlockState& old = arena->attachment()->control().block(states[3].block).state;
  age_messages(old, 299);
  CHECK(code_of([&] { return arena->allocate(ByteCount{kMiB}); }) == ErrorCode::kArenaFull);
  age_messages(old, 2);
  const Allocation made = arena->allocate(ByteCount{kMiB});
  CHECK(made.hold.block() == states[3].block);
  const auto notice = arena->take_expiry_notice();
  REQUIRE(notice);
  CHECK(notice->find("block " + std::to_string(value(states[3].block))) != std::string::npos);
  CHECK_FALSE(arena->take_expiry_notice().has_value());
  CHECK(arena->stats().expired == 1);
  const auto peer = Attachment::join(id_of(*arena));
  CHECK(code_of([&] { return load(*peer, states[3]); }) == ErrorCode::kStaleHandle);
  CHECK(load(*peer, states[4]).held());
  drop_messages(*arena);
}

TEST_CASE("rule 2: without pressure an old message keeps its block") {
  const auto arena = small_arena();
  HandleState state;
  {
    const Allocation made = arena->allocate(ByteCount{5000});
    fill(made, 5);
    state = send(made.hold, exactly(1));
  }
  age_messages(arena->attachment()->control().block(state.block).state, 10'000);
  for (int i = 0; i < 20; ++i) (void)arena->allocate(ByteCount{5000});
  (void)arena->sweep(false);
  const auto peer = Attachment::join(id_of(*arena));
  CHECK(is_filled(load(*peer, state), 5));
}

TEST_CASE("sweep gives up expired messages if asked, and no younger ones") {
  const auto arena = small_arena();
  HandleState old;
  HandleState young;
  {
    const Allocation a = arena->allocate(ByteCount{5000});
    const Allocation b = arena->allocate(ByteCount{5000});
    old = send(a.hold, exactly(1));
    young = send(b.hold, exactly(1));
  }
  age_messages(arena->attachment()->control().block(old.block).state, 301);
  CHECK(arena->sweep(true) == 0);
  CHECK(arena->stats().messages == 1);
  const auto peer = Attachment::join(id_of(*arena));
  CHECK(load(*peer, young).held());
}

TEST_CASE("a key finds its block while that is alive, without a copy") {
  const auto arena = small_arena();
  CHECK_FALSE(arena->find_key("image").has_value());
  std::byte* data = nullptr;
  {
    const Allocation made = arena->allocate(ByteCount{5000});
    fill(made, 8);
    data = made.data;
    arena->note_key("image", made.hold, "a description");
  }
  for (int i = 0; i < 3; ++i) {
    const auto found = arena->find_key("image");
    REQUIRE(found);
    CHECK(arena->attachment()->data(found->hold) == data);
    CHECK(found->description == "a description");
    CHECK(is_filled(found->hold, 8));
    CHECK(arena->allocate(ByteCount{5000}).data != data);
  }
  CHECK_FALSE(arena->find_key("").has_value());
}

TEST_CASE("a key ends with its block, with a revocation, and with the next block of that key") {
  const auto arena = small_arena();
  SUBCASE("its block is needed") {
    {
      arena->note_key("image", arena->allocate(ByteCount{kMiB}).hold, "");
    }
    const std::vector<Allocation> all = fill_up(*arena, kMiB);
    CHECK(all.size() == 16);
    CHECK_FALSE(arena->find_key("image").has_value());
  }
  SUBCASE("trimmed") {
    {
      arena->note_key("image", arena->allocate(ByteCount{kMiB}).hold, "");
    }
    CHECK(arena->trim() > 0);
    CHECK_FALSE(arena->find_key("image").has_value());
  }
  SUBCASE("revoked") {
    const Allocation made = arena->allocate(ByteCount{5000});
    arena->note_key("image", made.hold, "");
    arena->revoke(made.hold);
    CHECK_FALSE(arena->find_key("image").has_value());
  }
  SUBCASE("another block takes it over") {
    const Allocation a = arena->allocate(ByteCount{5000});
    Allocation b = arena->allocate(ByteCount{5000});
    arena->note_key("image", a.hold, "a");
    arena->note_key("image", b.hold, "b");
    CHECK(arena->find_key("image")->hold.block() == b.hold.block());
    CHECK(arena->find_key("image")->description == "b");
    // The old block's end does not take the key along.
    arena->revoke(a.hold);
    CHECK(arena->find_key("image").has_value());
  }
  SUBCASE("a block takes another key") {
    const Allocation made = arena->allocate(ByteCount{5000});
    arena->note_key("image", made.hold, "");
    arena->note_key("picture", made.hold, "");
    CHECK_FALSE(arena->find_key("image").has_value());
    CHECK(arena->find_key("picture").has_value());
    arena->note_key("picture", made.hold, "again");
    CHECK(arena->find_key("picture")->description == "again");
  }
}

TEST_CASE("a keyed block without a free cell is not found: another copy can announce its messages") {
  const auto arena = small_arena();
  const Allocation made = arena->allocate(ByteCount{5000});
  arena->note_key("image", made.hold, "");
  HandleState state;
  for (std::uint32_t i = 0; i < kMessageCells; ++i) state = send(made.hold, exactly(1));
  CHECK_FALSE(arena->find_key("image").has_value());
  const auto peer = Attachment::join(id_of(*arena));
  (void)load(*peer, state);
  CHECK(arena->find_key("image").has_value());
  drop_messages(*arena);
}

TEST_CASE("an address is found in its block as long as this process holds it") {
  const auto arena = small_arena();
  Allocation made = arena->allocate(ByteCount{5000});
  const std::uint64_t size = entry_of(made.hold).place.bytes.load();
  const auto found = arena->locate(made.data + 300);
  REQUIRE(found);
  CHECK(found->offset == 300);
  CHECK(found->block_bytes == size);
  CHECK(found->hold.block() == made.hold.block());
  CHECK(found->hold.generation() == made.hold.generation());
  CHECK(arena->may_contain(made.data + 300));
  CHECK(arena->locate(made.data + size - 1)->offset == size - 1);
  CHECK_FALSE(arena->locate(made.data + size).has_value());
  int elsewhere = 0;
  CHECK_FALSE(arena->may_contain(&elsewhere));
  CHECK_FALSE(arena->locate(&elsewhere).has_value());
  CHECK_FALSE(arena->locate(nullptr).has_value());
  CHECK_FALSE(small_arena()->may_contain(made.data));
}

TEST_CASE("an address of a block that this process has let go is not found") {
  const auto arena = small_arena();
  Allocation made = arena->allocate(ByteCount{5000});
  const HandleState state = send(made.hold, exactly(1));
  made.hold.release();
  CHECK_FALSE(arena->locate(made.data).has_value());
  CHECK(arena->attachment()->uses() == 0);
  CHECK(entry_of(load(*arena->attachment(), state)).state.holds.load() == hold_bit(kOwnerSlot));
}

TEST_CASE("revoke makes every handle stale, and the block is free after the last holder") {
  const auto arena = small_arena();
  const auto peer = Attachment::join(id_of(*arena));
  Allocation made = arena->allocate(ByteCount{5000});
  fill(made, 6);
  const HandleState sent = send(made.hold, exactly(2));
  Hold holder = load(*peer, sent);
  std::byte* const data = made.data;
  arena->revoke(made.hold);
  CHECK(code_of([&] { return load(*peer, sent); }) == ErrorCode::kStaleHandle);
  made.hold.release();
  CHECK(arena->allocate(ByteCount{5000}).data != data);
  CHECK(is_filled(holder, 6));
  holder.release();
  const Allocation a = arena->allocate(ByteCount{5000});
  const Allocation b = arena->allocate(ByteCount{5000});
  CHECK((a.data == data || b.data == data));
}

TEST_CASE("scrub clears a block before its bytes can be seen again") {
  ArenaOptions options = small_options();
  options.scrub = true;
  const auto arena = Arena::create(options);
  std::byte* data = nullptr;
  {
    const Allocation made = arena->allocate(ByteCount{5000});
    CHECK(is_filled(made.hold, 0));
    fill(made, 99);
    data = made.data;
  }
  const Allocation same = arena->allocate(ByteCount{5000});
  CHECK(same.data == data);
  CHECK(is_filled(same.hold, 0));
}

TEST_CASE("rule 6: what a killed peer held comes back when room is needed") {
  const auto arena = small_arena();
  std::vector<HandleState> states;
  {
    const std::vector<Allocation> all = fill_up(*arena, kMiB);
    for (const Allocation& made : all) states.push_back(send(made.hold, exactly(1)));
  }
  Child child([&](Line& line) {
    std::vector<Hold> held;
    for (const HandleState& state : states) {
      held.push_back(load_block(state.arena, state.place, state.block, state.generation, state.message));
    }
    line.say(held.size());
    (void)line.hear();
  });
  CHECK(child.hear() == states.size());
  CHECK(arena->stats().peers == 1);
  CHECK(code_of([&] { return arena->allocate(ByteCount{kMiB}); }) == ErrorCode::kArenaFull);
  child.kill_unreaped();
  const std::vector<Allocation> again = fill_up(*arena, kMiB);
  CHECK(again.size() == states.size());
  CHECK(arena->stats().swept == 1);
}

TEST_CASE("rule 6: sweep tells how many peers were dead") {
  const auto arena = small_arena();
  const Allocation made = arena->allocate(ByteCount{5000});
  const HandleState state = send(made.hold, exactly(2));
  const auto stay = [&](Line& line) {
    const Hold held = load_block(state.arena, state.place, state.block, state.generation, state.message);
    line.say(1);
    (void)line.hear();
  };
  Child first(stay);
  Child second(stay);
  CHECK(first.hear() == 1);
  CHECK(second.hear() == 1);
  CHECK(arena->sweep(false) == 0);
  first.kill_unreaped();
  CHECK(arena->sweep(false) == 1);
  CHECK(arena->sweep(false) == 0);
  CHECK(arena->stats().peers == 2);
  second.kill();
  CHECK(arena->sweep(false) == 1);
}

TEST_CASE("a closed arena gives no more blocks") {
  const auto arena = small_arena();
  const Allocation made = arena->allocate(ByteCount{5000});
  arena->close();
  CHECK(arena->closed());
  for (const ErrorCode code :
       {code_of([&] { return arena->allocate(ByteCount{1}); }),
        code_of([&] { return arena->try_allocate(ByteCount{1}); }), code_of([&] { return arena->trim(); }),
        code_of([&] { return arena->sweep(true); }), code_of([&] { return arena->find_key("x"); })}) {
    CHECK(code == ErrorCode::kReleased);
  }
  arena->close();
}

TEST_CASE("stats count blocks, bytes, holders and messages") {
  const auto arena = small_arena();
  const auto peer = Attachment::join(id_of(*arena));
  Allocation a = arena->allocate(ByteCount{1024});
  Allocation b = arena->allocate(ByteCount{2048});
  {
    const Allocation idle = arena->allocate(ByteCount{4096});
  }
  const Hold held = load(*peer, send(a.hold, exactly(3)));
  (void)send(b.hold, exactly(1));
  b.hold.release();
  const ArenaStats stats = arena->stats();
  CHECK(stats.name == arena->name());
  CHECK(stats.blocks == 3);
  CHECK(stats.held_blocks == 1);
  CHECK(stats.in_blocks == 1024 + 2048);
  CHECK(stats.messages == 2);
  CHECK(stats.peers == 2);
  CHECK(stats.published == 3);
  CHECK(stats.reused == 0);
  CHECK(stats.segments == 1);
  drop_messages(*arena);
}

}  // namespace
}  // namespace shmx
