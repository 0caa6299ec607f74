// What `calotype bench` says: tables for people, JSON, and Chrome's trace format.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/fma_peak.h"
#include "pipelines/benchmark.h"

namespace calotype::app {

struct BenchRow {
  std::string what;  // "unet", "train", "kernel" or "layer"
  std::string name;  // of the model, kernel or layer
  int64_t batch = 1;
  Comparison comparison;
};

struct BenchReport {
  std::string processor;
  int threads = 1;
  std::string winograd = "auto";
  std::vector<FmaPeak> peaks;
  std::vector<BenchRow> rows;

  double peak() const { return LargestPeak(peaks, threads); }  // GFLOP/s of the threads in use
};

// The line of peaks.
std::string PeakText(const BenchReport& report);
// The lines before the first row: machine, peaks, column names.
std::string HeadText(const BenchReport& report);
std::string RowText(const BenchReport& report, const BenchRow& row);
// The steps of a profiled row, slowest first.
std::string ProfileText(const BenchReport& report, const BenchRow& row);

std::string ToJson(const BenchReport& report);
// Chrome's trace event format, which Perfetto opens: one process for each profiled row, in it one
// complete event for each step and thread of one call.
std::string ToTrace(const BenchReport& report);

}  // namespace calotype::app
