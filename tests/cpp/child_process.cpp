#include "child_process.hpp"

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace shmx::test {
namespace {

// Not a limit on how long anything takes: only what is left of a test that hangs.
constexpr int kPatienceMilliseconds = 60'000;

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

bool wait_readable(int fd) {
  pollfd waiting{fd, POLLIN, 0};
  int ready = 0;
  do {
    ready = ::poll(&waiting, 1, kPatienceMilliseconds);
  } while (ready < 0 && errno == EINTR);
  return ready > 0;
}

std::pair<int, int> socket_pair() {
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) fail("socketpair");
  return {ends[0], ends[1]};
}

}  // namespace

Line& Line::operator=(Line&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Line::~Line() {
  if (fd_ >= 0) ::close(fd_);
}

void Line::write_exactly(const void* from, std::size_t bytes) {
  const auto* rest = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t sent = ::send(fd_, rest, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) fail("send");
    rest += sent;
    bytes -= static_cast<std::size_t>(sent);
  }
}

void Line::read_exactly(void* to, std::size_t bytes) {
  auto* rest = static_cast<char*>(to);
  while (bytes > 0) {
    if (!wait_readable(fd_)) throw std::runtime_error("the other process says nothing");
    const ssize_t got = ::recv(fd_, rest, bytes, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) throw std::runtime_error("the other process has hung up");
    rest += got;
    bytes -= static_cast<std::size_t>(got);
  }
}

void Line::say(std::uint64_t word) { write_exactly(&word, sizeof word); }

std::uint64_t Line::hear() {
  std::uint64_t word = 0;
  read_exactly(&word, sizeof word);
  return word;
}

void Line::say_text(const std::string& text) {
  say(text.size());
  write_exactly(text.data(), text.size());
}

std::string Line::hear_text() {
  std::string text(hear(), '\0');
  read_exactly(text.data(), text.size());
  return text;
}

void Line::hear_end() {
  char none = 0;
  if (!wait_readable(fd_)) throw std::runtime_error("the other process does not hang up");
  if (::recv(fd_, &none, 1, 0) > 0) throw std::runtime_error("the other process says more than it should");
}

LinePair make_line() {
  const auto [first, second] = socket_pair();
  return {Line(first), Line(second)};
}

Child::Child(const Body& body, bool bare) {
  const auto [mine, theirs] = socket_pair();
  const auto [report, its_report] = socket_pair();
  // Or what is buffered would be written twice where the runtime flushes in _exit, as TSan's does.
  std::cout.flush();
  // Glibc's fork runs the at-fork handlers; the system call alone does not.
  pid_ = bare ? static_cast<pid_t>(::syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr)) : ::fork();
  if (pid_ < 0) fail("fork");
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::close(mine);
    ::close(report);
    std::string text;
    try {
      Line line(theirs);
      body(line);
    } catch (const std::exception& error) {
      text = error.what();
      if (text.empty()) text = "an exception without a message";
    }
    if (!text.empty()) (void)!::write(its_report, text.data(), text.size());
    ::_exit(text.empty() ? 0 : 1);
  }
  ::close(theirs);
  ::close(its_report);
  line_ = Line(mine);
  report_ = report;
}

Child::~Child() {
  if (!reaped_) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  if (report_ >= 0) ::close(report_);
}

std::string Child::failure() {
  std::array<char, 1024> text{};
  const ssize_t got = ::recv(report_, text.data(), text.size(), MSG_DONTWAIT);
  return got > 0 ? std::string(text.data(), static_cast<std::size_t>(got)) : std::string();
}

std::uint64_t Child::hear() {
  try {
    return line_.hear();
  } catch (const std::exception&) {
    join();
    throw;
  }
}

std::string Child::hear_text() {
  try {
    return line_.hear_text();
  } catch (const std::exception&) {
    join();
    throw;
  }
}

void Child::join() {
  const int handle = static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0));
  if (handle < 0) fail("pidfd_open");
  const bool ended = wait_readable(handle);
  ::close(handle);
  if (!ended) ::kill(pid_, SIGKILL);
  int status = 0;
  if (::waitpid(pid_, &status, 0) != pid_) fail("waitpid");
  reaped_ = true;
  if (!ended) throw std::runtime_error("the child did not end and was killed");
  if (const std::string text = failure(); !text.empty()) throw std::runtime_error("in the child: " + text);
  if (WIFSIGNALED(status)) throw std::runtime_error(std::string("the child died of ") + strsignal(WTERMSIG(status)));
  if (WEXITSTATUS(status) != 0) {
    throw std::runtime_error("the child ended with status " + std::to_string(WEXITSTATUS(status)));
  }
}

void Child::kill_unreaped() {
  if (::kill(pid_, SIGKILL) != 0) fail("kill");
  siginfo_t info{};
  if (::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOWAIT) != 0) fail("waitid");
}

void Child::kill() {
  kill_unreaped();
  if (::waitpid(pid_, nullptr, 0) != pid_) fail("waitpid");
  reaped_ = true;
}

void Child::wait_stopped() {
  int status = 0;
  if (::waitpid(pid_, &status, WUNTRACED) != pid_) fail("waitpid");
  if (!WIFSTOPPED(status)) {
    reaped_ = true;
    throw std::runtime_error("the child ended instead of stopping: " + failure());
  }
}

int run_test_case(const std::string& name, const std::vector<std::pair<std::string, std::string>>& environment) {
  const std::string filter = "--test-case=" + name;
  const pid_t child = ::fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (const auto& [key, value] : environment) ::setenv(key.c_str(), value.c_str(), 1);
    ::execl("/proc/self/exe", "test", filter.c_str(), "--no-skip", "--no-colors", static_cast<char*>(nullptr));
    ::_exit(127);
  }
  int status = 0;
  if (::waitpid(child, &status, 0) != child) fail("waitpid");
  if (!WIFEXITED(status)) throw std::runtime_error(std::string("the process died of ") + strsignal(WTERMSIG(status)));
  return WEXITSTATUS(status);
}

void expect(bool condition, const std::source_location& where) {
  if (condition) return;
  std::string file = where.file_name();
  throw std::runtime_error("expectation not met at " + file.substr(file.rfind('/') + 1) + ":" +
                           std::to_string(where.line()));
}

}  // namespace shmx::test
