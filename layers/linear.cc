#include "layers/linear.h"

#include <cmath>

#include "graph/functions.h"

namespace calotype::nn {

Linear::Linear(const Options& options) : LoRACompatible("Linear"), options_(options) {
  Check(options.in_features > 0 && options.out_features > 0,
        "Linear: in_features {} and out_features {} must be positive", options.in_features,
        options.out_features);
  float bound = 1 / std::sqrt(static_cast<float>(options.in_features));
  AddParameter("weight", {options.out_features, options.in_features}, Initializer::Uniform(bound));
  if (options.bias) AddParameter("bias", {options.out_features}, Initializer::Uniform(bound));
}

std::vector<Value> Linear::ExportComputationGraph(ComputationGraph& graph,
                                                  std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "x");
  Check<ShapeError>(x.rank() >= 1 && x.dim(-1) == options_.in_features,
                    "{}: the last axis of x {} must have in_features = {}", Describe(), x.shape(),
                    options_.in_features);
  Value w = Leaf(graph, "weight");
  Value b = options_.bias ? Leaf(graph, "bias") : Value{};
  // One matrix of all rows, so that the weight gradient is one product, too.
  Shape shape = x.shape();
  if (x.rank() != 2)
    x = Reshape(x, {shape.elements() / options_.in_features, options_.in_features});
  Value y = MatMul(x, w, false, true, b);
  if (shape.rank() != 2) y = Reshape(y, shape.With(-1, options_.out_features));
  return {WithLoRA(inputs[0], y)};
}

LoRALayer* Linear::MakeLoRA(const std::string& name, int64_t rank,
                            std::optional<double> network_alpha) {
  return AddLayer<LoRALinearLayer>(
      name,
      LoRALinearLayer::Options{options_.in_features, options_.out_features, rank, network_alpha});
}

Embedding::Embedding(const Options& options) : Layer("Embedding"), options_(options) {
  Check(options.num_embeddings > 0 && options.embedding_dim > 0,
        "Embedding: num_embeddings {} and embedding_dim {} must be positive",
        options.num_embeddings, options.embedding_dim);
  AddParameter("weight", {options.num_embeddings, options.embedding_dim}, Initializer::Normal(1));
}

std::vector<Value> Embedding::ExportComputationGraph(ComputationGraph& graph,
                                                     std::span<const Value> inputs) {
  return {Gather(Leaf(graph, "weight"), Required(inputs, 0, "ids"), 0)};
}

}  // namespace calotype::nn
