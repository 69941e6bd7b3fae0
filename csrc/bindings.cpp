// The Python module shmx._core: the one file that sees pybind11.
//
// The GIL is the outermost lock. It is released before a system call, before a lock that may be held across
// one, and for copies over 64 KiB; the leaf locks of the core (process.hpp) are taken under it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "arena.hpp"
#include "copy.hpp"
#include "cuda_driver.hpp"
#include "destination_pool.hpp"
#include "dlpack_abi.hpp"
#include "docstrings.hpp"
#include "error.hpp"
#include "handle.hpp"
#include "host.hpp"
#include "in_flight.hpp"
#include "pinned.hpp"
#include "process.hpp"
#include "reaper.hpp"
#include "survey.hpp"

namespace py = pybind11;

namespace shmx {
namespace {
class SharedTensor;
class ReadersContext;
}  // namespace
}  // namespace shmx

// An object whose __init__ failed or never ran is refused like one of another type. By itself pybind11 would hand the
// method memory that was never constructed.
namespace pybind11::detail {
template <typename Class>
class initialized_caster : public type_caster_base<Class> {
 public:
  bool load(handle source, bool convert) {
    if (!type_caster_base<Class>::load(source, convert)) return false;
    auto* object = reinterpret_cast<instance*>(source.ptr());
    return object->get_value_and_holder(get_type_info(typeid(Class))).holder_constructed();
  }
};
template <>
class type_caster<shmx::SharedTensor> : public initialized_caster<shmx::SharedTensor> {};
template <>
class type_caster<shmx::ReadersContext> : public initialized_caster<shmx::ReadersContext> {};
template <>
class type_caster<shmx::Arena> : public initialized_caster<shmx::Arena> {};
}  // namespace pybind11::detail

namespace shmx {
namespace {

// As py::gil_scoped_release, for threads, too, that come back while the interpreter ends. Python before 3.14 unwinds
// such a thread, which no destructor lets pass: it would be an abort. Here it stands still instead, as from 3.14 on.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;
  ~GilReleased() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) ::pause();
    }
  }

 private:
  PyThreadState* state_;
};

using namespace pybind11::literals;

constexpr std::uint64_t kCopyWithoutGil = 64U << 10;
// Tensors that share a block begin at a cache line each.
constexpr std::uint64_t kPartAlignment = 64;
// Where an element of any dtype may begin.
constexpr std::uint64_t kElementAlignment = 16;
constexpr std::uint64_t kLargestTogether = 1ULL << 48;

// ---- errors

const char* exception_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kArenaFull:
      return "ArenaFullError";
    case ErrorCode::kSegmentLost:
      return "SegmentLostError";
    case ErrorCode::kStaleHandle:
      return "StaleHandleError";
    case ErrorCode::kForeignHost:
      return "ForeignHostError";
    case ErrorCode::kReleased:
      return "ReleasedError";
    case ErrorCode::kInvalidHandle:
      return "InvalidHandleError";
    case ErrorCode::kTooManyPeers:
      return "TooManyPeersError";
    case ErrorCode::kDevice:
      return "DeviceError";
    default:
      return "SystemCallError";
  }
}

py::object exception_object(const Error& error) {
  if (error.code() == ErrorCode::kInvalidArgument)
    return py::module_::import("builtins").attr("ValueError")(error.what());
  const py::object type = py::module_::import("shmx.errors").attr(exception_name(error.code()));
  if (error.system_errno() != 0 && PyObject_IsSubclass(type.ptr(), PyExc_OSError) == 1) {
    return type(error.system_errno(), error.what());
  }
  return type(error.what());
}

void translate_errors(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object exception = exception_object(error);
    PyErr_SetObject(py::type::handle_of(exception).ptr(), exception.ptr());
  }
}

// ---- torch, reached through Python objects only

py::str intern(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

// Filled when the module is imported, never freed: torch outlives every use.
struct Torch {
  // Attribute names, made once: a share asks for most of them.
  py::str dtype = intern("dtype"), is_cpu = intern("is_cpu"), is_meta = intern("is_meta"), layout = intern("layout"),
          is_neg = intern("is_neg"), is_conj = intern("is_conj"), shape = intern("shape");
  const dlpack::ExchangeApi* exchange;
  py::object tensor_type;
  py::object no_grad;
  py::object strided;
  std::array<PyObject*, kDtypes.size()> dtype_objects;
  std::unordered_map<PyObject*, Dtype> dtypes;
};
Torch* torch = nullptr;

void load_torch() {
  const py::module_ module = py::module_::import("torch");
  auto loaded = std::make_unique<Torch>();
  loaded->tensor_type = module.attr("Tensor");
  if (!py::hasattr(loaded->tensor_type, "__dlpack_c_exchange_api__")) {
    throw py::import_error("shmx needs torch >= 2.10 (this is " +
                           py::str(module.attr("__version__")).cast<std::string>() +
                           ", without torch.Tensor.__dlpack_c_exchange_api__): pip install -U torch");
  }
  const py::capsule capsule = loaded->tensor_type.attr("__dlpack_c_exchange_api__");
  loaded->exchange =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (loaded->exchange == nullptr) throw py::error_already_set();
  if (loaded->exchange->version.major != dlpack::kMajorVersion || loaded->exchange->tensor_from_object == nullptr) {
    throw py::import_error("shmx speaks DLPack 1.x; this torch does not: install a torch between 2.10 and 2.x");
  }
  loaded->no_grad = module.attr("no_grad");
  loaded->strided = module.attr("strided");
  for (std::size_t i = 0; i < kDtypes.size(); ++i) {
    // A dtype that this torch does not have yet is refused like any unknown one.
    const py::object dtype = py::getattr(module, kDtypes[i].torch_name, py::none());
    loaded->dtype_objects[i] = dtype.inc_ref().ptr();
    if (!dtype.is_none()) loaded->dtypes.emplace(dtype.ptr(), Dtype{static_cast<std::uint8_t>(i)});
  }
  torch = loaded.release();
}

py::object get(const py::object& object, const py::str& name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object dtype_object(Dtype dtype) { return py::reinterpret_borrow<py::object>(torch->dtype_objects[value(dtype)]); }

Dtype dtype_of(const py::handle& object) {
  const auto found = torch->dtypes.find(object.ptr());
  if (found != torch->dtypes.end()) return found->second;
  std::string names;
  for (const DtypeInfo& one : kDtypes) names += std::string(names.empty() ? "" : ", ") + one.torch_name;
  throw py::type_error("shmx cannot store dtype " + py::str(object).cast<std::string>() + "; it stores " + names +
                       " (dequantize or view the tensor as one of them)");
}

// The same of a DLPack type; nothing if Python has to be asked: torch calls its integers of less than a byte by the
// types of whole bytes.
std::optional<Dtype> dtype_of(const dlpack::DataType& type) {
  if (type.bits == 8 && type.code <= dlpack::kUnsigned) return std::nullopt;
  for (std::size_t i = 0; i < kDtypes.size(); ++i) {
    const DtypeInfo& known = kDtypes[i];
    if (known.dl_code != type.code || known.dl_bits != type.bits || known.dl_lanes != type.lanes) continue;
    if (torch->dtype_objects[i] == Py_None) return std::nullopt;
    return Dtype{static_cast<std::uint8_t>(i)};
  }
  return std::nullopt;
}

// A torch tensor over memory that `owner` keeps: a Hold, or a piece of the destination pool.
template <typename Owner>
py::object make_tensor(std::byte* data, const TensorMeta& meta, Owner owner) {
  struct Managed {
    dlpack::ManagedTensor dl;
    Owner owner;
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;
  };
  auto managed = std::make_unique<Managed>(Managed{{}, std::move(owner), meta.shape, meta.strides});
  if (managed->strides.empty()) {
    managed->strides.resize(managed->shape.size());
    // Unsigned: beside a size of 0 the others may multiply beyond any number.
    std::uint64_t step = 1;
    for (std::size_t i = managed->shape.size(); i-- > 0;) {
      managed->strides[i] = static_cast<std::int64_t>(step);
      step *= static_cast<std::uint64_t>(std::max<std::int64_t>(managed->shape[i], 1));
    }
  }
  const DtypeInfo& dtype = info(meta.dtype);
  managed->dl.version = {dlpack::kMajorVersion, 1};
  managed->dl.manager_context = managed.get();
  managed->dl.deleter = [](dlpack::ManagedTensor* tensor) { delete static_cast<Managed*>(tensor->manager_context); };
  managed->dl.tensor = {data,
                        {dlpack::kCpu, 0},
                        static_cast<std::int32_t>(meta.shape.size()),
                        {dtype.dl_code, dtype.dl_bits, dtype.dl_lanes},
                        managed->shape.data(),
                        managed->strides.data(),
                        0};
  void* object = nullptr;
  const int failed = torch->exchange->managed_tensor_to_object(&managed.release()->dl, &object);
  if (failed != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

class PooledMemory {
 public:
  explicit PooledMemory(std::size_t bytes) : bytes_(bytes), piece_(DestinationPool::instance().take(bytes)) {}
  PooledMemory(PooledMemory&& other) noexcept : bytes_(other.bytes_), piece_(other.piece_) {
    other.piece_.memory = nullptr;
  }
  PooledMemory& operator=(PooledMemory&&) = delete;
  PooledMemory(const PooledMemory&) = delete;
  PooledMemory& operator=(const PooledMemory&) = delete;
  ~PooledMemory() {
    if (piece_.memory != nullptr) DestinationPool::instance().give(piece_, bytes_);
  }
  [[nodiscard]] std::byte* get() const { return piece_.memory; }
  [[nodiscard]] Destination where() const { return piece_.where; }

 private:
  std::size_t bytes_;
  DestinationPool::Piece piece_;
};

void copy_tensor_bytes(void* destination, const void* source, std::uint64_t bytes, Destination where) {
  std::optional<GilReleased> released;
  if (bytes > kCopyWithoutGil) released.emplace();
  copy_bytes(destination, source, bytes, where);
}

// The content of bytes, a bytearray or a memoryview.
std::string contiguous_bytes(const py::buffer& data) {
  const py::object bytes = py::reinterpret_steal<py::object>(PyBytes_FromObject(data.ptr()));
  if (!bytes) throw py::error_already_set();
  return std::string(std::string_view(py::reinterpret_borrow<py::bytes>(bytes)));
}

// ---- readers(n)

// The context of `with shmx.readers(n)`; a context variable, so that tasks of one event loop do not see each
// other's.
class ReadersContext {
 public:
  explicit ReadersContext(const py::int_& count) : count_(checked(count)) {}

  static std::uint32_t checked(const py::int_& number) {
    int overflow = 0;
    const std::int64_t count = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow != 0 || count < 0 || count > MessageCell::kMaxReaders) {
      throw py::value_error("readers must lie between 0 and " + std::to_string(MessageCell::kMaxReaders) + ", not " +
                            py::str(number).cast<std::string>());
    }
    return static_cast<std::uint32_t>(count);
  }

  static std::optional<std::uint32_t> current_count() {
    const ReadersContext* context = current();
    return context == nullptr ? std::nullopt : std::optional(context->count());
  }

  static ReadersContext* current() {
    PyObject* value = nullptr;
    if (PyContextVar_Get(variable(), nullptr, &value) != 0) throw py::error_already_set();
    if (value == nullptr) return nullptr;
    const auto object = py::reinterpret_steal<py::object>(value);
    return object.is_none() ? nullptr : object.cast<ReadersContext*>();
  }

  void enter(const py::object& self) {
    if (token_) throw py::value_error("this readers() context is in use already; make another one");
    token_ = py::reinterpret_steal<py::object>(PyContextVar_Set(variable(), self.ptr()));
    if (!token_) throw py::error_already_set();
  }

  void exit(const py::object& exception_type) {
    const py::object token = std::move(token_);
    if (token && PyContextVar_Reset(variable(), token.ptr()) != 0) throw py::error_already_set();
    if (!exception_type.is_none()) {
      for (SentMessage& message : sent_) message.take_back();
    }
    sent_.clear();
  }

  [[nodiscard]] std::uint32_t count() const { return count_; }
  void note(SentMessage message) { sent_.push_back(std::move(message)); }

 private:
  static PyObject* variable() {
    static PyObject* instance = PyContextVar_New("shmx_readers", nullptr);
    return instance;
  }
  std::uint32_t count_;
  py::object token_;
  std::vector<SentMessage> sent_;
};

// ---- SharedTensor

class SharedTensor {
 public:
  explicit SharedTensor(Handle handle) : handle_(std::move(handle)) {}
  // One tensor of several in a block: `whole` is the SharedTensor of all its bytes, and travels once for all of them.
  SharedTensor(Handle handle, py::object whole) : handle_(std::move(handle)), whole_(std::move(whole)) {}

  // One load: of a pickle's text, or of the bytes of to_bytes(). With `whole` it is the load of that one.
  static SharedTensor from_text(const std::string& text, const py::object& whole) {
    if (whole.is_none()) return from_bytes(shmx::from_text(text));
    py::detail::make_caster<SharedTensor> tensor;
    if (!tensor.load(whole, false)) throw py::type_error("whole is the SharedTensor of a block, or None");
    Handle part = py::detail::cast_op<const SharedTensor&>(tensor).handle_.part(decode_part(shmx::from_text(text)));
    return part.available() ? SharedTensor(std::move(part), whole) : SharedTensor(std::move(part));
  }
  static SharedTensor from_bytes(std::string_view bytes) {
    const HandleState state = decode_handle(bytes);
    if (state.reason == ErrorCode::kNone && find_attachment(state.arena) != nullptr) {
      return SharedTensor(Handle::load(state));
    }
    const GilReleased released;
    return SharedTensor(Handle::load(state));
  }

  [[nodiscard]] std::string to_bytes(std::optional<std::uint32_t> count = std::nullopt) const {
    Readers readers;
    // Asked for only where its count or its notes are wanted: looking it up is most of the cost of this call.
    ReadersContext* context = count ? nullptr : ReadersContext::current();
    if (!count) count = bound_readers_;
    if (!count && whole_) count = whole_.cast<const SharedTensor&>().bound_readers_;
    if (!count && context != nullptr) count = context->count();
    if (count) readers = {*count, true};
    std::optional<SentMessage> sent;
    std::string bytes = handle_.to_bytes(readers, sent);
    if (sent && context != nullptr) context->note(std::move(*sent));
    return bytes;
  }

  // What a pickle calls to make this handle again, and with what.
  [[nodiscard]] py::tuple reduce() const {
    const py::type type = py::type::of<SharedTensor>();
    if (!whole_ || bound_readers_ || !available()) return py::make_tuple(type, py::make_tuple(to_text(to_bytes())));
    return py::make_tuple(type, py::make_tuple(to_text(encode_part(meta())), whole_));
  }

  [[nodiscard]] SharedTensor with_readers(const py::int_& count) const {
    SharedTensor bound(handle_.share());
    bound.bound_readers_ = ReadersContext::checked(count);
    return bound;
  }

  [[nodiscard]] SharedTensor copy() const {
    SharedTensor same(handle_.share(), whole_);
    same.bound_readers_ = bound_readers_;
    return same;
  }

  [[nodiscard]] py::object view() const {
    Hold hold = handle_.require().share();
    std::byte* data = map(hold) + meta().offset;
    return make_tensor(data, meta(), std::move(hold));
  }

  [[nodiscard]] py::object materialize_cpu() const {
    const Hold hold = handle_.require().share();
    const std::byte* data = map(hold) + meta().offset;
    TensorMeta contiguous = meta();
    contiguous.strides.clear();
    const std::uint64_t bytes = contiguous.elements() * info(contiguous.dtype).bytes;
    PooledMemory memory(bytes);
    std::byte* destination = memory.get();
    if (meta().strides.empty()) {
      copy_tensor_bytes(destination, data, bytes, memory.where());
      return make_tensor(destination, contiguous, std::move(memory));
    }
    py::object result = make_tensor(destination, contiguous, std::move(memory));
    result.attr("copy_")(view());
    return result;
  }

  [[nodiscard]] py::object materialize(const py::object& device, const py::object& stream, bool non_blocking) const {
    if (device.is_none()) return materialize_cpu();
    return py::module_::import("shmx.device").attr("materialize")(py::cast(*this), device, stream, non_blocking);
  }

  [[nodiscard]] py::object materialize_into(const py::object& destination) const {
    if (!py::isinstance(destination, torch->tensor_type)) {
      throw py::type_error("materialize_into takes a torch.Tensor, not " +
                           py::str(py::type::of(destination)).cast<std::string>());
    }
    const py::object expected = shape();
    if (!get(destination, torch->shape).equal(expected) ||
        !get(destination, torch->dtype).is(dtype_object(meta().dtype))) {
      throw py::value_error(
          "the destination is " + describe(get(destination, torch->shape), get(destination, torch->dtype)) +
          ", the tensor is " + describe(expected, dtype_object(meta().dtype)) + "; they must be equal");
    }
    const py::object guard = torch->no_grad();
    guard.attr("__enter__")();
    const struct Exit {
      const py::object& guard;
      ~Exit() { guard.attr("__exit__")(py::none(), py::none(), py::none()); }
    } exit{guard};
    if (get(destination, torch->is_cpu).cast<bool>() && destination.attr("is_contiguous")().cast<bool>() &&
        !get(destination, torch->is_conj)().cast<bool>() && !get(destination, torch->is_neg)().cast<bool>() &&
        meta().strides.empty()) {
      const Hold hold = handle_.require().share();
      const std::byte* data = map(hold) + meta().offset;
      auto* target = reinterpret_cast<void*>(destination.attr("data_ptr")().cast<std::uintptr_t>());
      const std::uint64_t bytes = nbytes();
      if (target == nullptr && bytes != 0) throw py::type_error("the destination has no memory behind it");
      copy_tensor_bytes(target, data, bytes, Destination::kHot);
    } else if (get(destination, torch->is_cpu).cast<bool>()) {
      destination.attr("copy_")(view());
    } else {
      py::module_::import("shmx.device").attr("materialize_into")(py::cast(*this), destination);
    }
    return destination;
  }

  // numpy's protocol: `copy` is None (if need be), True or False (never).
  [[nodiscard]] py::object array(const py::object& dtype, const py::object& copy) const {
    const py::object array = view().attr("numpy")();
    const py::object own = array.attr("dtype");
    const bool converts = !dtype.is_none() && !own.equal(dtype);
    const bool copies = !copy.is_none() && copy.cast<bool>();
    if (converts && !copies && !copy.is_none()) {
      throw py::value_error("another dtype needs a copy, and copy=False forbids one");
    }
    return converts || copies ? array.attr("astype")(dtype.is_none() ? own : dtype) : array;
  }

  void release() {
    handle_.release();
    // Moved out first: its destructor may run Python, which may look at this handle.
    const py::object whole = std::move(whole_);
  }
  void revoke();

  [[nodiscard]] py::tuple shape() const {
    py::tuple sizes(meta().shape.size());
    for (std::size_t i = 0; i < meta().shape.size(); ++i) sizes[i] = meta().shape[i];
    return sizes;
  }
  [[nodiscard]] py::object dtype() const { return dtype_object(meta().dtype); }
  [[nodiscard]] std::uint64_t nbytes() const { return meta().elements() * info(meta().dtype).bytes; }
  [[nodiscard]] std::size_t length() const {
    if (meta().shape.empty()) throw py::type_error("len() of a 0-d tensor");
    return static_cast<std::size_t>(meta().shape[0]);
  }
  [[nodiscard]] bool available() const { return handle_.available(); }
  [[nodiscard]] py::object error() const {
    const auto failure = handle_.failure();
    return failure ? exception_object(*failure) : py::none();
  }
  [[nodiscard]] std::string repr() const {
    std::string text = "SharedTensor(" + describe(shape(), dtype()) + ", " + control_name(handle_.origin().arena) +
                       " block " + std::to_string(value(handle_.origin().block)) + " generation " +
                       std::to_string(value(handle_.origin().generation));
    if (bound_readers_) text += ", readers=" + std::to_string(*bound_readers_);
    if (!available()) text += ", " + std::string(exception_name(handle_.failure()->code()));
    return text + ")";
  }
  [[nodiscard]] const Handle& handle() const { return handle_; }
  static std::byte* map(const Hold& hold) {
    if (std::byte* known = hold.attachment().mapped(hold)) return known;
    const GilReleased released;
    return hold.attachment().data(hold);
  }

 private:
  [[nodiscard]] const TensorMeta& meta() const { return handle_.meta(); }
  static std::string describe(const py::handle& shape, const py::handle& dtype) {
    return "shape " + py::str(py::tuple(py::reinterpret_borrow<py::object>(shape))).cast<std::string>() + " " +
           py::str(dtype).cast<std::string>();
  }

  Handle handle_;
  py::object whole_;
  std::optional<std::uint32_t> bound_readers_;
};

// ---- Arena

std::uint64_t positive_bytes(const py::int_& number, const char* name) {
  const std::uint64_t bytes = PyLong_AsUnsignedLongLong(number.ptr());
  if (PyErr_Occurred() != nullptr || bytes == 0) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " is a positive number of bytes of at most 64 TiB, not " +
                          py::str(number).cast<std::string>());
  }
  return bytes;
}

const char* backend_name(Backend backend) { return backend == Backend::kShm ? "shm" : "memfd"; }

BackendChoice backend_choice(const std::string& name) {
  if (name == "shm") return BackendChoice::kShm;
  if (name == "memfd") return BackendChoice::kMemfd;
  if (name == "auto") return BackendChoice::kAuto;
  throw py::value_error("backend is 'shm', 'memfd' or 'auto', not '" + name + "'");
}

std::shared_ptr<Arena> make_arena(const std::optional<py::int_>& capacity, const std::optional<py::int_>& segment_bytes,
                                  std::optional<double> ticket_ttl, std::optional<double> reuse_delay, bool scrub,
                                  const std::optional<py::int_>& reserve, std::optional<int> numa_node,
                                  std::optional<gid_t> group, const std::optional<std::string>& backend) {
  ArenaOptions options;
  if (backend) options.backend = backend_choice(*backend);
  if (capacity) options.capacity = positive_bytes(*capacity, "capacity");
  if (segment_bytes) options.segment_bytes = positive_bytes(*segment_bytes, "segment_bytes");
  if (ticket_ttl) options.ticket_ttl = *ticket_ttl;
  if (reuse_delay) options.reuse_delay = *reuse_delay;
  options.scrub = scrub;
  if (reserve) options.reserve = positive_bytes(*reserve, "reserve");
  options.numa_node = numa_node;
  options.group = group;
  const GilReleased released;
  return Arena::create(options);
}

// How an allocation gets its room.
struct Wait {
  std::optional<double> timeout;  // seconds; by default it fails at once
  bool system_calls = true;       // false: throws NeedsSystemCall instead of making one
};
struct NeedsSystemCall {};

Allocation allocate(Arena& arena, std::uint64_t bytes, Wait wait) {
  if (wait.timeout && std::isnan(*wait.timeout)) throw py::value_error("timeout is a number of seconds, or None");
  if (auto found = arena.try_allocate(ByteCount{bytes})) return std::move(*found);
  if (!wait.system_calls) throw NeedsSystemCall{};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(wait.timeout.value_or(0));
  for (auto pause = std::chrono::microseconds(50);; pause = std::min(2 * pause, std::chrono::microseconds(5000))) {
    try {
      std::optional<std::string> notice;
      std::optional<Allocation> allocation;
      {
        const GilReleased released;
        allocation = arena.allocate(ByteCount{bytes});
        notice = arena.take_expiry_notice();
      }
      if (notice) py::module_::import("logging").attr("getLogger")("shmx").attr("warning")("%s", *notice);
      if (notice && PyErr_WarnEx(PyExc_RuntimeWarning, notice->c_str(), 1) != 0) throw py::error_already_set();
      return std::move(*allocation);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kArenaFull || bytes > arena.options().capacity ||
          std::chrono::steady_clock::now() >= deadline) {
        throw;
      }
    }
    {
      const GilReleased released;
      std::this_thread::sleep_for(pause);
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

std::uint64_t checked_bytes(const TensorMeta& meta) {
  std::uint64_t bytes = info(meta.dtype).bytes;
  for (const std::int64_t size : meta.shape) {
    if (size < 0) throw py::value_error("a tensor has no negative size: " + std::to_string(size));
    if (size == 0) bytes = 0;
  }
  for (const std::int64_t size : meta.shape) {
    if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes)) {
      throw Error(ErrorCode::kArenaFull, "no arena holds a tensor of more than 2^64 bytes", ENOSPC);
    }
  }
  if (meta.shape.size() > kMaxDimensions) throw py::value_error("a tensor has at most 64 dimensions");
  return bytes;
}

py::object arena_empty(Arena& arena, TensorMeta meta, std::optional<double> timeout) {
  Allocation allocation = allocate(arena, checked_bytes(meta), {timeout});
  return make_tensor(allocation.data, meta, std::move(allocation.hold));
}

std::string describe_key(const TensorMeta& meta) {
  HandleState state;
  state.meta = meta;
  return encode_handle(state);
}

// Refuses what cannot be shared; answers the dtype of what can.
Dtype checked_dtype(const py::object& tensor) {
  if (!py::isinstance(tensor, torch->tensor_type)) {
    throw py::type_error("share takes a torch.Tensor, not " + py::str(py::type::of(tensor)).cast<std::string>() +
                         "; use torch.from_numpy or torch.as_tensor first");
  }
  const Dtype dtype = dtype_of(get(tensor, torch->dtype));
  if (!get(tensor, torch->layout).is(torch->strided) || get(tensor, torch->is_meta).cast<bool>()) {
    throw py::type_error("shmx shares dense tensors with data, not " +
                         py::str(get(tensor, torch->layout)).cast<std::string>() +
                         (get(tensor, torch->is_meta).cast<bool>() ? " on the meta device" : "") +
                         "; convert it first (to_dense(), or share its parts)");
  }
  return dtype;
}

// A tensor that is to be shared, as it is now.
struct Source {
  py::object tensor;
  TensorMeta meta;                  // with strides unless it is contiguous or not on the CPU
  std::uint64_t bytes = 0;          // of its elements
  const std::byte* data = nullptr;  // nothing where only torch can read the elements
};

bool is_true(const py::object& tensor, const py::str& method) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// The memory of a CPU tensor, borrowed from it. Other tensors, and what has no plain memory, make no difference here:
// Python is asked about them, for what may be done and for what to say.
std::optional<dlpack::Tensor> memory_of(const py::object& tensor) {
  dlpack::Tensor dl{};
  if (!py::isinstance(tensor, torch->tensor_type)) return std::nullopt;
  if (torch->exchange->tensor_from_object(tensor.ptr(), &dl) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  if (dl.device.type != dlpack::kCpu) return std::nullopt;
  return dl;
}

Source inspect(py::object tensor) {
  Source source;
  TensorMeta& meta = source.meta;
  const auto dl = memory_of(tensor);
  const auto dtype = dl ? dtype_of(dl->dtype) : std::nullopt;
  // The order of the questions is that of their cost: most tensors answer the first.
  meta.dtype = dtype ? *dtype : checked_dtype(tensor);
  source.tensor = std::move(tensor);
  if (dl) {
    meta.shape.assign(dl->shape, dl->shape + dl->ndim);
  } else {
    meta.shape = get(source.tensor, torch->shape).cast<std::vector<std::int64_t>>();
  }
  source.bytes = checked_bytes(meta);
  if (!dl) {
    if (get(source.tensor, torch->is_cpu).cast<bool>()) {
      throw py::type_error("this tensor has no plain memory to share; make a copy of it (clone())");
    }
    return source;
  }
  if (source.bytes == 0 || is_true(source.tensor, torch->is_neg) ||
      (info(meta.dtype).dl_code == dlpack::kComplex && is_true(source.tensor, torch->is_conj))) {
    return source;
  }
  bool contiguous = true;
  if (dl->strides != nullptr) {
    std::int64_t step = 1;
    for (std::int32_t i = dl->ndim; i-- > 0;) {
      contiguous = contiguous && (dl->shape[i] == 1 || dl->strides[i] == step);
      step *= dl->shape[i];
    }
  }
  if (dl->data == nullptr) {
    throw py::type_error(
        "this tensor has no memory behind it (a fake tensor, or one whose storage was freed); share one "
        "with data");
  }
  source.data = static_cast<const std::byte*>(dl->data) + dl->byte_offset;
  if (!contiguous) {
    meta.strides.assign(dl->strides, dl->strides + dl->ndim);
    // The stride of a dimension of size 1 is never stepped, and may be any number.
    for (std::size_t i = 0; i < meta.shape.size(); ++i) {
      if (meta.shape[i] == 1) meta.strides[i] = 1;
    }
  }
  return source;
}

std::optional<SharedTensor> share_in_place(Arena& arena, const Source& source) {
  if (source.data == nullptr || !arena.may_contain(source.data)) return std::nullopt;
  std::optional<Arena::Located> located;
  {
    const GilReleased released;
    located = arena.locate(source.data);
  }
  if (!located) return std::nullopt;
  TensorMeta placed = source.meta;
  placed.offset = located->offset;
  if (placed.end() > located->block_bytes) return std::nullopt;
  return SharedTensor(Handle(std::move(placed), std::move(located->hold)));
}

// Tensors on devices, each after the one in the arena that it is to be copied into.
using FromDevices = std::vector<std::pair<py::object, py::object>>;

// Returns when all are there; one wait for each device.
void copy_from_devices(const FromDevices& copies) {
  if (copies.empty()) return;
  py::module_::import("shmx.device").attr("fill_from_devices")(py::cast(copies));
}

// Writes the elements of a source into a block, contiguous, and answers what it looks like there. From a device it is
// only noted what is to be copied.
TensorMeta fill(const Allocation& block, const Source& source, std::uint64_t offset, std::size_t together,
                FromDevices& from_devices) {
  TensorMeta stored = source.meta;
  stored.strides.clear();
  stored.offset = offset;
  if (source.data != nullptr && source.meta.strides.empty()) {
    copy_piece(block.data + offset, source.data, source.bytes, together, block.where);
  } else if (source.bytes != 0) {
    const py::gil_scoped_acquire held;
    const py::object target = make_tensor(block.data + offset, stored, block.hold.share());
    if (get(source.tensor, torch->is_cpu).cast<bool>()) {
      // Any layout: torch copies into a tensor that lives in the arena.
      target.attr("copy_")(source.tensor.attr("detach")());
    } else {
      from_devices.emplace_back(target, source.tensor.attr("detach")());
    }
  }
  return stored;
}

SharedTensor share_tensor(Arena& arena, const Source& source, Wait wait) {
  if (auto shared = share_in_place(arena, source)) return std::move(*shared);
  Allocation allocation = allocate(arena, source.bytes, wait);
  TensorMeta stored;
  FromDevices from_devices;
  {
    std::optional<GilReleased> released;
    if (source.bytes > kCopyWithoutGil) released.emplace();
    stored = fill(allocation, source, 0, source.bytes, from_devices);
  }
  copy_from_devices(from_devices);
  return SharedTensor(Handle(std::move(stored), std::move(allocation.hold)));
}

SharedTensor arena_share(Arena& arena, const py::object& tensor, const std::optional<std::string>& key, Wait wait) {
  const Source source = inspect(tensor);
  if (!key) return share_tensor(arena, source, wait);
  if (key->empty()) throw py::value_error("key is a string that is not empty");
  std::optional<Arena::Keyed> known;
  {
    const GilReleased released;
    known = arena.find_key(*key);
  }
  if (known) {
    TensorMeta meta = decode_handle(known->description).meta;
    if (meta.shape != source.meta.shape || meta.dtype != source.meta.dtype) {
      throw py::value_error("key '" + *key +
                            "' is taken by a tensor of another shape or dtype; a key names content, "
                            "so give different content a different key");
    }
    return SharedTensor(Handle(std::move(meta), std::move(known->hold)));
  }
  SharedTensor shared = share_tensor(arena, source, wait);
  {
    const GilReleased released;
    arena.note_key(*key, shared.handle().require(), describe_key(shared.handle().meta()));
  }
  return shared;
}

// Nothing if it takes a system call, or a wait for another thread that makes one.
std::optional<SharedTensor> arena_try_share(Arena& arena, const py::object& tensor) {
  try {
    return arena_share(arena, tensor, std::nullopt, {std::nullopt, false});
  } catch (const NeedsSystemCall&) {
    return std::nullopt;
  }
}

std::vector<SharedTensor> arena_share_many(Arena& arena, const py::iterable& tensors, std::optional<double> timeout,
                                           const std::optional<py::int_>& readers) {
  const auto bound = [&readers](SharedTensor shared) {
    return readers ? shared.with_readers(*readers) : std::move(shared);
  };
  if (readers) ReadersContext::checked(*readers);
  std::vector<Source> sources;
  for (const py::handle tensor : tensors) sources.push_back(inspect(py::reinterpret_borrow<py::object>(tensor)));
  std::vector<std::optional<SharedTensor>> in_place(sources.size());
  std::vector<std::uint64_t> offsets(sources.size());
  std::uint64_t total = 0;
  std::size_t copies = 0;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if ((in_place[i] = share_in_place(arena, sources[i]))) continue;
    ++copies;
    offsets[i] = (total + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
    if (__builtin_add_overflow(offsets[i], sources[i].bytes, &total) || total > kLargestTogether) {
      throw Error(ErrorCode::kArenaFull, "no arena holds tensors of more than 2^48 bytes", ENOSPC);
    }
  }
  std::vector<SharedTensor> shared;
  shared.reserve(sources.size());
  if (copies <= 1) {
    for (std::size_t i = 0; i < sources.size(); ++i) {
      shared.push_back(bound(in_place[i] ? std::move(*in_place[i]) : share_tensor(arena, sources[i], {timeout})));
    }
    return shared;
  }
  Allocation allocation = allocate(arena, total, {timeout});
  std::vector<TensorMeta> stored(sources.size());
  FromDevices from_devices;
  {
    std::optional<GilReleased> released;
    if (total > kCopyWithoutGil) released.emplace();
    std::uint64_t end = 0;
    for (std::size_t i = 0; i < sources.size(); ++i) {
      if (in_place[i]) continue;
      // The handle of the whole reaches what lies between the parts.
      std::memset(allocation.data + end, 0, offsets[i] - end);
      stored[i] = fill(allocation, sources[i], offsets[i], total, from_devices);
      end = offsets[i] + sources[i].bytes;
    }
  }
  copy_from_devices(from_devices);
  const TensorMeta all{kBytesDtype, 0, {static_cast<std::int64_t>(total)}, {}};
  const py::object whole = py::cast(bound(SharedTensor(Handle(all, allocation.hold.share()))));
  for (std::size_t i = 0; i < sources.size(); ++i) {
    shared.push_back(in_place[i] ? bound(std::move(*in_place[i]))
                                 : SharedTensor(Handle(std::move(stored[i]), allocation.hold.share()), whole));
  }
  return shared;
}

void SharedTensor::revoke() {
  if (!handle_.available()) return;
  const Hold hold = handle_.require().share();
  Attachment& attachment = hold.attachment();
  const auto arena = attachment.owner();
  if (!arena) {
    throw Error(ErrorCode::kReleased, "only the process that owns arena " + attachment.control().name() +
                                          " can revoke in it; release() gives up this process's own use");
  }
  {
    const GilReleased released;
    arena->revoke(hold);
  }
  release();
}

py::dict arena_stats(Arena& arena) {
  ArenaStats stats;
  {
    const GilReleased released;
    stats = arena.stats();
  }
  py::dict result;
  result["name"] = stats.name;
  result["backend"] = backend_name(stats.backend);
  result["capacity"] = stats.capacity;
  result["reserved_bytes"] = stats.reserved;
  result["bytes_in_use"] = stats.in_blocks;
  result["largest_free_bytes"] = stats.largest_free;
  result["numa_node"] = stats.numa_node;
  result["segments"] = stats.segments;
  result["blocks"] = stats.blocks;
  result["held_blocks"] = stats.held_blocks;
  result["messages"] = stats.messages;
  result["holders"] = stats.peers;
  result["published"] = stats.published;
  result["reused"] = stats.reused;
  result["dead_peers_swept"] = stats.swept;
  result["expired_messages"] = stats.expired;
  result["revoked"] = stats.revoked;
  result["peak_reserved_bytes"] = stats.peak_reserved;
  result["peak_block_bytes"] = stats.peak_in_blocks;
  return result;
}

// What this process has done in each arena that it takes part in; of its own arenas their statistics, too.
py::list membership_counts() {
  py::list result;
  for (const auto& attachment : all_attachments()) {
    const auto arena = attachment->owner();
    Attachment::Counts counts{};
    {
      const GilReleased released;
      counts = attachment->counts();
    }
    py::dict one;
    one["name"] = attachment->control().name();
    one["backend"] = backend_name(attachment->control().backend());
    one["loaded"] = counts.loaded;
    one["stale_loads"] = counts.stale_loads;
    one["held_blocks"] = counts.held_blocks;
    one["held_bytes"] = counts.held_bytes;
    one["owned"] = arena ? py::object(arena_stats(*arena)) : py::none();
    result.append(one);
  }
  return result;
}

const char* outcome_name(Reaped outcome) {
  switch (outcome) {
    case Reaped::kRemoved:
      return "removed";
    case Reaped::kInUse:
      return "in use";
    case Reaped::kOwnerAlive:
      return "owner alive";
    case Reaped::kNotOurs:
      return "not ours";
  }
  return "unknown";
}

const char* state_name(ArenaState state) {
  switch (state) {
    case ArenaState::kAlive:
      return "alive";
    case ArenaState::kOrphan:
      return "orphan";
    case ArenaState::kStarting:
      return "starting";
    case ArenaState::kTorn:
      return "torn";
    case ArenaState::kHeadless:
      return "headless";
    case ArenaState::kForeign:
      return "foreign";
    case ArenaState::kOtherVersion:
      return "other version";
    case ArenaState::kDamaged:
      return "damaged";
  }
  return "unknown";
}

py::dict describe(const ArenaSurvey& arena) {
  py::dict result;
  result["name"] = arena.name;
  result["backend"] = backend_name(arena.backend);
  result["state"] = state_name(arena.state);
  result["trouble"] = arena.trouble;
  result["uid"] = arena.uid;
  result["memory_bytes"] = arena.memory_bytes;
  result["attached"] = arena.attached;
  if (arena.state != ArenaState::kAlive && arena.state != ArenaState::kOrphan) return result;
  result["owner_pid"] = arena.owner_pid;
  result["owner_left"] = arena.owner_left;
  result["capacity"] = arena.capacity;
  result["ticket_ttl"] = arena.ticket_ttl;
  result["reserved_bytes"] = arena.reserved_bytes;
  result["segments"] = arena.segments;
  result["blocks_in_use"] = arena.blocks_in_use;
  result["bytes_in_use"] = arena.bytes_in_use;
  result["messages"] = arena.messages;
  result["expired_messages"] = arena.expired_messages;
  result["loads_to_come"] = arena.loads_to_come;
  result["oldest_message_seconds"] = arena.oldest_message;
  py::list peers;
  for (const PeerSurvey& peer : arena.peers) {
    peers.append(py::dict("slot"_a = peer.slot, "pid"_a = peer.pid, "alive"_a = peer.alive, "blocks"_a = peer.blocks,
                          "bytes"_a = peer.bytes));
  }
  result["peers"] = peers;
  return result;
}

py::list survey_arenas() {
  std::vector<ArenaSurvey> arenas;
  {
    const GilReleased released;
    arenas = survey();
  }
  py::list result;
  for (const ArenaSurvey& arena : arenas) result.append(describe(arena));
  return result;
}

py::list noted_removals() {
  std::vector<Removal> removals;
  {
    const GilReleased released;
    removals = take_removals();
  }
  py::list result;
  for (const Removal& one : removals) {
    result.append(py::dict("name"_a = one.name, "bytes"_a = one.bytes, "own"_a = one.own));
  }
  return result;
}

py::list reap_all_arenas(bool force) {
  std::vector<ReapReport> reports;
  {
    const GilReleased released;
    reports = reap_all(force ? Expiry::kNow : Expiry::kTimeToLive);
  }
  py::list result;
  for (const ReapReport& report : reports) {
    py::dict one;
    one["name"] = report.name;
    one["outcome"] = outcome_name(report.outcome);
    one["bytes"] = report.bytes;
    result.append(one);
  }
  return result;
}

// ---- devices

DriverKind checked_driver(const std::string& name) {
  const auto kind = driver_kind(name);
  if (!kind) throw py::value_error("a backend is \"cuda\" or \"hip\", not \"" + name + "\"");
  return *kind;
}

void refuse_capture(DeviceDriver& driver, int device, void* stream) {
  const DeviceDriver::Scope scope(driver, device);
  if (!driver.is_capturing(stream)) return;
  throw Error(ErrorCode::kDevice,
              "the stream is capturing a graph, which would copy from or to a block of shared memory again when it is "
              "used for something else; share and materialize outside the capture, and copy_ into the graph's input");
}

// Copies of published tensors to a device, which torch makes: what they read and where registrations meet in it. The
// blocks stay in use until it is said how the copies ended.
class DeviceCopy {
 public:
  // Contiguous bytes that one or several tensors lie in, side by side.
  struct Group {
    std::vector<std::pair<std::size_t, std::uint64_t>> members;  // index of the tensor, offset in the group
    std::byte* base = nullptr;
    std::uint64_t bytes = 0;
    std::optional<std::vector<std::uint64_t>> cuts;  // nothing: not registered
    std::size_t hold = 0;
    bool contiguous = true;
  };

  DeviceCopy(const py::iterable& handles, const std::optional<std::string>& backend, int device, std::uintptr_t stream)
      : device_(device), stream_(reinterpret_cast<void*>(stream)) {
    if (backend) kind_ = checked_driver(*backend);
    driver_ = kind_ ? DeviceDriver::known(*kind_) : nullptr;
    for (const py::handle object : handles) add(object.cast<const SharedTensor&>());
    if (!kind_) return;
    for (Group& group : groups_) {
      Attachment& attachment = holds_[group.hold].attachment();
      if (driver_ != nullptr && group.contiguous) group.cuts = attachment.cuts(group.base, group.bytes);
      registered_ = registered_ || group.cuts;
      if (!group.cuts && attachment.may_pin()) {
        Pinner::instance().want(attachment.shared_from_this(), *kind_, device_);
      }
    }
    if (driver_ == nullptr) return;
    const GilReleased released;
    InFlight::instance().poll();
    refuse_capture(*driver_, device_, stream_);
  }

  [[nodiscard]] py::list groups() const {
    py::list result;
    for (const Group& group : groups_) {
      result.append(py::make_tuple(group.members, group.bytes, group.cuts, group.contiguous));
    }
    return result;
  }
  [[nodiscard]] py::object bytes_of(std::size_t index) const {
    const Group& group = groups_.at(index);
    return make_tensor(group.base, {kBytesDtype, 0, {static_cast<std::int64_t>(group.bytes)}, {}},
                       holds_[group.hold].share());
  }
  [[nodiscard]] bool registered() const { return registered_; }
  // The copies are in the stream: the blocks stay in use until the device has done them.
  void depart() {
    if (driver_ == nullptr) throw Error(ErrorCode::kDevice, "no driver was there when this copy began");
    const GilReleased released;
    InFlight::instance().depart(holds_, *driver_, device_, stream_);
  }
  // They are done.
  void finish() { holds_.clear(); }
  // Nobody knows.
  void keep() { InFlight::instance().keep(holds_); }

 private:
  void add(const SharedTensor& tensor) {
    const std::size_t index = count_++;
    const TensorMeta& meta = tensor.handle().meta();
    Hold hold = tensor.handle().require().share();
    std::byte* base = SharedTensor::map(hold) + meta.offset;
    const std::uint64_t bytes = tensor.nbytes();
    if (bytes == 0) return;
    const bool contiguous = meta.strides.empty();
    if (contiguous && !groups_.empty()) {
      Group& last = groups_.back();
      const Hold& other = holds_[last.hold];
      if (last.contiguous && &other.attachment() == &hold.attachment() && other.block() == hold.block() &&
          base >= last.base + last.bytes && base < last.base + last.bytes + kPartAlignment &&
          static_cast<std::uint64_t>(base - last.base) % kElementAlignment == 0) {
        last.members.emplace_back(index, static_cast<std::uint64_t>(base - last.base));
        last.bytes = static_cast<std::uint64_t>(base - last.base) + bytes;
        return;
      }
    }
    holds_.push_back(std::move(hold));
    groups_.push_back({{{index, 0}}, base, bytes, std::nullopt, holds_.size() - 1, contiguous});
  }

  std::optional<DriverKind> kind_;
  DeviceDriver* driver_ = nullptr;
  int device_;
  void* stream_;
  std::size_t count_ = 0;
  bool registered_ = false;
  std::vector<Hold> holds_;
  std::vector<Group> groups_;
};

void refuse_capture_by(const std::string& backend, int device, std::uintptr_t stream) {
  const DriverKind kind = checked_driver(backend);
  const GilReleased released;
  DeviceDriver* driver = DeviceDriver::get(kind);
  if (driver != nullptr) refuse_capture(*driver, device, reinterpret_cast<void*>(stream));
}

// Of memory of an arena: where registrations meet in it, or nothing if it is not all registered, which is then begun.
std::optional<std::vector<std::uint64_t>> registered_cuts(std::uintptr_t address, std::uint64_t bytes,
                                                          const std::string& backend, int device) {
  const DriverKind kind = checked_driver(backend);
  const auto* base = reinterpret_cast<const std::byte*>(address);
  for (const auto& attachment : all_attachments()) {
    const auto arena = attachment->owner();
    if (!arena || !arena->may_contain(base)) continue;
    if (auto cuts = attachment->cuts(base, bytes)) return cuts;
    if (attachment->may_pin()) Pinner::instance().want(attachment, kind, device);
  }
  return std::nullopt;
}

bool pin_arena(const SharedTensor& tensor, const std::string& backend, int device) {
  const DriverKind kind = checked_driver(backend);
  const GilReleased released;
  const auto attachment = attach(tensor.handle().origin().arena);
  attachment->allow_pinning();
  return Pinner::pin_now(*attachment, kind, device);
}

void refuse_pinning(const SharedTensor& tensor) {
  const GilReleased released;
  const auto attachment = attach(tensor.handle().origin().arena);
  // What is locked stays so until it is unmapped: another thread may be about to copy from it.
  attachment->refuse_pinning();
}

// For measurements: locked pages are given up by themselves when they are unmapped.
void unpin_arena(const SharedTensor& tensor) {
  const GilReleased released;
  if (InFlight::instance().report().copies != 0) {
    throw Error(ErrorCode::kDevice, "copies are under way: synchronize the device and call poll_copies first");
  }
  attach(tensor.handle().origin().arena)->unpin();
}

py::dict pin_report() {
  const PinReport report = PinLedger::instance().report();
  const InFlight::Report copies = InFlight::instance().report();
  py::dict result;
  result["backend"] = report.backend;
  result["bytes"] = report.bytes;
  result["chunks"] = report.chunks;
  result["foreign_bytes"] = report.foreign_bytes;
  result["registrations"] = report.registrations;
  result["milliseconds"] = static_cast<double>(report.nanoseconds) / 1e6;
  result["quarantined_bytes"] = report.quarantined_bytes;
  result["reason"] = report.reason;
  result["copies_in_flight"] = copies.copies;
  result["copies_lost"] = copies.kept;
  result["trouble"] = copies.trouble;
  return result;
}

// What devices do and have locked ends first: a block must not be used again under a copy, nor unmapped while locked.
void leave_devices_and_all() {
  constexpr auto kLongestDrain = std::chrono::seconds(5);
  const bool drained = InFlight::instance().drain(kLongestDrain);
  Pinner::instance().stop();
  // Otherwise the end of the process unregisters, with the device.
  if (drained && InFlight::instance().report().kept == 0) {
    for (const auto& attachment : all_attachments()) attachment->unpin();
  }
  leave_all();
}

// Joins the arena of a handle and maps all of it.
void attach_to(const SharedTensor& tensor) {
  const GilReleased released;
  const auto attachment = attach(tensor.handle().origin().arena, tensor.handle().origin().place);
  attachment->map_all();
}

bool discard_text(const std::string& text) {
  const HandleState state = decode_handle(from_text(text));
  const GilReleased released;
  return discard(state);
}

bool discard_bytes(const py::buffer& data) {
  const HandleState state = decode_handle(contiguous_bytes(data));
  const GilReleased released;
  return discard(state);
}

// Without these, copyreg makes a bare pybind11 object of it at protocols 0 and 1, which ends the process.
template <typename Class>
void refuse_pickling(Class& bound, const char* remedy) {
  const auto refuse = [remedy](const py::object& self) -> py::object {
    const auto name = py::type::of(self).attr("__name__").cast<std::string>();
    throw py::type_error("cannot pickle '" + name + "' object: " + remedy);
  };
  bound.def("__reduce__", refuse);
  bound.def("__reduce_ex__", [refuse](const py::object& self, int) { return refuse(self); });
}

}  // namespace
}  // namespace shmx

PYBIND11_MODULE(_core, module) {
  using namespace shmx;
  using namespace pybind11::literals;

  prepare_process();
  py::options options;
  options.disable_function_signatures();
  py::register_exception_translator(&translate_errors);
  load_torch();

  py::class_<ReadersContext> readers(module, "readers", doc::kReaders);
  refuse_pickling(readers, "pickle inside of it");
  readers.def(py::init<const py::int_&>(), "n"_a)
      .def("__enter__",
           [](ReadersContext& self) {
             // The object that exists already, not another one.
             py::object object = py::cast(&self, py::return_value_policy::reference);
             self.enter(object);
             return object;
           })
      .def("__exit__",
           [](ReadersContext& self, const py::object& type, const py::object&, const py::object&) { self.exit(type); });

  py::class_<SharedTensor>(module, "SharedTensor", doc::kSharedTensor)
      .def(py::init(&SharedTensor::from_text), "text"_a, "whole"_a = py::none())
      .def("__reduce__", &SharedTensor::reduce)
      .def("__reduce_ex__", [](const SharedTensor& self, int) { return self.reduce(); })
      .def("__copy__", &SharedTensor::copy)
      .def("__deepcopy__", [](const SharedTensor& self, const py::object&) { return self.copy(); })
      .def(
          "to_bytes",
          [](const SharedTensor& self, const std::optional<py::int_>& readers) {
            return py::bytes(self.to_bytes(readers ? std::optional(ReadersContext::checked(*readers)) : std::nullopt));
          },
          py::kw_only(), "readers"_a = py::none(), doc::kToBytes)
      .def_static(
          "from_bytes",
          [](const py::buffer& data) {
            if (PyBytes_CheckExact(data.ptr()) != 0) {
              return SharedTensor::from_bytes(std::string_view(py::reinterpret_borrow<py::bytes>(data)));
            }
            return SharedTensor::from_bytes(contiguous_bytes(data));
          },
          "data"_a, doc::kFromBytes)
      .def("with_readers", &SharedTensor::with_readers, "n"_a, doc::kWithReaders)
      .def("view", &SharedTensor::view, doc::kView)
      .def("materialize", &SharedTensor::materialize, "device"_a = py::none(), py::kw_only(), "stream"_a = py::none(),
           "non_blocking"_a = true, doc::kMaterialize)
      .def("materialize_into", &SharedTensor::materialize_into, "dst"_a, doc::kMaterializeInto)
      .def("release", &SharedTensor::release, doc::kRelease)
      .def("revoke", &SharedTensor::revoke, doc::kRevoke)
      .def(
          "numpy", [](const SharedTensor& self) { return self.view().attr("numpy")(); },
          "Zero-copy ``numpy.ndarray`` of the shared pages; as :meth:`view`.")
      .def("__array__", &SharedTensor::array, "dtype"_a = py::none(), py::kw_only(), "copy"_a = py::none())
      .def("__dlpack__",
           [](const SharedTensor& self, const py::kwargs& kwargs) { return self.view().attr("__dlpack__")(**kwargs); })
      .def("__dlpack_device__", [](const SharedTensor&) { return py::make_tuple(dlpack::kCpu, 0); })
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](SharedTensor& self, const py::args&) { self.release(); })
      .def("__len__", &SharedTensor::length)
      .def("__repr__", &SharedTensor::repr)
      .def_property_readonly("shape", &SharedTensor::shape, "Sizes, as a tuple.")
      .def_property_readonly("dtype", &SharedTensor::dtype, "The ``torch.dtype``.")
      .def_property_readonly("nbytes", &SharedTensor::nbytes, "Bytes of the elements.")
      .def_property_readonly("is_available", &SharedTensor::available,
                             "Whether this handle holds its data; if not, :attr:`error` says why.")
      .def_property_readonly(
          "error", &SharedTensor::error,
          "Why there is no data, as the exception that :meth:`view` raises; ``None`` while there is.");

  py::class_<Arena, std::shared_ptr<Arena>> arena(module, "Arena");
  refuse_pickling(arena, "it belongs to its process; share a tensor in it and send the handle");
  arena
      .def(py::init(&make_arena), py::kw_only(), "capacity"_a = py::none(), "segment_bytes"_a = py::none(),
           "ticket_ttl"_a = py::none(), "reuse_delay"_a = py::none(), "scrub"_a = false, "reserve"_a = py::none(),
           "numa_node"_a = py::none(), "group"_a = py::none(), "backend"_a = py::none())
      .def(
          "share",
          [](Arena& arena, const py::object& tensor, const std::optional<std::string>& key,
             std::optional<double> timeout) { return arena_share(arena, tensor, key, {timeout}); },
          "tensor"_a, py::kw_only(), "key"_a = py::none(), "timeout"_a = py::none(), doc::kShare)
      .def("share_many", &arena_share_many, "tensors"_a, py::kw_only(), "timeout"_a = py::none(),
           "readers"_a = py::none(), doc::kShareMany)
      .def("try_share", &arena_try_share, "tensor"_a, doc::kTryShare)
      .def(
          "empty",
          [](Arena& arena, const std::vector<std::int64_t>& shape, const py::object& dtype,
             std::optional<double> timeout) { return arena_empty(arena, {dtype_of(dtype), 0, shape, {}}, timeout); },
          "shape"_a, py::kw_only(), "dtype"_a, "timeout"_a = py::none())
      .def("trim", &Arena::trim, py::call_guard<GilReleased>(), doc::kTrim)
      .def("sweep", &Arena::sweep, py::kw_only(), "expire_messages"_a = false, py::call_guard<GilReleased>(),
           doc::kSweep)
      .def("close", &Arena::close, py::call_guard<GilReleased>())
      .def("stats", &arena_stats, doc::kStats)
      .def_property_readonly("name", &Arena::name, "As in ``shmx ls`` and in messages of errors.")
      .def_property_readonly(
          "backend", [](const Arena& arena) { return backend_name(arena.backend()); }, "``\"shm\"`` or ``\"memfd\"``.")
      .def_property_readonly("closed", &Arena::closed, "Whether it allocates no more in this process.")
      .def_property_readonly("capacity", [](const Arena& arena) { return arena.options().capacity; }, "Bytes at most.");

  module.def("attach", &attach_to, "handle"_a);
  module.def("current_readers", &ReadersContext::current_count);
  module.def("discard_text", &discard_text, "text"_a);
  module.def("discard_bytes", &discard_bytes, "data"_a);
  module.def("reap", &reap_all_arenas, py::kw_only(), "force"_a = false);
  module.def("survey", &survey_arenas);
  module.def("take_removals", &noted_removals);
  module.def("membership_counts", &membership_counts);
  module.def("memory_cgroup_room", &memory_cgroup_room);
  module.def("leave_all", &leave_devices_and_all, py::call_guard<GilReleased>());

  py::class_<DeviceCopy> device_copy(module, "DeviceCopy");
  refuse_pickling(device_copy, "it is under way in this process");
  device_copy
      .def(py::init<const py::iterable&, const std::optional<std::string>&, int, std::uintptr_t>(), "handles"_a,
           "backend"_a, "device"_a, "stream"_a)
      .def("groups", &DeviceCopy::groups)
      .def("bytes_of", &DeviceCopy::bytes_of, "group"_a)
      .def("depart", &DeviceCopy::depart)
      .def("finish", &DeviceCopy::finish)
      .def("keep", &DeviceCopy::keep)
      .def_property_readonly("registered", &DeviceCopy::registered);
  module.def("refuse_capture", &refuse_capture_by, "backend"_a, "device"_a, "stream"_a);
  module.def("registered_cuts", &registered_cuts, "address"_a, "bytes"_a, "backend"_a, "device"_a);
  module.def("pin", &pin_arena, "handle"_a, "backend"_a, "device"_a);
  module.def("refuse_pinning", &refuse_pinning, "handle"_a);
  module.def("unpin", &unpin_arena, "handle"_a);
  module.def("settle_pinning", [] { Pinner::instance().settle(); }, py::call_guard<GilReleased>());
  module.def("poll_copies", [] { InFlight::instance().poll(); }, py::call_guard<GilReleased>());
  module.def("pin_report", &pin_report);
  module.def("take_pin_warning", [] { return PinLedger::instance().take_warning(); });
  module.def("set_pin_limit", [](std::uint64_t bytes) { PinLedger::instance().set_limit(bytes); }, "bytes"_a);

  module.def("set_pool_limit", [](std::uint64_t bytes) { DestinationPool::instance().set_limit(bytes); }, "bytes"_a);
  module.def("set_non_temporal_threshold", &set_non_temporal_threshold, "bytes"_a);
  module.def("set_trusted_group", &set_trusted_group, "group"_a);
  module.def("set_read_only", [](bool on) { set_peer_access(on ? Access::kReadOnly : Access::kReadWrite); }, "on"_a);
  module.def("clear_pool", [] { DestinationPool::instance().clear(); });
  module.def("pool_bytes", [] { return DestinationPool::instance().kept_bytes(); });
  module.def("attached", [] {
    std::vector<std::string> names;
    for (const auto& attachment : all_attachments()) names.push_back(attachment->control().name());
    return names;
  });
  module.def("non_temporal_thresholds", [] {
    const Thresholds from = non_temporal_thresholds();
    return py::dict("hot"_a = from.hot, "cold"_a = from.cold);
  });
  module.def("measure_non_temporal_thresholds", &measure_non_temporal_thresholds, py::call_guard<GilReleased>());
  module.def("non_temporal_kind", &non_temporal_kind);
  module.def(
      "copy",
      [](std::uintptr_t destination, std::uintptr_t source, std::uint64_t bytes, const std::string& how) {
        const GilReleased released;
        auto* to = reinterpret_cast<void*>(destination);
        const auto* from = reinterpret_cast<const void*>(source);
        how == "plain" ? copy_plain(to, from, bytes)
                       : (how == "streaming" ? copy_non_temporal(to, from, bytes)
                                             : copy_bytes(to, from, bytes, Destination::kHot));
      },
      "destination"_a, "source"_a, "bytes"_a, "how"_a = "auto");
  module.attr("TEXT_PREFIX") = std::string(kTextPrefix);
  py::list names;
  for (const DtypeInfo& dtype : kDtypes) names.append(dtype.torch_name);
  module.attr("DTYPE_NAMES") = py::tuple(names);
  module.attr("MAX_PEERS") = kMaxPeers;
  module.attr("MESSAGE_CELLS") = kMessageCells;
  module.attr("LAYOUT_VERSION") = kLayoutVersion;
}
