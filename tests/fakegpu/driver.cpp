// A CUDA driver without a GPU, for tests: libcuda.so.1 with its own prototypes and the real one's codes.
//
// A stream is a thread, device memory faults when the host touches it, and a copy reads registered host memory when
// its turn in the stream comes: a block that is used again too early shows as wrong bytes. What the real driver leaves
// undefined ends the process here: unregistering memory that is unmapped or under a copy, copying from unmapped memory.
// The functions fake_* are for tests: failures at the nth call, a gate that holds every stream, the log of calls.
// Built with -DFAKE_HIP it is libamdhip64.so, whose functions have the same signatures.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef FAKE_HIP
#define NAME(cuda, hip) hip
#else
#define NAME(cuda, hip) cuda
#endif
#define API extern "C" __attribute__((visibility("default"))) int
#define CONTROL extern "C" __attribute__((visibility("default")))

namespace {

enum Code : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kNotReady = 600,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
};

using Address = std::uintptr_t;
using Clock = std::chrono::steady_clock;

[[noreturn]] void die(const std::string& why) {
  std::fprintf(stderr, "fake driver: %s\n", why.c_str());
  std::abort();
}

// Device, inode and offset behind an address, as the kernel tells it; empty where nothing is mapped.
std::string backing(Address address) {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  while (std::getline(maps, line)) {
    Address from = 0;
    Address to = 0;
    char permissions[8];
    unsigned long long offset = 0;
    char device[16];
    unsigned long long inode = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx %7s %llx %15s %llu", &from, &to, permissions, &offset, device, &inode) !=
        6) {
      continue;
    }
    if (address < from || address >= to) continue;
    if (inode == 0) return "anonymous";
    return std::string(device) + " " + std::to_string(inode) + " " + std::to_string(offset + (address - from));
  }
  return {};
}

bool is_mapped(Address address, std::size_t bytes) {
  const auto page = static_cast<Address>(::sysconf(_SC_PAGESIZE));
  const Address from = address / page * page;
  const Address to = (address + bytes + page - 1) / page * page;
  std::vector<unsigned char> resident((to - from) / page);
  return ::mincore(reinterpret_cast<void*>(from), to - from, resident.data()) == 0;
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    const int fd = ::memfd_create("fake-device-memory", MFD_CLOEXEC);
    if (fd < 0) return;
    if (::ftruncate(fd, static_cast<off_t>(bytes)) == 0) {
      seen_ = ::mmap(nullptr, bytes, PROT_NONE, MAP_SHARED, fd, 0);
      real_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    ::close(fd);
  }
  ~DeviceMemory() {
    if (seen_ != MAP_FAILED) ::munmap(seen_, bytes_);
    if (real_ != MAP_FAILED) ::munmap(real_, bytes_);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  bool valid() const { return seen_ != MAP_FAILED && real_ != MAP_FAILED; }
  Address address() const { return reinterpret_cast<Address>(seen_); }
  std::size_t bytes() const { return bytes_; }
  char* at(Address address) const { return static_cast<char*>(real_) + (address - this->address()); }

 private:
  std::size_t bytes_;
  void* seen_ = MAP_FAILED;
  void* real_ = MAP_FAILED;
};

// A place in device memory that lives as long as an operation on it.
struct Place {
  std::shared_ptr<DeviceMemory> memory;
  char* bytes = nullptr;
};

struct Registration {
  std::size_t bytes;
  unsigned flags;
  std::string backing;
};

struct Failure {
  std::string name;
  long skip;  // calls of that name that succeed first
  int code;
  bool sticky;
};

struct HostRange {
  Address address;
  std::size_t bytes;
};

struct Gate {
  std::mutex mutex;
  std::condition_variable changed;
  bool closed = false;
  long passes = 0;  // operations that may go through while it is closed
  std::atomic<long> delay_us{0};

  void pass() {
    std::unique_lock guard(mutex);
    changed.wait(guard, [this] { return !closed || passes > 0; });
    if (closed) --passes;
    guard.unlock();
    if (const long pause = delay_us.load(); pause > 0) std::this_thread::sleep_for(std::chrono::microseconds(pause));
  }
};

// Calls of one name wait in it, before they do anything.
struct Turnstile {
  std::mutex mutex;
  std::condition_variable changed;
  std::string name;
  long waiting = 0;

  void pass(const std::string& call) {
    std::unique_lock guard(mutex);
    if (call != name) return;
    ++waiting;
    changed.wait(guard, [this, &call] { return call != name; });
    --waiting;
  }
};

struct Context {
  int device;
};

struct Fake {
  std::mutex mutex;
  std::atomic<pid_t> process{0};
  std::atomic<bool> ended{false};
  std::map<Address, Registration> registrations;
  std::map<Address, std::shared_ptr<DeviceMemory>> memories;
  std::list<HostRange> in_flight;  // registered memory that a pending copy reads or writes
  std::vector<Failure> failures;
  int broken = 0;                     // the code of a failure from which a context does not recover
  std::map<int, int> broken_devices;  // the same for one device
  std::vector<std::string> log;
  std::map<std::string, long> counts;
  long late_copies = 0;
  long staged_copies = 0;
  std::atomic<long> after_fork{0};
  std::atomic<int> captures{0};
  std::atomic<bool> capture_broken{false};
  Gate gate;
  Turnstile turnstile;
  Context contexts[2] = {{0}, {1}};
};

// Never destroyed: streams outlive static objects.
Fake& fake() {
  static auto* instance = new Fake;
  return *instance;
}

thread_local std::vector<Context*> stack;
thread_local int capture_mode = 0;  // 0: global, 1: of this thread, 2: relaxed

// What ends a capture that is going on elsewhere, unless the caller's thread is in relaxed mode.
bool is_unsafe_in_capture(const std::string& name) {
  static const std::set<std::string> names = {"EventQuery",   "EventSynchronize", "StreamSynchronize", "StreamQuery",
                                              "HostRegister", "HostUnregister",   "MemAlloc",          "MemFree"};
  return names.contains(name);
}

// What every call does first. `name` without prefix and version, for the log and for failures.
int enter(const std::string& name, bool needs_context = false) {
  Fake& self = fake();
  const pid_t process = self.process.load();
  if (process != 0 && process != ::getpid()) {
    ++self.after_fork;
    return kNotInitialized;
  }
  if (self.ended.load()) {
    std::fprintf(stderr, "fake driver: %s after the end\n", name.c_str());
    return kDeinitialized;
  }
  if (process == 0 && name != "Init") return kNotInitialized;
  self.turnstile.pass(name);
  const std::lock_guard guard(self.mutex);
  self.log.push_back(name);
  ++self.counts[name];
  if (self.captures.load() > 0 && capture_mode == 0 && is_unsafe_in_capture(name)) {
    self.capture_broken = true;
    return kCaptureUnsupported;
  }
  if (self.broken != 0) return self.broken;
  if (!stack.empty() && stack.back() != nullptr && name != "CtxPopCurrent") {
    const auto broken = self.broken_devices.find(stack.back()->device);
    if (broken != self.broken_devices.end()) return broken->second;
  }
  for (auto failure = self.failures.begin(); failure != self.failures.end(); ++failure) {
    if (failure->name != name || failure->skip-- > 0) continue;
    const int code = failure->code;
    if (failure->sticky) self.broken = code;
    self.failures.erase(failure);
    return code;
  }
  if (needs_context && (stack.empty() || stack.back() == nullptr)) return kInvalidContext;
  return kSuccess;
}

#define ENTER(...)                                        \
  do {                                                    \
    if (const int code = enter(__VA_ARGS__)) return code; \
  } while (false)

// The caller holds the mutex. Whether one registration covers all of a range, and whether any touches it.
std::pair<bool, bool> registered(Address address, std::size_t bytes) {
  bool touched = false;
  for (const auto& [from, registration] : fake().registrations) {
    const Address to = from + registration.bytes;
    if (address >= from && address + bytes <= to) return {true, true};
    touched = touched || (from < address + bytes && address < to);
  }
  return {false, touched};
}

Place place(Address address, std::size_t bytes) {
  Fake& self = fake();
  const std::lock_guard guard(self.mutex);
  auto found = self.memories.upper_bound(address);
  if (found == self.memories.begin()) return {};
  --found;
  if (address + bytes > found->first + found->second->bytes()) return {};
  return {found->second, found->second->at(address)};
}

class Stream {
 public:
  Stream() : thread_([this] { run(); }) { thread_.detach(); }

  void push(std::function<void()> operation) {
    {
      const std::lock_guard guard(mutex_);
      if (capturing) return;  // it goes into the graph, which nobody runs here
      operations_.push_back(std::move(operation));
    }
    changed_.notify_all();
  }
  bool idle() {
    const std::lock_guard guard(mutex_);
    return operations_.empty() && !busy_;
  }
  void synchronize() {
    std::unique_lock guard(mutex_);
    changed_.wait(guard, [this] { return operations_.empty() && !busy_; });
  }
  std::atomic<bool> capturing{false};

 private:
  void run() {
    for (;;) {
      std::unique_lock guard(mutex_);
      changed_.wait(guard, [this] { return !operations_.empty(); });
      const std::function<void()> operation = std::move(operations_.front());
      operations_.pop_front();
      busy_ = true;
      guard.unlock();
      fake().gate.pass();
      operation();
      guard.lock();
      busy_ = false;
      guard.unlock();
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> operations_;
  bool busy_ = false;
  std::thread thread_;
};

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  std::uint64_t recorded = 0;
  std::uint64_t done = 0;
  Clock::time_point when;

  std::uint64_t last() {
    const std::lock_guard guard(mutex);
    return recorded;
  }
  void wait(std::uint64_t number) {
    std::unique_lock guard(mutex);
    changed.wait(guard, [this, number] { return done >= number; });
  }
};

// Handles are pointers to these, so that what a stream has yet to do keeps an event that was destroyed.
using EventHandle = std::shared_ptr<Event>*;

Stream& stream_of(void* handle) {
  static auto* defaults = new Stream[2];
  if (handle == nullptr || handle == reinterpret_cast<void*>(1) || handle == reinterpret_cast<void*>(2)) {
    return defaults[stack.empty() || stack.back() == nullptr ? 0 : stack.back()->device];
  }
  return *static_cast<Stream*>(handle);
}

// Registered memory that an operation uses, until it is done.
std::list<HostRange>::iterator begin_flight(Address address, std::size_t bytes) {
  return fake().in_flight.insert(fake().in_flight.end(), {address, bytes});
}

void end_flight(std::list<HostRange>::iterator flight) {
  const std::lock_guard guard(fake().mutex);
  fake().in_flight.erase(flight);
}

void require_mapped(Address address, std::size_t bytes) {
  if (!is_mapped(address, bytes)) die("a copy uses host memory that was unmapped");
}

}  // namespace

// ---- initialization and contexts

API NAME(cuInit, hipInit)(unsigned) {
  ENTER("Init");
  pid_t nobody = 0;
  if (fake().process.compare_exchange_strong(nobody, ::getpid())) std::atexit([] { fake().ended = true; });
  return kSuccess;
}

API NAME(cuDriverGetVersion, hipDriverGetVersion)(int* version) {
  *version = 13000;
  return kSuccess;
}

API NAME(cuDeviceGetCount, hipGetDeviceCount)(int* count) {
  ENTER("DeviceGetCount");
  *count = 2;
  return kSuccess;
}

API NAME(cuDeviceGet, hipDeviceGet)(int* device, int ordinal) {
  ENTER("DeviceGet");
  if (ordinal < 0 || ordinal > 1) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

API NAME(cuDeviceGetAttribute, hipDeviceGetAttribute)(int* value, int attribute, int) {
  ENTER("DeviceGetAttribute");
  *value = attribute == 113 ? 1 : 0;  // registration for reading
  return kSuccess;
}

API NAME(cuDevicePrimaryCtxRetain, hipDevicePrimaryCtxRetain)(void** context, int device) {
  ENTER("DevicePrimaryCtxRetain");
  if (device < 0 || device > 1) return kInvalidDevice;
  *context = &fake().contexts[device];
  return kSuccess;
}

API NAME(cuCtxSetCurrent, hipCtxSetCurrent)(void* context) {
  ENTER("CtxSetCurrent");
  if (!stack.empty()) stack.pop_back();
  stack.push_back(static_cast<Context*>(context));
  return kSuccess;
}

API NAME(cuCtxPushCurrent_v2, hipCtxPushCurrent)(void* context) {
  ENTER("CtxPushCurrent");
  {
    const std::lock_guard guard(fake().mutex);
    const auto broken = fake().broken_devices.find(static_cast<Context*>(context)->device);
    if (broken != fake().broken_devices.end()) return broken->second;
  }
  stack.push_back(static_cast<Context*>(context));
  return kSuccess;
}

API NAME(cuCtxPopCurrent_v2, hipCtxPopCurrent)(void** context) {
  const int code = enter("CtxPopCurrent");
  if (stack.empty()) return kInvalidContext;
  // Popped all the same: such a code is told of earlier work.
  if (context != nullptr) *context = stack.back();
  stack.pop_back();
  return code;
}

API NAME(cuGetErrorName, hipDrvGetErrorName)(int code, const char** name) {
  static const std::map<int, const char*> names = {
      {kSuccess, "SUCCESS"},
      {kInvalidValue, "INVALID_VALUE"},
      {kOutOfMemory, "OUT_OF_MEMORY"},
      {kNotInitialized, "NOT_INITIALIZED"},
      {kDeinitialized, "DEINITIALIZED"},
      {kInvalidContext, "INVALID_CONTEXT"},
      {kAlreadyRegistered, "HOST_MEMORY_ALREADY_REGISTERED"},
      {kNotRegistered, "HOST_MEMORY_NOT_REGISTERED"},
      {700, "ILLEGAL_ADDRESS"},
  };
  const auto found = names.find(code);
  *name = found == names.end() ? "UNKNOWN" : found->second;
  return found == names.end() ? kInvalidValue : kSuccess;
}

// ---- host memory

API NAME(cuMemHostRegister_v2, hipHostRegister)(void* memory, std::size_t bytes, unsigned flags) {
  ENTER("HostRegister", true);
  const auto address = reinterpret_cast<Address>(memory);
  if (memory == nullptr || bytes == 0 || !is_mapped(address, bytes)) return kInvalidValue;
  Fake& self = fake();
  const std::lock_guard guard(self.mutex);
  // Whole pages are locked: two ranges that share one overlap.
  const auto page = static_cast<Address>(::sysconf(_SC_PAGESIZE));
  const Address from = address / page * page;
  const Address to = (address + bytes + page - 1) / page * page;
  if (registered(from, to - from).second) return kAlreadyRegistered;
  self.registrations[address] = {bytes, flags, backing(address)};
  return kSuccess;
}

API NAME(cuMemHostUnregister, hipHostUnregister)(void* memory) {
  ENTER("HostUnregister", true);
  Fake& self = fake();
  const auto address = reinterpret_cast<Address>(memory);
  const std::lock_guard guard(self.mutex);
  const auto found = self.registrations.find(address);
  if (found == self.registrations.end()) return registered(address, 1).first ? kInvalidValue : kNotRegistered;
  const std::size_t bytes = found->second.bytes;
  if (!is_mapped(address, bytes) || backing(address) != found->second.backing) die("unregistered after munmap");
  for (const HostRange& flight : self.in_flight) {
    if (flight.address < address + bytes && address < flight.address + flight.bytes) {
      die("unregistered while a copy uses it");
    }
  }
  self.registrations.erase(found);
  return kSuccess;
}

API NAME(cuPointerGetAttribute, hipPointerGetAttribute)(void* result, int attribute, Address address) {
  ENTER("PointerGetAttribute");
  const bool on_device = place(address, 1).bytes != nullptr;
  Fake& self = fake();
  const std::lock_guard guard(self.mutex);
  auto found = self.registrations.upper_bound(address);
  const bool on_host = found != self.registrations.begin() && address < (--found)->first + found->second.bytes;
  if (!on_device && !on_host) return kInvalidValue;
  switch (attribute) {
    case 2:  // type of memory
      *static_cast<unsigned*>(result) = on_device ? 2 : 1;
      return kSuccess;
    case 11:  // start of its range
      *static_cast<Address*>(result) = found->first;
      return kSuccess;
    case 12:  // size of its range
      *static_cast<std::size_t*>(result) = found->second.bytes;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}

// ---- device memory and copies

API NAME(cuMemAlloc_v2, hipMalloc)(Address* address, std::size_t bytes) {
  ENTER("MemAlloc", true);
  auto memory = std::make_shared<DeviceMemory>(bytes);
  if (bytes == 0 || !memory->valid()) return kOutOfMemory;
  const std::lock_guard guard(fake().mutex);
  *address = memory->address();
  fake().memories[*address] = std::move(memory);
  return kSuccess;
}

API NAME(cuMemFree_v2, hipFree)(Address address) {
  ENTER("MemFree");
  std::shared_ptr<DeviceMemory> last;  // unmapped without the lock, when no operation uses it any more
  const std::lock_guard guard(fake().mutex);
  const auto found = fake().memories.find(address);
  if (found == fake().memories.end()) return kInvalidValue;
  last = std::move(found->second);
  fake().memories.erase(found);
  return kSuccess;
}

API NAME(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync)(Address to, const void* from, std::size_t bytes, void* handle) {
  ENTER("MemcpyHtoDAsync", true);
  const Place target = place(to, bytes);
  if (target.bytes == nullptr) return kInvalidValue;
  const auto address = reinterpret_cast<Address>(from);
  Fake& self = fake();
  std::unique_lock guard(self.mutex);
  const auto [covered, touched] = registered(address, bytes);
  if (touched && !covered) return kInvalidValue;  // it would span two registrations, or one and none
  if (covered) {
    ++self.late_copies;
    const auto flight = begin_flight(address, bytes);
    guard.unlock();
    stream_of(handle).push([=] {
      require_mapped(address, bytes);
      std::memcpy(target.bytes, from, bytes);
      end_flight(flight);
    });
    return kSuccess;
  }
  ++self.staged_copies;
  guard.unlock();
  const auto staged =
      std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  stream_of(handle).push([=] { std::memcpy(target.bytes, staged->data(), bytes); });
  return kSuccess;
}

API NAME(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync)(void* to, Address from, std::size_t bytes, void* handle) {
  ENTER("MemcpyDtoHAsync", true);
  const Place source = place(from, bytes);
  if (source.bytes == nullptr) return kInvalidValue;
  const auto address = reinterpret_cast<Address>(to);
  Fake& self = fake();
  std::unique_lock guard(self.mutex);
  const auto [covered, touched] = registered(address, bytes);
  if (touched && !covered) return kInvalidValue;
  const auto flight = begin_flight(address, bytes);
  guard.unlock();
  stream_of(handle).push([=] {
    require_mapped(address, bytes);
    std::memcpy(to, source.bytes, bytes);
    end_flight(flight);
  });
  if (!covered) stream_of(handle).synchronize();
  return kSuccess;
}

API NAME(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync)(Address to, Address from, std::size_t bytes, void* handle) {
  ENTER("MemcpyDtoDAsync", true);
  const Place target = place(to, bytes);
  const Place source = place(from, bytes);
  if (target.bytes == nullptr || source.bytes == nullptr) return kInvalidValue;
  stream_of(handle).push([=] { std::memmove(target.bytes, source.bytes, bytes); });
  return kSuccess;
}

// ---- streams and events

API NAME(cuStreamCreate, hipStreamCreateWithFlags)(void** handle, unsigned) {
  ENTER("StreamCreate", true);
  *handle = new Stream;  // its thread runs to the end of the process
  return kSuccess;
}

API NAME(cuStreamSynchronize, hipStreamSynchronize)(void* handle) {
  ENTER("StreamSynchronize");
  stream_of(handle).synchronize();
  return kSuccess;
}

API NAME(cuStreamQuery, hipStreamQuery)(void* handle) {
  ENTER("StreamQuery");
  return stream_of(handle).idle() ? kSuccess : kNotReady;
}

API NAME(cuStreamIsCapturing, hipStreamIsCapturing)(void* handle, int* status) {
  ENTER("StreamIsCapturing");
  *status = stream_of(handle).capturing.load() ? 1 : 0;
  return kSuccess;
}

API NAME(cuStreamBeginCapture_v2, hipStreamBeginCapture)(void* handle, int) {
  ENTER("StreamBeginCapture");
  stream_of(handle).capturing = true;
  fake().capture_broken = false;
  ++fake().captures;
  return kSuccess;
}

API NAME(cuStreamEndCapture, hipStreamEndCapture)(void* handle, void** graph) {
  ENTER("StreamEndCapture");
  stream_of(handle).capturing = false;
  --fake().captures;
  *graph = nullptr;
  return fake().capture_broken.load() ? kCaptureInvalidated : kSuccess;
}

API NAME(cuThreadExchangeStreamCaptureMode, hipThreadExchangeStreamCaptureMode)(int* mode) {
  ENTER("ThreadExchangeStreamCaptureMode");
  std::swap(*mode, capture_mode);
  return kSuccess;
}

API NAME(cuEventCreate, hipEventCreateWithFlags)(void** handle, unsigned) {
  ENTER("EventCreate", true);
  *handle = new std::shared_ptr<Event>(std::make_shared<Event>());
  return kSuccess;
}

API NAME(cuEventDestroy_v2, hipEventDestroy)(void* handle) {
  const int code = enter("EventDestroy");
  // Gone all the same, as above; its caller has no further use for it.
  if (code != kNotInitialized && code != kDeinitialized) delete static_cast<EventHandle>(handle);
  return code;
}

API NAME(cuEventRecord, hipEventRecord)(void* handle, void* stream) {
  ENTER("EventRecord");
  const std::shared_ptr<Event> event = *static_cast<EventHandle>(handle);
  std::uint64_t number = 0;
  {
    const std::lock_guard guard(event->mutex);
    number = ++event->recorded;
  }
  stream_of(stream).push([event, number] {
    {
      const std::lock_guard guard(event->mutex);
      event->done = std::max(event->done, number);
      event->when = Clock::now();
    }
    event->changed.notify_all();
  });
  return kSuccess;
}

API NAME(cuEventQuery, hipEventQuery)(void* handle) {
  ENTER("EventQuery");
  Event& event = **static_cast<EventHandle>(handle);
  const std::lock_guard guard(event.mutex);
  return event.done >= event.recorded ? kSuccess : kNotReady;
}

API NAME(cuEventSynchronize, hipEventSynchronize)(void* handle) {
  ENTER("EventSynchronize");
  const std::shared_ptr<Event> event = *static_cast<EventHandle>(handle);
  event->wait(event->last());
  return kSuccess;
}

API NAME(cuStreamWaitEvent, hipStreamWaitEvent)(void* stream, void* handle, unsigned) {
  ENTER("StreamWaitEvent");
  const std::shared_ptr<Event> event = *static_cast<EventHandle>(handle);
  const std::uint64_t number = event->last();
  stream_of(stream).push([event, number] { event->wait(number); });
  return kSuccess;
}

API NAME(cuEventElapsedTime, hipEventElapsedTime)(float* milliseconds, void* from, void* to) {
  ENTER("EventElapsedTime");
  const auto span = (**static_cast<EventHandle>(to)).when - (**static_cast<EventHandle>(from)).when;
  *milliseconds = std::chrono::duration<float, std::milli>(span).count();
  return kSuccess;
}

// ---- for tests

// The call of that name after `skip` good ones fails; sticky: and so does every call of any name after it.
CONTROL void fake_fail(const char* name, long skip, int code, int sticky) {
  const std::lock_guard guard(fake().mutex);
  fake().failures.push_back({name, skip, code, sticky != 0});
}

// Every call for that device fails, those for others do not.
CONTROL void fake_break(int device, int code) {
  const std::lock_guard guard(fake().mutex);
  fake().broken_devices[device] = code;
}

CONTROL void fake_recover() {
  const std::lock_guard guard(fake().mutex);
  fake().failures.clear();
  fake().broken_devices.clear();
  fake().broken = 0;
}

// Holds the calls of that name, or none any more if it is empty.
CONTROL void fake_hold_calls(const char* name) {
  {
    const std::lock_guard guard(fake().turnstile.mutex);
    fake().turnstile.name = name;
  }
  fake().turnstile.changed.notify_all();
}

// How many calls are held.
CONTROL long fake_held_calls() {
  const std::lock_guard guard(fake().turnstile.mutex);
  return fake().turnstile.waiting;
}

// Holds every stream before its next operation, or lets all go on.
CONTROL void fake_gate(int closed) {
  {
    const std::lock_guard guard(fake().gate.mutex);
    fake().gate.closed = closed != 0;
    fake().gate.passes = 0;
  }
  fake().gate.changed.notify_all();
}

CONTROL void fake_delay(long microseconds) { fake().gate.delay_us = microseconds; }

CONTROL void fake_forget_calls() {
  const std::lock_guard guard(fake().mutex);
  fake().log.clear();
  fake().counts.clear();
  fake().late_copies = 0;
  fake().staged_copies = 0;
}

CONTROL long fake_count(const char* name) {
  const std::string what = name;
  // Without the lock, which a thread of the parent may have had at the fork.
  if (what == "after fork") return fake().after_fork.load();
  const std::lock_guard guard(fake().mutex);
  if (what == "registrations") return static_cast<long>(fake().registrations.size());
  if (what == "late copies") return fake().late_copies;
  if (what == "staged copies") return fake().staged_copies;
  if (what == "in flight") return static_cast<long>(fake().in_flight.size());
  if (what == "memories") return static_cast<long>(fake().memories.size());
  const auto found = fake().counts.find(what);
  return found == fake().counts.end() ? 0 : found->second;
}

// The names of the calls so far, a line each, as far as they fit; answers how many bytes they need.
CONTROL long fake_log(char* text, long room) {
  const std::lock_guard guard(fake().mutex);
  std::ostringstream all;
  for (const std::string& name : fake().log) all << name << '\n';
  const std::string lines = all.str();
  if (room > 0) {
    const std::size_t part = std::min(lines.size(), static_cast<std::size_t>(room) - 1);
    std::memcpy(text, lines.data(), part);
    text[part] = '\0';
  }
  return static_cast<long>(lines.size()) + 1;
}

// Start, size and flags of each registration, in order of address; answers how many there are.
CONTROL long fake_registrations(std::uint64_t* triples, long room) {
  const std::lock_guard guard(fake().mutex);
  long written = 0;
  for (const auto& [address, registration] : fake().registrations) {
    if (written == room) break;
    triples[3 * written] = address;
    triples[3 * written + 1] = registration.bytes;
    triples[3 * written + 2] = registration.flags;
    ++written;
  }
  return static_cast<long>(fake().registrations.size());
}
