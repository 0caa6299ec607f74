#include "core/fma_peak.h"

#include <algorithm>
#include <chrono>

#include "core/fma_peak_kernels.h"
#include "core/parallel.h"

namespace calotype {

namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Operations a second of the fastest of the stretches that fit into `seconds`.
double Rate(const FmaLoop& loop, int threads, double seconds) {
  constexpr double kStretch = 2e-3;  // short enough to lie between two interruptions
  auto rounds = static_cast<int64_t>(kStretch * 5e10 / loop.flop / 8);
  struct Context {
    const FmaLoop& loop;
    int64_t rounds;
    float sink[64];  // the results must be used, or the loop may vanish
  } context{loop, rounds, {}};
  int64_t chunks = threads == 1 ? 1 : int64_t{8} * threads;
  double best = 0;
  for (double start = Now(), end = start; end - start < seconds;) {
    double begin = Now();
    ParallelChunks(
        chunks,
        [](void* p, int64_t chunk) {
          auto& c = *static_cast<Context*>(p);
          c.sink[chunk % 64] = c.loop.run(c.rounds);
        },
        &context);
    end = Now();
    double flop = loop.flop * static_cast<double>(rounds) * static_cast<double>(chunks);
    best = std::max(best, flop / (end - begin));
  }
  volatile float used = context.sink[0];
  (void)used;
  return best;
}

}  // namespace

std::vector<FmaPeak> MeasureFmaPeak(double seconds) {
  std::vector<const FmaLoop*> loops;
#if defined(__x86_64__)
  loops.push_back(&v2::kFmaLoop);
  if (HostIsa() >= IsaLevel::v3) loops.push_back(&v3::kFmaLoop);
  if (HostIsa() >= IsaLevel::v4) loops.push_back(&v4::kFmaLoop);
#else
  loops.push_back(&base::kFmaLoop);
#endif
  std::vector<FmaPeak> peaks;
  std::vector<int> counts{1};
  if (Threads() > 1) counts.push_back(Threads());
  for (const FmaLoop* loop : loops) {
    for (int threads : counts) {
      peaks.push_back({loop->width, loop->fused, threads, 1e-9 * Rate(*loop, threads, seconds)});
    }
  }
  return peaks;
}

void KeepFastest(std::vector<FmaPeak>& peaks, const std::vector<FmaPeak>& again) {
  for (FmaPeak& peak : peaks) {
    for (const FmaPeak& other : again) {
      if (other.width == peak.width && other.threads == peak.threads)
        peak.gflops = std::max(peak.gflops, other.gflops);
    }
  }
}

double LargestPeak(const std::vector<FmaPeak>& peaks, int threads) {
  double largest = 0;
  for (const FmaPeak& peak : peaks) {
    if (peak.threads == threads) largest = std::max(largest, peak.gflops);
  }
  return largest;
}

}  // namespace calotype
