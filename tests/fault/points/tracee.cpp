#include "tracee.hpp"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace shmx::test {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

struct Text {
  std::uint64_t start = 0;
  std::uint64_t end = 0;
  [[nodiscard]] bool contains(std::uint64_t address) const { return address >= start && address < end; }
};

// Where the code of an object lies; a forked child has it at the same place. `name`: part of its path, empty for the
// program itself.
Text text_of(std::string_view name) {
  struct Search {
    std::string_view name;
    Text found;
  } search{name, {}};
  ::dl_iterate_phdr(
      [](dl_phdr_info* object, std::size_t, void* to) {
        auto& wanted = *static_cast<Search*>(to);
        const std::string_view path = object->dlpi_name;
        if (wanted.name.empty() ? !path.empty() : path.find(wanted.name) == std::string_view::npos) return 0;
        for (unsigned i = 0; i < object->dlpi_phnum; ++i) {
          const auto& part = object->dlpi_phdr[i];
          if (part.p_type != PT_LOAD || (part.p_flags & PF_X) == 0) continue;
          wanted.found = {object->dlpi_addr + part.p_vaddr, object->dlpi_addr + part.p_vaddr + part.p_memsz};
        }
        return 1;
      },
      &search);
  if (search.found.end == 0) throw std::runtime_error("the core's shared object is not loaded");
  return search.found;
}

const Text& core_text() {
  static const Text text = text_of("libshmx_core_points");
  return text;
}

const Text& program_text() {
  static const Text text = text_of("");
  return text;
}

std::uint64_t memory_word(pid_t pid, std::uint64_t address) {
  errno = 0;
  const long word = ::ptrace(PTRACE_PEEKDATA, pid, address, nullptr);
  if (errno != 0) fail("PTRACE_PEEKDATA");
  return static_cast<std::uint64_t>(word);
}

std::string memory_text(pid_t pid, std::uint64_t address) {
  std::string text;
  for (;; address += sizeof address) {
    const std::uint64_t word = memory_word(pid, address);
    char bytes[sizeof word];
    std::memcpy(bytes, &word, sizeof word);
    text.append(bytes, ::strnlen(bytes, sizeof bytes));
    if (text.size() % sizeof bytes != 0 || bytes[0] == 0) return text;
  }
}

#if defined(__x86_64__)

std::uint64_t user_word(pid_t pid, std::size_t offset) {
  errno = 0;
  const long word = ::ptrace(PTRACE_PEEKUSER, pid, offset, nullptr);
  if (errno != 0) fail("PTRACE_PEEKUSER");
  return static_cast<std::uint64_t>(word);
}

void set_user_word(pid_t pid, std::size_t offset, std::uint64_t word) {
  if (::ptrace(PTRACE_POKEUSER, pid, offset, word) != 0) fail("PTRACE_POKEUSER");
}

void set_memory_word(pid_t pid, std::uint64_t address, std::uint64_t word) {
  if (::ptrace(PTRACE_POKEDATA, pid, address, word) != 0) fail("PTRACE_POKEDATA");
}

constexpr std::size_t kProgramCounter = offsetof(user_regs_struct, rip);
constexpr std::size_t kStackPointer = offsetof(user_regs_struct, rsp);
constexpr std::size_t kCallNumber = offsetof(user_regs_struct, orig_rax);
constexpr std::size_t kResult = offsetof(user_regs_struct, rax);
constexpr std::uint64_t kBreakpoint = 0xcc;

#endif

}  // namespace

void enter_trace() {
  if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) fail("PTRACE_TRACEME");
  (void)::raise(SIGSTOP);
}

void leave_trace() { (void)::raise(SIGSTOP); }

Tracee::Tracee(pid_t pid) : pid_(pid) {
  int status = 0;
  if (::waitpid(pid_, &status, WUNTRACED) != pid_) fail("waitpid");
  if (!WIFSTOPPED(status)) throw std::runtime_error("the child ended before the marker");
  if (::ptrace(PTRACE_SETOPTIONS, pid_, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL) != 0) {
    fail("PTRACE_SETOPTIONS");
  }
}

Tracee::Stop Tracee::resume(int request) {
  if (::ptrace(static_cast<__ptrace_request>(request), pid_, nullptr, nullptr) != 0) fail("ptrace");
  int status = 0;
  if (::waitpid(pid_, &status, 0) != pid_) fail("waitpid");
  if (!WIFSTOPPED(status)) {
    throw std::runtime_error("the child ended between the markers: " +
                             (WIFSIGNALED(status) ? "signal " + std::to_string(WTERMSIG(status))
                                                  : "status " + std::to_string(WEXITSTATUS(status))));
  }
  const int signal = WSTOPSIG(status);
  if (signal == (SIGTRAP | 0x80)) return Stop::kSystemCall;
  if (signal == SIGTRAP) return Stop::kTrap;
  if (signal == SIGSTOP) return Stop::kMarker;
  throw std::runtime_error(std::string("the child stopped between the markers: ") + ::strsignal(signal));
}

bool Tracee::next_call_stop() {
  if (resume(PTRACE_SYSCALL) == Stop::kMarker) return false;
  struct __ptrace_syscall_info info{};
  if (::ptrace(static_cast<__ptrace_request>(PTRACE_GET_SYSCALL_INFO), pid_, sizeof info, &info) <= 0) {
    fail("PTRACE_GET_SYSCALL_INFO");
  }
  call_.reset();
  if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
    call_.emplace(Call{info.entry.nr, {}, false, {}});
    std::memcpy(call_->arguments, info.entry.args, sizeof call_->arguments);
    if (call_->number == SYS_openat) call_->path = memory_text(pid_, call_->arguments[1]);
    if (call_->number == SYS_fcntl && call_->arguments[1] == F_OFD_SETLK) {
      const auto type = static_cast<short>(memory_word(pid_, call_->arguments[2]));  // the first field
      call_->takes_lock = type == F_WRLCK;
    }
  }
  return true;
}

#if defined(__x86_64__)

bool can_step() { return true; }

void Tracee::fail_call(int system_errno) {
  if (!call_) throw std::logic_error("not at the beginning of a call");
  const bool done = call_->number == SYS_close || (call_->number == SYS_unlink && system_errno == ENOENT);
  if (!done) set_user_word(pid_, kCallNumber, UINT64_MAX);
  if (!next_call_stop()) throw std::runtime_error("a call without an end");
  set_user_word(pid_, kResult, static_cast<std::uint64_t>(-static_cast<std::int64_t>(system_errno)));
}

bool Tracee::run_to(std::uint64_t address) {
  const std::uint64_t code = memory_word(pid_, address);
  set_memory_word(pid_, address, (code & ~std::uint64_t{0xff}) | kBreakpoint);
  const Stop stop = resume(PTRACE_CONT);
  set_memory_word(pid_, address, code);
  if (stop == Stop::kMarker) return false;
  if (user_word(pid_, kProgramCounter) != address + 1) throw std::runtime_error("a trap that is not the breakpoint");
  set_user_word(pid_, kProgramCounter, address);
  return true;
}

bool Tracee::next_instruction(const std::function<void()>& after_foreign) {
  bool known = core_text().contains(user_word(pid_, kProgramCounter)) ||
               program_text().contains(user_word(pid_, kProgramCounter));
  for (;;) {
    if (resume(PTRACE_SINGLESTEP) == Stop::kMarker) return false;
    std::uint64_t at = user_word(pid_, kProgramCounter);
    if (known && !core_text().contains(at) && !program_text().contains(at)) {
      // Called, or jumped to in the place of a return: either way the return address is on top of the stack.
      if (!run_to(memory_word(pid_, user_word(pid_, kStackPointer)))) return false;
      after_foreign();
      at = user_word(pid_, kProgramCounter);
    }
    if (core_text().contains(at)) return true;
    known = program_text().contains(at);
  }
}

#else

bool can_step() { return false; }
void Tracee::fail_call(int /*system_errno*/) { throw std::logic_error("x86-64 only"); }
bool Tracee::run_to(std::uint64_t /*address*/) { return false; }
bool Tracee::next_instruction(const std::function<void()>& /*after_foreign*/) { return false; }

#endif

void Tracee::run_to_end() {
  while (resume(PTRACE_CONT) != Stop::kMarker) {
  }
}

void Tracee::let_go() {
  if (::ptrace(PTRACE_DETACH, pid_, nullptr, nullptr) != 0) fail("PTRACE_DETACH");
}

}  // namespace shmx::test
