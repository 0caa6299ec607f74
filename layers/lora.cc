#include "layers/lora.h"

#include "graph/functions.h"

namespace calotype::nn {

LoRALinearLayer::LoRALinearLayer(const Options& options)
    : Layer("LoRALinearLayer"), options_(options) {
  const Options& o = options_;
  Check(o.in_features > 0 && o.out_features > 0 && o.rank > 0,
        "LoRALinearLayer: in_features {}, out_features {} and rank {} must be positive",
        o.in_features, o.out_features, o.rank);
  AddParameter("down.weight", {o.rank, o.in_features},
               Initializer::Normal(1 / static_cast<float>(o.rank)));
  AddParameter("up.weight", {o.out_features, o.rank}, Initializer::Constant(0));
}

double LoRALinearLayer::factor() const {
  const Options& o = options_;
  return o.network_alpha ? o.scale * *o.network_alpha / static_cast<double>(o.rank) : o.scale;
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
  Value y = MatMul(x, Leaf(graph, "down.weight"), false, true);
  // The factor goes to the narrow value.
  auto f = static_cast<float>(factor());
  if (f != 1) y = y * f;
  y = MatMul(y, Leaf(graph, "up.weight"), false, true);
  return {shape.rank() != 2 ? Reshape(y, shape.With(-1, o.out_features)) : y};
}

}  // namespace calotype::nn
