// Shared-memory segments, with names in /dev/shm or with none: descriptors, mappings. No meaning of the bytes is known
// here.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"
#include "layout.hpp"

namespace shmx {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  [[nodiscard]] int get() const { return fd_; }
  [[nodiscard]] bool valid() const { return fd_ >= 0; }
  void reset();
  // Gives the number up without closing it.
  int forget() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

// Which file a descriptor or a name leads to.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

struct FileFacts {
  FileIdentity identity;
  std::uint64_t bytes = 0;
  std::uint64_t links = 0;
  uid_t uid = 0;
  gid_t gid = 0;
  mode_t mode = 0;
};
[[nodiscard]] FileFacts file_facts(int fd, const std::string& name);

// Group mode, for processes with different user ids: a segment of mode 0660 is trusted, too, if it has the group that
// this process was told to trust and is in. Without it a process trusts its own user id's segments alone.
void set_trusted_group(std::optional<gid_t> group);
[[nodiscard]] bool in_group(gid_t group);
[[nodiscard]] bool is_trusted(uid_t uid, gid_t gid, mode_t mode);
// Gives a new segment to the group, which this process is in.
void open_to_group(int fd, const std::string& name, gid_t group);
// The same if the arena's control segment was given to one.
void open_like(int fd, const std::string& name, const FileFacts& control);
// What segments are made of: files in /dev/shm, or files that have no name anywhere (memfd_create), which end with the
// last process that has them open or mapped.
enum class Backend : std::uint8_t { kShm, kMemfd };

// Creates a segment that did not exist (mode 0600); EEXIST is an Error like any other.
[[nodiscard]] UniqueFd create_segment(const std::string& name);
// Opens an existing one read-write; nothing if there is no such name.
[[nodiscard]] std::optional<UniqueFd> open_segment(const std::string& name);
// For a name that must be there.
[[nodiscard]] Error lost_name_error(const std::string& name);
// True if the name was there.
bool unlink_segment(const std::string& name);
// A file without a name, which nobody can make shorter. Its mark in /proc/<pid>/fd is "memfd:" and the name.
[[nodiscard]] UniqueFd create_nameless_segment(const std::string& name);
// Opens the one with that mark through the process that has it open; nothing if that has ended, or what it has there
// is something else. Throws SegmentLost if this process may not look into that one.
[[nodiscard]] std::optional<UniqueFd> open_nameless_segment(const std::string& name, DescriptorPlace place);
// What others have to open: a descriptor of this process.
[[nodiscard]] DescriptorPlace place_of(int fd);
[[nodiscard]] Error lost_place_error(const std::string& name, DescriptorPlace place);
// Sets the size without reserving anything.
void size_segment(int fd, const std::string& name, ByteCount bytes);
// Reserves [offset, offset + bytes): afterwards no access to it can fault for want of memory.
// Throws ArenaFull (ENOSPC) when /dev/shm, the memory cgroup or, without a name, the machine has no room.
void reserve_segment(int fd, const std::string& name, std::uint64_t offset, ByteCount bytes, Backend backend);

// A descriptor that survives daemonizers which close everything: every use checks that the number still
// leads to the same file, and opens the name again if not. Without a name it is opened again where its owner has it;
// the owner's own descriptor has no substitute.
class SegmentFile {
 public:
  SegmentFile() = default;
  SegmentFile(std::string name, UniqueFd fd, DescriptorPlace place = {});
  SegmentFile(SegmentFile&& other) noexcept = default;
  SegmentFile& operator=(SegmentFile&& other) noexcept;
  SegmentFile(const SegmentFile&) = delete;
  SegmentFile& operator=(const SegmentFile&) = delete;
  ~SegmentFile();

  // Throws SegmentLost if the file is gone.
  [[nodiscard]] int fd();
  // Another open file description of the file. Throws SegmentLost if it is gone.
  [[nodiscard]] UniqueFd open_again();
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] Backend backend() const { return place_.none() ? Backend::kShm : Backend::kMemfd; }
  [[nodiscard]] DescriptorPlace place() const { return place_; }
  // Closes the descriptor; the next use opens the file again.
  void close();
  // In a forked child: gives up the open file description that it shares with its parent.
  void renew() noexcept;

 private:
  // 0: the descriptor leads to this file. EBADF: the number is closed, or leads to another file by now. Any other errno
  // says why it could not be looked at, and nothing about whose the number is.
  [[nodiscard]] int why_not_ours() const;
  // What the name or the place leads to, if it is this file.
  [[nodiscard]] UniqueFd open_anew() const;
  std::string name_;
  UniqueFd fd_;
  FileIdentity identity_;
  DescriptorPlace place_;
};

enum class Access : std::uint8_t { kReadWrite, kReadOnly };

// A shared mapping of a range of a segment, aligned to 2 MiB so that huge pages fit; `offset` is a multiple of a page.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int fd, const std::string& name, ByteCount bytes, Access access, std::uint64_t offset = 0);
  Mapping(Mapping&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { reset(); }

  [[nodiscard]] std::byte* base() const { return base_; }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  [[nodiscard]] bool valid() const { return base_ != nullptr; }
  void reset();
  // The same range, private and zero. Best effort: on failure it stays as it is.
  void replace_by_zeros();
  // Gives the range up without unmapping it: it is not mapped in this process.
  void forget() { base_ = nullptr; }

 private:
  std::byte* base_ = nullptr;
  std::uint64_t bytes_ = 0;
};

// False where the administrator has turned huge pages off.
[[nodiscard]] bool huge_pages_allowed();
// A mount at /dev/shm decides for itself; files without a name go by this setting.
[[nodiscard]] bool huge_pages_for_nameless();

// Enters the pages of a range into this process's page table, so that first use does not fault: pages that exist, or
// pages that were reserved just now. Best effort: kernels before 5.14 do without.
void prefault(std::byte* base, std::uint64_t bytes);
void prefault_new(std::byte* base, std::uint64_t bytes);
// Puts whole huge pages in the place of the small ones of a reserved range, for every process that maps it, also where
// the system gives shared memory none by itself. Takes as long as prefault_new, or several times that where memory is
// fragmented. Best effort: Linux 6.1 or newer.
void gather_into_huge_pages(std::byte* base, std::uint64_t bytes);
// Asks for huge pages wherever the range faults, where the system gives them to files without a name.
void advise_huge_pages(std::byte* base, std::uint64_t bytes);

// Arena names: "/shmx-" and 16 hex digits; data segments append "." and their id.
[[nodiscard]] std::string control_name(ArenaId arena);
[[nodiscard]] std::string data_name(ArenaId arena, std::uint32_t segment_id);
// The arena that a file name in /dev/shm belongs to, if it is one of ours.
[[nodiscard]] std::optional<ArenaId> arena_of_name(const std::string& file_name);

struct NamedSegments {
  ArenaId arena;
  bool has_control = false;
  std::vector<std::string> data;  // names as for open_segment
};
// Every arena that has a name in /dev/shm.
[[nodiscard]] std::vector<NamedSegments> list_arenas();

struct NamelessSegment {
  ArenaId arena{};
  DescriptorPlace place;
};
// Arenas without a name that a process of this user has open, each once. A process that ends meanwhile, or may not be
// looked into, is passed over.
[[nodiscard]] std::vector<NamelessSegment> list_nameless_arenas();

}  // namespace shmx
