#include "jit/runtime/thread_pool.h"

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>

namespace calotype::jit {

namespace {

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls done() until it is true or as much time has passed as it takes to put a thread to sleep and
// wake it again. Returns done().
template <class F>
bool SpinUntil(F done) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (Clock::now() < end);
  return done();
}

// Lives to the end of the process, as its sleeping threads do.
class ThreadPool {
 public:
  // False if another caller has the pool.
  bool TryRun(int64_t chunks, int workers, ChunkFunction body, void* context) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    for (; threads_ < workers; ++threads_) {
      try {
        std::thread([this, index = threads_] { Work(index); }).detach();
      } catch (const std::system_error&) {
        break;  // The system gives no more threads: those there are do the work.
      }
    }
    body_ = body;
    context_ = context;
    chunks_ = chunks;
    workers_.store(workers, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    left_.store(chunks, std::memory_order_release);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    while (RunOne()) {
    }
    // Threads that come late find nothing left and are not waited for.
    auto finished = [&] { return done_.load(std::memory_order_acquire) == chunks; };
    if (!SpinUntil(finished)) {
      for (int64_t done; (done = done_.load(std::memory_order_acquire)) != chunks;) {
        done_.wait(done, std::memory_order_acquire);
      }
    }
    busy_.clear(std::memory_order_release);
    return true;
  }

 private:
  // Claims one chunk and runs it; false if none is left. The job cannot end, so its fields cannot
  // change, before the claimed chunk is counted as done: that is why they are read after the claim.
  bool RunOne() {
    int64_t left = left_.load(std::memory_order_acquire);
    do {
      if (left == 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire));
    const int64_t chunks = chunks_;
    body_(context_, chunks - left);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) done_.notify_one();
    return true;
  }

  void Work(int index) {
    for (;;) {
      const uint32_t epoch = epoch_.load();
      const bool takes_part = index < workers_.load(std::memory_order_relaxed);
      if (takes_part) {
        while (RunOne()) {
        }
        if (SpinUntil([&] { return epoch_.load(std::memory_order_acquire) != epoch; })) continue;
      }
      epoch_.wait(epoch);
    }
  }

  std::atomic_flag busy_;
  int threads_ = 0;
  std::atomic<int> workers_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // changes with each job
  // The job.
  ChunkFunction body_ = nullptr;
  void* context_ = nullptr;
  int64_t chunks_ = 0;
  alignas(64) std::atomic<int64_t> left_{0};  // chunks that nobody has claimed
  alignas(64) std::atomic<int64_t> done_{0};
};

// In a chunk of the pool.
thread_local bool in_chunk = false;

}  // namespace

void RunChunks(int64_t chunks, ChunkFunction body, void* context) {
  static ThreadPool& pool = *new ThreadPool;
  struct Call {
    ChunkFunction body;
    void* context;
  } call{body, context};
  auto flagged = [](void* p, int64_t chunk) {
    auto& c = *static_cast<Call*>(p);
    in_chunk = true;
    c.body(c.context, chunk);
    in_chunk = false;
  };
  const int threads = Threads();
  if (chunks > 1 && threads > 1 && !in_chunk && pool.TryRun(chunks, threads - 1, flagged, &call)) {
    return;
  }
  for (int64_t c = 0; c < chunks; ++c) body(context, c);
}

}  // namespace calotype::jit
