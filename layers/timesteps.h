// Time embedding: the sinusoids of a timestep (Vaswani et al. 2017, arXiv:1706.03762) and the two
// linear layers after them, as in diffusers.
#pragma once

#include <string>

#include "layers/linear.h"

namespace calotype::nn {

// timesteps [B] (f32, i32 or i64) -> [B, num_channels]: with half = num_channels / 2 and
// f_i = exp(-ln(10000) i / (half - downscale_freq_shift)), the columns are [sin(t f) | cos(t f)],
// or [cos | sin] with flip_sin_to_cos; an odd num_channels appends a zero. f_i and the product t
// f_i are rounded to float32, as diffusers defines them (at t = 999 this differs from exact
// arithmetic by up to 1e-5, which trained weights have seen).
class Timesteps : public Layer {
 public:
  struct Options {
    int64_t num_channels = 0;
    bool flip_sin_to_cos = true;
    double downscale_freq_shift = 0;
    double scale = 1;  // of the product t f_i
  };
  // Errors: ValueError unless num_channels / 2 > downscale_freq_shift.
  explicit Timesteps(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
  std::vector<float> frequencies_;
};

// y = g(linear_2(f(linear_1(x + cond_proj(c))))): x [B or 1, in_channels] -> [B, out_dim or
// time_embed_dim]; the input c [B or 1, cond_proj_dim] is optional, and g the identity unless
// post_act_fn names another.
class TimestepEmbedding : public Layer {
 public:
  struct Options {
    int64_t in_channels = 0, time_embed_dim = 0;
    std::string act_fn = "silu";
    int64_t out_dim = 0;  // 0: time_embed_dim
    std::string post_act_fn = "";
    int64_t cond_proj_dim = 0;  // 0: no second input
  };
  explicit TimestepEmbedding(const Options& options);  // Errors: as Linear's and Activate's
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
  Linear *linear_1_, *linear_2_, *cond_proj_ = nullptr;
};

}  // namespace calotype::nn
