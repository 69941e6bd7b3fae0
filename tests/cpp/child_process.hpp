// Processes that a test starts: forked, spoken to in words, killed and reaped whatever happens.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

namespace shmx::test {

// One end of a two-way line between two processes.
class Line {
 public:
  Line() = default;
  explicit Line(int fd) : fd_(fd) {}
  Line(Line&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Line& operator=(Line&& other) noexcept;
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;
  ~Line();

  void say(std::uint64_t word);
  void say_text(const std::string& text);
  // Throws when the other side has gone, or says nothing for a minute.
  [[nodiscard]] std::uint64_t hear();
  [[nodiscard]] std::string hear_text();
  // Waits until the other side hangs up.
  void hear_end();

 private:
  void read_exactly(void* to, std::size_t bytes);
  void write_exactly(const void* from, std::size_t bytes);
  int fd_ = -1;
};

struct LinePair {
  Line first;
  Line second;
};
[[nodiscard]] LinePair make_line();

// A forked child that runs `body` and exits. What the body throws comes back as the exception of join().
class Child {
 public:
  using Body = std::function<void(Line&)>;
  explicit Child(const Body& body) : Child(body, false) {}
  // Made by a bare clone(2): no at-fork handler runs.
  [[nodiscard]] static Child without_handlers(const Body& body) { return Child(body, true); }
  Child(Child&&) = delete;
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  Child& operator=(Child&&) = delete;
  ~Child();

  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] Line& line() { return line_; }
  void say(std::uint64_t word) { line_.say(word); }
  // As of the line, but a child that has failed is reported with its own message.
  [[nodiscard]] std::uint64_t hear();
  [[nodiscard]] std::string hear_text();

  // Waits for the end; throws unless the body has returned.
  void join();
  // SIGKILL; returns when the child is a zombie, which stays until the end of this object.
  void kill_unreaped();
  // SIGKILL, and reaped.
  void kill();
  // Waits until the child has stopped itself with SIGSTOP.
  void wait_stopped();

 private:
  Child(const Body& body, bool bare);
  [[nodiscard]] std::string failure();
  pid_t pid_ = -1;
  int report_ = -1;
  Line line_;
  bool reaped_ = false;
};

// Runs one test case of this executable, a skipped one perhaps, in a fresh process; answers its exit status. Throws if
// it was killed.
[[nodiscard]] int run_test_case(const std::string& name,
                                const std::vector<std::pair<std::string, std::string>>& environment = {});

// For bodies of children, where doctest's checks would go unseen.
void expect(bool condition, const std::source_location& where = std::source_location::current());

}  // namespace shmx::test
