#include "layers/timesteps.h"

#include <cmath>

#include "graph/functions.h"
#include "layers/activation.h"

namespace calotype::nn {

Timesteps::Timesteps(const Options& options) : Layer("Timesteps"), options_(options) {
  int64_t half = options.num_channels / 2;
  Check(half > 0 && static_cast<double>(half) > options.downscale_freq_shift,
        "Timesteps: half of num_channels {} must be positive and more than downscale_freq_shift {}",
        options.num_channels, options.downscale_freq_shift);
  // Each step is rounded to float32, in diffusers' order.
  auto log_period = static_cast<float>(-std::log(10000.0));
  auto span = static_cast<float>(static_cast<double>(half) - options.downscale_freq_shift);
  for (int64_t i = 0; i < half; ++i) {
    float exponent = log_period * static_cast<float>(i) / span;
    frequencies_.push_back(static_cast<float>(std::exp(static_cast<double>(exponent))));
  }
}

std::vector<Value> Timesteps::ExportComputationGraph(ComputationGraph& graph,
                                                     std::span<const Value> inputs) {
  Value t = Required(inputs, 0, "timesteps");
  Check<ShapeError>(t.rank() == 1, "{}: timesteps {} must be [B]", Describe(), t.shape());
  if (t.type().dtype != DType::kF32) t = Cast(t);
  int64_t batch = t.dim(0), half = static_cast<int64_t>(frequencies_.size());
  Value f = graph.Constant(Tensor::From(Shape{1, half}, frequencies_));
  Value angle = Reshape(t, {batch, 1}) * f;
  if (options_.scale != 1) angle = static_cast<float>(options_.scale) * angle;
  Value sine = Sin(angle), cosine = Cos(angle);
  Value y = options_.flip_sin_to_cos ? Concat({cosine, sine}, 1) : Concat({sine, cosine}, 1);
  if (options_.num_channels % 2 != 0) y = Pad(y, {0, 0}, {0, 1});
  return {y};
}

TimestepEmbedding::TimestepEmbedding(const Options& options)
    : Layer("TimestepEmbedding"), options_(options) {
  CheckActivation(options.act_fn);
  if (!options.post_act_fn.empty()) CheckActivation(options.post_act_fn);
  int64_t out = options.out_dim > 0 ? options.out_dim : options.time_embed_dim;
  linear_1_ =
      AddLayer<Linear>("linear_1", Linear::Options{options.in_channels, options.time_embed_dim});
  linear_2_ = AddLayer<Linear>("linear_2", Linear::Options{options.time_embed_dim, out});
  if (options.cond_proj_dim > 0) {
    cond_proj_ = AddLayer<Linear>(
        "cond_proj", Linear::Options{options.cond_proj_dim, options.in_channels, /*bias=*/false});
  }
}

std::vector<Value> TimestepEmbedding::ExportComputationGraph(ComputationGraph&,
                                                             std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "sample"), condition = Optional(inputs, 1);
  if (condition.defined()) {
    Check<ShapeError>(cond_proj_, "{}: a condition {} is given, but there is no cond_proj_dim",
                      Describe(), condition.shape());
    Check<ShapeError>(condition.rank() == 2 && condition.dim(1) == options_.cond_proj_dim &&
                          (condition.dim(0) == x.dim(0) || condition.dim(0) == 1 || x.dim(0) == 1),
                      "{}: condition {} must be [{}, {}] (rows, cond_proj_dim)", Describe(),
                      condition.shape(), x.dim(0) == 1 ? "any" : fmt::format("{} or 1", x.dim(0)),
                      options_.cond_proj_dim);
    x = x + cond_proj_->Call(condition);
  }
  Value y = linear_2_->Call(Activate(options_.act_fn, linear_1_->Call(x)));
  return {options_.post_act_fn.empty() ? y : Activate(options_.post_act_fn, y)};
}

}  // namespace calotype::nn
