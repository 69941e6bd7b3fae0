// Names, descriptors and mappings of segments.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "child_process.hpp"
#include "error.hpp"
#include "host.hpp"
#include "segment.hpp"
#include "shm_names.hpp"

namespace shmx {
namespace {

// A segment that is gone at the end of the test.
struct Scratch {
  ArenaId arena{random_id()};
  std::string name = control_name(arena);
  UniqueFd fd = create_segment(name);
  ~Scratch() { unlink_segment(name); }
};

ErrorCode code_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::kNone;
}

TEST_CASE("names are written and read in one form only") {
  const ArenaId arena{0x00ab'cdef'0123'4567};
  CHECK(control_name(arena) == "/shmx-00abcdef01234567");
  CHECK(data_name(arena, 12) == "/shmx-00abcdef01234567.12");
  CHECK(arena_of_name("shmx-00abcdef01234567") == arena);
  CHECK(arena_of_name("shmx-00abcdef01234567.12") == arena);
  for (const char* other :
       {"", "shmx-", "shmx-00abcdef0123456", "shmx-00abcdef0123456g", "shmx-00abcdef012345678", "shmx-+0abcdef01234567",
        "shmx--0abcdef01234567", "shmx-0x0bcdef01234567", "shmx-00abcdef01234567.x", "shmx-00abcdef01234567.1x",
        "shmx-00abcdef01234567-1", "shmy-00abcdef01234567", "Shmx-00abcdef01234567", "/shmx-00abcdef01234567",
        "shmx-00ABCDEF01234567", "shmx-00abcdef01234567.", "shmx-00abcdef01234567.01", "shmx-00abcdef01234567.1.1",
        "shmx-00abcdef01234567.4294967296"}) {
    CAPTURE(other);
    CHECK_FALSE(arena_of_name(other).has_value());
  }
}

TEST_CASE("every arena's name is found, with its data segments") {
  const Scratch scratch;
  const std::string data = data_name(scratch.arena, 3);
  const UniqueFd fd = create_segment(data);
  const auto mine = [&] {
    for (NamedSegments& segments : list_arenas()) {
      if (segments.arena == scratch.arena) return segments;
    }
    return NamedSegments{ArenaId{0}, false, {}};
  };
  CHECK(mine().has_control);
  CHECK(mine().data == std::vector<std::string>{data});
  CHECK(unlink_segment(data));
  CHECK_FALSE(unlink_segment(data));
  CHECK(mine().data.empty());
}

TEST_CASE("a segment is private to its user, new, and closed at exec") {
  const Scratch scratch;
  struct stat facts{};
  REQUIRE(::fstat(scratch.fd.get(), &facts) == 0);
  CHECK((facts.st_mode & 0777) == 0600);
  CHECK((::fcntl(scratch.fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
  try {
    (void)create_segment(scratch.name);
    FAIL("created twice");
  } catch (const Error& error) {
    CHECK(error.system_errno() == EEXIST);
    CHECK(std::string(error.what()).find(scratch.name) != std::string::npos);
  }
}

TEST_CASE("opening a name that is not there is no error") {
  CHECK_FALSE(open_segment(control_name(ArenaId{random_id()})).has_value());
}

TEST_CASE("rule 9: a reservation that /dev/shm cannot hold is an error at once") {
  const Scratch scratch;
  const std::uint64_t too_much = shm_filesystem_bytes() * 2 + (std::uint64_t{1} << 40);
  size_segment(scratch.fd.get(), scratch.name, ByteCount{too_much});
  try {
    reserve_segment(scratch.fd.get(), scratch.name, 0, ByteCount{too_much}, Backend::kShm);
    FAIL("reserved");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kArenaFull);
    CHECK(error.system_errno() == ENOSPC);
  }
  struct stat facts{};
  REQUIRE(::fstat(scratch.fd.get(), &facts) == 0);
  CHECK(facts.st_blocks == 0);
  reserve_segment(scratch.fd.get(), scratch.name, 65536, ByteCount{65536}, Backend::kShm);
  REQUIRE(::fstat(scratch.fd.get(), &facts) == 0);
  CHECK(facts.st_blocks * 512 == 65536);
}

TEST_CASE("a segment's descriptor that was closed under it is opened again by name") {
  Scratch scratch;
  SegmentFile file(scratch.name, std::move(scratch.fd));
  const int number = file.fd();
  const FileIdentity identity = file_facts(number, scratch.name).identity;
  ::close(number);
  CHECK(file_facts(file.fd(), scratch.name).identity == identity);
  file.close();
  CHECK(file_facts(file.fd(), scratch.name).identity == identity);
}

TEST_CASE("a number that belongs to somebody else by now is neither used nor closed") {
  Scratch scratch;
  int number = -1;
  {
    SegmentFile file(scratch.name, std::move(scratch.fd));
    number = file.fd();
    const int other = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    REQUIRE(::dup2(other, number) == number);
    ::close(other);
    SUBCASE("when used") { CHECK(file.fd() != number); }
    SUBCASE("when closed") { file.close(); }
    SUBCASE("when destroyed") {}
    SUBCASE("when moved") { const SegmentFile moved(std::move(file)); }
    SUBCASE("when replaced") { file = SegmentFile(); }
  }
  CHECK(::fcntl(number, F_GETFD) >= 0);
  ::close(number);
}

TEST_CASE("a segment whose name leads nowhere or to another file is lost") {
  Scratch scratch;
  SegmentFile file(scratch.name, std::move(scratch.fd));
  file.close();
  REQUIRE(unlink_segment(scratch.name));
  CHECK(code_of([&] { (void)file.fd(); }) == ErrorCode::kSegmentLost);
  const UniqueFd other = create_segment(scratch.name);
  CHECK(code_of([&] { (void)file.fd(); }) == ErrorCode::kSegmentLost);
}

TEST_CASE("a mapping shows the segment's bytes, and large ones start on a huge page") {
  const Scratch scratch;
  for (const std::uint64_t bytes : {std::uint64_t{4096}, std::uint64_t{1} << 20, std::uint64_t{2} << 20,
                                    (std::uint64_t{4} << 20) + 4096, (std::uint64_t{3} << 20) + 100}) {
    CAPTURE(bytes);
    size_segment(scratch.fd.get(), scratch.name, ByteCount{bytes});
    reserve_segment(scratch.fd.get(), scratch.name, 0, ByteCount{bytes}, Backend::kShm);
    Mapping writable(scratch.fd.get(), scratch.name, ByteCount{bytes}, Access::kReadWrite);
    const Mapping readable(scratch.fd.get(), scratch.name, ByteCount{bytes}, Access::kReadOnly);
    if (bytes >= 2U << 20) CHECK(reinterpret_cast<std::uintptr_t>(writable.base()) % (2U << 20) == 0);
    prefault(writable.base(), bytes);
    prefault(readable.base() + 5, bytes - 5);
    std::memset(writable.base(), 7, bytes);
    CHECK(std::all_of(readable.base(), readable.base() + bytes, [](std::byte b) { return b == std::byte{7}; }));
    writable = Mapping();
    CHECK_FALSE(writable.valid());
  }
}

TEST_CASE("a mapping leaves no reserved addresses behind") {
  const Scratch scratch;
  const std::uint64_t bytes = (std::uint64_t{2} << 20) + 5 * 4096 + 100;
  size_segment(scratch.fd.get(), scratch.name, ByteCount{bytes});
  // In a process of its own: nothing else maps there meanwhile.
  test::Child child([&](test::Line&) {
    const auto mapped_bytes = [] {
      std::uint64_t total = 0;
      std::FILE* maps = std::fopen("/proc/self/statm", "r");
      test::expect(maps != nullptr && std::fscanf(maps, "%lu", &total) == 1);
      std::fclose(maps);
      return total;
    };
    (void)mapped_bytes();
    const std::uint64_t before = mapped_bytes();
    for (int i = 0; i < 50; ++i)
      const Mapping mapping(scratch.fd.get(), scratch.name, ByteCount{bytes}, Access::kReadWrite);
    test::expect(mapped_bytes() <= before + 16);
  });
  child.join();
}

TEST_CASE("a mapping that the system refuses leaves nothing behind") {
  const Scratch scratch;
  const UniqueFd read_only(::open(("/dev/shm" + scratch.name).c_str(), O_RDONLY | O_CLOEXEC));
  REQUIRE(read_only.valid());
  CHECK(code_of([&] {
          const Mapping mapping(read_only.get(), scratch.name, ByteCount{8U << 20}, Access::kReadWrite);
        }) == ErrorCode::kSystem);
}

}  // namespace
}  // namespace shmx
