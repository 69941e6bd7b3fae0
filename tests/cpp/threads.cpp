#include "threads.hpp"

#include <dirent.h>

#include <chrono>
#include <fstream>
#include <memory>
#include <thread>

namespace shmx::test {

unsigned threads_named(const std::string& name) {
  unsigned found = 0;
  const std::unique_ptr<DIR, int (*)(DIR*)> tasks(::opendir("/proc/self/task"), &::closedir);
  while (const dirent* task = ::readdir(tasks.get())) {
    std::ifstream file(std::string("/proc/self/task/") + task->d_name + "/comm");
    std::string comm;
    if (std::getline(file, comm) && comm == name) ++found;
  }
  return found;
}

bool comes_true(const std::function<bool()>& condition) {
  const auto bound = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > bound) return false;
    std::this_thread::yield();
  }
  return true;
}

}  // namespace shmx::test
