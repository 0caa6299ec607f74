// Low-rank terms beside a layer: LoRALinearLayer and LoRAConv2dLayer of diffusers, and
// LoRACompatible, the base of Linear and Conv2d, to which such terms can be added by name. Hu et
// al. 2021, arXiv:2106.09685.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "layers/layer.h"

namespace calotype::nn {

// y = scale * network_alpha / rank * up(down(x)), without the fraction if there is no
// network_alpha. down.weight is drawn from N(0, 1/rank^2), up.weight is 0 at first, so that
// training starts from the layer as it was. `scale` may change at any time: graphs read the factor
// as a parameter, so compiled ones stay valid. (It is none of NamedParameters: not part of a file,
// not trained.)
class LoRALayer : public Layer {
 public:
  int64_t rank() const { return rank_; }
  std::optional<double> network_alpha() const { return network_alpha_; }
  double scale() const { return scale_; }
  // Errors: ValueError unless the scale is finite.
  void SetScale(double scale);
  // What up(down(x)) is multiplied by.
  double factor() const;

 protected:
  // Errors: ValueError unless rank > 0 and the other two are finite.
  LoRALayer(std::string_view type, int64_t rank, std::optional<double> network_alpha, double scale);
  // v times the factor.
  Value Scaled(ComputationGraph& graph, Value v);

 private:
  int64_t rank_;
  std::optional<double> network_alpha_;
  double scale_ = 1;
  ParameterPtr factor_;
};

// Beside a linear layer: down.weight [rank, in_features], up.weight [out_features, rank].
class LoRALinearLayer : public LoRALayer {
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
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
};

// Beside a convolution: down is one of the same kernel and stride to `rank` channels, down.weight
// [rank, in_channels, k, k]; up is 1x1, up.weight [out_channels, rank, 1, 1].
class LoRAConv2dLayer : public LoRALayer {
 public:
  struct Options {
    int64_t in_channels = 0, out_channels = 0;
    int64_t kernel_size = 1, stride = 1, padding = 0, extra_padding = 0;  // as Conv2d's
    int64_t rank = 4;
    std::optional<double> network_alpha = std::nullopt;
    double scale = 1;
  };
  // Errors: ValueError unless the sizes are positive.
  explicit LoRAConv2dLayer(const Options& options);
  const Options& options() const { return options_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
};

// A layer with a parameter "weight" to whose result low-rank terms can be added: y = base(x) +
// lora_1(x) + lora_2(x) ... The terms are sub-layers: their parameters train and are saved as
// "lora_1.down.weight" and so on.
class LoRACompatible : public Layer {
 public:
  // Errors: ValueError if there is a term of that name, or for a rank that is not positive.
  LoRALayer& AddLoRA(const std::string& name, int64_t rank, std::optional<double> network_alpha);
  // The term of that name, or null.
  LoRALayer* FindLoRA(std::string_view name) const;
  // Removes the term of that name, if there is one.
  void RemoveLoRA(std::string_view name);
  const std::vector<LoRALayer*>& loras() const { return loras_; }

 protected:
  using Layer::Layer;
  virtual LoRALayer* MakeLoRA(const std::string& name, int64_t rank,
                              std::optional<double> network_alpha) = 0;
  // y plus all terms of x.
  Value WithLoRA(Value x, Value y);

 private:
  std::vector<LoRALayer*> loras_;  // in the order of their addition
};

// All layers of a model that take low-rank terms, by their paths counted from the model, in the
// order of its layers. Terms themselves are not among them.
std::vector<std::pair<std::string, LoRACompatible*>> LoRACompatibleLayers(Layer& model);

}  // namespace calotype::nn
