// Counts every allocation of the process (malloc, and so operator new), so that a test can show
// that a call makes none. Include in exactly one file of a program.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

extern "C" void* __libc_malloc(size_t bytes);
inline std::atomic<int64_t> g_mallocs = 0;
extern "C" void* malloc(size_t bytes) {
  g_mallocs.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(bytes);
}
