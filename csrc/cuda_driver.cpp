#include "cuda_driver.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "process.hpp"

namespace shmx {
namespace {

constexpr unsigned kPortable = 1;
constexpr unsigned kReadOnly = 8;
constexpr unsigned kEventWithoutTiming = 2;
constexpr int kRelaxedCapture = 2;
constexpr int kReadOnlyRegistrationSupported = 113;
constexpr int kRangeStart = 11;
constexpr int kRangeSize = 12;

struct Names {
  const char* backend;
  const char* library;
  const char* path_variable;
  const char* init;
  const char* device_get;
  const char* device_attribute;
  const char* context_retain;
  const char* context_push;
  const char* context_pop;
  const char* error_name;
  const char* host_register;
  const char* host_unregister;
  const char* pointer_attribute;
  const char* event_create;
  const char* event_destroy;
  const char* event_record;
  const char* event_query;
  const char* stream_is_capturing;
  const char* capture_mode;
};

constexpr std::array<Names, kDriverKinds> kNames = {{
    {"cuda", "libcuda.so.1", "SHMX_CUDA_DRIVER", "cuInit", "cuDeviceGet", "cuDeviceGetAttribute",
     "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuGetErrorName", "cuMemHostRegister_v2",
     "cuMemHostUnregister", "cuPointerGetAttribute", "cuEventCreate", "cuEventDestroy_v2", "cuEventRecord",
     "cuEventQuery", "cuStreamIsCapturing", "cuThreadExchangeStreamCaptureMode"},
    {"hip", "libamdhip64.so", "SHMX_HIP_DRIVER", "hipInit", "hipDeviceGet", "hipDeviceGetAttribute",
     "hipDevicePrimaryCtxRetain", "hipCtxPushCurrent", "hipCtxPopCurrent", "hipDrvGetErrorName", "hipHostRegister",
     "hipHostUnregister", "hipPointerGetAttribute", "hipEventCreateWithFlags", "hipEventDestroy", "hipEventRecord",
     "hipEventQuery", "hipStreamIsCapturing", "hipThreadExchangeStreamCaptureMode"},
}};

const Names& names(DriverKind kind) { return kNames[static_cast<std::size_t>(kind)]; }

enum class Opening : int { kNotBegun, kBegun, kOpen, kFailed };

// Without a lock: one that a thread of the parent had at a fork could never be had in the child.
struct Slot {
  std::atomic<Opening> opening{Opening::kNotBegun};
  DeviceDriver* driver = nullptr;  // once it is open
  std::string reason;              // once it has failed
};

struct State {
  std::array<Slot, kDriverKinds> slots;
  std::atomic<bool> inherited{false};
  Slot& of(DriverKind kind) { return slots[static_cast<std::size_t>(kind)]; }
};

// Never destroyed: what uses a driver may outlive every static object.
State& state() {
  static auto* instance = new State;
  return *instance;
}

// In a forked child. What a thread of the parent was about to open is there by half.
void note_inherited() {
  for (const Slot& slot : state().slots) {
    const Opening opening = slot.opening.load(std::memory_order_relaxed);
    if (opening == Opening::kBegun || opening == Opening::kOpen) {
      state().inherited.store(true, std::memory_order_relaxed);
    }
  }
}

const char* remedy(DriverCode code) {
  switch (static_cast<int>(code)) {
    case 1:
      return "the driver refuses this memory or device; see the report of shmx doctor";
    case 2:
      return "no memory can be page-locked any more: lower SHMX_PIN_BYTES, or give the container more memory";
    case 3:
    case 4:
      return "the driver does not run in this process: use the spawn start method, and no device at exit";
    case 100:
    case 101:
      return "no such device is visible: see CUDA_VISIBLE_DEVICES and, in a container, --gpus";
    case 712:
      return "another library has registered a part of it: let it register all of the segment, or none";
    default:
      return static_cast<int>(code) >= 700 && static_cast<int>(code) < 720
                 ? "the device context may be broken for good: see the first error of this process, and restart it"
                 : "see nvidia-smi or rocm-smi";
  }
}

}  // namespace

struct DeviceDriver::Table {
  int (*init)(unsigned);
  int (*device_get)(int*, int);
  int (*device_attribute)(int*, int, int);
  int (*context_retain)(void**, int);
  int (*context_push)(void*);
  int (*context_pop)(void**);
  int (*error_name)(int, const char**);
  int (*host_register)(void*, std::size_t, unsigned);
  int (*host_unregister)(void*);
  int (*pointer_attribute)(void*, int, std::uintptr_t);
  int (*event_create)(void**, unsigned);
  int (*event_destroy)(void*);
  int (*event_record)(void*, void*);
  int (*event_query)(void*);
  int (*stream_is_capturing)(void*, int*);
  int (*capture_mode)(int*);
};

const char* name_of(DriverKind kind) { return names(kind).backend; }

std::optional<DriverKind> driver_kind(const std::string& name) {
  for (std::size_t i = 0; i < kDriverKinds; ++i) {
    if (name == kNames[i].backend) return static_cast<DriverKind>(i);
  }
  return std::nullopt;
}

DeviceDriver::DeviceDriver(DriverKind kind) : kind_(kind) {}
DeviceDriver::~DeviceDriver() = default;

bool DeviceDriver::usable() {
  // relaxed: written by the only thread of a forked child.
  return process_joined() && !state().inherited.load(std::memory_order_relaxed);
}

DeviceDriver* DeviceDriver::known(DriverKind kind) {
  if (!usable()) return nullptr;
  const Slot& slot = state().of(kind);
  // acquire: pairs with get(), which fills it first.
  return slot.opening.load(std::memory_order_acquire) == Opening::kOpen ? slot.driver : nullptr;
}

DeviceDriver* DeviceDriver::get(DriverKind kind) {
  if (!usable()) return nullptr;
  Slot& slot = state().of(kind);
  // acquire throughout: pairs with the store at the end.
  Opening seen = slot.opening.load(std::memory_order_acquire);
  if (seen == Opening::kNotBegun) {
    static const int registered = ::pthread_atfork(nullptr, nullptr, &note_inherited);
    (void)registered;
    if (slot.opening.compare_exchange_strong(seen, Opening::kBegun, std::memory_order_acquire)) {
      try {
        std::unique_ptr<DeviceDriver> driver(new DeviceDriver(kind));
        driver->open();
        slot.driver = driver.release();
        seen = Opening::kOpen;
      } catch (const Error& error) {
        slot.reason = error.what();
        seen = Opening::kFailed;
      } catch (...) {
        // No memory: the next call may have some.
        slot.opening.store(Opening::kNotBegun, std::memory_order_release);
        slot.opening.notify_all();
        throw;
      }
      slot.opening.store(seen, std::memory_order_release);
      slot.opening.notify_all();
    }
  }
  while (seen == Opening::kBegun) {
    slot.opening.wait(seen, std::memory_order_acquire);
    seen = slot.opening.load(std::memory_order_acquire);
  }
  return seen == Opening::kOpen ? slot.driver : nullptr;
}

std::string DeviceDriver::why_not(DriverKind kind) {
  if (!usable()) return "this process was forked after the driver was initialized: use the spawn start method";
  const Slot& slot = state().of(kind);
  return slot.opening.load(std::memory_order_acquire) == Opening::kFailed ? slot.reason : std::string();
}

void DeviceDriver::open() {
  const Names& known = names(kind_);
  // Read once.
  const char* chosen = std::getenv(known.path_variable);  // NOLINT(concurrency-mt-unsafe)
  const std::string path = chosen != nullptr && *chosen != '\0' ? chosen : known.library;
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(ErrorCode::kDevice, "no driver " + path + ": " + ::dlerror() +  // NOLINT(concurrency-mt-unsafe)
                                        "; without it copies to devices are pageable. Install it (in a container, "
                                        "docker run --gpus all), or name it by " +
                                        known.path_variable);
  }
  auto table = std::make_unique<Table>();
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
    if (function == nullptr) {
      throw Error(ErrorCode::kDevice, "driver " + path + " has no " + name + ": install a newer driver");
    }
  };
  find(table->init, known.init);
  find(table->device_get, known.device_get);
  find(table->device_attribute, known.device_attribute);
  find(table->context_retain, known.context_retain);
  find(table->context_push, known.context_push);
  find(table->context_pop, known.context_pop);
  find(table->error_name, known.error_name);
  find(table->host_register, known.host_register);
  find(table->host_unregister, known.host_unregister);
  find(table->pointer_attribute, known.pointer_attribute);
  find(table->event_create, known.event_create);
  find(table->event_destroy, known.event_destroy);
  find(table->event_record, known.event_record);
  find(table->event_query, known.event_query);
  find(table->stream_is_capturing, known.stream_is_capturing);
  find(table->capture_mode, known.capture_mode);
  // The library is never given back: a driver cannot be unloaded.
  table_ = std::move(table);
  if (const auto code = static_cast<DriverCode>(table_->init(0)); code != DriverCode::kSuccess) {
    throw failure(known.init, path, code);
  }
  int device = 0;
  int answer = 0;
  registers_for_reading_ = kind_ == DriverKind::kCuda && table_->device_get(&device, 0) == 0 &&
                           table_->device_attribute(&answer, kReadOnlyRegistrationSupported, device) == 0 &&
                           answer != 0;
}

void* DeviceDriver::context(int device) {
  if (device < 0 || device >= kMaxDevices) {
    throw Error(ErrorCode::kDevice, "device " + std::to_string(device) + " is out of range: shmx knows 64 devices");
  }
  const std::atomic_ref<void*> known(contexts_[device]);
  // relaxed: the driver orders what is behind the pointer.
  if (void* context = known.load(std::memory_order_relaxed)) return context;
  int handle = 0;
  void* context = nullptr;
  const std::string object = "device " + std::to_string(device);
  if (const auto code = static_cast<DriverCode>(table_->device_get(&handle, device)); code != DriverCode::kSuccess) {
    throw failure(names(kind_).device_get, object, code);
  }
  // Held to the end of the process, as torch holds it: each retains the same one.
  if (const auto code = static_cast<DriverCode>(table_->context_retain(&context, handle));
      code != DriverCode::kSuccess) {
    throw failure(names(kind_).context_retain, object, code);
  }
  known.store(context, std::memory_order_relaxed);
  return context;
}

DeviceDriver::Scope::Scope(DeviceDriver& driver, int device) : driver_(driver), capture_mode_(kRelaxedCapture) {
  void* context = driver_.context(device);
  if (const auto code = static_cast<DriverCode>(driver_.table_->context_push(context)); code != DriverCode::kSuccess) {
    throw driver_.failure(names(driver_.kind_).context_push, "device " + std::to_string(device), code);
  }
  if (const auto code = static_cast<DriverCode>(driver_.table_->capture_mode(&capture_mode_));
      code != DriverCode::kSuccess) {
    void* popped = nullptr;
    (void)driver_.table_->context_pop(&popped);
    throw driver_.failure(names(driver_.kind_).capture_mode, "device " + std::to_string(device), code);
  }
}

DeviceDriver::Scope::~Scope() {
  (void)driver_.table_->capture_mode(&capture_mode_);
  void* popped = nullptr;
  (void)driver_.table_->context_pop(&popped);
}

DriverCode DeviceDriver::register_pages(void* base, std::size_t bytes, bool read_only) const {
  // Without READ_ONLY the driver wants to write, which a mapping for reading refuses.
  const unsigned flags = kPortable | (read_only && registers_for_reading_ ? kReadOnly : 0U);
  return static_cast<DriverCode>(table_->host_register(base, bytes, flags));
}

DriverCode DeviceDriver::unregister_pages(void* base) const {
  return static_cast<DriverCode>(table_->host_unregister(base));
}

bool DeviceDriver::is_registered(const void* base, std::size_t bytes) const {
  const auto address = reinterpret_cast<std::uintptr_t>(base);
  std::uintptr_t start = 0;
  std::size_t size = 0;
  return table_->pointer_attribute(&start, kRangeStart, address) == 0 &&
         table_->pointer_attribute(&size, kRangeSize, address) == 0 && start <= address &&
         address + bytes <= start + size;
}

void* DeviceDriver::record_event(void* stream) const {
  void* event = nullptr;
  if (const auto code = static_cast<DriverCode>(table_->event_create(&event, kEventWithoutTiming));
      code != DriverCode::kSuccess) {
    throw failure(names(kind_).event_create, "a copy from shared memory", code);
  }
  if (const auto code = static_cast<DriverCode>(table_->event_record(event, stream)); code != DriverCode::kSuccess) {
    destroy_event(event);
    throw failure(names(kind_).event_record, "a copy from shared memory", code);
  }
  return event;
}

DriverCode DeviceDriver::query_event(void* event) const { return static_cast<DriverCode>(table_->event_query(event)); }

void DeviceDriver::destroy_event(void* event) const { (void)table_->event_destroy(event); }

bool DeviceDriver::is_capturing(void* stream) const {
  int status = 0;
  return table_->stream_is_capturing(stream, &status) == 0 && status != 0;
}

const char* DeviceDriver::register_name() const { return names(kind_).host_register; }
const char* DeviceDriver::unregister_name() const { return names(kind_).host_unregister; }
const char* DeviceDriver::query_name() const { return names(kind_).event_query; }

Error DeviceDriver::failure(const char* call, const std::string& object, DriverCode code) const {
  const char* name = nullptr;
  if (table_ == nullptr || table_->error_name(static_cast<int>(code), &name) != 0 || name == nullptr) name = "error";
  return {ErrorCode::kDevice, std::string(call) + " of " + object + ": " + name + " (" +
                                  std::to_string(static_cast<int>(code)) + "); " + remedy(code)};
}

}  // namespace shmx
