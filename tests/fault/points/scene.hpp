// One operation of the library with other processes around it: an owner, a survivor that holds a block and has a
// message on its way, and a fresh process that comes later. Whatever happens to the process that performs it, they must
// find what the rules promise.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arena.hpp"
#include "child_process.hpp"
#include "handle.hpp"

namespace shmx::test {

// What the process that performs an operation has at hand.
struct Stage {
  std::shared_ptr<Arena> arena;       // the owner's
  std::vector<HandleState> messages;  // for a peer to load
  std::vector<Handle> handles;
};

enum class Performer : std::uint8_t { kOwner, kPeer, kNewOwner };

struct Operation {
  const char* name;
  Performer performer;
  bool alone = false;      // nobody else uses the arena
  bool dead_peer = false;  // somebody has died with a hold
  bool orphaned = false;   // the owner is killed before
  void (*prepare)(Stage&);
  void (*perform)(Stage&);
};
[[nodiscard]] const std::vector<Operation>& operations();

// What a process has of what it must give back.
struct Possessions {
  std::uint64_t descriptors;
  std::uint64_t mappings;  // of segments
  std::uint64_t loads;     // that messages announce, of all arenas, and its own handles
  std::uint64_t heap;      // bytes
};

// What came of an operation in which something failed, as its process says it.
struct Outcome {
  enum class Kind : std::uint64_t { kDone, kError, kBadAlloc, kNoThread, kOther };
  Kind kind;
  ErrorCode code;
  int system_errno;
  std::uint64_t allocations;
  std::string text;
  Possessions after;
};

class Scene {
 public:
  // Everybody is started; the performer stands before the operation.
  explicit Scene(const Operation& operation);
  [[nodiscard]] Child& performer() { return *performer_; }

  // The performer has been killed. Throws what rule is broken.
  void check_after_kill();

  // The performer goes on after leave_trace(): what it says, in this order.
  [[nodiscard]] Outcome hear_outcome();
  [[nodiscard]] const Possessions& before() const { return before_; }
  // It has performed the operation again, if that had failed, and gives everything back like everybody else. Throws
  // what rule is broken. Answers what it has at the end.
  [[nodiscard]] Possessions check_after_return();

 private:
  void check(bool owner_alive);
  void start_owner();
  void hear_end_of_performer();
  void expect_nothing_left() const;

  const Operation& operation_;
  const std::uint64_t bytes_before_;
  std::unique_ptr<Child> owner_;
  std::unique_ptr<Child> survivor_;
  std::unique_ptr<Child> peer_;
  Child* performer_ = nullptr;
  HandleState held_;
  HandleState first_;
  HandleState second_;
  std::vector<HandleState> extra_;
  Possessions before_{};
  std::optional<Possessions> end_;
};

// What the performer of every later scene does between the markers: the n-th allocation by operator new fails, counted
// from 1; 0: none.
void set_failing_allocation(std::uint64_t n);

}  // namespace shmx::test
