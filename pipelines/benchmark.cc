#include "pipelines/benchmark.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "core/random.h"

namespace calotype {
namespace {

double Median(std::vector<double> values) {
  auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

Comparison Compare(const std::function<ComputationGraph()>& make_graph,
                   std::span<const Tensor> inputs, double seconds) {
  GraphRunner eager(make_graph(), Backend::kEager), jit(make_graph(), Backend::kJit);
  Comparison result;
  result.compile_seconds = jit.compile_seconds();
  std::vector<Tensor> expected = eager.Run(inputs), actual = jit.Run(inputs);
  for (size_t i = 0; i < expected.size(); ++i) {
    double largest = 0, difference = 0;
    for (int64_t k = 0; k < expected[i].elements(); ++k) {
      double e = expected[i].data()[k], d = std::abs(actual[i].data()[k] - e);
      largest = std::max(largest, std::abs(e));
      difference = std::isnan(d) ? d : std::max(difference, d);
    }
    result.max_rel_difference =
        std::max(result.max_rel_difference, largest > 0 ? difference / largest : difference);
  }
  auto time = [&](GraphRunner& runner) {
    auto start = std::chrono::steady_clock::now();
    runner.Run(inputs);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  std::vector<double> eager_times, jit_times;
  for (double spent = 0; spent < 2 * seconds || eager_times.size() < 3;
       spent += eager_times.back() + jit_times.back()) {
    eager_times.push_back(time(eager));
    jit_times.push_back(time(jit));
  }
  result.eager_ms = 1e3 * Median(eager_times);
  result.jit_ms = 1e3 * Median(jit_times);
  return result;
}

Comparison CompareUNet(DiffusionModel& model, int64_t batch, double seconds) {
  model.SetTrainingMode(false);
  Shape picture{batch, model.channels(), model.side(), model.side()};
  Shape context{batch, model.caption_tokens(), model.context_width()};
  Random random(0, "benchmark");
  Tensor timesteps({batch}, DType::kI64);
  for (int64_t i = 0; i < batch; ++i) timesteps.data<int64_t>()[i] = 7 + 13 * i % 900;
  std::vector<Tensor> inputs{random.NormalTensor(picture), timesteps, random.NormalTensor(context)};
  auto make_graph = [&] {
    ComputationGraph graph;
    Value sample = graph.Input("sample", picture),
          timestep = graph.Input("timestep", timesteps.type());
    graph.Output("out",
                 model.Denoise(sample, timestep, graph.Input("encoder_hidden_states", context)));
    return graph;
  };
  return Compare(make_graph, inputs, seconds);
}

}  // namespace calotype
