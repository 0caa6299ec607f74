#include "pipelines/benchmark.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "core/random.h"
#include "pipelines/model_graphs.h"
#include "pipelines/training_setup.h"

namespace calotype {
namespace {

Tensor Integers(const Shape& shape, int64_t limit, Random& random) {
  Tensor result(shape, DType::kI64);
  for (int64_t& v : result.values<int64_t>()) v = random.Integer(limit);
  return result;
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
  result.eager_ms = 1e3 * *std::min_element(eager_times.begin(), eager_times.end());
  result.jit_ms = 1e3 * *std::min_element(jit_times.begin(), jit_times.end());
  return result;
}

Comparison CompareUNet(DiffusionModel& model, int64_t batch, double seconds) {
  Random random(0, "benchmark");
  std::vector<Tensor> inputs{
      random.NormalTensor({batch, model.channels(), model.side(), model.side()}),
      Integers({batch}, 1000, random),
      random.NormalTensor({batch, model.caption_tokens(), model.context_width()})};
  return Compare([&] { return UNetGraph(model, batch); }, inputs, seconds);
}

Comparison CompareTrainingStep(DiffusionModel& model, int64_t batch, double seconds) {
  Random random(0, "benchmark");
  NoiseSchedule schedule(model.scheduler());
  Optimizer optimizer(AdamW{}, model.NamedParameters(), 1);
  Ema ema({.decay = 0.995}, model.NamedParameters());
  Shape pictures{batch, model.channels(), model.side(), model.side()};
  int64_t words = static_cast<int64_t>(model.encoder().config().vocabulary.size());
  std::vector<Tensor> inputs{random.NormalTensor(pictures), random.NormalTensor(pictures),
                             Integers({batch}, schedule.size(), random),
                             Integers({batch, model.caption_tokens()}, words, random)};
  for (Tensor& input : optimizer.Inputs(1, 0)) inputs.push_back(std::move(input));
  for (Tensor& input : ema.Inputs(1)) inputs.push_back(std::move(input));
  return Compare([&] { return TrainingStepGraph(model, schedule, batch, optimizer, &ema); }, inputs,
                 seconds);
}

std::unique_ptr<DiffusionModel> RandomModel(const std::string& unet) {
  UNet2DConditionConfig config = UNetOf(unet);
  CaptionEncoderConfig encoder;
  for (char c = 'a'; c <= 'z'; ++c) encoder.vocabulary.push_back(std::string(1, c));
  encoder.hidden_size = config.cross_attention_dim[0];
  auto model = std::make_unique<DiffusionModel>(config, encoder, SchedulerConfig{});
  model->Initialize(0);
  return model;
}

}  // namespace calotype
