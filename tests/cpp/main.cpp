// The runner of every C++ test: a test that leaves a name in /dev/shm, a child or a descriptor fails the run.
#define DOCTEST_CONFIG_IMPLEMENT
#include <dirent.h>
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <set>
#include <string>

#include "own_shm.hpp"
#include "shm_names.hpp"

namespace {

// A test that hangs is killed with its name on the screen; SIGALRM does not reach its children, PDEATHSIG does.
constexpr unsigned kWatchdogSeconds = 120;

std::set<int> open_descriptors() {
  std::set<int> all;
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir("/proc/self/fd"), &::closedir);
  while (const dirent* entry = ::readdir(directory.get())) {
    if (entry->d_name[0] == '.') continue;
    const int number = std::stoi(entry->d_name);
    if (number != ::dirfd(directory.get())) all.insert(number);
  }
  return all;
}

unsigned leaks = 0;

class Leftovers : public doctest::IReporter {
 public:
  explicit Leftovers(const doctest::ContextOptions& /*options*/) {}

  void test_case_start(const doctest::TestCaseData& test) override {
    name_ = test.m_name;
    shmx::test::forget_created_names();
    descriptors_ = open_descriptors();
    ::alarm(kWatchdogSeconds);
  }

  void test_case_end(const doctest::CurrentTestCaseStats& /*stats*/) override {
    ::alarm(0);
    for (const std::string& name : shmx::test::names_left()) {
      report("the segment " + name);
      ::shm_unlink(name.c_str());
    }
    for (;;) {
      const pid_t child = ::waitpid(-1, nullptr, WNOHANG);
      if (child < 0) break;
      report("a child");
      if (child == 0) break;
    }
    for (const int number : open_descriptors()) {
      if (!descriptors_.contains(number)) report("descriptor " + std::to_string(number));
    }
  }

  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}

 private:
  void report(const std::string& what) {
    ++leaks;
    std::cerr << "LEFT BEHIND by \"" << name_ << "\": " << what << '\n';
  }
  std::string name_;
  std::set<int> descriptors_;
};

REGISTER_LISTENER("leftovers", 0, Leftovers);

}  // namespace

int main(int argc, char** argv) {
  // Grandchildren whose parent a test has killed come here, to be reaped.
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  // A process that a test starts shares the /dev/shm of that test.
  constexpr const char* kHasOwnShm = "SHMX_TEST_HAS_OWN_SHM";
  if (std::getenv(kHasOwnShm) == nullptr) {
    if (!shmx::test::take_own_shm("1g")) {
      std::cerr << "no /dev/shm of our own here: other users of shmx on this host can disturb these tests\n";
    }
    ::setenv(kHasOwnShm, "1", 1);
  }
  doctest::Context context(argc, argv);
  const int result = context.run();
  if (context.shouldExit()) return result;
  return result != 0 ? result : (leaks != 0 ? 1 : 0);
}
