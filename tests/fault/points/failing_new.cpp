#include "failing_new.hpp"

#include <cstdlib>
#include <new>

namespace shmx::test {
namespace {

// Of the one thread there is.
bool counting = false;
std::uint64_t count = 0;
std::uint64_t fails_at = 0;

}  // namespace

void count_allocations(std::uint64_t failing) {
  count = 0;
  fails_at = failing;
  counting = true;
}

std::uint64_t allocations() {
  counting = false;
  return count;
}

}  // namespace shmx::test

void* operator new(std::size_t bytes) {
  if (shmx::test::counting && ++shmx::test::count == shmx::test::fails_at) throw std::bad_alloc();
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept { std::free(memory); }
