// The floating-point rate that this machine reaches when it does nothing else: the yardstick of all
// benchmarks, measured in the same run because clocks and neighbours change.
#pragma once

#include <cstdint>
#include <vector>

namespace calotype {

struct FmaPeak {
  int width = 0;      // floats in a vector register
  bool fused = true;  // multiply-adds in one instruction; false: multiplications and additions
  int threads = 0;
  double gflops = 0;  // 10^9 operations a second, a multiply-add counts 2
};

// Runs a loop of independent multiply-adds on registers for about `seconds` at each vector width
// that HostIsa() allows, on one thread and on Threads(), narrowest first; the fastest stretch
// counts.
std::vector<FmaPeak> MeasureFmaPeak(double seconds = 0.1);
// Takes over what `again`, a later measurement by the same process, found faster: other work on the
// machine only slows.
void KeepFastest(std::vector<FmaPeak>& peaks, const std::vector<FmaPeak>& again);
// The largest of them on `threads` threads; 0 if that count was not measured.
double LargestPeak(const std::vector<FmaPeak>& peaks, int threads);

}  // namespace calotype
