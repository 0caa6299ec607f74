// What benchmarks rest on: the count of multiply-adds, the FMA peak, the profile of a run.
#include "pipelines/benchmark.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/fma_peak.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/random.h"
#include "graph/flop.h"
#include "graph/functions.h"
#include "models/presets.h"
#include "pipelines/kernel_cases.h"
#include "pipelines/model_graphs.h"

namespace calotype {
namespace {

using ::testing::AllOf;
using ::testing::Ge;
using ::testing::Le;

TEST(CountFlop, CountsContractionsAndNothingElse) {
  ComputationGraph graph;
  Value a = graph.Input("a", Shape{2, 3, 5}), b = graph.Input("b", Shape{5, 7});
  Value product = MatMul(a, b);
  MatMul(product, b, false, true);  // dead
  graph.Output("y", Silu(product) + Sum(product, {1}, true));
  EXPECT_EQ(CountFlop(graph), 2.0 * 2 * 3 * 7 * 5);
}

TEST(CountFlop, Convolutions) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2, 3, 8, 6}), w = graph.Input("w", Shape{5, 3, 3, 3});
  Value y = Conv2d(x, w, Value{}, Conv2dOptions::Padded(2, 1));
  ASSERT_EQ(y.shape(), Shape({2, 5, 4, 3}));
  constexpr double kForward = 2.0 * 2 * 5 * 4 * 3 * 3 * 3 * 3;
  Value dy = graph.Input("dy", y.shape());
  std::vector<Value> gradients = Gradients({{y}}, {{dy}}, {{x, w}});
  graph.Output("y", y);
  EXPECT_EQ(CountFlop(graph), kForward);
  graph.Output("dx", gradients[0]);
  EXPECT_EQ(CountFlop(graph), 2 * kForward);
  graph.Output("dw", gradients[1]);
  EXPECT_EQ(CountFlop(graph), 3 * kForward);
}

// Two products forward, five backward (Dao et al. 2022).
TEST(CountFlop, Attention) {
  for (bool causal : {false, true}) {
    ComputationGraph graph;
    Value q = graph.Input("q", Shape{2, 6, 4 * 3}), k = graph.Input("k", Shape{2, 9, 4 * 3}),
          v = graph.Input("v", Shape{2, 9, 4 * 5});
    Value out = Attention(q, k, v, {.heads = 4, .causal = causal}).out;
    double pairs = causal ? 1 + 2 + 3 + 4 + 5 + 6 : 6 * 9, unit = 2.0 * 2 * 4 * pairs;
    graph.Output("out", out);
    EXPECT_NEAR(CountFlop(graph), unit * (3 + 5), 1e-6) << causal;
    Value dout = graph.Input("dout", out.shape());
    for (Value gradient : Gradients({{out}}, {{dout}}, {{q, k, v}}))
      graph.Output(fmt::format("d{}", graph.outputs().size()), gradient);
    EXPECT_NEAR(CountFlop(graph), unit * (3 + 5) + unit * (3 * 3 + 2 * 5), 1e-6) << causal;
  }
}

// Against counts made with hooks on diffusers' modules.
TEST(CountFlop, UNets) {
  EXPECT_NEAR(1e-9 * CountFlop(UNetGraph(*RandomModel("toy16", 8), 1)), 0.167, 0.0005);
  EXPECT_NEAR(1e-9 * CountFlop(UNetGraph(*RandomModel("attn32", 16), 1)), 1.48, 0.005);
}

TEST(FmaPeak, EachWidthOnOneThreadAndAll) {
  std::vector<FmaPeak> peaks = MeasureFmaPeak(0.01);
  std::set<int> widths, threads;
  for (const FmaPeak& peak : peaks) {
    widths.insert(peak.width);
    threads.insert(peak.threads);
    // Between a tenth of a chip of 2010 and twice the fastest of today.
    EXPECT_THAT(peak.gflops / peak.threads, AllOf(Ge(0.5), Le(800))) << peak.width;
    EXPECT_LE(peak.gflops, LargestPeak(peaks, peak.threads));
  }
  EXPECT_EQ(threads, (std::set<int>{1, Threads()}));
  EXPECT_EQ(peaks.size(), widths.size() * threads.size());
#if defined(__x86_64__)
  std::set<int> expected{4};
  if (HostIsa() >= IsaLevel::v3) expected.insert(8);
  if (HostIsa() >= IsaLevel::v4) expected.insert(16);
  EXPECT_EQ(widths, expected);
#endif
  EXPECT_EQ(LargestPeak(peaks, 1000), 0);
}

TEST(RunProfile, TellsWhatEachStepAndThreadDid) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{512, 256}), w = graph.Input("w", Shape{256, 384}),
        u = graph.Input("u", Shape{384, 128});
  graph.Output("y", Sum(MatMul(Silu(MatMul(x, w)), u), {0}));
  Random random(0, "profile");
  std::vector<Tensor> inputs{random.NormalTensor({512, 256}), random.NormalTensor({256, 384}),
                             random.NormalTensor({384, 128})};
  auto executable = jit::Compile(graph);
  std::vector<Tensor> expected = executable->Run(inputs), actual{Tensor(expected[0].type())};
  jit::RunProfile profile{.want_events = true};
  for (int run = 0; run < 3; ++run) executable->Run(inputs, actual, profile);
  EXPECT_TRUE(std::ranges::equal(expected[0].values(), actual[0].values()));

  EXPECT_EQ(profile.runs, 3);
  auto steps = executable->steps();
  ASSERT_EQ(profile.steps.size(), steps.size());
  double flop = 0;
  std::vector<int64_t> chunks(steps.size(), 0);
  for (size_t s = 0; s < steps.size(); ++s) {
    flop += steps[s].flop;
    EXPECT_FALSE(steps[s].kind.empty() || steps[s].shape.empty()) << steps[s].label;
    EXPECT_GT(profile.steps[s].wall, 0);
  }
  EXPECT_EQ(flop, CountFlop(graph));
  double end_of_step = 0, end = 0;
  std::set<std::pair<int, int>> seen;
  for (size_t e = 0; e < profile.events.size(); ++e) {
    const jit::RunProfile::Event& event = profile.events[e];
    if (e > 0 && event.step != profile.events[e - 1].step) end_of_step = end;
    EXPECT_GE(event.begin, end_of_step) << "steps follow one another";
    EXPECT_GT(event.end, event.begin);
    EXPECT_THAT(event.thread, AllOf(Ge(0), Le(Threads() - 1)));
    EXPECT_TRUE(seen.insert({event.step, event.thread}).second) << "one event a step and thread";
    chunks.at(static_cast<size_t>(event.step)) += event.chunks;
    end = std::max(end, event.end);
  }
  for (size_t s = 0; s < steps.size(); ++s) EXPECT_EQ(chunks[s], steps[s].chunks) << s;
}

TEST(Compare, MeasuresAndProfiles) {
  auto graph = [] {
    ComputationGraph graph;
    Value x = graph.Input("x", Shape{64, 32});
    graph.Output("y", Silu(MatMul(x, x, false, true)));
    return graph;
  };
  std::vector<Tensor> inputs{Random(0, "compare").NormalTensor({64, 32})};
  Comparison c = Compare(graph, inputs, {.seconds = 0, .profile = true});
  EXPECT_EQ(c.flop, 2.0 * 64 * 64 * 32);
  for (double value : {c.eager_ms, c.jit_ms, c.eager_cpu_ms, c.jit_cpu_ms, c.compile_seconds})
    EXPECT_GT(value, 0);
  EXPECT_LE(c.max_rel_difference, 1e-5);
  ASSERT_FALSE(c.steps.empty());
  EXPECT_FALSE(c.events.empty());
  for (size_t s = 1; s < c.steps.size(); ++s) EXPECT_GE(c.steps[s - 1].ms, c.steps[s].ms);
  EXPECT_TRUE(Compare(graph, inputs, {.seconds = 0}).steps.empty());
}

TEST(Median, TakesTheMiddle) {
  EXPECT_EQ(Median({3}), 3);
  EXPECT_EQ(Median({3, 1, 2}), 2);
  EXPECT_EQ(Median({4, 1, 3, 2}), 2);
}

}  // namespace
}  // namespace calotype
