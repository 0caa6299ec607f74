// Threads of the interpreter: OpenMP's, the same that oneDNN uses (compiled code has a pool of its
// own, jit/runtime/thread_pool.h). Work is cut into chunks that depend on the size of the work
// alone, never on the number of threads, so results do not depend on it. On machines that also do
// other work set GOMP_SPINCOUNT=2000 before the program starts, as `calotype` does: OpenMP's
// default is to spin for milliseconds at the end of every loop.
#pragma once

#include <algorithm>
#include <cstdint>

namespace calotype {

// Number of threads that ParallelFor and the contractions use; at first CALOTYPE_THREADS, else
// OMP_NUM_THREADS, else the processors this process may use.
int Threads();
// Errors: ValueError unless 1 <= threads <= 1024.
void SetThreads(int threads);

// The body of a parallel loop: handles chunk number `chunk`.
using ChunkFunction = void (*)(void* context, int64_t chunk);
// Runs body(context, c) for every c in [0, chunks), in any order, on up to Threads() threads.
// Never allocates. The body must not throw.
void ParallelChunks(int64_t chunks, ChunkFunction body, void* context);

// Calls f(begin, end) over [0, n) in chunks of `grain` elements. f must not throw.
template <class F>
void ParallelFor(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  struct Context {
    F& f;
    int64_t n, grain;
  } context{f, n, grain};
  ParallelChunks((n + grain - 1) / grain,
                 [](void* p, int64_t chunk) {
                   auto& c = *static_cast<Context*>(p);
                   c.f(chunk * c.grain, std::min(c.n, (chunk + 1) * c.grain));
                 },
                 &context);
}

}  // namespace calotype
