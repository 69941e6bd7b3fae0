// Arenas without a name: sealed, opened through the process that has them open, gone with the last one that uses them.
#include <dirent.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <vector>

#include "peer_lock.hpp"
#include "process.hpp"
#include "reaper.hpp"
#include "shm_names.hpp"
#include "small_arena.hpp"
#include "survey.hpp"

namespace shmx {
namespace {

using namespace test;

ArenaOptions nameless_options() {
  ArenaOptions options = small_options();
  options.backend = BackendChoice::kMemfd;
  return options;
}

struct Nameless {
  std::string name = control_name(ArenaId{random_id()});
  UniqueFd fd = create_nameless_segment(name);
  [[nodiscard]] DescriptorPlace place() const { return place_of(fd.get()); }
};

std::uint64_t kernel_bytes(int fd) {
  struct stat facts{};
  REQUIRE(::fstat(fd, &facts) == 0);
  return static_cast<std::uint64_t>(facts.st_blocks) * 512;
}

// Whether a process, by its number or "self", has any of the arena open or mapped.
bool refers_to(const std::string& process, const std::string& name) {
  const std::string mark = "/memfd:" + name.substr(1) + " (deleted)";
  std::ifstream maps("/proc/" + process + "/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.ends_with(mark)) return true;
  }
  const std::string folder = "/proc/" + process + "/fd";
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(folder.c_str()), &::closedir);
  while (const dirent* entry = directory ? ::readdir(directory.get()) : nullptr) {
    char target[256];
    const ssize_t length = ::readlink((folder + "/" + entry->d_name).c_str(), target, sizeof target);
    if (length > 0 && std::string(target, static_cast<std::size_t>(length)) == mark) return true;
  }
  return false;
}

bool anybody_refers_to(const std::string& name) {
  const std::unique_ptr<DIR, int (*)(DIR*)> processes(::opendir("/proc"), &::closedir);
  while (const dirent* entry = ::readdir(processes.get())) {
    if (entry->d_name[0] >= '0' && entry->d_name[0] <= '9' && refers_to(entry->d_name, name)) return true;
  }
  return false;
}

TEST_CASE("a file without a name is private to its user, closed at exec, and grows but never shrinks") {
  const Nameless file;
  struct stat facts{};
  REQUIRE(::fstat(file.fd.get(), &facts) == 0);
  CHECK((facts.st_mode & 0777) == 0600);
  CHECK(facts.st_nlink == 0);
  CHECK((::fcntl(file.fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
  size_segment(file.fd.get(), file.name, ByteCount{65536});
  size_segment(file.fd.get(), file.name, ByteCount{2 * 65536});
  CHECK(::ftruncate(file.fd.get(), 65536) != 0);
  CHECK(errno == EPERM);
  CHECK(::fcntl(file.fd.get(), F_ADD_SEALS, F_SEAL_GROW) != 0);
  CHECK(errno == EPERM);
}

TEST_CASE("it is opened where it is open, and nothing else is") {
  const Nameless file;
  const auto again = open_nameless_segment(file.name, file.place());
  REQUIRE(again.has_value());
  CHECK(file_facts(again->get(), file.name).identity == file_facts(file.fd.get(), file.name).identity);
  CHECK((::fcntl(again->get(), F_GETFD) & FD_CLOEXEC) != 0);
  const Nameless other;
  CHECK_FALSE(open_nameless_segment(other.name, file.place()).has_value());
  CHECK_FALSE(open_nameless_segment(file.name, {file.place().pid, 0}).has_value());
  CHECK_FALSE(open_nameless_segment(file.name, {file.place().pid, 1U << 30}).has_value());
  int pipes[2];
  REQUIRE(::pipe2(pipes, O_CLOEXEC) == 0);
  const UniqueFd reader(pipes[0]);
  const UniqueFd writer(pipes[1]);
  CHECK_FALSE(open_nameless_segment(file.name, place_of(reader.get())).has_value());
}

TEST_CASE("a file of that mark with something behind it is another arena's") {
  const std::string name = control_name(ArenaId{random_id()});
  const UniqueFd fd(::memfd_create((name.substr(1) + ".1").c_str(), MFD_CLOEXEC));
  CHECK_FALSE(open_nameless_segment(name, place_of(fd.get())).has_value());
}

TEST_CASE("rule 9: a reservation that the machine cannot hold is an error before any byte is taken") {
  const Nameless file;
  const std::uint64_t too_much = available_memory() + (std::uint64_t{1} << 40);
  size_segment(file.fd.get(), file.name, ByteCount{too_much});
  CHECK(code_of([&] {
          reserve_segment(file.fd.get(), file.name, 0, ByteCount{too_much}, Backend::kMemfd);
          return 0;
        }) == ErrorCode::kArenaFull);
  CHECK(kernel_bytes(file.fd.get()) == 0);
  reserve_segment(file.fd.get(), file.name, 65536, ByteCount{65536}, Backend::kMemfd);
  CHECK(kernel_bytes(file.fd.get()) == 65536);
}

TEST_CASE("a peer's descriptor that was closed under it is opened again where the owner has it") {
  Nameless file;
  SegmentFile peer(file.name, std::move(*open_nameless_segment(file.name, file.place())), file.place());
  const int number = peer.fd();
  const UniqueFd stranger(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  REQUIRE(::dup3(stranger.get(), number, O_CLOEXEC) == number);
  CHECK(peer.fd() != number);
  CHECK(file_facts(peer.fd(), file.name).identity == file_facts(file.fd.get(), file.name).identity);
  ::close(number);
}

TEST_CASE("the owner's descriptor has no substitute, and the error says so") {
  Nameless file;
  const DescriptorPlace place = file.place();
  SegmentFile owner(file.name, std::move(file.fd), place);
  const int number = owner.fd();
  const UniqueFd stranger(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  REQUIRE(::dup3(stranger.get(), number, O_CLOEXEC) == number);
  try {
    (void)owner.fd();
    FAIL("opened");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kSegmentLost);
    CHECK(std::string(error.what()).find("SHMX_BACKEND=shm") != std::string::npos);
  }
  ::close(number);
}

TEST_CASE("an arena has no name, one descriptor, and its handles say where") {
  const auto arena = Arena::create(nameless_options());
  CHECK(arena->backend() == Backend::kMemfd);
  CHECK_FALSE(name_exists(arena->name()));
  const Allocation first = arena->allocate(ByteCount{3 * kMiB});
  const Allocation second = arena->allocate(ByteCount{3 * kMiB});
  CHECK(entry_of(first.hold).place.segment_slot != entry_of(second.hold).place.segment_slot);
  const Handle handle(TensorMeta{Dtype{0}, 0, {16}, {}}, first.hold.share());
  std::optional<SentMessage> sent;
  const HandleState state = decode_handle(handle.to_bytes({0, true}, sent));
  CHECK(state.place == arena->attachment()->control().place());
  CHECK(state.place.pid == static_cast<std::uint32_t>(::getpid()));
  CHECK(state.host == process_space_id());
}

TEST_CASE("a handle of an arena with names has no place") {
  const auto arena = Arena::create(small_options());
  const Allocation made = arena->allocate(ByteCount{100});
  const HandleState state = send(made.hold, exactly(1));
  CHECK(state.place.none());
  CHECK(state.host == host_id());
  drop_messages(*arena);
}

TEST_CASE("a peer slot is a kernel lock here too") {
  const auto arena = Arena::create(nameless_options());
  SegmentFile& control = arena->attachment()->control().file();
  CHECK(is_alive(control, kOwnerSlot));
  auto seat = PeerLock::take_any(control, Inheritance::kThisProcess);
  REQUIRE(seat.has_value());
  CHECK(is_alive(control, seat->second));
  CHECK_FALSE(PeerLock::try_take(control, seat->second, Inheritance::kThisProcess).has_value());
  seat->first.release();
  CHECK_FALSE(is_alive(control, seat->second));
}

TEST_CASE("rule 1: a peer that is attached reads on when the owner has been killed, also what it had not mapped") {
  Child owner([](Line& line) {
    const auto arena = Arena::create(nameless_options());
    std::vector<Allocation> made;
    for (int i = 0; i < 3; ++i) {
      made.push_back(arena->allocate(ByteCount{3 * kMiB}));
      fill(made.back(), 30 + i);
      send_to(line, send(made.back().hold, exactly(1)));
    }
    (void)line.hear();
  });
  HandleState states[3];
  for (HandleState& state : states) state = receive_from(owner.line());
  const std::string name = control_name(states[0].arena);
  {
    // Joined by one load; the other two segments are still to be mapped.
    Hold first = load_block(states[0].arena, states[0].place, states[0].block, states[0].generation, states[0].message);
    CHECK(is_filled(first, 30));
    CHECK(find_attachment(states[1].arena) != nullptr);
    owner.kill();
    CHECK(is_filled(first, 30));
    // Without a use it would leave an orphan that has a name, to come back when it needs to.
    first.release();
    detach_from_orphans();
    for (int i = 1; i < 3; ++i) {
      const Hold hold =
          load_block(states[i].arena, states[i].place, states[i].block, states[i].generation, states[i].message);
      CHECK(is_filled(hold, 30 + i));
    }
    CHECK_FALSE(find_attachment(states[1].arena) == nullptr);
  }
  CHECK_FALSE(name_exists(name));
  detach_from_orphans();
  CHECK(find_attachment(states[0].arena) == nullptr);
  CHECK_FALSE(anybody_refers_to(name));
}

TEST_CASE("whoever comes after the owner's end is told that, and the remedy") {
  Child owner([](Line& line) {
    const auto arena = Arena::create(nameless_options());
    const Allocation made = arena->allocate(ByteCount{100});
    send_to(line, send(made.hold, exactly(1)));
    (void)line.hear();
  });
  const HandleState state = receive_from(owner.line());
  owner.kill();
  const Handle lost = Handle::load(state);
  REQUIRE(lost.failure().has_value());
  CHECK(lost.failure()->code() == ErrorCode::kSegmentLost);
  const std::string what = lost.failure()->what();
  for (const char* part : {"while the owner lives", "shmx.attach", "SHMX_BACKEND=shm"}) {
    CAPTURE(part);
    CHECK(what.find(part) != std::string::npos);
  }
  CHECK_FALSE(anybody_refers_to(control_name(state.arena)));
}

TEST_CASE("rule 7: nothing is left when all have been killed") {
  Child owner([](Line& line) {
    const auto arena = Arena::create(nameless_options());
    const Allocation made = arena->allocate(ByteCount{kMiB});
    send_to(line, send(made.hold, exactly(2)));
    (void)line.hear();
  });
  const HandleState state = receive_from(owner.line());
  Child peer([&](Line& line) {
    const Hold hold = load_block(state.arena, state.place, state.block, state.generation, state.message);
    line.say(1);
    (void)line.hear();
  });
  (void)peer.hear();
  const std::string name = control_name(state.arena);
  CHECK(anybody_refers_to(name));
  owner.kill();
  CHECK(anybody_refers_to(name));
  peer.kill();
  CHECK_FALSE(anybody_refers_to(name));
}

TEST_CASE("rule 2: a message of an arena that was closed is loaded while its process lives, and then it goes") {
  auto arena = Arena::create(nameless_options());
  const ArenaId id = id_of(*arena);
  const std::string name = arena->name();
  HandleState state;
  {
    const Allocation made = arena->allocate(ByteCount{100});
    fill(made, 9);
    state = send(made.hold, exactly(1));
  }
  arena->close();
  arena.reset();
  Child peer([&](Line& line) {
    const Hold hold = load_block(state.arena, state.place, state.block, state.generation, state.message);
    expect(is_filled(hold, 9));
    line.say(1);
    (void)line.hear();
  });
  (void)peer.hear();
  detach_from_orphans();
  CHECK(find_attachment(id) != nullptr);
  peer.say(0);
  peer.join();
  detach_from_orphans();
  CHECK(find_attachment(id) == nullptr);
  CHECK_FALSE(anybody_refers_to(name));
}

TEST_CASE("a message that nobody loads keeps a closed arena for its time-to-live only") {
  auto arena = Arena::create(nameless_options());
  const ArenaId id = id_of(*arena);
  HandleState state;
  {
    const Allocation made = arena->allocate(ByteCount{100});
    state = send(made.hold, exactly(1));
  }
  const auto attachment = arena->attachment();
  arena->close();
  detach_from_orphans();
  REQUIRE(find_attachment(id) != nullptr);
  age_messages(attachment->control().block(state.block).state, 301);
  detach_from_orphans();
  CHECK(find_attachment(id) == nullptr);
}

TEST_CASE("trim gives memory back at once, and a later segment never lies where one has been") {
  const auto arena = Arena::create(nameless_options());
  const int fd = arena->attachment()->control().file().fd();
  const std::uint64_t before = kernel_bytes(fd);
  auto made = std::make_optional(arena->allocate(ByteCount{3 * kMiB}));
  const std::uint16_t slot = entry_of(made->hold).place.segment_slot;
  ControlHeader& header = arena->attachment()->control().header();
  const std::uint64_t offset = header.file_offsets[slot];
  CHECK(offset >= kControlBytes);
  CHECK(kernel_bytes(fd) >= before + 3 * kMiB);
  made.reset();
  CHECK(arena->trim() >= 3 * kMiB);
  // The block table has grown by a step.
  CHECK(kernel_bytes(fd) < before + kMiB);
  made.emplace(arena->allocate(ByteCount{3 * kMiB}));
  CHECK(header.file_offsets[entry_of(made->hold).place.segment_slot] > offset);
  fill(*made, 5);
  CHECK(is_filled(made->hold, 5));
}

TEST_CASE("a damaged place of a segment is refused") {
  const auto arena = Arena::create(nameless_options());
  const Allocation made = arena->allocate(ByteCount{100});
  ControlHeader& header = arena->attachment()->control().header();
  std::atomic<std::uint64_t>& offset = header.file_offsets[entry_of(made.hold).place.segment_slot];
  const std::uint64_t right = offset;
  const DescriptorPlace place = arena->attachment()->control().place();
  for (const std::uint64_t wrong : {std::uint64_t{0}, kControlBytes, right + 1, UINT64_MAX, std::uint64_t{1} << 62}) {
    CAPTURE(wrong);
    offset = wrong;
    const auto peer = Attachment::join(id_of(*arena), place);
    const auto hold = peer->try_hold(made.hold.block(), made.hold.generation());
    REQUIRE(hold.has_value());
    const ErrorCode code = code_of([&] { return peer->data(*hold); });
    CHECK((code == ErrorCode::kInvalidHandle || code == ErrorCode::kSegmentLost));
  }
  offset = right;
}

TEST_CASE("rule 10: a forked child reads on when its parent, the owner, has gone, and shares no description with it") {
  Child parent([](Line& line) {
    const auto arena = Arena::create(nameless_options());
    const Allocation made = arena->allocate(ByteCount{kMiB});
    fill(made, 77);
    SegmentFile& control = arena->attachment()->control().file();
    const int inherited = control.fd();
    auto lines = make_line();
    const pid_t pid = ::fork();
    if (pid == 0) {
      bool good = made.hold.attachment().usable() && !made.hold.attachment().is_owner();
      good = good && control.fd() != -1 && is_filled(made.hold, 77);
      // The number that the child has inherited leads nowhere, or to the description that it has made for itself.
      good = good && (::fcntl(inherited, F_GETFD) == -1 || control.fd() == inherited);
      lines.first = Line();
      lines.second.say(good ? 1 : 2);
      lines.second.hear_end();
      // The kernel lets go of the lock a moment after it has hung up the line.
      while (is_alive(control, kOwnerSlot)) ::sched_yield();
      line.say(is_filled(made.hold, 77) ? 3 : 4);
      ::_exit(0);
    }
    line.say(lines.first.hear());
    line.say(static_cast<std::uint64_t>(pid));
    (void)line.hear();
  });
  CHECK(parent.hear() == 1);
  const auto orphan = static_cast<pid_t>(parent.hear());
  parent.kill();
  CHECK(parent.line().hear() == 3);
  CHECK(::waitpid(orphan, nullptr, 0) == orphan);
}

TEST_CASE("a fork without a use leaves the child nothing of the arena's descriptors") {
  const auto arena = Arena::create(nameless_options());
  (void)arena->allocate(ByteCount{100});
  const std::string name = arena->name();
  Child child([&](Line& line) {
    const std::string mark = "/memfd:" + name.substr(1) + " (deleted)";
    bool found = false;
    for (int fd = 0; fd < 256; ++fd) {
      char target[256];
      const std::string path = "/proc/self/fd/" + std::to_string(fd);
      const ssize_t length = ::readlink(path.c_str(), target, sizeof target);
      found = found || (length > 0 && std::string(target, static_cast<std::size_t>(length)) == mark);
    }
    line.say(found ? 2 : 1);
  });
  CHECK(child.hear() == 1);
  child.join();
}

TEST_CASE("it is surveyed through any process that has it open, and is no matter for the reaper") {
  Child owner([](Line& line) {
    const auto arena = Arena::create(nameless_options());
    const Allocation made = arena->allocate(ByteCount{kMiB});
    send_to(line, send(made.hold, exactly(1)));
    (void)line.hear();
  });
  const HandleState state = receive_from(owner.line());
  const auto seen = [&]() -> std::optional<ArenaSurvey> {
    for (ArenaSurvey& one : survey()) {
      if (one.name == control_name(state.arena)) return std::move(one);
    }
    return std::nullopt;
  };
  auto found = seen();
  REQUIRE(found.has_value());
  CHECK(found->backend == Backend::kMemfd);
  CHECK(found->state == ArenaState::kAlive);
  CHECK(found->owner_pid == static_cast<std::uint32_t>(owner.pid()));
  CHECK(found->memory_bytes >= kMiB);
  CHECK(found->messages == 1);
  CHECK_FALSE(found->attached);
  for (const ReapReport& report : reap_all(Expiry::kNow)) CHECK(report.name != found->name);
  {
    const auto peer = Attachment::join(state.arena, state.place);
    owner.kill();
    found = seen();
    REQUIRE(found.has_value());
    CHECK(found->state == ArenaState::kOrphan);
    for (const ReapReport& report : reap_all(Expiry::kNow)) CHECK(report.name != found->name);
  }
  CHECK_FALSE(seen().has_value());
}

TEST_CASE("auto takes names while /dev/shm can hold the capacity") {
  ArenaOptions options = small_options();
  options.backend = BackendChoice::kAuto;
  CHECK(Arena::create(options)->backend() == Backend::kShm);
  options.capacity = shm_filesystem_room() + kMiB;
  const auto large = Arena::create(options);
  CHECK(large->backend() == Backend::kMemfd);
  CHECK(large->options().capacity > shm_filesystem_room());
}

TEST_CASE("the default capacity without names goes by memory") {
  ArenaOptions options;
  options.backend = BackendChoice::kMemfd;
  const std::uint64_t before = available_memory();
  const auto arena = Arena::create(options);
  CHECK(arena->options().capacity <= std::uint64_t{64} << 30);
  CHECK(arena->options().capacity > kMiB);
  // Others take and give memory meanwhile.
  CHECK(arena->options().capacity <= before);
}

}  // namespace
}  // namespace shmx
