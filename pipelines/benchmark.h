// Measurements of graphs and models, eager beside compiled: the demo and `calotype bench` report
// them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "jit/compile.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"

namespace calotype {

struct BenchmarkOptions {
  double seconds = 1;  // of calls on each of the two
  jit::CompileOptions compile;
  bool profile = false;  // also time each step of the compiled form
};

// One step of the compiled form.
struct ProfiledStep {
  int step = 0;  // its place in the program
  std::string label, kind, shape;
  int64_t chunks = 0;         // of work that threads share
  double flop = 0;            // that the step really does, a multiply-add counts 2
  double ms = 0, cpu_ms = 0;  // mean over the profiled calls
};

// Wall and CPU times are those of the fastest call of alternating turns of 5 ms or one call: noise
// only adds. CPU time is that of all threads.
struct Comparison {
  double flop = 0;  // CountFlop of the graph
  double eager_ms = 0, eager_cpu_ms = 0;
  double jit_ms = 0, jit_cpu_ms = 0;
  double compile_seconds = 0;
  double max_rel_difference =
      0;  // largest |jit - eager| over the largest |eager|, over all outputs
  int64_t arena_bytes = 0, packed_bytes = 0;   // of the compiled form
  std::vector<ProfiledStep> steps;             // with `profile`: slowest first
  std::vector<jit::RunProfile::Event> events;  // with `profile`: of one call, by step
};

// Runs the graph on both for about `seconds` each, alternating, after one call that compares them.
Comparison Compare(const std::function<ComputationGraph()>& make_graph,
                   std::span<const Tensor> inputs, const BenchmarkOptions& options = {});

// One U-Net call on random pictures and contexts.
Comparison CompareUNet(DiffusionModel& model, int64_t batch, const BenchmarkOptions& options = {});
// One AdamW training step with clipping and averages on random pictures, at a learning rate of 0.
Comparison CompareTrainingStep(DiffusionModel& model, int64_t batch,
                               const BenchmarkOptions& options = {});

// A model with random weights and an invented vocabulary around the U-Net of that name (see
// UNetOf), for contexts of `tokens` words.
std::unique_ptr<DiffusionModel> RandomModel(const std::string& unet, int64_t tokens = 8);

// Wall time and the CPU time of all threads that a call takes, in seconds.
struct CallTime {
  double wall = 0, cpu = 0;
};
CallTime TimeCall(const std::function<void()>& call);

// The largest amount of memory that this process has held so far, in bytes.
int64_t PeakMemoryBytes();
// The processor's name as the system gives it; "" if it does not.
std::string ProcessorName();

// The middle of `values`, the lower one of an even number. Needs at least one.
double Median(std::vector<double> values);

}  // namespace calotype
