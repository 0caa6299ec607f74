// FeedForward of diffusers: the two linear layers of a transformer block.
#pragma once

#include <string>

#include "layers/linear.h"

namespace calotype::nn {

// x [..., dim] -> [..., dim_out]: net.2(f(net.0.proj(x))) over an inner width of dim * mult.
// activation_fn: "geglu" a gelu(g) (Shazeer 2020, arXiv:2002.05202) and "swiglu" a silu(g), where
// a, g are the halves of net.0.proj(x); "gelu", "gelu-approximate" (tanh), "geglu-approximate" (x
// sigmoid(1.702 x)), "linear-silu".
class FeedForward : public Layer {
 public:
  struct Options {
    int64_t dim = 0;
    int64_t dim_out = 0;  // 0: dim
    int64_t mult = 4;
    double dropout = 0;  // only 0 is supported
    std::string activation_fn = "geglu";
    int64_t inner_dim = 0;  // 0: dim * mult
    bool bias = true;
  };
  // Errors: ValueError for an unknown activation_fn, UnsupportedError for a dropout.
  explicit FeedForward(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
  std::string activation_;
  bool gated_ = false;
  Linear *proj_, *out_;
};

}  // namespace calotype::nn
