// Page-locking: all of a range or nothing of it, each page once, within the budget, undone before it is unmapped; and
// the thread that does it beside everything else. The driver ends the process where a real one would do damage.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fake_driver.hpp"
#include "in_flight.hpp"
#include "process.hpp"
#include "reaper.hpp"
#include "small_arena.hpp"
#include "threads.hpp"

namespace shmx {
namespace {

using namespace test;

constexpr std::uint64_t kGiB = 1ULL << 30;
constexpr int kOutOfMemory = 2;
constexpr std::uint64_t kReadOnlyFlag = 8;

// Addresses without memory: the driver that tests use locks pages without touching them.
class Addresses {
 public:
  explicit Addresses(std::uint64_t bytes)
      : bytes_(bytes), base_(::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    REQUIRE(base_ != MAP_FAILED);
  }
  ~Addresses() { ::munmap(base_, bytes_); }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  [[nodiscard]] std::byte* base() const { return static_cast<std::byte*>(base_); }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

 private:
  std::uint64_t bytes_;
  void* base_;
};

class Pinning : public Devices {
 protected:
  static std::uint64_t quarantined() { return PinLedger::instance().report().quarantined_bytes; }
  static std::uint64_t pinned_bytes() { return PinLedger::instance().report().bytes; }
  std::vector<PinnedChunk> lock(const Addresses& range, std::uint64_t chunk = kMaxChunk,
                                Access access = Access::kReadWrite) {
    return register_range(driver, 0, range.base(), range.bytes(), access, "/shmx-test.1", stuck, chunk);
  }
  bool stuck = false;
  // What an attempt that fails says.
  std::string refusal(const Addresses& range, std::uint64_t chunk = kMaxChunk) {
    try {
      (void)lock(range, chunk);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kDevice);
      return error.what();
    }
    return {};
  }
};

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

bool pin(Attachment& attachment) { return Pinner::pin_now(attachment, DriverKind::kCuda, 0); }
bool pin(const std::shared_ptr<Arena>& arena) { return pin(*arena->attachment()); }

// ---- ranges

TEST_CASE_FIXTURE(Pinning, "a range is registered without a gap, no more than 1 GiB at a time") {
  const Addresses range(2 * kGiB + kGiB / 2 + kPage);
  std::vector<PinnedChunk> chunks = lock(range);
  std::byte* next = range.base();
  for (const Registration& one : gpu.registrations()) {
    CHECK(one.base == next);
    CHECK(one.bytes <= kGiB);
    CHECK((one.flags & kReadOnlyFlag) == 0);
    next += one.bytes;
  }
  CHECK(next == range.base() + range.bytes());
  CHECK(chunks.size() == 3);
  const PinReport report = PinLedger::instance().report();
  CHECK(report.bytes == before.bytes + range.bytes());
  CHECK(report.chunks == before.chunks + 3);
  CHECK(report.registrations == before.registrations + 3);
  CHECK(unregister_chunks(chunks, DriverKind::kCuda, 0));
  CHECK(chunks.empty());
}

TEST_CASE_FIXTURE(Pinning, "what is mapped for reading is registered for reading") {
  const Addresses range(3 * kPage);
  std::vector<PinnedChunk> chunks = lock(range, kMaxChunk, Access::kReadOnly);
  CHECK((gpu.registrations().at(0).flags & kReadOnlyFlag) != 0);
  CHECK(unregister_chunks(chunks, DriverKind::kCuda, 0));
}

TEST_CASE_FIXTURE(Pinning, "whichever registration of a range fails, none is left, and the error names it") {
  const Addresses range(5 * kGiB);
  for (long nth = 0; nth < 5; ++nth) {
    gpu.forget_calls();
    gpu.fail("HostRegister", nth, kOutOfMemory);
    const std::string why = refusal(range);
    CHECK(has(why, "cuMemHostRegister_v2 of /shmx-test.1: OUT_OF_MEMORY (2)"));
    CHECK(has(why, "SHMX_PIN_BYTES"));
    CHECK_FALSE(stuck);
    CHECK(gpu.registrations().empty());
    CHECK(gpu.count("HostRegister") == nth + 1);
    CHECK(gpu.count("HostUnregister") == nth);
    CHECK(pinned_bytes() == before.bytes);
  }
}

TEST_CASE_FIXTURE(Pinning, "what was registered is undone last first") {
  const Addresses range(4 * kPage);
  for (long nth = 0; nth < 3; ++nth) {
    gpu.fail("HostRegister", 3, kOutOfMemory);
    gpu.fail("HostUnregister", nth, 1);
    const std::uint64_t lost = quarantined();
    stuck = false;
    CHECK(has(refusal(range, kPage), "stays so"));
    CHECK(stuck);
    // The one that the nth call was for.
    const std::vector<Registration> left = gpu.registrations();
    REQUIRE(left.size() == 1);
    CHECK(left[0].base == range.base() + (2 - nth) * static_cast<std::ptrdiff_t>(kPage));
    CHECK(quarantined() == lost + kPage);
    CHECK(gpu.unregister_pages(0, left[0].base) == 0);
  }
}

TEST_CASE_FIXTURE(Pinning, "another library's registration is used, and left alone in the end") {
  const Addresses range(4 * kPage);
  REQUIRE(gpu.register_pages(0, range.base(), range.bytes()) == 0);
  std::vector<PinnedChunk> chunks = lock(range);
  REQUIRE(chunks.size() == 1);
  CHECK_FALSE(chunks[0].owned);
  CHECK(PinLedger::instance().report().foreign_bytes == range.bytes());
  CHECK(PinLedger::instance().report().registrations == before.registrations);
  CHECK(unregister_chunks(chunks, DriverKind::kCuda, 0));
  CHECK(gpu.count("HostUnregister") == 0);
  CHECK(PinLedger::instance().report().foreign_bytes == 0);
  CHECK(gpu.unregister_pages(0, range.base()) == 0);
}

TEST_CASE_FIXTURE(Pinning, "a registration of one chunk by another library does not stand in the way of the others") {
  const Addresses range(3 * kPage);
  REQUIRE(gpu.register_pages(0, range.base() + kPage, kPage) == 0);
  std::vector<PinnedChunk> chunks = lock(range, kPage);
  REQUIRE(chunks.size() == 3);
  CHECK((chunks[0].owned && !chunks[1].owned && chunks[2].owned));
  CHECK(unregister_chunks(chunks, DriverKind::kCuda, 0));
  CHECK(gpu.registrations().size() == 1);
  CHECK(gpu.unregister_pages(0, range.base() + kPage) == 0);
}

TEST_CASE_FIXTURE(Pinning, "another library's registration of a part is no use, and nothing is left of the attempt") {
  const Addresses range(4 * kPage);
  std::byte* const part = range.base() + 3 * kPage;
  REQUIRE(gpu.register_pages(0, part, kPage) == 0);
  CHECK(has(refusal(range, 2 * kPage), "712"));
  REQUIRE(gpu.registrations().size() == 1);
  CHECK(gpu.registrations()[0].base == part);
  CHECK(pinned_bytes() == before.bytes);
  CHECK(gpu.unregister_pages(0, part) == 0);
}

TEST_CASE_FIXTURE(Pinning, "what somebody else has unregistered counts as undone") {
  const Addresses range(2 * kPage);
  std::vector<PinnedChunk> chunks = lock(range, kPage);
  REQUIRE(gpu.unregister_pages(0, range.base()) == 0);
  CHECK(unregister_chunks(chunks, DriverKind::kCuda, 0));
  CHECK(quarantined() == before.quarantined_bytes);
}

TEST_CASE_FIXTURE(Pinning, "what cannot be unregistered is told, and the rest is undone") {
  const Addresses range(3 * kPage);
  std::vector<PinnedChunk> chunks = lock(range, kPage);
  gpu.fail("HostUnregister", 1, 1);
  CHECK_FALSE(unregister_chunks(chunks, DriverKind::kCuda, 0));
  CHECK(chunks.empty());
  CHECK(quarantined() == before.quarantined_bytes + kPage);
  CHECK(has(PinLedger::instance().report().reason, "cuMemHostUnregister"));
  REQUIRE(gpu.registrations().size() == 1);
  CHECK(gpu.unregister_pages(0, gpu.registrations()[0].base) == 0);
}

TEST_CASE_FIXTURE(Pinning, "where the device does not answer at all, everything counts as still registered") {
  const Addresses range(3 * kPage);
  std::vector<PinnedChunk> chunks = lock(range, kPage);
  gpu.fail("CtxPushCurrent", 0, 700);
  CHECK_FALSE(unregister_chunks(chunks, DriverKind::kCuda, 0));
  CHECK(quarantined() == before.quarantined_bytes + range.bytes());
  for (const Registration& one : gpu.registrations()) CHECK(gpu.unregister_pages(0, one.base) == 0);
}

// ---- the budget

TEST_CASE("a budget is given once, and again what was given back") {
  PinLedger ledger;
  ledger.set_limit(100);
  CHECK(ledger.take(60) == 60);
  CHECK(ledger.take(60) == 40);
  CHECK(ledger.take(60) == 0);
  ledger.give(50);
  CHECK(ledger.take(60) == 50);
  // A limit that is set below what is taken takes nothing back.
  ledger.set_limit(10);
  CHECK(ledger.take(1) == 0);
  ledger.give(1000);
  CHECK(ledger.take(1000) == 10);
}

TEST_CASE("a reason is told once") {
  PinLedger ledger;
  CHECK(ledger.take_warning().empty());
  CHECK(ledger.note_reason("first"));
  CHECK_FALSE(ledger.note_reason("first"));
  CHECK(ledger.take_warning() == "first");
  CHECK(ledger.take_warning().empty());
  CHECK(ledger.note_reason("second"));
  CHECK(ledger.take_warning() == "second");
  CHECK(ledger.report().reason == "second");
}

TEST_CASE_FIXTURE(Pinning, "no more than the budget is registered, over all arenas") {
  PinLedger::instance().set_limit(3 * kMiB);
  const auto first = Arena::create(small_options());
  const auto second = Arena::create(small_options());
  const Allocation one = first->allocate(ByteCount{2 * kMiB});
  const Allocation two = second->allocate(ByteCount{2 * kMiB});
  CHECK(pin(first));
  CHECK_FALSE(pin(second));
  CHECK(gpu.registered_bytes() == 3 * kMiB);
  CHECK(has(PinLedger::instance().take_warning(), "SHMX_PIN_BYTES"));
  // Of the second arena there is a part, and no copy is told that there is all of it.
  CHECK(second->attachment()->cuts(two.data, kMiB / 2));
  CHECK_FALSE(second->attachment()->cuts(two.data, 2 * kMiB));
  first->attachment()->unpin();
  CHECK(pin(second));
  CHECK(gpu.registered_bytes() == 2 * kMiB);
}

TEST_CASE_FIXTURE(Pinning, "a part of a page that a budget has over is not lost to a larger budget") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  PinLedger::instance().set_limit(kPage + 100);
  CHECK_FALSE(pin(arena));
  CHECK(gpu.registered_bytes() == kPage);
  PinLedger::instance().set_limit(2 * kPage);
  CHECK_FALSE(pin(arena));
  CHECK(gpu.registered_bytes() == 2 * kPage);
}

TEST_CASE_FIXTURE(Pinning, "a registration that fails takes nothing of the budget") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  PinLedger::instance().set_limit(arena->stats().reserved);
  for (int attempt = 0; attempt < 3; ++attempt) {
    gpu.fail("HostRegister", 0, kOutOfMemory);
    CHECK(code_of([&] { return pin(arena); }) == ErrorCode::kDevice);
  }
  CHECK(pin(arena));
}

// ---- arenas

TEST_CASE_FIXTURE(Pinning, "an arena is registered as far as it is reserved, once") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{100'000});
  for (int i = 0; i < 3; ++i) CHECK(pin(arena));
  CHECK(gpu.registered_bytes() == arena->stats().reserved);
  CHECK(arena->stats().reserved < small_options().segment_bytes);
  CHECK(gpu.count("HostRegister") == 1);
}

TEST_CASE_FIXTURE(Pinning, "growth registers what it adds, and copies are told where registrations meet") {
  ArenaOptions options = small_options();
  options.segment_bytes = options.capacity;
  const auto arena = Arena::create(options);
  const Allocation made = arena->allocate(ByteCount{kMiB});
  std::byte* const base = made.data;
  CHECK(pin(arena));
  const Registration first = gpu.registrations().at(0);
  REQUIRE(first.base == base);
  const std::uint64_t large = arena->stats().largest_free + 1;
  const Allocation more = arena->allocate(ByteCount{large});
  Attachment& attachment = *arena->attachment();
  CHECK_FALSE(attachment.cuts(more.data, large));
  const std::uint64_t added = arena->stats().reserved - first.bytes;
  CHECK(attachment.pin(driver, 0, added / kPage / 2 * kPage + kPage));
  // The second part in two chunks, behind the first as it was.
  const std::vector<Registration> all = gpu.registrations();
  REQUIRE(all.size() == 3);
  CHECK(all[0].bytes == first.bytes);
  std::vector<std::uint64_t> expected;
  std::uint64_t offset = 0;
  for (const Registration& one : all) {
    CHECK(one.base == base + offset);
    offset += one.bytes;
    expected.push_back(offset);
  }
  CHECK(offset == arena->stats().reserved);
  expected.pop_back();
  CHECK(attachment.cuts(base, offset).value() == expected);
  // From the middle of the first to just before, and just behind, where the second ends.
  const std::uint64_t start = expected[0] / 2;
  CHECK(attachment.cuts(base + start, expected[1] - start).value() == std::vector{expected[0] - start});
  CHECK(attachment.cuts(base + start, expected[1] - start + 1).value() ==
        std::vector{expected[0] - start, expected[1] - start});
  CHECK(attachment.cuts(base + expected[0], kMiB / 4).value().empty());
  CHECK_FALSE(attachment.cuts(base, offset + 1));
  CHECK_FALSE(attachment.cuts(base - 1, 1));
}

TEST_CASE_FIXTURE(Pinning, "a segment that cannot be registered leaves the others as they are") {
  const auto arena = Arena::create(small_options());
  const Allocation first = arena->allocate(ByteCount{4 * kMiB});
  const Allocation second = arena->allocate(ByteCount{4 * kMiB});
  gpu.fail("HostRegister", 1, kOutOfMemory);
  CHECK(code_of([&] { return pin(arena); }) == ErrorCode::kDevice);
  CHECK(arena->attachment()->cuts(first.data, 4 * kMiB));
  CHECK_FALSE(arena->attachment()->cuts(second.data, 4 * kMiB));
  CHECK(gpu.registered_bytes() == 4 * kMiB);
  CHECK(pin(arena));
  CHECK(gpu.count("HostRegister") == 3);
  CHECK(gpu.registered_bytes() == 8 * kMiB);
}

TEST_CASE_FIXTURE(Pinning, "rule 1: what is trimmed or ends is unregistered before it is unmapped, by owner and peer") {
  auto arena = Arena::create(small_options());
  Allocation made = arena->allocate(ByteCount{100'000});
  const HandleState state = send(made.hold, exactly(2));
  auto peer = Attachment::join(id_of(*arena));
  Hold hold = load(*peer, state);
  CHECK(pin(arena));
  CHECK(pin(*peer));
  CHECK(gpu.registrations().size() == 2);
  SUBCASE("trim") {
    hold.release();
    (void)load(*peer, state);
    made.hold.release();
    CHECK(arena->trim() > 0);
    CHECK(gpu.registrations().size() == 1);
    peer->drop_dead_mappings();
  }
  SUBCASE("a segment in the place of another one") {
    hold.release();
    (void)load(*peer, state);
    made.hold.release();
    CHECK(arena->trim() > 0);
    const Allocation next = arena->allocate(ByteCount{100'000});
    CHECK(pin(*peer));
    CHECK(pin(arena));
    CHECK(gpu.registered_bytes() == 2 * arena->stats().reserved);
    return;
  }
  SUBCASE("a peer that goes") {
    hold.release();
    peer.reset();
    CHECK(gpu.registrations().size() == 1);
    drop_messages(*arena);
    made.hold.release();
    arena.reset();
  }
  SUBCASE("an owner that leaves a holder behind") {
    made.hold.release();
    arena->close();
    arena.reset();
    CHECK(peer->mapped(hold) != nullptr);
    CHECK(pin(*peer));
    (void)load(*peer, state);
    hold.release();
    peer.reset();
  }
  CHECK(gpu.registrations().empty());
  CHECK(mapped_segments(state.arena).data == 0);
}

TEST_CASE_FIXTURE(Pinning, "an arena without names is registered, grows, is trimmed and ends like any other") {
  ArenaOptions options = small_options();
  options.backend = BackendChoice::kMemfd;
  auto arena = Arena::create(options);
  std::optional<Allocation> made = arena->allocate(ByteCount{kMiB});
  fill(*made, 8);
  const HandleState state = send(made->hold, exactly(1));
  auto peer = Attachment::join(state.arena, state.place);
  CHECK(pin(arena));
  CHECK(pin(*peer));
  {
    const Allocation more = arena->allocate(ByteCount{4 * kMiB});
    CHECK(pin(arena));
    CHECK(gpu.registered_bytes() > arena->stats().reserved);
  }
  CHECK(arena->trim() == 4 * kMiB);
  peer->drop_dead_mappings();
  Hold hold = load(*peer, state);
  made.reset();
  arena.reset();
  CHECK(is_filled(hold, 8));
  CHECK(peer->cuts(peer->data(hold), kMiB));
  hold.release();
  peer.reset();
  // Its owner kept it open for the peer, and looks again whenever it joins or makes an arena.
  detach_from_orphans();
  CHECK(gpu.registrations().empty());
}

TEST_CASE_FIXTURE(Pinning, "memory that cannot be unregistered stays mapped") {
  const auto arena = Arena::create(small_options());
  {
    const Allocation made = arena->allocate(ByteCount{100'000});
    CHECK(pin(arena));
  }
  const std::uint64_t bytes = gpu.registered_bytes();
  gpu.fail("HostUnregister", 0, 1);
  CHECK(arena->trim() == bytes);
  CHECK(mapped_segments(id_of(*arena)).deleted == 1);
  CHECK(quarantined() == before.quarantined_bytes + bytes);
  // The arena goes on elsewhere.
  const Allocation next = arena->allocate(ByteCount{100'000});
  const std::vector<Registration> left = gpu.registrations();
  REQUIRE(left.size() == 1);
  CHECK((next.data >= left[0].base + left[0].bytes || next.data + 100'000 <= left[0].base));
  CHECK(pin(arena));
  CHECK(gpu.registered_bytes() == 2 * bytes);
  // The driver ends the process here if it is not.
  CHECK(gpu.unregister_pages(0, left[0].base) == 0);
  ::munmap(left[0].base, small_options().segment_bytes);
}

TEST_CASE_FIXTURE(Pinning, "memory that a failed attempt has left registered stays mapped") {
  const auto arena = Arena::create(small_options());
  std::optional<Allocation> made = arena->allocate(ByteCount{kMiB});
  Attachment& attachment = *arena->attachment();
  gpu.fail("HostRegister", 2, kOutOfMemory);
  gpu.fail("HostUnregister", 0, 1);
  CHECK(code_of([&] { return attachment.pin(driver, 0, kMiB / 4); }) == ErrorCode::kDevice);
  const std::vector<Registration> left = gpu.registrations();
  REQUIRE(left.size() == 1);
  SUBCASE("at once") {}
  SUBCASE("after another attempt") {
    CHECK(attachment.pin(driver, 0, kMiB / 4));
    CHECK(attachment.cuts(made->data, kMiB).value().size() == 3);
  }
  SUBCASE("after another attempt that fails") {
    gpu.fail("HostRegister", 0, kOutOfMemory);
    CHECK(code_of([&] { return attachment.pin(driver, 0, kMiB / 4); }) == ErrorCode::kDevice);
  }
  SUBCASE("after it was unregistered as far as it can be") { attachment.unpin(); }
  made.reset();
  (void)arena->trim();
  CHECK(mapped_segments(id_of(*arena)).deleted == 1);
  CHECK(gpu.registrations().size() == 1);
  CHECK(gpu.unregister_pages(0, left[0].base) == 0);
  ::munmap(left[0].base - kMiB / 4, small_options().segment_bytes);
}

// ---- turns

// Whether another open file description could begin a turn.
bool turn_is_free(const Arena& arena) {
  const UniqueFd fd(::open(("/dev/shm" + arena.name()).c_str(), O_RDWR | O_CLOEXEC));
  REQUIRE(fd.valid());
  struct flock request{};
  request.l_type = F_WRLCK;
  request.l_whence = SEEK_SET;
  request.l_start = kMaxPeers;
  request.l_len = 1;
  REQUIRE(::fcntl(fd.get(), F_OFD_GETLK, &request) == 0);
  return request.l_type == F_UNLCK;
}

TEST_CASE_FIXTURE(Pinning, "while one process registers an arena no other one does") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  CHECK(turn_is_free(*arena));
  gpu.hold_calls("HostRegister");
  {
    const std::jthread registers([&] { CHECK(pin(arena)); });
    REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
    CHECK_FALSE(turn_is_free(*arena));
    gpu.release_calls();
  }
  CHECK(turn_is_free(*arena));
}

TEST_CASE_FIXTURE(Pinning, "a turn lasts until the last thread of the process has had it") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  Attachment& attachment = *arena->attachment();
  gpu.hold_calls("HostRegister");
  {
    const std::jthread registers([&] { CHECK(pin(arena)); });
    REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
    {
      const PinTurn another = attachment.take_pin_turn();
    }
    CHECK_FALSE(turn_is_free(*arena));
    gpu.release_calls();
  }
  CHECK(turn_is_free(*arena));
}

TEST_CASE_FIXTURE(Pinning, "rule 6: a process that is killed in its turn keeps nobody from theirs") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  const ArenaId id = id_of(*arena);
  Child child([&](Line& line) {
    const auto peer = Attachment::join(id);
    const PinTurn turn = peer->take_pin_turn();
    line.say(1);
    (void)line.hear();
  });
  REQUIRE(child.hear() == 1);
  CHECK_FALSE(turn_is_free(*arena));
  child.kill_unreaped();
  CHECK(comes_true([&] { return turn_is_free(*arena); }));
  CHECK(pin(arena));
}

// ---- in the background

TEST_CASE_FIXTURE(Pinning, "what is wanted is registered by a thread, once however often it is wanted") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  Pinner& pinner = Pinner::instance();
  gpu.hold_calls("HostRegister");
  pinner.want(arena->attachment(), DriverKind::kCuda, 0);
  REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
  CHECK(threads_named("shmx-pinner") == 1);
  for (int i = 0; i < 100; ++i) pinner.want(arena->attachment(), DriverKind::kCuda, 0);
  CHECK(pinned_bytes() == before.bytes);
  gpu.release_calls();
  pinner.settle();
  CHECK(gpu.registered_bytes() == arena->stats().reserved);
  CHECK(gpu.count("HostRegister") == 1);
  pinner.stop();
  CHECK(comes_true([] { return threads_named("shmx-pinner") == 0; }));
}

TEST_CASE_FIXTURE(Pinning, "a wish that fails is not tried again by itself, and its reason is told once") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  gpu.fail("HostRegister", 0, kOutOfMemory);
  Pinner& pinner = Pinner::instance();
  pinner.want(arena->attachment(), DriverKind::kCuda, 0);
  pinner.settle();
  CHECK_FALSE(arena->attachment()->may_pin());
  CHECK(has(PinLedger::instance().take_warning(), "OUT_OF_MEMORY"));
  CHECK(PinLedger::instance().take_warning().empty());
  // Who asks for it expressly gets it.
  arena->attachment()->allow_pinning();
  CHECK(pin(arena));
}

TEST_CASE_FIXTURE(Pinning, "an arena that has ended before its turn is not registered") {
  Pinner& pinner = Pinner::instance();
  auto blocker = Arena::create(small_options());
  std::optional<Allocation> made = blocker->allocate(ByteCount{kMiB});
  gpu.hold_calls("HostRegister");
  pinner.want(blocker->attachment(), DriverKind::kCuda, 0);
  REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
  {
    auto ended = Arena::create(small_options());
    (void)ended->allocate(ByteCount{kMiB});
    pinner.want(ended->attachment(), DriverKind::kCuda, 0);
    ended->close();
  }
  gpu.release_calls();
  pinner.settle();
  CHECK(gpu.count("HostRegister") == 1);
  CHECK(PinLedger::instance().take_warning().empty());
}

TEST_CASE_FIXTURE(Pinning, "a wish is not granted any more where it has been refused meanwhile") {
  Pinner& pinner = Pinner::instance();
  const auto blocker = Arena::create(small_options());
  const auto refused = Arena::create(small_options());
  const Allocation one = blocker->allocate(ByteCount{kMiB});
  const Allocation two = refused->allocate(ByteCount{kMiB});
  gpu.hold_calls("HostRegister");
  pinner.want(blocker->attachment(), DriverKind::kCuda, 0);
  REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
  pinner.want(refused->attachment(), DriverKind::kCuda, 0);
  refused->attachment()->refuse_pinning();
  gpu.release_calls();
  pinner.settle();
  CHECK(gpu.count("HostRegister") == 1);
  CHECK_FALSE(refused->attachment()->cuts(two.data, kMiB));
}

TEST_CASE_FIXTURE(Pinning, "a wish that comes while the thread is being ended is granted by the next one") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  Pinner& pinner = Pinner::instance();
  for (int round = 0; round < 100; ++round) {
    gpu.hold_calls("HostRegister");
    pinner.want(arena->attachment(), DriverKind::kCuda, 0);
    REQUIRE(comes_true([&] { return gpu.held_calls() == 1; }));
    const auto other = Arena::create(small_options());
    const Allocation more = other->allocate(ByteCount{kMiB});
    {
      // It waits for the thread, which waits for the driver.
      const std::jthread ends([&] { pinner.stop(); });
      for (int i = 0; i < round; ++i) std::this_thread::yield();
      pinner.want(other->attachment(), DriverKind::kCuda, 0);
      gpu.release_calls();
    }
    pinner.want(other->attachment(), DriverKind::kCuda, 0);
    pinner.settle();
    CHECK(other->attachment()->cuts(more.data, kMiB));
    arena->attachment()->unpin();
  }
}

// ---- threads

TEST_CASE_FIXTURE(Pinning,
                  "rule 1: threads that want, register, trim, ask, copy and poll at once are in no one's way") {
  const int rounds = std::getenv("SHMX_LONG") != nullptr ? 3000 : 150;
  ArenaOptions options = small_options();
  options.segment_bytes = kMiB;
  const auto arena = Arena::create(options);
  const auto peer = Attachment::join(id_of(*arena));
  Pinner& pinner = Pinner::instance();
  InFlight& in_flight = InFlight::instance();
  std::vector<std::jthread> helpers;
  helpers.emplace_back([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      pinner.want(arena->attachment(), DriverKind::kCuda, 0);
      pinner.want(peer, DriverKind::kCuda, 0);
      std::this_thread::yield();
    }
  });
  helpers.emplace_back([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      (void)pin(arena);
      (void)pin(*peer);
      in_flight.poll();
      (void)arena->trim();
      peer->drop_dead_mappings();
      (void)PinLedger::instance().report();
    }
  });
  {
    std::vector<std::jthread> users;
    for (int user = 0; user < 2; ++user) {
      users.emplace_back([&, user] {
        const std::uintptr_t memory = gpu.allocate(user, kMiB / 2);
        for (int round = 0; round < rounds; ++round) {
          const int byte = (2 * round + user) % 251;
          Allocation made = arena->allocate(ByteCount{kMiB / 2});
          fill(made, byte);
          const HandleState state = send(made.hold, exactly(1));
          Hold hold = load(*peer, state);
          std::byte* const data = peer->data(hold);
          made.hold.release();
          std::optional<std::vector<std::uint64_t>> cuts;
          if (!comes_true([&] { return (cuts = peer->cuts(data, kMiB / 2)).has_value(); })) {
            FAIL_CHECK("what is wanted is not registered");
            return;
          }
          std::vector<std::uint64_t> edges = {0};
          edges.insert(edges.end(), cuts->begin(), cuts->end());
          edges.push_back(kMiB / 2);
          for (std::size_t i = 0; i + 1 < edges.size(); ++i) {
            CHECK(gpu.copy_to_device(user, memory + edges[i], data + edges[i], edges[i + 1] - edges[i]) == 0);
          }
          std::vector<Hold> holds;
          holds.push_back(std::move(hold));
          in_flight.depart(holds, driver, user, nullptr);
          const std::vector<std::byte> arrived = gpu.read(user, memory, kMiB / 2);
          CHECK(std::all_of(arrived.begin(), arrived.end(), [&](std::byte b) { return b == std::byte(byte); }));
        }
        gpu.free(user, memory);
      });
    }
  }
  helpers.clear();
  CHECK(gpu.count("late copies") >= 2 * rounds);
  CHECK(in_flight.drain(std::chrono::minutes(1)));
  pinner.stop();
}

// ---- forks

TEST_CASE_FIXTURE(Pinning,
                  "rule 10: a child calls no driver for what it inherits, and counts nothing of it as its own") {
  const auto arena = Arena::create(small_options());
  Allocation made = arena->allocate(ByteCount{kMiB});
  fill(made, 5);
  CHECK(pin(arena));
  PinLedger::instance().set_limit(kMiB + kPage);
  const PinReport parents = PinLedger::instance().report();
  Child child([&](Line&) {
    PinLedger& ledger = PinLedger::instance();
    expect(is_filled(made.hold, 5));
    expect(!arena->attachment()->cuts(made.data, kMiB));
    expect(ledger.report().bytes == 0);
    expect(ledger.report().chunks == 0);
    expect(ledger.report().backend == "none");
    expect(ledger.take_warning().empty());
    // The limit is that of the program, what counts against it is not inherited.
    expect(ledger.take(2 * kMiB) == kMiB + kPage);
    expect(code_of([&] { return pin(arena); }) == ErrorCode::kDevice);
    made.hold.release();
    arena->attachment()->unpin();
    leave_all();
    expect(ledger.report().quarantined_bytes == 0);
    expect(gpu.count("after fork") == 0);
  });
  child.join();
  CHECK(PinLedger::instance().report().bytes == parents.bytes);
  CHECK(gpu.registered_bytes() == arena->stats().reserved);
}

TEST_CASE_FIXTURE(Pinning, "rule 10: a child that was forked while threads register is in nobody's way") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{kMiB});
  fill(made, 6);
  std::vector<std::jthread> threads;
  threads.emplace_back([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      (void)pin(arena);
      arena->attachment()->unpin();
    }
  });
  // Memberships that end here are not in the registry, which a fork goes by.
  threads.emplace_back([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      const auto peer = Attachment::join(id_of(*arena));
      (void)pin(*peer);
    }
  });
  threads.emplace_back([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      PinLedger::instance().note_reason("this");
      PinLedger::instance().note_reason("that");
      (void)PinLedger::instance().take_warning();
    }
  });
  for (int round = 0; round < 30; ++round) {
    Child child([&](Line&) {
      expect(is_filled(made.hold, 6));
      expect(PinLedger::instance().report().bytes == 0);
      arena->attachment()->unpin();
      leave_all();
      expect(gpu.count("after fork") == 0);
    });
    child.join();
  }
  threads.clear();
  (void)arena->sweep(false);
}

TEST_CASE("in a process without a driver whose thread waits for wishes at a fork" * doctest::skip()) {
  Pinner& pinner = Pinner::instance();
  const auto ask = [&pinner] {
    const auto arena = Arena::create(small_options());
    const Allocation made = arena->allocate(ByteCount{kMiB});
    pinner.want(arena->attachment(), DriverKind::kCuda, 0);
    pinner.settle();
    return !arena->attachment()->may_pin();
  };
  CHECK(ask());
  CHECK(ask());
  Child child([&](Line&) {
    expect(threads_named("shmx-pinner") == 0);
    for (int i = 0; i < 3; ++i) expect(ask());
    pinner.stop();
    leave_all();
  });
  child.join();
  pinner.stop();
}

TEST_CASE("a child has a thread of its own for its own wishes") {
  CHECK(run_test_case("in a process without a driver whose thread waits for wishes at a fork",
                      {{"SHMX_CUDA_DRIVER", "/nowhere/libcuda.so.1"},
                       // A thread after a fork is what this is about.
                       {"TSAN_OPTIONS", "detect_deadlocks=0:die_after_fork=0"}}) == 0);
}

}  // namespace
}  // namespace shmx
