#include "scene.hpp"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <stdexcept>
#include <system_error>

#include "copy.hpp"
#include "failing_new.hpp"
#include "peer_lock.hpp"
#include "process.hpp"
#include "reaper.hpp"
#include "shared_state.hpp"
#include "small_arena.hpp"
#include "tracee.hpp"

namespace shmx::test {
namespace {

constexpr std::uint64_t kCapacity = kMiB;
constexpr std::uint64_t kSegment = 256U << 10;
constexpr std::uint64_t kTensor = 64;
// Longer than any run; what has to expire is made older.
constexpr double kTimeToLive = 300;
// What the blocks are filled with.
enum Content : int { kHeld = 1, kFirst = 2, kSecond = 3, kExtra = 4, kLater = 5, kOwn = 6 };

ArenaOptions options() {
  ArenaOptions options;
  options.capacity = kCapacity;
  options.segment_bytes = kSegment;
  options.ticket_ttl = kTimeToLive;
  options.reuse_delay = 0;
  return options;
}

// As bindings.cpp does it.
Handle publish(Arena& arena, std::uint64_t bytes, int content) {
  const std::vector<std::byte> source(bytes, static_cast<std::byte>(content));
  auto room = arena.try_allocate(ByteCount{bytes});
  Allocation made = room ? std::move(*room) : arena.allocate(ByteCount{bytes});
  copy_bytes(made.data, source.data(), bytes, made.where);
  return {TensorMeta{Dtype{0}, 0, {static_cast<std::int64_t>(bytes)}, {}}, std::move(made.hold)};
}

HandleState announce(const Handle& handle, Readers readers) {
  std::optional<SentMessage> sent;
  try {
    return decode_handle(handle.to_bytes(readers, sent));
  } catch (...) {
    if (sent) sent->take_back();
    throw;
  }
}

bool is_filled_up_to(const Hold& hold, std::uint64_t bytes, int content) {
  const std::byte* data = hold.attachment().data(hold);
  return std::all_of(data, data + bytes, [&](std::byte byte) { return byte == static_cast<std::byte>(content); });
}

void expect_content(const Handle& handle, int content, const char* whose) {
  if (!is_filled_up_to(handle.require(), static_cast<std::uint64_t>(handle.meta().shape[0]), content)) {
    throw std::runtime_error(std::string("other data in ") + whose);
  }
}

Handle load_expecting(const HandleState& state, int content, const char* whose) {
  Handle handle = Handle::load(state);
  if (const auto failure = handle.failure()) throw std::runtime_error(std::string(whose) + ": " + failure->what());
  expect_content(handle, content, whose);
  return handle;
}

void fill_arena(Stage& stage, std::uint64_t bytes) {
  for (;;) {
    try {
      stage.handles.push_back(publish(*stage.arena, bytes, kOwn));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kArenaFull) throw;
      return;
    }
  }
}

void make_messages_old(ControlSegment& control) {
  for (std::uint32_t i = 0; i < control.block_count(); ++i) {
    age_messages(control.block(BlockIndex{i}).state, 2 * kTimeToLive);
  }
}

// A child that has failed is reported with its own message.
void tell(Child& child, std::uint64_t word) {
  try {
    child.say(word);
  } catch (const std::exception&) {
    child.join();
    throw;
  }
}

// ---- the operations

void nothing(Stage& /*stage*/) {}

void publish_one(Stage& stage) { stage.handles.push_back(publish(*stage.arena, kTensor, kOwn)); }

void publish_and_release(Stage& stage, int content) { const Handle released = publish(*stage.arena, kTensor, content); }
void publish_one_and_release(Stage& stage) { publish_and_release(stage, kOwn); }

void leave_room_of_another_size(Stage& stage) {
  fill_arena(stage, 32U << 10);
  stage.handles.erase(stage.handles.begin());
}

void publish_in_its_place(Stage& stage) { stage.handles.push_back(publish(*stage.arena, 20U << 10, kOwn)); }

void fill_segment(Stage& stage) {
  while (stage.arena->stats().segments == 1) stage.handles.push_back(publish(*stage.arena, 32U << 10, kOwn));
  while (stage.arena->stats().largest_free >= (32U << 10)) {
    stage.handles.push_back(publish(*stage.arena, 32U << 10, kOwn));
  }
}

void publish_large(Stage& stage) { stage.handles.push_back(publish(*stage.arena, 32U << 10, kOwn)); }

void fill_table(Stage& stage) {
  const ControlSegment& control = stage.arena->attachment()->control();
  while (stage.arena->stats().blocks < control.block_count()) publish_one(stage);
}

void fill_with_small_and_release(Stage& stage) {
  fill_arena(stage, kSegment / 4);
  stage.handles.clear();
}

void publish_a_whole_segment(Stage& stage) { stage.handles.push_back(publish(*stage.arena, kSegment, kOwn)); }

void publish_under_a_key(Stage& stage) {
  const std::string key = "a key that is too long to lie in the string itself";
  // In the place of what an earlier attempt has left.
  publish_and_release(stage, kLater);
  if (const auto known = stage.arena->find_key(key)) {
    if (!is_filled_up_to(known->hold, kTensor, kOwn)) throw std::runtime_error("other data under a key");
  }
  const Handle handle = publish(*stage.arena, kTensor, kOwn);
  stage.arena->note_key(key, handle.require(), "a description that is too long to lie in the string itself");
}

void announce_two(Stage& stage) {
  const HandleState state = announce(stage.handles.back(), exactly(2));
  if (!state.message) throw std::runtime_error("not announced");
}

void announce_by_default(Stage& stage) {
  const HandleState state = announce(stage.handles.back(), by_default());
  if (!state.message) throw std::runtime_error("not announced");
}

void publish_and_announce(Stage& stage) {
  publish_one(stage);
  announce_two(stage);
}

void revoke_it(Stage& stage) { stage.arena->revoke(stage.handles.back().require()); }

void release_last(Stage& stage) {
  if (!stage.handles.empty()) stage.handles.pop_back();
}

void sweep_all(Stage& stage) { (void)stage.arena->sweep(false); }

void trim_all(Stage& stage) { (void)stage.arena->trim(); }

void end_arena(Stage& stage) {
  stage.handles.clear();
  stage.arena.reset();
  leave_all();
}

void load_next(Stage& stage) {
  Handle loaded = Handle::load(stage.messages.back());
  (void)loaded.require();
  stage.handles.push_back(std::move(loaded));
  expect_content(stage.handles.back(), kExtra, "a load");
}

void load_one(Stage& stage) {
  load_next(stage);
  stage.messages.pop_back();
}

void load_two(Stage& stage) {
  load_one(stage);
  load_one(stage);
}

void discard_one(Stage& stage) { (void)discard(stage.messages.back()); }

void release_all_and_leave(Stage& stage) {
  stage.handles.clear();
  leave_all();
}

void make_arena(Stage& stage) { stage.arena = Arena::create(options()); }

void reap_everything(Stage& /*stage*/) { (void)reap_all(Expiry::kTimeToLive); }

// The last use there is, of an arena whose owner has been quiet for some time.
void hold_the_last(Stage& stage) {
  load_one(stage);
  Attachment& attachment = stage.handles.back().require().attachment();
  for (std::uint32_t i = 0; i < attachment.control().block_count(); ++i) {
    (void)drop_expired(attachment.control().block(BlockIndex{i}).state, 0, ticks_now());
  }
  attachment.control().header().owner_active.store(ticks_now() - 60 * kTicksPerSecond);
}

// ---- what is counted

std::uint64_t performer_fails_at = 0;
// The process is forked, from one that has a heap.
std::uint64_t heap_at_start = 0;

Possessions possessions(const Stage* stage) {
  Possessions has{};
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++has.descriptors;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) has.mappings += line.find("/dev/shm/shmx-") != std::string::npos;
  has.heap = ::mallinfo2().uordblks - heap_at_start;
  if (stage == nullptr) return has;
  has.loads = stage->handles.size();
  for (const NamedSegments& arena : list_arenas()) {
    std::optional<ControlSegment> control;
    try {
      control = ControlSegment::open(arena.arena);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kSegmentLost) throw;
    }
    for (std::uint32_t i = 0; control && i < control->block_count(); ++i) {
      for (const auto& cell : control->block(BlockIndex{i}).state.cells) {
        has.loads += MessageCell::unpack(cell.load()).remaining;
      }
    }
  }
  return has;
}

void say_possessions(Line& line, const Stage* stage = nullptr) {
  const Possessions has = possessions(stage);
  for (const std::uint64_t word : {has.descriptors, has.mappings, has.loads, has.heap}) line.say(word);
}

Possessions hear_possessions_from(Child& child) {
  Possessions has{};
  for (std::uint64_t* word : {&has.descriptors, &has.mappings, &has.loads, &has.heap}) *word = child.hear();
  return has;
}

Outcome attempt(const Operation& operation, Stage& stage) {
  try {
    operation.perform(stage);
    return {Outcome::Kind::kDone, ErrorCode::kNone, 0, 0, {}, {}};
  } catch (const Error& error) {
    return {Outcome::Kind::kError, error.code(), error.system_errno(), 0, error.what(), {}};
  } catch (const std::bad_alloc&) {
    return {Outcome::Kind::kBadAlloc, ErrorCode::kNone, 0, 0, {}, {}};
  } catch (const std::system_error& error) {
    return {Outcome::Kind::kNoThread, ErrorCode::kNone, error.code().value(), 0, error.what(), {}};
  } catch (const std::exception& error) {
    return {Outcome::Kind::kOther, ErrorCode::kNone, 0, 0, error.what(), {}};
  }
}

// What the performer does, from the operation on; a scene of kills ends in it.
void perform_between_markers(const Operation& operation, Stage& stage, Line& line) {
  operation.prepare(stage);
  line.say(1);
  (void)line.hear();
  // So that what the operation allocates is its own.
  stage.handles.reserve(stage.handles.size() + 2);
  say_possessions(line, &stage);
  enter_trace();
  count_allocations(performer_fails_at);
  const Outcome outcome = attempt(operation, stage);
  const std::uint64_t made = allocations();
  leave_trace();
  line.say(static_cast<std::uint64_t>(outcome.kind));
  line.say(static_cast<std::uint64_t>(outcome.code));
  line.say(static_cast<std::uint64_t>(outcome.system_errno));
  line.say(made);
  line.say_text(outcome.text);
  say_possessions(line, &stage);
  if (outcome.kind == Outcome::Kind::kDone) return;
  const Outcome again = attempt(operation, stage);
  if (again.kind != Outcome::Kind::kDone) throw std::runtime_error("it fails again, without a failure: " + again.text);
}

// ---- the processes

// After whatever has happened: what an owner can expect.
void go_on_as_owner(Arena& arena, Line& line) {
  (void)line.hear();
  (void)arena.sweep(false);
  const ArenaStats stats = arena.stats();
  line.say(stats.held_blocks);
  line.say(stats.peers);
  (void)line.hear();
  {
    const Handle later = publish(arena, kTensor, kLater);
    send_to(line, announce(later, exactly(1)));
  }
  (void)line.hear();
  make_messages_old(arena.attachment()->control());
  // All of it, in one piece: whatever is not given back is missing here.
  const Allocation everything = arena.allocate(ByteCount{kCapacity});
}

void be_owner(const Operation& operation, Line& line) {
  const bool performs = operation.performer == Performer::kOwner;
  heap_at_start = ::mallinfo2().uordblks;
  Stage stage;
  stage.arena = Arena::create(options());
  for (const int content : {kHeld, kFirst, kSecond, kExtra, kExtra}) {
    // What the performer loads the survivor holds, too.
    const std::uint32_t loads = content == kExtra && !operation.alone ? 2 : 1;
    send_to(line, announce(publish(*stage.arena, kTensor, content), exactly(loads)));
  }
  // What is on its way keeps an arena.
  if (operation.alone && operation.performer != Performer::kPeer) drop_messages(*stage.arena);
  if (operation.orphaned) line.say(1);
  if (performs) {
    (void)line.hear();
    perform_between_markers(operation, stage, line);
  }
  stage.handles.clear();
  if (stage.arena) go_on_as_owner(*stage.arena, line);
  stage.arena.reset();
  leave_all();
  if (performs) say_possessions(line);
}

void be_performer(const Operation& operation, Line& line) {
  heap_at_start = ::mallinfo2().uordblks;
  Stage stage;
  stage.messages.push_back(receive_from(line));
  stage.messages.push_back(receive_from(line));
  perform_between_markers(operation, stage, line);
  stage.handles.clear();
  stage.arena.reset();
  leave_all();
  say_possessions(line);
}

void be_survivor(Line& line) {
  {
    const Handle held = load_expecting(receive_from(line), kHeld, "the block that the survivor holds");
    std::vector<Handle> shared;
    for (int i = 0; i < 2; ++i) {
      shared.push_back(load_expecting(receive_from(line), kExtra, "what the survivor and the performer load"));
    }
    line.say(1);
    const HandleState on_its_way = receive_from(line);
    expect_content(held, kHeld, "the block that the survivor holds");
    const Handle loaded = load_expecting(on_its_way, kFirst, "the message to the survivor");
    send_to(line, announce(held, exactly(1)));
    std::vector<Handle> later;
    if (line.hear() != 0) later.push_back(load_expecting(receive_from(line), kLater, "what was published later"));
    (void)line.hear();
    expect_content(held, kHeld, "the block that the survivor holds");
    for (const Handle& handle : shared) expect_content(handle, kExtra, "what the survivor and the performer load");
  }
  leave_all();
}

void be_fresh(bool alone, unsigned peers, Line& line) {
  if (!alone) {
    const Handle second = load_expecting(receive_from(line), kSecond, "the message to the fresh process");
    const Handle forwarded = load_expecting(receive_from(line), kHeld, "what the survivor forwarded");
    ControlSegment& control = second.require().attachment().control();
    unsigned alive = 0;
    for (std::uint32_t slot = 0; slot < kMaxPeers; ++slot) alive += is_alive(control.file(), PeerSlot{slot}) ? 1 : 0;
    if (alive != peers) {
      throw std::runtime_error("rule 6: " + std::to_string(alive) + " peer slots are taken, not " +
                               std::to_string(peers));
    }
  }
  {
    const auto arena = Arena::create(options());
    const Handle own = publish(*arena, kTensor, kOwn);
    const Handle loaded = load_expecting(announce(own, exactly(1)), kOwn, "an arena of the fresh process");
  }
  line.say(1);
  (void)line.hear();
  for (const NamedSegments& left : list_arenas()) {
    try {
      if (auto control = ControlSegment::open(left.arena)) make_messages_old(*control);
    } catch (const Error& error) {
      // A torn creation has no messages.
      if (error.code() != ErrorCode::kSegmentLost) throw;
    }
  }
  leave_all();
  (void)reap_all(Expiry::kTimeToLive);
}

}  // namespace

const std::vector<Operation>& operations() {
  using enum Performer;
  static const std::vector<Operation> all{
      {.name = "publish", .performer = kOwner, .prepare = nothing, .perform = publish_one},
      {.name = "reuse", .performer = kOwner, .prepare = publish_one_and_release, .perform = publish_one},
      {.name = "reuse for another size",
       .performer = kOwner,
       .prepare = leave_room_of_another_size,
       .perform = publish_in_its_place},
      {.name = "reuse under pressure",
       .performer = kOwner,
       .prepare = fill_with_small_and_release,
       .perform = publish_a_whole_segment},
      {.name = "growth by a segment", .performer = kOwner, .prepare = fill_segment, .perform = publish_large},
      {.name = "growth of the table", .performer = kOwner, .prepare = fill_table, .perform = publish_one},
      {.name = "publish under a key",
       .performer = kOwner,
       .prepare = publish_one_and_release,
       .perform = publish_under_a_key},
      {.name = "pickle", .performer = kOwner, .prepare = publish_one, .perform = announce_two},
      {.name = "pickle without a count", .performer = kOwner, .prepare = publish_one, .perform = announce_by_default},
      {.name = "revoke", .performer = kOwner, .prepare = publish_and_announce, .perform = revoke_it},
      {.name = "release by the owner", .performer = kOwner, .prepare = publish_one, .perform = release_last},
      {.name = "sweep", .performer = kOwner, .dead_peer = true, .prepare = nothing, .perform = sweep_all},
      {.name = "trim",
       .performer = kOwner,
       .dead_peer = true,
       .prepare = fill_with_small_and_release,
       .perform = trim_all},
      {.name = "end by the owner, in use", .performer = kOwner, .prepare = publish_and_announce, .perform = end_arena},
      {.name = "end by the owner", .performer = kOwner, .alone = true, .prepare = publish_one, .perform = end_arena},
      {.name = "attach and load", .performer = kPeer, .prepare = nothing, .perform = load_next},
      {.name = "load", .performer = kPeer, .prepare = load_one, .perform = load_next},
      {.name = "load from an orphan", .performer = kPeer, .orphaned = true, .prepare = load_one, .perform = load_next},
      {.name = "pickle by a peer", .performer = kPeer, .prepare = load_one, .perform = announce_two},
      {.name = "release", .performer = kPeer, .prepare = load_one, .perform = release_last},
      {.name = "discard", .performer = kPeer, .prepare = nothing, .perform = discard_one},
      {.name = "leave", .performer = kPeer, .prepare = load_two, .perform = release_all_and_leave},
      {.name = "leave an orphan",
       .performer = kPeer,
       .orphaned = true,
       .prepare = load_two,
       .perform = release_all_and_leave},
      {.name = "creation", .performer = kNewOwner, .prepare = nothing, .perform = make_arena},
      {.name = "creation beside an orphan",
       .performer = kNewOwner,
       .alone = true,
       .orphaned = true,
       .prepare = nothing,
       .perform = make_arena},
      {.name = "look at an orphan in use",
       .performer = kNewOwner,
       .orphaned = true,
       .prepare = nothing,
       .perform = reap_everything},
      {.name = "removal of an orphan",
       .performer = kNewOwner,
       .alone = true,
       .orphaned = true,
       .prepare = nothing,
       .perform = reap_everything},
      {.name = "last release of an orphan",
       .performer = kPeer,
       .alone = true,
       .orphaned = true,
       .prepare = hold_the_last,
       .perform = release_last},
  };
  return all;
}

Scene::Scene(const Operation& operation) : operation_(operation), bytes_before_(bytes_in_shm()) {
  start_owner();
  if (!operation.alone) {
    survivor_ = std::make_unique<Child>([](Line& line) { be_survivor(line); });
    send_to(survivor_->line(), held_);
    for (const HandleState& state : extra_) send_to(survivor_->line(), state);
    (void)survivor_->hear();
  }
  if (operation.dead_peer) {
    Child dying([this](Line& line) {
      const Handle held = load_expecting(extra_[0], kExtra, "the message to a peer that dies");
      line.say(1);
      (void)line.hear();
    });
    (void)dying.hear();
    dying.kill();
  }
  if (operation.performer == Performer::kOwner) {
    performer_ = owner_.get();
    tell(*performer_, 1);
  } else {
    peer_ = std::make_unique<Child>([&operation](Line& line) { be_performer(operation, line); });
    performer_ = peer_.get();
    for (const HandleState& state : extra_) send_to(performer_->line(), state);
  }
  (void)performer_->hear();
  if (operation.orphaned) {
    (void)owner_->hear();
    owner_->kill();
    owner_.reset();
  }
  tell(*performer_, 1);
  before_ = hear_possessions_from(*performer_);
}

void Scene::start_owner() {
  owner_ = std::make_unique<Child>([this](Line& line) { be_owner(operation_, line); });
  held_ = decode_handle(owner_->hear_text());
  first_ = decode_handle(owner_->hear_text());
  second_ = decode_handle(owner_->hear_text());
  for (int i = 0; i < 2; ++i) extra_.push_back(decode_handle(owner_->hear_text()));
}

void Scene::check_after_kill() {
  check(operation_.performer != Performer::kOwner && !operation_.orphaned);
  expect_nothing_left();
}

void Scene::check(bool owner_alive) {
  if (owner_alive) {
    tell(*owner_, 1);
    const std::uint64_t held = owner_->hear();
    const std::uint64_t peers = owner_->hear();
    // The blocks of the survivor, and nobody else's.
    if (held != 3 || peers != 1) {
      throw std::runtime_error("rule 6: " + std::to_string(held) + " blocks are held by " + std::to_string(peers) +
                               " peers, 3 by 1 was expected");
    }
  }
  Child fresh([alone = operation_.alone, peers = owner_alive ? 3U : 2U](Line& line) { be_fresh(alone, peers, line); });
  if (survivor_) {
    send_to(survivor_->line(), first_);
    send_to(fresh.line(), second_);
    fresh.line().say_text(survivor_->hear_text());
    tell(*survivor_, owner_alive ? 1 : 0);
    if (owner_alive) {
      tell(*owner_, 1);
      survivor_->line().say_text(owner_->hear_text());
    }
  }
  (void)fresh.hear();
  if (survivor_) {
    tell(*survivor_, 1);
    survivor_->join();
  }
  if (owner_alive) {
    tell(*owner_, 1);
    if (owner_.get() == performer_) {
      hear_end_of_performer();
    } else {
      owner_->join();
    }
  }
  tell(fresh, 1);
  fresh.join();
}

void Scene::expect_nothing_left() const {
  for (const std::string& name : names_in_shm()) throw std::runtime_error("rule 7: the name " + name + " is left");
  if (const std::uint64_t bytes = bytes_in_shm(); bytes != bytes_before_) {
    throw std::runtime_error("rule 7: " + std::to_string(bytes - bytes_before_) + " bytes are left");
  }
}

void Scene::hear_end_of_performer() {
  end_ = hear_possessions_from(*performer_);
  performer_->join();
}

Outcome Scene::hear_outcome() {
  Outcome heard{};
  heard.kind = static_cast<Outcome::Kind>(performer_->hear());
  heard.code = static_cast<ErrorCode>(performer_->hear());
  heard.system_errno = static_cast<int>(performer_->hear());
  heard.allocations = performer_->hear();
  heard.text = performer_->hear_text();
  heard.after = hear_possessions_from(*performer_);
  return heard;
}

Possessions Scene::check_after_return() {
  const bool owner_performs = operation_.performer == Performer::kOwner;
  const bool owner_goes_on = !operation_.orphaned && operation_.perform != end_arena;
  if (!owner_performs || !owner_goes_on) hear_end_of_performer();
  check(owner_goes_on);
  expect_nothing_left();
  return end_.value();
}

void set_failing_allocation(std::uint64_t n) { performer_fails_at = n; }

}  // namespace shmx::test
