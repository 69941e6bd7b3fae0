#include "segment.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <climits>
#include <csignal>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>

#include "error.hpp"
#include "host.hpp"

namespace shmx {
namespace {

constexpr std::uint64_t kHugePage = 2U << 20;
constexpr const char* kDirectory = "/dev/shm";
constexpr std::string_view kPrefix = "shmx-";
constexpr std::size_t kHexDigits = 16;
constexpr mode_t kGroupMode = 0660;
constexpr std::int64_t kNoGroup = -1;

// A setting, read when a segment is opened.
std::atomic<std::int64_t> trusted_group{kNoGroup};

#ifndef MADV_POPULATE_READ
constexpr int MADV_POPULATE_READ = 22;
#endif
#ifndef MADV_POPULATE_WRITE
constexpr int MADV_POPULATE_WRITE = 23;
#endif
#ifndef MADV_COLLAPSE
constexpr int MADV_COLLAPSE = 25;
#endif
#ifndef MFD_NOEXEC_SEAL
constexpr unsigned MFD_NOEXEC_SEAL = 8;
#endif
constexpr std::string_view kNamelessMark = "/memfd:";
constexpr std::string_view kDeletedMark = " (deleted)";

// Of a file without a name: nobody can open it by this.
std::string mark_of(const std::string& name) { return name.substr(1); }

std::string link_of(const std::string& name) {
  return std::string(kNamelessMark) + mark_of(name) + std::string(kDeletedMark);
}

std::string path_of(DescriptorPlace place) {
  return "/proc/" + std::to_string(place.pid) + "/fd/" + std::to_string(place.fd);
}

// For a range whose allocation a signal has interrupted: Linux before 6.11 gives back what it has then, so that under a
// timer a long one would never be done. False, with errno and nothing taken, if there is no room.
bool allocate_in_pieces(int fd, std::uint64_t offset, std::uint64_t bytes) {
  constexpr std::uint64_t kPiece = 8U << 20;
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  for (std::uint64_t done = 0; done < bytes;) {
    const std::uint64_t piece = std::min(kPiece, bytes - done);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    const int result = ::fallocate(fd, 0, static_cast<off_t>(offset + done), static_cast<off_t>(piece));
    const int failure = result == 0 ? 0 : errno;
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failure == EINTR) continue;
    if (failure != 0) {
      (void)::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                        static_cast<off_t>(bytes));
      errno = failure;
      return false;
    }
    done += piece;
  }
  return true;
}

std::string path_of(int own_fd) { return "/proc/self/fd/" + std::to_string(own_fd); }

// Where a link of /proc leads; empty, with errno, if there is no such link.
std::string read_link(const std::string& path) {
  char target[PATH_MAX];
  const ssize_t length = ::readlink(path.c_str(), target, sizeof target);
  return length < 0 ? std::string() : std::string(target, static_cast<std::size_t>(length));
}

// For a message: " (12.0 GiB)", or nothing where the system does not say.
std::string shm_size() {
  try {
    return " (" + human_bytes(shm_filesystem_bytes()) + ")";
  } catch (const Error&) {
    return "";
  }
}

}  // namespace

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void UniqueFd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

FileFacts file_facts(int fd, const std::string& name) {
  struct stat facts{};
  if (::fstat(fd, &facts) != 0) throw system_error("fstat", name, errno);
  return {{facts.st_dev, facts.st_ino},
          static_cast<std::uint64_t>(facts.st_size),
          static_cast<std::uint64_t>(facts.st_nlink),
          facts.st_uid,
          facts.st_gid,
          facts.st_mode};
}

void set_trusted_group(std::optional<gid_t> group) { trusted_group.store(group ? std::int64_t{*group} : kNoGroup); }

bool in_group(gid_t group) {
  if (group == ::getegid()) return true;
  std::vector<gid_t> groups(static_cast<std::size_t>(std::max(::getgroups(0, nullptr), 0)));
  const int count = ::getgroups(static_cast<int>(groups.size()), groups.data());
  return count > 0 && std::find(groups.begin(), groups.begin() + count, group) != groups.begin() + count;
}

bool is_trusted(uid_t uid, gid_t gid, mode_t mode) {
  if (uid == ::geteuid()) return true;
  // Root may open what others have made, which is no reason to: the group decides for root, too.
  return trusted_group.load() == std::int64_t{gid} && (mode & ACCESSPERMS) == kGroupMode && in_group(gid);
}

void open_to_group(int fd, const std::string& name, gid_t group) {
  // The group first, so that no other one is ever let in.
  if (::fchown(fd, static_cast<uid_t>(-1), group) != 0) throw system_error("fchown", name, errno);
  if (::fchmod(fd, kGroupMode) != 0) throw system_error("fchmod", name, errno);
}

void open_like(int fd, const std::string& name, const FileFacts& control) {
  if ((control.mode & ACCESSPERMS) == kGroupMode) open_to_group(fd, name, control.gid);
}

UniqueFd create_segment(const std::string& name) {
  // shm_open sets FD_CLOEXEC by itself.
  const int fd = ::shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  if (fd < 0) {
    if (errno == ENOSPC)
      throw no_space_error(name, 0,
                           "/dev/shm has no inode or page left; make it larger than now" + shm_size() +
                               ", by docker run --shm-size=SIZE");
    throw system_error("shm_open", name, errno);
  }
  return UniqueFd(fd);
}

std::optional<UniqueFd> open_segment(const std::string& name) {
  const int fd = ::shm_open(name.c_str(), O_RDWR, 0);
  if (fd >= 0) return UniqueFd(fd);
  if (errno == ENOENT) return std::nullopt;
  throw system_error("shm_open", name, errno);
}

Error lost_name_error(const std::string& name) {
  return {ErrorCode::kSegmentLost,
          "segment " + name + " has lost its name; somebody outside shmx removed it from /dev/shm", ENOENT};
}

bool unlink_segment(const std::string& name) {
  if (::shm_unlink(name.c_str()) == 0) return true;
  if (errno == ENOENT) return false;
  throw system_error("shm_unlink", name, errno);
}

UniqueFd create_nameless_segment(const std::string& name) {
  const std::string mark = mark_of(name);
  // A system may insist on files that cannot be executed; before Linux 6.3 it does not know the flag.
  int fd = ::memfd_create(mark.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  if (fd < 0 && errno == EINVAL) fd = ::memfd_create(mark.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) throw system_error("memfd_create", name, errno);
  UniqueFd owned(fd);
  if (::fchmod(fd, 0600) != 0) throw system_error("fchmod", name, errno);
  // No SIGBUS by another's ftruncate, and no seal that would keep the arena from growing.
  if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL) != 0) throw system_error("fcntl(F_ADD_SEALS)", name, errno);
  return owned;
}

std::optional<UniqueFd> open_nameless_segment(const std::string& name, DescriptorPlace place) {
  const std::string path = path_of(place);
  const std::string expected = link_of(name);
  const std::string found = read_link(path);
  if (found.empty() && (errno == EACCES || errno == EPERM)) {
    throw Error(ErrorCode::kSegmentLost,
                "arena " + name + " has no name (backend memfd), and this process may not look into process " +
                    std::to_string(place.pid) +
                    ", which is to have it open: that one is another user's, has more privileges, or is not dumpable "
                    "(or it has ended, and its number is another's); use backend=\"shm\" (SHMX_BACKEND=shm)",
                EACCES);
  }
  if (found != expected) return std::nullopt;
  // O_NONBLOCK: by now it may lead to a pipe.
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) {
    if (errno == ENOENT || errno == ESRCH || errno == ENXIO) return std::nullopt;
    throw system_error("open", name, errno);
  }
  if (read_link(path_of(fd.get())) != expected) return std::nullopt;
  return fd;
}

DescriptorPlace place_of(int fd) {
  // Not getpid(): /proc may be that of an outer PID namespace.
  const std::string self = read_link("/proc/self");
  std::uint32_t pid = 0;
  const auto [end, failure] = std::from_chars(self.data(), self.data() + self.size(), pid);
  if (failure != std::errc{} || pid == 0) {
    throw Error(ErrorCode::kSystem,
                "backend memfd needs /proc, by which other processes open what has no name; mount it, or use "
                "backend=\"shm\" (SHMX_BACKEND=shm)",
                ENOENT);
  }
  return {pid, static_cast<std::uint32_t>(fd)};
}

Error lost_place_error(const std::string& name, DescriptorPlace place) {
  return {ErrorCode::kSegmentLost,
          "arena " + name + " is gone: it has no name (backend memfd), and its owner, process " +
              std::to_string(place.pid) +
              ", does not have it open any more: it has ended, closed the arena, or closed its descriptors. A process "
              "must load its first handle of such an arena, or shmx.attach to it, while the owner lives; keep the "
              "producer running until then and send the tensor again, or use backend=\"shm\" (SHMX_BACKEND=shm)",
          ENOENT};
}

void size_segment(int fd, const std::string& name, ByteCount bytes) {
  if (::ftruncate(fd, static_cast<off_t>(value(bytes))) != 0) throw system_error("ftruncate", name, errno);
}

void reserve_segment(int fd, const std::string& name, std::uint64_t offset, ByteCount bytes, Backend backend) {
  if (const auto room = memory_cgroup_room(); room && *room < value(bytes)) {
    throw no_space_error(name, value(bytes),
                         "the memory cgroup has only " + human_bytes(*room) +
                             " left; raise the container's memory limit or lower SHMX_CAPACITY");
  }
  // Nothing else bounds a file without a name: where memory ends, the kernel kills.
  if (backend == Backend::kMemfd && available_memory() < value(bytes)) {
    throw no_space_error(name, value(bytes),
                         "the machine has only " + human_bytes(available_memory()) +
                             " of memory available; release handles, or lower SHMX_CAPACITY");
  }
  if (::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(value(bytes))) == 0) return;
  if (errno == EINTR && allocate_in_pieces(fd, offset, value(bytes))) return;
  if (backend == Backend::kMemfd && (errno == ENOSPC || errno == ENOMEM)) {
    throw no_space_error(name, value(bytes), "the machine is out of memory; release handles, or lower SHMX_CAPACITY");
  }
  if (errno == ENOSPC || errno == ENOMEM) {
    throw no_space_error(name, value(bytes),
                         "/dev/shm is full; make it larger than now" + shm_size() +
                             ", by docker run --shm-size=SIZE or mount -o remount,size=SIZE /dev/shm, release handles, "
                             "or run `shmx gc` to remove arenas of dead processes");
  }
  throw system_error("fallocate", name, errno);
}

SegmentFile::SegmentFile(std::string name, UniqueFd fd, DescriptorPlace place)
    : name_(std::move(name)), fd_(std::move(fd)), place_(place) {
  identity_ = file_facts(fd_.get(), name_).identity;
}

SegmentFile& SegmentFile::operator=(SegmentFile&& other) noexcept {
  if (this != &other) {
    close();
    name_ = std::move(other.name_);
    fd_ = std::move(other.fd_);
    identity_ = other.identity_;
    place_ = other.place_;
  }
  return *this;
}

SegmentFile::~SegmentFile() {
  // The number may belong to somebody else by now; closing it then would be a bug of ours in their code.
  if (fd_.valid() && why_not_ours() != 0) fd_.forget();
}

int SegmentFile::why_not_ours() const {
  struct stat facts{};
  if (::fstat(fd_.get(), &facts) != 0) return errno;
  return FileIdentity{facts.st_dev, facts.st_ino} == identity_ ? 0 : EBADF;
}

int SegmentFile::fd() {
  if (fd_.valid()) {
    const int why = why_not_ours();
    if (why == 0) return fd_.get();
    if (why != EBADF) throw system_error("fstat", name_, why);
    fd_.forget();
  }
  fd_ = open_anew();
  return fd_.get();
}

UniqueFd SegmentFile::open_again() {
  if (backend() == Backend::kShm) return open_anew();
  const int own = fd();
  UniqueFd again(::open(path_of(own).c_str(), O_RDWR | O_CLOEXEC));
  if (!again.valid()) throw system_error("open", name_, errno);
  return again;
}

UniqueFd SegmentFile::open_anew() const {
  auto found = backend() == Backend::kShm ? open_segment(name_) : open_nameless_segment(name_, place_);
  if (found && file_facts(found->get(), name_).identity == identity_) return std::move(*found);
  throw backend() == Backend::kShm ? lost_name_error(name_) : lost_place_error(name_, place_);
}

void SegmentFile::renew() noexcept {
  try {
    // With a name it is opened when it is needed.
    UniqueFd fresh = backend() == Backend::kMemfd ? open_again() : UniqueFd();
    close();
    fd_ = std::move(fresh);
  } catch (const std::exception&) {
    close();
  }
}

void SegmentFile::close() {
  if (fd_.valid() && why_not_ours() != 0) fd_.forget();
  fd_.reset();
}

Mapping::Mapping(int fd, const std::string& name, ByteCount bytes, Access access, std::uint64_t offset) {
  const std::uint64_t size = value(bytes);
  // Reserve a range with room to align, then map over its aligned part and give the rest back.
  const std::uint64_t slack = size >= kHugePage ? kHugePage : 0;
  void* reserved = ::mmap(nullptr, size + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) throw system_error("mmap", name, errno);
  const auto start = reinterpret_cast<std::uintptr_t>(reserved);
  const std::uintptr_t aligned = slack == 0 ? start : (start + slack - 1) / kHugePage * kHugePage;
  const int protection = access == Access::kReadWrite ? PROT_READ | PROT_WRITE : PROT_READ;
  void* mapped = ::mmap(reinterpret_cast<void*>(aligned), size, protection, MAP_SHARED | MAP_FIXED, fd,
                        static_cast<off_t>(offset));
  if (mapped == MAP_FAILED) {
    const int failure = errno;
    ::munmap(reserved, size + slack);
    throw system_error("mmap", name, failure);
  }
  if (aligned > start) ::munmap(reserved, aligned - start);
  if (const std::uintptr_t tail = start + slack - aligned; slack != 0 && tail > 0) {
    // The mapping's last page may be partial; the reservation beyond starts on the next page.
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    const std::uintptr_t end = (aligned + size + page - 1) / page * page;
    const std::uintptr_t limit = (start + size + slack + page - 1) / page * page;
    if (limit > end) ::munmap(reinterpret_cast<void*>(end), limit - end);
  }
  base_ = static_cast<std::byte*>(mapped);
  bytes_ = size;
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    reset();
    base_ = std::exchange(other.base_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void Mapping::reset() {
  if (base_ != nullptr) ::munmap(base_, bytes_);
  base_ = nullptr;
  bytes_ = 0;
}

void Mapping::replace_by_zeros() {
  if (base_ == nullptr) return;
  [[maybe_unused]] const void* zeros =
      ::mmap(base_, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

namespace {

void advise(std::byte* base, std::uint64_t bytes, int advice) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(base) / page * page;
  const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(base) + bytes;
  ::madvise(reinterpret_cast<void*>(start), end - start, advice);
}

std::string huge_page_modes(const char* which) {
  std::ifstream file(std::string("/sys/kernel/mm/transparent_hugepage/") + which);
  std::string modes;
  std::getline(file, modes);
  return modes;
}

}  // namespace

bool huge_pages_allowed() {
  static const bool allowed = [] {
    const std::string modes = huge_page_modes("enabled");
    return !modes.empty() && modes.find("[never]") == std::string::npos;
  }();
  return allowed;
}

bool huge_pages_for_nameless() {
  static const bool given = [] {
    const std::string modes = huge_page_modes("shmem_enabled");
    return modes.find("[advise]") != std::string::npos || modes.find("[always]") != std::string::npos;
  }();
  return given;
}

void prefault(std::byte* base, std::uint64_t bytes) {
  // Entries of a shared mapping of tmpfs are writable even if they were made for reading, which takes half the time of
  // MADV_POPULATE_WRITE: the kernel enters neighbours together.
  advise(base, bytes, MADV_POPULATE_READ);
}

void prefault_new(std::byte* base, std::uint64_t bytes) {
  // Pages that fallocate has reserved are cleared now, one by one: there are no neighbours to enter.
  advise(base, bytes, MADV_POPULATE_WRITE);
}

void gather_into_huge_pages(std::byte* base, std::uint64_t bytes) {
  if (!huge_pages_allowed()) return;
  const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(base) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(base) + bytes) / kHugePage * kHugePage;
  if (start < end) ::madvise(reinterpret_cast<void*>(start), end - start, MADV_COLLAPSE);
}

void advise_huge_pages(std::byte* base, std::uint64_t bytes) {
  if (huge_pages_for_nameless()) advise(base, bytes, MADV_HUGEPAGE);
}

std::string control_name(ArenaId arena) {
  char name[1 + kPrefix.size() + kHexDigits + 1];
  (void)std::snprintf(name, sizeof name, "/%.*s%016llx", static_cast<int>(kPrefix.size()), kPrefix.data(),
                      static_cast<unsigned long long>(value(arena)));
  return name;
}

std::string data_name(ArenaId arena, std::uint32_t segment_id) {
  return control_name(arena) + "." + std::to_string(segment_id);
}

std::optional<ArenaId> arena_of_name(const std::string& file_name) {
  if (!file_name.starts_with(kPrefix) || file_name.size() < kPrefix.size() + kHexDigits) return std::nullopt;
  const char* digits = file_name.data() + kPrefix.size();
  std::uint64_t id = 0;
  const auto [end, failure] = std::from_chars(digits, digits + kHexDigits, id, 16);
  if (failure != std::errc{} || end != digits + kHexDigits) return std::nullopt;
  const ArenaId arena{id};
  const char* const last = file_name.data() + file_name.size();
  std::uint32_t segment = 0;
  if (end != last && std::from_chars(end + 1, last, segment).ec != std::errc{}) return std::nullopt;
  // In the one form in which shmx writes it: a file of any other name is somebody else's, and not to be removed.
  const std::string written = end == last ? control_name(arena) : data_name(arena, segment);
  if (written.compare(1, std::string::npos, file_name) != 0) return std::nullopt;
  return arena;
}

std::vector<NamedSegments> list_arenas() {
  std::map<std::uint64_t, NamedSegments> found;
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(kDirectory), &::closedir);
  if (!directory) {
    const int system_errno = errno;
    // Arenas without names do without it. Asked twice: names that are passed over would never be removed.
    if (system_errno == ENOENT && ::access(kDirectory, F_OK) != 0) return {};
    throw system_error("opendir", kDirectory, system_errno);
  }
  for (;;) {
    // A list that ends early would pass for the whole: what it lacks would never be removed.
    errno = 0;
    const dirent* const entry = ::readdir(directory.get());  // NOLINT(concurrency-mt-unsafe): the stream is our own
    if (entry == nullptr) {
      if (errno != 0) throw system_error("readdir", kDirectory, errno);
      break;
    }
    const std::string file_name = entry->d_name;
    const auto arena = arena_of_name(file_name);
    if (!arena) continue;
    NamedSegments& segments = found.try_emplace(value(*arena), NamedSegments{*arena, false, {}}).first->second;
    if (file_name.find('.') == std::string::npos) {
      segments.has_control = true;
    } else {
      segments.data.push_back("/" + file_name);
    }
  }
  std::vector<NamedSegments> all;
  all.reserve(found.size());
  for (auto& [id, segments] : found) all.push_back(std::move(segments));
  return all;
}

namespace {

// What is not a number is 0.
std::uint32_t number_of(const char* text) {
  std::uint32_t number = 0;
  const auto [end, failure] = std::from_chars(text, text + std::strlen(text), number);
  return failure == std::errc{} && *end == '\0' ? number : 0;
}

// The arena whose file has that link in /proc/<pid>/fd.
std::optional<ArenaId> arena_of_link(const std::string& link) {
  if (!link.starts_with(kNamelessMark) || !link.ends_with(kDeletedMark)) return std::nullopt;
  const std::string mark = link.substr(kNamelessMark.size(), link.size() - kNamelessMark.size() - kDeletedMark.size());
  return mark.find('.') == std::string::npos ? arena_of_name(mark) : std::nullopt;
}

}  // namespace

std::vector<NamelessSegment> list_nameless_arenas() {
  std::vector<NamelessSegment> all;
  const std::unique_ptr<DIR, int (*)(DIR*)> processes(::opendir("/proc"), &::closedir);
  if (!processes) return all;
  // The streams are this call's own.
  while (const dirent* process = ::readdir(processes.get())) {  // NOLINT(concurrency-mt-unsafe)
    const std::uint32_t pid = number_of(process->d_name);
    struct stat facts{};
    const std::string folder = "/proc/" + std::string(process->d_name);
    if (pid == 0 || ::stat(folder.c_str(), &facts) != 0 || facts.st_uid != ::geteuid()) continue;
    const std::unique_ptr<DIR, int (*)(DIR*)> descriptors(::opendir((folder + "/fd").c_str()), &::closedir);
    if (!descriptors) continue;
    while (const dirent* entry = ::readdir(descriptors.get())) {  // NOLINT(concurrency-mt-unsafe)
      const auto arena = arena_of_link(read_link(folder + "/fd/" + entry->d_name));
      if (!arena || std::any_of(all.begin(), all.end(), [&](const auto& one) { return one.arena == *arena; })) continue;
      all.push_back({*arena, {pid, number_of(entry->d_name)}});
    }
  }
  return all;
}

}  // namespace shmx
