#include "core/parallel.h"

#include <omp.h>
#include <sched.h>

#include <cstdlib>
#include <string>

#include "core/error.h"

namespace calotype {

namespace {

int DefaultThreads() {
  if (const char* text = std::getenv("CALOTYPE_THREADS")) {
    char* end = nullptr;
    long value = std::strtol(text, &end, 10);
    Check(end != text && *end == '\0' && value >= 1 && value <= 1024,
          "CALOTYPE_THREADS is \"{}\"; it must be a number from 1 to 1024", text);
    return static_cast<int>(value);
  }
  return std::max(1, omp_get_max_threads());
}

int& ThreadCount() {
  static int threads = [] {
    int n = DefaultThreads();
    omp_set_num_threads(n);
    return n;
  }();
  return threads;
}

}  // namespace

int Threads() { return ThreadCount(); }

void SetThreads(int threads) {
  Check(threads >= 1 && threads <= 1024, "threads: {} is not in 1..1024", threads);
  ThreadCount() = threads;
  omp_set_num_threads(threads);
}

void ParallelChunks(int64_t chunks, ChunkFunction body, void* context) {
  int threads = Threads();
  if (chunks <= 1 || threads == 1 || omp_in_parallel()) {
    for (int64_t c = 0; c < chunks; ++c) body(context, c);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c) body(context, c);
}

}  // namespace calotype
