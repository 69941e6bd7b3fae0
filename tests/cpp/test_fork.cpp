// What a forked child inherits, and what it must leave alone.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "process.hpp"
#include "reaper.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"

namespace shmx {
namespace {

using namespace test;

struct Published {
  std::shared_ptr<Arena> arena = Arena::create(small_options());
  Allocation made = arena->allocate(ByteCount{5000});
  Published() { fill(made, 44); }
  [[nodiscard]] ArenaId id() const { return id_of(*arena); }
  [[nodiscard]] ControlSegment& control() const { return arena->attachment()->control(); }
  [[nodiscard]] BlockState& state() const { return entry_of(made.hold).state; }
  [[nodiscard]] std::uint64_t bits() const { return state().holds.load(); }
};

// Every slot of the arena that is free, taken.
std::vector<PeerLock> take_all_slots(ControlSegment& control) {
  std::vector<PeerLock> locks;
  while (auto seat = PeerLock::take_any(control.file(), Inheritance::kThisProcess)) {
    locks.push_back(std::move(seat->first));
  }
  return locks;
}

TEST_CASE("rule 10: a child has a slot of its own and the parent's holds in it") {
  Published published;
  Child child([&](Line& line) {
    expect(published.made.hold.held());
    expect(published.made.hold.attachment().usable());
    expect(!published.made.hold.attachment().is_owner());
    line.say(value(published.made.hold.attachment().slot()));
    (void)line.hear();
    expect(is_filled(published.made.hold, 44));
    published.made.hold.release();
    line.say(1);
    (void)line.hear();
  });
  const PeerSlot slot{static_cast<std::uint32_t>(child.hear())};
  CHECK(slot != kOwnerSlot);
  CHECK(published.bits() == (hold_bit(kOwnerSlot) | hold_bit(slot)));
  CHECK(is_alive(published.control().file(), slot));
  CHECK(published.control().header().peers[value(slot)].pid.load() == static_cast<std::uint32_t>(child.pid()));

  // Rule 1: the parent lets go, the child reads on.
  const std::byte* const data = published.made.data;
  BlockState& state = published.state();
  published.made.hold.release();
  CHECK(published.arena->allocate(ByteCount{5000}).data != data);
  child.say(1);
  CHECK(child.hear() == 1);
  CHECK(state.holds.load() == 0);
  child.say(1);
  child.join();
  const Allocation a = published.arena->allocate(ByteCount{5000});
  const Allocation b = published.arena->allocate(ByteCount{5000});
  CHECK((a.data == data || b.data == data));
}

TEST_CASE("rule 10: a child keeps its holds after its parent's exit, and removes the orphan in the end") {
  auto [mine, childs] = make_line();
  Child parent([&](Line& line) {
    Published published;
    const pid_t child = ::fork();
    if (child == 0) {
      {
        const Line closed(std::move(mine));
      }
      childs.say(value(published.id()));
      int status = 1;
      try {
        (void)childs.hear();
        expect(is_filled(published.made.hold, 44));
        published.made.hold.release();
        status = 0;
      } catch (const std::exception&) {
        status = 2;
      }
      childs.say(static_cast<std::uint64_t>(status));
      ::_exit(status);
    }
    line.say(static_cast<std::uint64_t>(child));
    (void)line.hear();
    leave_all();
  });
  const auto child = static_cast<pid_t>(parent.hear());
  {
    const Line closed(std::move(childs));
  }
  const ArenaId arena{mine.hear()};
  bool killed = false;
  SUBCASE("an orderly exit") {
    parent.say(1);
    parent.join();
  }
  SUBCASE("SIGKILL") {
    parent.kill();
    killed = true;
  }
  CHECK(name_exists(control_name(arena)));
  mine.say(1);
  CHECK(mine.hear() == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  // A killed owner tells nobody; then it takes a reaper.
  if (killed) (void)reap_all(Expiry::kTimeToLive);
  CHECK_FALSE(name_exists(control_name(arena)));
}

TEST_CASE("rule 6: a killed child's inherited holds come back") {
  Published published;
  Child child([](Line& line) { (void)line.hear(); });
  published.made.hold.release();
  CHECK(published.arena->stats().held_blocks == 1);
  child.kill_unreaped();
  CHECK(published.arena->sweep(false) == 1);
  CHECK(published.arena->stats().held_blocks == 0);
}

TEST_CASE("a child of a child inherits, too, with a slot of its own") {
  Published published;
  Child child([&](Line& line) {
    const PeerSlot mine = published.made.hold.attachment().slot();
    Child grandchild([&](Line& up) {
      const PeerSlot own = published.made.hold.attachment().slot();
      expect(own != mine);
      expect(is_filled(published.made.hold, 44));
      up.say(value(own));
      (void)up.hear();
    });
    line.say(grandchild.hear());
    (void)line.hear();
    published.made.hold.release();
    line.say(1);
    (void)line.hear();
    grandchild.say(1);
    grandchild.join();
  });
  const PeerSlot grandchild{static_cast<std::uint32_t>(child.hear())};
  child.say(1);
  CHECK(child.hear() == 1);
  CHECK(published.bits() == (hold_bit(kOwnerSlot) | hold_bit(grandchild)));
  child.say(1);
  child.join();
  CHECK(published.arena->sweep(false) == 1);
}

TEST_CASE("a child of a process that uses nothing takes no slot, and joins when it needs to") {
  Published published;
  const HandleState state = send(published.made.hold, exactly(1));
  published.made.hold.release();
  Child child([&](Line& line) {
    expect(find_attachment(state.arena) == nullptr);
    expect(!published.arena->attachment()->usable());
    {
      const Hold hold = load_block(state.arena, state.place, state.block, state.generation, state.message);
      expect(is_filled(hold, 44));
      expect(!hold.attachment().is_owner());
    }
    line.say(1);
    (void)line.hear();
    leave_all();
  });
  CHECK(child.hear() == 1);
  CHECK(published.arena->stats().held_blocks == 0);
  child.say(1);
  child.join();
  CHECK(published.arena->allocate(ByteCount{1}).hold.held());
}

TEST_CASE("rule 10: the arena stays the parent's; the child allocates in its own") {
  Published published;
  Child child([&](Line&) {
    expect(published.arena->closed());
    expect(code_of([&] { return published.arena->allocate(ByteCount{1}); }) == ErrorCode::kReleased);
    expect(code_of([&] { return published.arena->trim(); }) == ErrorCode::kReleased);
    const auto own = Arena::create(small_options());
    expect(id_of(*own) != published.id());
    const Allocation made = own->allocate(ByteCount{5000});
    expect(made.hold.held());
    // The address of an inherited view is found in the parent's arena.
    const auto located = published.arena->locate(published.made.data + 8);
    expect(located && located->offset == 8 && located->hold.block() == published.made.hold.block());
    published.arena.reset();
    leave_all();
  });
  child.join();
  CHECK(name_exists(published.arena->name()));
  CHECK(published.arena->allocate(ByteCount{5000}).hold.held());
  // What the child still held has ended with it.
  CHECK(published.arena->sweep(false) == 1);
  CHECK(published.bits() == hold_bit(kOwnerSlot));
}

TEST_CASE("a child announces messages of what it inherited, and others load them") {
  Published published;
  Child child([&](Line& line) { send_to(line, send(published.made.hold, exactly(1))); });
  const HandleState state = decode_handle(child.hear_text());
  child.join();
  published.made.hold.release();
  (void)published.arena->sweep(false);
  CHECK(published.arena->stats().held_blocks == 0);
  const auto peer = Attachment::join(published.id());
  CHECK(is_filled(load(*peer, state), 44));
}

TEST_CASE("a child of a consumer inherits its holds") {
  Published published;
  const HandleState state = send(published.made.hold, exactly(1));
  Child consumer([&](Line& line) {
    published.made.hold.release();
    leave_all();
    Hold hold = load_block(state.arena, state.place, state.block, state.generation, state.message);
    expect(is_filled(hold, 44));
    Child grandchild([&](Line& up) {
      expect(is_filled(hold, 44));
      up.say(1);
      (void)up.hear();
      expect(is_filled(hold, 44));
    });
    expect(grandchild.hear() == 1);
    hold.release();
    leave_all();
    line.say(1);
    (void)line.hear();
    grandchild.say(1);
    grandchild.join();
  });
  CHECK(consumer.hear() == 1);
  published.made.hold.release();
  CHECK(published.arena->stats().held_blocks == 1);
  consumer.say(1);
  consumer.join();
  CHECK(published.arena->sweep(false) == 1);
}

// ---- no free slot

TEST_CASE("rule 10: where no slot is free the child says so, and its memory is absent rather than wrong") {
  Published published;
  const Hold peers_view = published.made.hold.share();
  {
    const std::vector<PeerLock> locks = take_all_slots(published.control());
    Child child([&](Line&) {
      Attachment& attachment = published.made.hold.attachment();
      expect(!attachment.usable());
      expect(code_of([&] {
               attachment.require_usable();
               return 0;
             }) == ErrorCode::kTooManyPeers);
      expect(code_of([&] { return attachment.data(published.made.hold); }) == ErrorCode::kTooManyPeers);
      expect(mapped_segments(published.id()).data == 0);
    });
    child.join();
    CHECK(published.bits() == hold_bit(kOwnerSlot));
    CHECK(is_filled(published.made.hold, 44));
  }
  // The parent's mappings are inherited again as soon as there is a slot.
  Child next([&](Line&) { expect(is_filled(published.made.hold, 44)); });
  next.join();
}

TEST_CASE("rule 10: a child without a slot does not unmap, at the end of a handle, what has come to lie there") {
  Published published;
  const std::vector<PeerLock> locks = take_all_slots(published.control());
  Child child([&](Line&) {
    // The first page that is free where the data segment lies in the parent. A sanitizer's runtime may be there before
    // us: then its pages are what must not go.
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    std::byte* const start = published.made.data - entry_of(published.made.hold).place.offset.load();
    void* place = MAP_FAILED;
    for (std::size_t at = 0; place == MAP_FAILED && at < 4 * kMiB; at += page) {
      place =
          ::mmap(start + at, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    }
    const bool free = place != MAP_FAILED;
    if (free) std::memset(place, 1, page);
    published.made.hold.release();
    published.arena.reset();
    unsigned char resident = 0;
    expect(::mincore(free ? place : start, page, &resident) == 0);
    expect(!free || *static_cast<const std::byte*>(place) == std::byte{1});
  });
  child.join();
}

TEST_CASE("a child without a slot works with other arenas") {
  Published published;
  const std::vector<PeerLock> locks = take_all_slots(published.control());
  Child child([&](Line&) {
    const auto own = Arena::create(small_options());
    const Allocation made = own->allocate(ByteCount{5000});
    fill(made, 1);
    expect(is_filled(made.hold, 1));
    published.made.hold.release();
    leave_all();
  });
  child.join();
}

TEST_CASE("rule 6: a slot that a process was probing when it was killed is free, although a child of it lives") {
  LinePair far = make_line();
  Child prober([&](Line& line) {
    const Published own;  // inherited with its hold, so that the child stays in the arena
    const Child idle([&](Line&) {
      ::prctl(PR_SET_PDEATHSIG, 0);  // this child outlives its parent
      far.second.say(static_cast<std::uint64_t>(::getpid()));
      (void)far.second.hear();
    });
    far.second = Line();
    line.say(value(own.id()));
    (void)line.hear();
    const auto probe = ProbeLock::try_take(own.control().file(), PeerSlot{7});
    expect(probe.has_value());
    line.say(1);
    (void)line.hear();
  });
  far.second = Line();
  auto control = ControlSegment::open(ArenaId{prober.hear()});
  REQUIRE(control);
  const auto idle = static_cast<pid_t>(far.first.hear());
  prober.say(1);
  CHECK(prober.hear() == 1);
  CHECK(is_alive(control->file(), PeerSlot{7}));
  prober.kill();
  CHECK_FALSE(is_alive(control->file(), PeerSlot{7}));
  far.first.say(1);
  CHECK(::waitpid(idle, nullptr, 0) == idle);
  (void)reap_all(Expiry::kNow);
  CHECK_FALSE(name_exists(control->name()));
}

TEST_CASE("a child that uses nothing of an arena keeps none of its memory") {
  Published published;
  published.made.hold.release();
  Child child([&](Line& line) {
    std::ifstream maps("/proc/self/maps");
    const std::string all{std::istreambuf_iterator<char>(maps), {}};
    expect(!all.empty() && all.find(published.arena->name()) == std::string::npos);
    expect(published.control().block_count() == 0);
    expect(code_of([&] { return published.arena->allocate(ByteCount{1}); }) == ErrorCode::kReleased);
    line.say(1);
    (void)line.hear();
    published.arena.reset();
  });
  CHECK(child.hear() == 1);
  CHECK(published.arena->allocate(ByteCount{5000}).hold.held());
  child.say(1);
  child.join();
}

// ---- no handlers

TEST_CASE("rule 10: a process made by a bare clone touches neither holds nor locks nor names") {
  Published published;
  Hold another = published.made.hold.share();
  const HandleState state = send(published.made.hold, exactly(2));
  Child child = Child::without_handlers([&](Line&) {
    expect(!process_joined());
    expect(!published.made.hold.attachment().usable());
    expect(code_of([&] { return published.arena->allocate(ByteCount{1}); }) == ErrorCode::kReleased);
    {
      // Every destructor there is.
      const Hold first = std::move(published.made.hold);
      const Hold second = std::move(another);
      const Handle handle(TensorMeta{Dtype{0}, 0, {1}, {}}, first.share());
    }
    forget_attachment(*published.arena->attachment());
    published.arena.reset();
    leave_all();
  });
  child.join();
  CHECK(name_exists(published.arena->name()));
  CHECK(published.bits() == hold_bit(kOwnerSlot));
  CHECK(is_alive(published.control().file(), kOwnerSlot));
  CHECK(published.arena->stats().messages == 1);
  CHECK(is_filled(another, 44));
  CHECK(load(*published.arena->attachment(), state).held());
  drop_messages(*published.arena);
}

TEST_CASE("a load in a process made by a bare clone is an error, and takes no slot") {
  Published published;
  const HandleState state = send(published.made.hold, exactly(0));
  Child child = Child::without_handlers([&](Line& line) {
    const Handle loaded = Handle::load(state);
    expect(!loaded.available());
    line.say(1);
    (void)line.hear();
  });
  CHECK(child.hear() == 1);
  CHECK_FALSE(is_alive(published.control().file(), PeerSlot{1}));
  CHECK(published.bits() == hold_bit(kOwnerSlot));
  child.say(1);
  child.join();
}

TEST_CASE("a bare clone of a consumer leaves the consumer's slot alone") {
  Published published;
  auto peer = Attachment::join(published.id());
  Hold hold = load(*peer, send(published.made.hold, exactly(1)));
  const PeerSlot slot = peer->slot();
  Child child = Child::without_handlers([&](Line&) {
    hold.release();
    peer.reset();
  });
  child.join();
  CHECK(is_alive(published.control().file(), slot));
  CHECK((published.bits() & hold_bit(slot)) != 0);
  CHECK(is_filled(hold, 44));
}

// ---- forks while other threads are at work

TEST_CASE("children forked while threads allocate, load and release can use what they inherit") {
  Published published;
  const auto arena = published.arena;
  std::vector<std::jthread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&](const std::stop_token& stop) {
      for (std::uint64_t k = 0; !stop.stop_requested(); ++k) {
        const Allocation made = arena->allocate(ByteCount{1000 + k % 7 * 3000});
        const HandleState state = send(made.hold, exactly(1));
        (void)load(*arena->attachment(), state);
        if (k % 64 == 0) (void)arena->trim();
        if (k % 64 == 32) (void)arena->sweep(false);
      }
    });
  }
  for (int round = 0; round < 25; ++round) {
    Child child([&](Line&) {
      // The counts of a block and of all blocks agree, or this process would never find that it uses nothing.
      std::uint64_t uses = 0;
      Attachment& attachment = published.made.hold.attachment();
      for (std::uint32_t i = 0; i < attachment.control().block_count(); ++i) uses += attachment.uses_of(BlockIndex{i});
      expect(uses == attachment.uses());
      expect(is_filled(published.made.hold, 44));
      published.made.hold.release();
      const auto own = Arena::create(small_options());
      expect(own->allocate(ByteCount{5000}).hold.held());
      leave_all();
    });
    child.join();
  }
  threads.clear();
  CHECK(is_filled(published.made.hold, 44));
  (void)arena->sweep(false);
  CHECK(published.bits() == hold_bit(kOwnerSlot));
}

TEST_CASE("rule 7: a child forked while another thread makes an arena does not keep that arena's lock") {
  // The children live as long as this object: what they have inherited lives on with them.
  std::vector<std::unique_ptr<Child>> children;
  std::vector<std::string> names;
  {
    const std::jthread maker([&](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        const auto arena = Arena::create(small_options());
        names.push_back(arena->name());
      }
    });
    for (int i = 0; i < 40; ++i) {
      children.push_back(std::make_unique<Child>([](Line& line) { (void)line.hear(); }));
    }
  }
  // The owner has closed each of them, nothing was outstanding: a name that is left is one whose lock lives on.
  std::size_t left = 0;
  for (const std::string& name : names) left += name_exists(name) ? 1 : 0;
  CHECK(left == 0);
  for (auto& child : children) child->kill();
  (void)reap_all(Expiry::kTimeToLive);
}

}  // namespace
}  // namespace shmx
