// The control segment of an arena, mapped: creation, validation, and what is done to all its blocks at once.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "layout.hpp"
#include "segment.hpp"

namespace shmx {

struct ControlOptions {
  std::uint64_t capacity = 0;
  std::uint32_t ttl_ticks = 0;
  std::optional<gid_t> group = std::nullopt;  // whose members may attach, too
  Backend backend = Backend::kShm;
};

// Where the bytes of a data segment are: a file of their own, or, without names, a part of the arena's one file.
struct DataFile {
  UniqueFd fd;
  std::string name;
  std::uint64_t offset;
};

class ControlSegment {
 public:
  // A new arena's control segment, not yet ready: publish() makes it so. Throws ArenaFull, and SegmentLost if a reaper
  // has taken it for what a dead process left.
  [[nodiscard]] static ControlSegment create(ArenaId arena, const ControlOptions& options);
  // An existing one. Nothing if there is no such name, or not that file at its place. Throws InvalidHandle for another
  // layout version or another user's arena, SegmentLost if the creation was torn or the file was truncated.
  [[nodiscard]] static std::optional<ControlSegment> open(ArenaId arena, DescriptorPlace place = {});

  [[nodiscard]] ControlHeader& header() const { return *reinterpret_cast<ControlHeader*>(mapping_.base()); }
  [[nodiscard]] BlockEntry& block(BlockIndex index) const {
    return reinterpret_cast<BlockEntry*>(mapping_.base() + kHeaderBytes)[value(index)];
  }
  [[nodiscard]] std::uint32_t block_count() const;
  [[nodiscard]] ArenaId arena() const { return arena_; }
  [[nodiscard]] const std::string& name() const { return file_.name(); }
  [[nodiscard]] SegmentFile& file() { return file_; }
  [[nodiscard]] Backend backend() const { return file_.backend(); }
  [[nodiscard]] DescriptorPlace place() const { return file_.place(); }
  // Tells, for handles, who can reach the arena.
  [[nodiscard]] std::uint32_t host() const { return host_; }
  [[nodiscard]] FileIdentity identity() const { return identity_; }

  // Owner: from here on others may attach.
  void publish();
  // Owner: makes the entries up to `count` usable, reserving their memory first.
  void grow_table(std::uint32_t count);

  // Owner: a new data segment, sized and without memory.
  [[nodiscard]] DataFile create_data(std::uint32_t slot, std::uint32_t id, ByteCount bytes);
  // Throws SegmentLost if it is gone.
  [[nodiscard]] DataFile open_data(std::uint32_t slot, std::uint32_t id);
  // Owner: takes its name away. Without names, gives the memory of its mapped bytes back.
  void remove_data(std::uint32_t id, std::byte* base, std::uint64_t bytes);

  // Replaces the shared pages by private zeros, for a process that has left.
  void forget_content() { mapping_.replace_by_zeros(); }

  // Bits of all peers that hold anything.
  [[nodiscard]] std::uint64_t holders() const;
  // Clears what a former peer left in `slot`. The caller has the slot's lock.
  void clear_slot(PeerSlot slot);
  // Clears the holds of every dead peer but `spared` (the caller's own slots); answers how many were dead.
  // The caller holds probe_mutex().
  std::uint32_t sweep(std::uint64_t spared);

 private:
  ControlSegment(ArenaId arena, SegmentFile file, FileIdentity identity, Mapping mapping);
  ArenaId arena_;
  std::uint32_t host_;
  SegmentFile file_;
  FileIdentity identity_;
  Mapping mapping_;
};

}  // namespace shmx
