// LoRALinearLayer of diffusers: the low-rank term that is added to a linear layer. Hu et al. 2021,
// arXiv:2106.09685.
#pragma once

#include <optional>

#include "layers/linear.h"

namespace calotype::nn {

// y = scale * network_alpha / rank * up(down(x)), without the fraction if there is no
// network_alpha. down.weight [rank, in_features] is drawn from N(0, 1/rank^2), up.weight
// [out_features, rank] is 0 at first, so that training starts from the layer as it was.
class LoRALinearLayer : public Layer {
 public:
  struct Options {
    int64_t in_features = 0, out_features = 0;
    int64_t rank = 4;
    std::optional<double> network_alpha = std::nullopt;
    double scale = 1;
  };
  // Errors: ValueError unless the sizes are positive.
  explicit LoRALinearLayer(const Options& options);
  const Options& options() const { return options_; }
  // What up(down(x)) is multiplied by.
  double factor() const;
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
};

}  // namespace calotype::nn
