// GroupNorm and LayerNorm: torch.nn's layers of these names.
#pragma once

#include "layers/layer.h"

namespace calotype::nn {

// y = (x - mean) / sqrt(var + eps) * weight + bias over the channels of a group and all positions;
// x [B, C, ...], weight (1 at first) and bias (0) [C]. Wu & He 2018, arXiv:1803.08494.
class GroupNorm : public Layer {
 public:
  struct Options {
    int64_t num_groups = 32, num_channels = 0;
    double eps = 1e-5;
    bool affine = true;
  };
  // Errors: ValueError unless num_groups divides num_channels and eps >= 0.
  explicit GroupNorm(const Options& options);
  const Options& options() const { return options_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
};

// The same over the last axis, of size normalized_shape. Ba et al. 2016, arXiv:1607.06450.
class LayerNorm : public Layer {
 public:
  struct Options {
    int64_t normalized_shape = 0;
    double eps = 1e-5;
    bool elementwise_affine = true;
  };
  explicit LayerNorm(const Options& options);  // Errors: ValueError unless both are in range
  const Options& options() const { return options_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
};

}  // namespace calotype::nn
