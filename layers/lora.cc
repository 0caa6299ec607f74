#include "layers/lora.h"

#include <algorithm>
#include <cmath>

#include "graph/functions.h"

namespace calotype::nn {

LoRALayer::LoRALayer(std::string_view type, int64_t rank, std::optional<double> network_alpha,
                     double scale)
    : Layer(type), rank_(rank), network_alpha_(network_alpha) {
  Check(rank > 0, "{}: rank {} must be positive", type, rank);
  Check(std::isfinite(network_alpha.value_or(0)), "{}: network_alpha {} must be finite", type,
        network_alpha.value_or(0));
  factor_ = std::make_shared<Parameter>("factor", Tensor::Scalar(1), /*trainable=*/false);
  SetScale(scale);
}

double LoRALayer::factor() const {
  return network_alpha_ ? scale_ * *network_alpha_ / static_cast<double>(rank_) : scale_;
}

void LoRALayer::SetScale(double scale) {
  Check(std::isfinite(scale), "{}: scale {} must be finite", Describe(), scale);
  scale_ = scale;
  *factor_->Write().data() = static_cast<float>(factor());
}

Value LoRALayer::Scaled(ComputationGraph& graph, Value v) {
  factor_->set_name(path().empty() ? "factor" : path() + ".factor");
  return v * graph.ParameterLeaf(factor_);
}

LoRALinearLayer::LoRALinearLayer(const Options& options)
    : LoRALayer("LoRALinearLayer", options.rank, options.network_alpha, options.scale),
      options_(options) {
  const Options& o = options_;
  Check(o.in_features > 0 && o.out_features > 0,
        "LoRALinearLayer: in_features {} and out_features {} must be positive", o.in_features,
        o.out_features);
  AddParameter("down.weight", {o.rank, o.in_features},
               Initializer::Normal(1 / static_cast<float>(o.rank)));
  AddParameter("up.weight", {o.out_features, o.rank}, Initializer::Constant(0));
}

std::vector<Value> LoRALinearLayer::ExportComputationGraph(ComputationGraph& graph,
                                                           std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "x");
  const Options& o = options_;
  Check<ShapeError>(x.rank() >= 1 && x.dim(-1) == o.in_features,
                    "{}: the last axis of x {} must have in_features = {}", Describe(), x.shape(),
                    o.in_features);
  Shape shape = x.shape();
  if (x.rank() != 2) x = Reshape(x, {shape.elements() / o.in_features, o.in_features});
  // The factor goes to the narrow value.
  Value y = Scaled(graph, MatMul(x, Leaf(graph, "down.weight"), false, true));
  y = MatMul(y, Leaf(graph, "up.weight"), false, true);
  return {shape.rank() != 2 ? Reshape(y, shape.With(-1, o.out_features)) : y};
}

LoRAConv2dLayer::LoRAConv2dLayer(const Options& options)
    : LoRALayer("LoRAConv2dLayer", options.rank, options.network_alpha, options.scale),
      options_(options) {
  const Options& o = options_;
  Check(o.in_channels > 0 && o.out_channels > 0 && o.kernel_size > 0 && o.stride > 0,
        "LoRAConv2dLayer: in_channels {}, out_channels {}, kernel_size {} and stride {} must be "
        "positive",
        o.in_channels, o.out_channels, o.kernel_size, o.stride);
  AddParameter("down.weight", {o.rank, o.in_channels, o.kernel_size, o.kernel_size},
               Initializer::Normal(1 / static_cast<float>(o.rank)));
  AddParameter("up.weight", {o.out_channels, o.rank, 1, 1}, Initializer::Constant(0));
}

std::vector<Value> LoRAConv2dLayer::ExportComputationGraph(ComputationGraph& graph,
                                                           std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "x");
  const Options& o = options_;
  int64_t near = o.padding, far = o.padding + o.extra_padding;
  Value y = Conv2d(x, Leaf(graph, "down.weight"), {}, {o.stride, near, far, near, far});
  return {Conv2d(Scaled(graph, y), Leaf(graph, "up.weight"), {}, {})};
}

LoRALayer& LoRACompatible::AddLoRA(const std::string& name, int64_t rank,
                                   std::optional<double> network_alpha) {
  Check(FindLoRA(name) == nullptr, "{}: there is a low-rank term '{}' already", Describe(), name);
  LoRALayer* lora = MakeLoRA(name, rank, network_alpha);
  lora->SetTrainingMode(training());
  loras_.push_back(lora);
  Changed();
  return *lora;
}

LoRALayer* LoRACompatible::FindLoRA(std::string_view name) const {
  size_t skip = path().empty() ? 0 : path().size() + 1;
  for (LoRALayer* lora : loras_) {
    if (std::string_view(lora->path()).substr(skip) == name) return lora;
  }
  return nullptr;
}

void LoRACompatible::RemoveLoRA(std::string_view name) {
  LoRALayer* lora = FindLoRA(name);
  if (!lora) return;
  std::erase(loras_, lora);
  RemoveLayer(lora);
}

Value LoRACompatible::WithLoRA(Value x, Value y) {
  for (LoRALayer* lora : loras_) y = y + lora->Call(x);
  return y;
}

namespace {

void Collect(Layer& layer, size_t skip,
             std::vector<std::pair<std::string, LoRACompatible*>>& result) {
  if (auto* found = dynamic_cast<LoRACompatible*>(&layer)) {
    result.emplace_back(found->path().substr(std::min(skip, found->path().size())), found);
    return;
  }
  for (const auto& child : layer.layers()) Collect(*child, skip, result);
}

}  // namespace

std::vector<std::pair<std::string, LoRACompatible*>> LoRACompatibleLayers(Layer& model) {
  std::vector<std::pair<std::string, LoRACompatible*>> result;
  Collect(model, model.path().empty() ? 0 : model.path().size() + 1, result);
  return result;
}

}  // namespace calotype::nn
