#include "layers/norm.h"

#include "graph/functions.h"

namespace calotype::nn {

GroupNorm::GroupNorm(const Options& options) : Layer("GroupNorm"), options_(options) {
  const Options& o = options_;
  Check(o.num_groups > 0 && o.num_channels > 0 && o.num_channels % o.num_groups == 0,
        "GroupNorm: num_groups {} must divide num_channels {}", o.num_groups, o.num_channels);
  Check(o.eps >= 0, "GroupNorm: eps {} must not be negative", o.eps);
  if (!o.affine) return;
  AddParameter("weight", {o.num_channels}, Initializer::Constant(1));
  AddParameter("bias", {o.num_channels}, Initializer::Constant(0));
}

std::vector<Value> GroupNorm::ExportComputationGraph(ComputationGraph& graph,
                                                     std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "x");
  Check<ShapeError>(x.rank() >= 2 && x.dim(1) == options_.num_channels,
                    "{}: x {} must be [B, C, ...] with {} channels", Describe(), x.shape(),
                    options_.num_channels);
  Value gamma = options_.affine ? Leaf(graph, "weight") : Value{};
  Value beta = options_.affine ? Leaf(graph, "bias") : Value{};
  return {calotype::GroupNorm(x, gamma, beta, options_.num_groups, options_.eps)};
}

LayerNorm::LayerNorm(const Options& options) : Layer("LayerNorm"), options_(options) {
  const Options& o = options_;
  Check(o.normalized_shape > 0 && o.eps >= 0,
        "LayerNorm: normalized_shape {} must be positive, eps {} not negative", o.normalized_shape,
        o.eps);
  if (!o.elementwise_affine) return;
  AddParameter("weight", {o.normalized_shape}, Initializer::Constant(1));
  AddParameter("bias", {o.normalized_shape}, Initializer::Constant(0));
}

std::vector<Value> LayerNorm::ExportComputationGraph(ComputationGraph& graph,
                                                     std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "x");
  Check<ShapeError>(x.rank() >= 1 && x.dim(-1) == options_.normalized_shape,
                    "{}: the last axis of x {} must have size {}", Describe(), x.shape(),
                    options_.normalized_shape);
  Value gamma = options_.elementwise_affine ? Leaf(graph, "weight") : Value{};
  Value beta = options_.elementwise_affine ? Leaf(graph, "bias") : Value{};
  return {calotype::LayerNorm(x, gamma, beta, options_.eps)};
}

}  // namespace calotype::nn
