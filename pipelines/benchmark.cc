#include "pipelines/benchmark.h"

#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>

#include "core/random.h"
#include "graph/flop.h"
#include "pipelines/model_graphs.h"
#include "pipelines/training_setup.h"

namespace calotype {
namespace {

Tensor Integers(const Shape& shape, int64_t limit, Random& random) {
  Tensor result(shape, DType::kI64);
  for (int64_t& v : result.values<int64_t>()) v = random.Integer(limit);
  return result;
}

// Largest |actual - expected| over the largest |expected|; NaN if one is.
double RelativeDifference(const Tensor& expected, const Tensor& actual) {
  double largest = 0, difference = 0;
  for (int64_t k = 0; k < expected.elements(); ++k) {
    double e = expected.data()[k], d = std::abs(actual.data()[k] - e);
    largest = std::max(largest, std::abs(e));
    if (!(d <= difference)) difference = d;
    if (std::isnan(d)) return d;
  }
  return largest > 0 ? difference / largest : difference;
}

void Profile(jit::Executable& jit, std::span<const Tensor> inputs, std::span<Tensor> outputs,
             double seconds, Comparison& result) {
  jit::RunProfile profile;
  for (double spent = 0; spent < seconds || profile.runs < 3;) {
    spent += TimeCall([&] { jit.Run(inputs, outputs, profile); }).wall;
  }
  double runs = static_cast<double>(profile.runs);
  for (size_t s = 0; s < profile.steps.size(); ++s) {
    const jit::ExecutableData::Step& step = jit.steps()[s];
    result.steps.push_back({static_cast<int>(s), step.label, step.kind, step.shape, step.chunks,
                            step.flop, 1e3 * profile.steps[s].wall / runs,
                            1e3 * profile.steps[s].cpu / runs});
  }
  std::stable_sort(result.steps.begin(), result.steps.end(),
                   [](const ProfiledStep& a, const ProfiledStep& b) { return a.ms > b.ms; });
  jit::RunProfile events{.want_events = true};
  jit.Run(inputs, outputs, events);
  result.events = std::move(events.events);
}

}  // namespace

Comparison Compare(const std::function<ComputationGraph()>& make_graph,
                   std::span<const Tensor> inputs, const BenchmarkOptions& options) {
  Comparison result;
  ComputationGraph graph = make_graph();
  result.flop = CountFlop(graph);
  std::unique_ptr<jit::Executable> jit;
  result.compile_seconds = TimeCall([&] { jit = jit::Compile(graph, options.compile); }).wall;
  result.arena_bytes = jit->Stats().arena_bytes;
  result.packed_bytes = jit->Stats().persistent_bytes;
  GraphRunner eager(std::move(graph), Backend::kEager);

  std::vector<Tensor> expected = eager.Run(inputs), actual = jit->Run(inputs);
  for (size_t i = 0; i < expected.size(); ++i) {
    double difference = RelativeDifference(expected[i], actual[i]);
    if (!(difference <= result.max_rel_difference)) result.max_rel_difference = difference;
    if (std::isnan(difference)) break;
  }
  auto keep_fastest = [](CallTime time, double& ms, double& cpu_ms) {
    if (ms > 0 && 1e3 * time.wall >= ms) return;
    ms = 1e3 * time.wall;
    cpu_ms = 1e3 * time.cpu;
  };
  // In turns of some calls each: the two have threads of their own, which sleep while the other's
  // work, and the first calls of a turn wait for them to wake.
  constexpr double kTurn = 5e-3;
  double spent = 0;
  auto turn = [&](double& ms, double& cpu_ms, const std::function<void()>& call) {
    double begin = spent;
    for (int calls = 0; calls == 0 || spent < begin + kTurn; ++calls) {
      CallTime time = TimeCall(call);
      keep_fastest(time, ms, cpu_ms);
      spent += time.wall;
    }
  };
  for (int rounds = 0; rounds < 3 || spent < 2 * options.seconds; ++rounds) {
    turn(result.eager_ms, result.eager_cpu_ms, [&] { eager.Run(inputs); });
    turn(result.jit_ms, result.jit_cpu_ms, [&] { jit->Run(inputs, actual); });
  }
  if (options.profile) Profile(*jit, inputs, actual, options.seconds, result);
  return result;
}

Comparison CompareUNet(DiffusionModel& model, int64_t batch, const BenchmarkOptions& options) {
  Random random(0, "benchmark");
  std::vector<Tensor> inputs{
      random.NormalTensor(
          {batch, model.unet().config().in_channels, model.sample_side(), model.sample_side()}),
      Integers({batch}, 1000, random).To(DType::kF32),
      random.NormalTensor({batch, model.caption_tokens(), model.context_width()})};
  return Compare([&] { return UNetGraph(model, batch); }, inputs, options);
}

Comparison CompareTrainingStep(DiffusionModel& model, int64_t batch,
                               const BenchmarkOptions& options) {
  Random random(0, "benchmark");
  NoiseSchedule schedule(model.scheduler());
  Optimizer optimizer(AdamW{}, model.NamedParameters(), 1);
  Ema ema({.decay = 0.995}, model.NamedParameters());
  Shape pictures{batch, model.channels(), model.sample_side(), model.sample_side()};
  int64_t words = static_cast<int64_t>(model.vocabulary_size());
  std::vector<Tensor> inputs{random.NormalTensor(pictures), random.NormalTensor(pictures),
                             Integers({batch}, schedule.size(), random),
                             Integers({batch, model.caption_tokens()}, words, random)};
  for (Tensor& input : optimizer.Inputs(1, 0)) inputs.push_back(std::move(input));
  for (Tensor& input : ema.Inputs(1)) inputs.push_back(std::move(input));
  return Compare([&] { return TrainingStepGraph(model, schedule, batch, optimizer, &ema); }, inputs,
                 options);
}

std::unique_ptr<DiffusionModel> RandomModel(const std::string& unet, int64_t tokens) {
  UNet2DConditionConfig config = UNetOf(unet);
  CaptionEncoderConfig encoder;
  for (char c = 'a'; c <= 'z'; ++c) encoder.vocabulary.push_back(std::string(1, c));
  encoder.hidden_size = config.context_width();
  encoder.max_length = tokens;
  auto model = std::make_unique<DiffusionModel>(config, encoder, SchedulerConfig{});
  model->Initialize(0);
  return model;
}

CallTime TimeCall(const std::function<void()>& call) {
  auto cpu = [] {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  double cpu_start = cpu();
  auto start = std::chrono::steady_clock::now();
  call();
  double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return {wall, cpu() - cpu_start};
}

int64_t PeakMemoryBytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{1024} * usage.ru_maxrss;
}

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    size_t colon = line.find(": ");
    return colon == std::string::npos ? "" : line.substr(colon + 2);
  }
  return "";
}

double Median(std::vector<double> values) {
  auto middle = values.begin() + static_cast<int64_t>((values.size() - 1) / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace calotype
