// GroupNorm and LayerNorm with their gradients.
#include "core/error.h"
#include "core/norm.h"
#include "graph/functions.h"
#include "graph/op.h"
#include "graph/op_decompose.h"

namespace calotype {

extern const Op kGroupNormOp, kGroupNormGradientOp, kLayerNormOp, kLayerNormGradientOp;

namespace {

// Gamma comes with beta, so there are min_arity or max_arity inputs.
void CheckInputs(const InferContext& context) {
  const size_t count = context.inputs.size();
  Check<ShapeError>(count == static_cast<size_t>(context.op->min_arity) ||
                        count == static_cast<size_t>(context.op->max_arity),
                    "{}: {} inputs, expects {} or {}", context.op->name, count,
                    context.op->min_arity, context.op->max_arity);
  for (const TensorType& input : context.inputs) {
    Check<ShapeError>(input.dtype == DType::kF32, "{}: input is {}, expects f32", context.op->name,
                      input);
  }
}

const float* Optional(std::span<const Tensor> inputs, size_t i) {
  return i < inputs.size() ? inputs[i].data() : nullptr;
}

// ---------------------------------------------------------------- GroupNorm(x[, gamma, beta])

// x [B, C, ...] as [B, C, N]; checks the groups.
GroupNormShape GroupsOf(std::string_view op, const Shape& x, int64_t groups) {
  Check<ShapeError>(x.rank() >= 2, "{}: x is {}, expects [B, C, ...]", op, x);
  Check<ShapeError>(groups >= 1 && x[1] % groups == 0,
                    "{}: {} channels cannot form {} groups (x {})", op, x[1], groups, x);
  int64_t positions = 1;
  for (int axis = 2; axis < x.rank(); ++axis) positions *= x[axis];
  Check<ShapeError>(x[1] * positions > 0, "{}: the groups of x {} are empty", op, x);
  return {x[0], x[1], positions, groups};
}

std::vector<TensorType> InferGroupNorm(const InferContext& context) {
  CheckInputs(context);
  const Shape& x = context.inputs[0].shape;
  GroupNormShape s = GroupsOf("GroupNorm", x, context.attrs.Int("groups"));
  for (size_t i = 1; i < context.inputs.size(); ++i) {
    Check<ShapeError>(context.inputs[i].shape == Shape{s.channels},
                      "GroupNorm: gamma and beta must be f32[{}], one is {} (x {})", s.channels,
                      context.inputs[i], x);
  }
  TensorType statistic{DType::kF32, {s.batch, s.groups}};
  return {context.inputs[0], statistic, statistic};
}

void RunGroupNorm(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  GroupNormForward(GroupsOf("GroupNorm", x.shape(), context.attrs.Int("groups")),
                   context.attrs.Float("eps"), x.data(), Optional(context.inputs, 1),
                   Optional(context.inputs, 2), context.outputs[0].data(),
                   context.outputs[1].data(), context.outputs[2].data());
}

// The pieces that forward and gradient share, in the shape [B, C, N].
struct GroupNormParts {
  GroupNormShape s;
  Shape bcn, bc, bgc;
  float count;  // elements of a group

  explicit GroupNormParts(const GroupNormShape& shape)
      : s(shape),
        bcn{s.batch, s.channels, s.positions},
        bc{s.batch, s.channels},
        bgc{s.batch, s.groups, s.channels / s.groups},
        count(static_cast<float>(bgc[2] * s.positions)) {}

  // [B, C, N] -> [B, C]: per channel first, so that a channels-last layout adds whole vectors.
  static Value ChannelSum(Value x) { return Sum(x, {2}); }
  // [B, C] -> [B, G].
  Value GroupSum(Value x) const { return Sum(Reshape(x, bgc), {2}); }
  // [B, G] -> [B, C, 1].
  Value PerChannel(Value x) const {
    Value wide = Broadcast(Reshape(x, {s.batch, s.groups, 1}), bgc);
    return Reshape(wide, {s.batch, s.channels, 1});
  }
};

std::vector<Value> DecomposeGroupNorm(ComputationGraph&, const ComputationNode& node,
                                      std::span<const Value> inputs) {
  GroupNormParts p(GroupsOf("GroupNorm", inputs[0].shape(), node.attrs.Int("groups")));
  Value x = Reshape(inputs[0], p.bcn);
  Value mean = p.GroupSum(p.ChannelSum(x)) / p.count;
  Value centred = x - p.PerChannel(mean);
  Value variance = p.GroupSum(p.ChannelSum(Square(centred))) / p.count;
  Value rstd = Rsqrt(variance + static_cast<float>(node.attrs.Float("eps")));
  Value scale = p.PerChannel(rstd);
  if (inputs.size() == 3) scale = scale * Reshape(inputs[1], {p.s.channels, 1});
  Value y = centred * scale;
  if (inputs.size() == 3) y = y + Reshape(inputs[2], {p.s.channels, 1});
  return {Reshape(y, inputs[0].shape()), mean, rstd};
}

// The common rule of both norms; `op` is the gradient op.
std::vector<Value> GradientNorm(const GradientContext& context, const Op& op) {
  if (context.doutputs[1].defined() || context.doutputs[2].defined())
    return DecomposedGradient(context);
  std::vector<Value> inputs{context.doutputs[0], context.inputs[0], context.outputs[1],
                            context.outputs[2]};
  if (context.inputs.size() == 3) inputs.push_back(context.inputs[1]);
  return context.graph.Emit(op, inputs, context.node.attrs);
}
std::vector<Value> GradientGroupNorm(const GradientContext& context) {
  return GradientNorm(context, kGroupNormGradientOp);
}

std::vector<OpSample> NormSamples(bool gradient, bool group) {
  struct Case {
    Shape x;
    int64_t groups;
    bool affine;
  };
  const std::vector<Case> cases =
      group ? std::vector<Case>{{{1, 4, 3, 3}, 2, true}, {{2, 6, 5, 7}, 3, true},
                                {{3, 8, 4}, 8, false},   {{2, 12, 2, 3}, 1, true},
                                {{2, 32, 17}, 4, true},  {{1, 5}, 1, true},
                                {{2, 6, 1, 1}, 2, true}, {{1, 4, 33, 65}, 2, true},
                                {{5, 12}, 4, false},     {{0, 4, 3}, 2, true}}
            : std::vector<Case>{{{5}, 0, true},        {{3, 17}, 0, true}, {{2, 3, 33}, 0, false},
                                {{4, 2, 64}, 0, true}, {{1, 1}, 0, true},  {{70, 33}, 0, true},
                                {{9, 130}, 0, true},   {{0, 8}, 0, true}};
  std::vector<OpSample> samples;
  for (const Case& c : cases) {
    OpSample sample{{{DType::kF32, c.x}}, {{"eps", 1e-5}}};
    if (group) sample.attrs.Set("groups", c.groups);
    const int64_t width = group ? c.x[1] : c.x[-1];
    if (gradient) {
      Shape statistic = group ? Shape{c.x[0], c.groups} : Shape(c.x.dims().first(c.x.rank() - 1));
      sample.inputs = {{DType::kF32, c.x},
                       {DType::kF32, c.x},
                       {DType::kF32, statistic},
                       {DType::kF32, statistic}};
      if (c.affine) sample.inputs.push_back({DType::kF32, {width}});
    } else if (c.affine) {
      sample.inputs.insert(sample.inputs.end(), 2, {DType::kF32, {width}});
    }
    samples.push_back(std::move(sample));
  }
  return samples;
}

// ------------------------------------------- GroupNormGradient(dy, x, mean, rstd[, gamma])

std::vector<TensorType> InferGroupNormGradient(const InferContext& context) {
  CheckInputs(context);
  const Shape& x = context.inputs[1].shape;
  GroupNormShape s = GroupsOf("GroupNormGradient", x, context.attrs.Int("groups"));
  Shape statistic{s.batch, s.groups};
  Check<ShapeError>(context.inputs[0].shape == x && context.inputs[2].shape == statistic &&
                        context.inputs[3].shape == statistic,
                    "GroupNormGradient: dy {}, x {}, mean {}, rstd {} do not fit",
                    context.inputs[0], x, context.inputs[2], context.inputs[3]);
  if (context.inputs.size() == 4) return {context.inputs[1]};
  TensorType channels{DType::kF32, {s.channels}};
  Check<ShapeError>(context.inputs[4] == channels, "GroupNormGradient: gamma is {}, expects {}",
                    context.inputs[4], channels);
  return {context.inputs[1], channels, channels};
}

void RunGroupNormGradient(const RunContext& context) {
  auto in = [&](int i) { return context.inputs[i].data(); };
  const bool affine = context.inputs.size() == 5;
  GroupNormBackward(
      GroupsOf("GroupNormGradient", context.inputs[1].shape(), context.attrs.Int("groups")), in(1),
      Optional(context.inputs, 4), in(2), in(3), in(0), context.outputs[0].data(),
      affine ? context.outputs[1].data() : nullptr, affine ? context.outputs[2].data() : nullptr);
}

std::vector<Value> DecomposeGroupNormGradient(ComputationGraph&, const ComputationNode& node,
                                              std::span<const Value> inputs) {
  GroupNormParts p(GroupsOf("GroupNormGradient", inputs[1].shape(), node.attrs.Int("groups")));
  const bool affine = inputs.size() == 5;
  Value dy = Reshape(inputs[0], p.bcn), x = Reshape(inputs[1], p.bcn);
  Value rstd = p.PerChannel(inputs[3]);
  Value xhat = (x - p.PerChannel(inputs[2])) * rstd;
  Value dbeta = p.ChannelSum(dy), dgamma = p.ChannelSum(dy * xhat);  // of each picture
  Value scaled_dy = dy, sum = dbeta, sum_xhat = dgamma;
  if (affine) {
    scaled_dy = dy * Reshape(inputs[4], {p.s.channels, 1});
    sum = dbeta * inputs[4];
    sum_xhat = dgamma * inputs[4];
  }
  Value mean_dy = p.PerChannel(p.GroupSum(sum) / p.count);
  Value mean_dy_xhat = p.PerChannel(p.GroupSum(sum_xhat) / p.count);
  Value dx = rstd * (scaled_dy - mean_dy - xhat * mean_dy_xhat);
  std::vector<Value> result{Reshape(dx, inputs[1].shape())};
  if (affine) result.insert(result.end(), {Sum(dgamma, {0}), Sum(dbeta, {0})});
  return result;
}

// ---------------------------------------------------------------- LayerNorm(x[, gamma, beta])

Shape RowsOf(const Shape& x) { return Shape(x.dims().first(x.rank() - 1)); }

std::vector<TensorType> InferLayerNorm(const InferContext& context) {
  CheckInputs(context);
  const Shape& x = context.inputs[0].shape;
  Check<ShapeError>(x.rank() >= 1 && x[-1] > 0, "LayerNorm: x is {}, expects [..., D], D > 0", x);
  for (size_t i = 1; i < context.inputs.size(); ++i) {
    Check<ShapeError>(context.inputs[i].shape == Shape{x[-1]},
                      "LayerNorm: gamma and beta must be f32[{}], one is {} (x {})", x[-1],
                      context.inputs[i], x);
  }
  TensorType statistic{DType::kF32, RowsOf(x)};
  return {context.inputs[0], statistic, statistic};
}

void RunLayerNorm(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  LayerNormForward(context.outputs[1].elements(), x.shape()[-1], context.attrs.Float("eps"),
                   x.data(), Optional(context.inputs, 1), Optional(context.inputs, 2),
                   context.outputs[0].data(), context.outputs[1].data(), context.outputs[2].data());
}

std::vector<Value> DecomposeLayerNorm(ComputationGraph&, const ComputationNode& node,
                                      std::span<const Value> inputs) {
  Value x = inputs[0];
  const float width = static_cast<float>(x.dim(-1));
  Value mean = Sum(x, {-1}, true) / width;
  Value centred = x - mean;
  Value variance = Sum(Square(centred), {-1}, true) / width;
  Value rstd = Rsqrt(variance + static_cast<float>(node.attrs.Float("eps")));
  Value y = centred * rstd;
  if (inputs.size() == 3) y = y * inputs[1] + inputs[2];
  Shape rows = RowsOf(x.shape());
  return {y, Reshape(mean, rows), Reshape(rstd, rows)};
}

std::vector<Value> GradientLayerNorm(const GradientContext& context) {
  return GradientNorm(context, kLayerNormGradientOp);
}

// ------------------------------------------- LayerNormGradient(dy, x, mean, rstd[, gamma])

std::vector<TensorType> InferLayerNormGradient(const InferContext& context) {
  CheckInputs(context);
  const Shape& x = context.inputs[1].shape;
  Check<ShapeError>(x.rank() >= 1 && context.inputs[0].shape == x &&
                        context.inputs[2].shape == RowsOf(x) &&
                        context.inputs[3].shape == RowsOf(x),
                    "LayerNormGradient: dy {}, x {}, mean {}, rstd {} do not fit",
                    context.inputs[0], x, context.inputs[2], context.inputs[3]);
  if (context.inputs.size() == 4) return {context.inputs[1]};
  TensorType width{DType::kF32, {x[-1]}};
  Check<ShapeError>(context.inputs[4] == width, "LayerNormGradient: gamma is {}, expects {}",
                    context.inputs[4], width);
  return {context.inputs[1], width, width};
}

void RunLayerNormGradient(const RunContext& context) {
  auto in = [&](int i) { return context.inputs[i].data(); };
  const bool affine = context.inputs.size() == 5;
  LayerNormBackward(context.inputs[2].elements(), context.inputs[1].shape()[-1], in(1),
                    Optional(context.inputs, 4), in(2), in(3), in(0), context.outputs[0].data(),
                    affine ? context.outputs[1].data() : nullptr,
                    affine ? context.outputs[2].data() : nullptr);
}

std::vector<Value> DecomposeLayerNormGradient(ComputationGraph&, const ComputationNode&,
                                              std::span<const Value> inputs) {
  Value dy = inputs[0], x = inputs[1];
  auto column = [&](Value v) {
    std::vector<int64_t> dims = v.shape().ToVector();
    dims.push_back(1);
    return Reshape(v, Shape(dims));
  };
  Value rstd = column(inputs[3]);
  Value xhat = (x - column(inputs[2])) * rstd;
  const bool affine = inputs.size() == 5;
  Value scaled_dy = affine ? dy * inputs[4] : dy;
  const float width = static_cast<float>(x.dim(-1));
  Value mean_dy = Sum(scaled_dy, {-1}, true) / width;
  Value mean_dy_xhat = Sum(scaled_dy * xhat, {-1}, true) / width;
  Value dx = rstd * (scaled_dy - mean_dy - xhat * mean_dy_xhat);
  std::vector<Value> result{dx};
  if (affine) {
    Shape flat{inputs[2].shape().elements(), x.dim(-1)};
    result.push_back(Sum(Reshape(dy * xhat, flat), {0}));
    result.push_back(Sum(Reshape(dy, flat), {0}));
  }
  return result;
}

std::vector<OpSample> SamplesGroupNorm() { return NormSamples(false, true); }
std::vector<OpSample> SamplesGroupNormGradient() { return NormSamples(true, true); }
std::vector<OpSample> SamplesLayerNorm() { return NormSamples(false, false); }
std::vector<OpSample> SamplesLayerNormGradient() { return NormSamples(true, false); }

Value EmitNorm(const Op& op, Value x, Value gamma, Value beta, Attrs attrs) {
  Check<ShapeError>(gamma.defined() == beta.defined(), "{}: gamma and beta come together (x {})",
                    op.name, x.shape());
  std::vector<Value> inputs{x};
  if (gamma.defined()) inputs.insert(inputs.end(), {gamma, beta});
  return x.graph->EmitOne(op, inputs, std::move(attrs));
}

}  // namespace

const Op kGroupNormOp{.name = "GroupNorm",
                      .kind = OpKind::kCall,
                      .min_arity = 1,
                      .max_arity = 3,
                      .doc =
                          "y = (x - mean) rstd gamma + beta over the channels of a group and all "
                          "positions; also mean, rstd [B, groups]",
                      .source = "Wu & He 2018, arXiv:1803.08494",
                      .infer = InferGroupNorm,
                      .run = RunGroupNorm,
                      .gradient = GradientGroupNorm,
                      .decompose = DecomposeGroupNorm,
                      .samples = SamplesGroupNorm};
const Op kGroupNormGradientOp{
    .name = "GroupNormGradient",
    .kind = OpKind::kCall,
    .min_arity = 4,
    .max_arity = 5,
    .doc = "dx[, dgamma, dbeta] of GroupNorm from dy, x, mean, rstd[, gamma]",
    .source = "",
    .infer = InferGroupNormGradient,
    .run = RunGroupNormGradient,
    .decompose = DecomposeGroupNormGradient,
    .samples = SamplesGroupNormGradient};
const Op kLayerNormOp{.name = "LayerNorm",
                      .kind = OpKind::kCall,
                      .min_arity = 1,
                      .max_arity = 3,
                      .doc = "y = (x - mean) rstd gamma + beta over the last axis; also mean, rstd",
                      .source = "Ba et al. 2016, arXiv:1607.06450",
                      .infer = InferLayerNorm,
                      .run = RunLayerNorm,
                      .gradient = GradientLayerNorm,
                      .decompose = DecomposeLayerNorm,
                      .samples = SamplesLayerNorm};
const Op kLayerNormGradientOp{
    .name = "LayerNormGradient",
    .kind = OpKind::kCall,
    .min_arity = 4,
    .max_arity = 5,
    .doc = "dx[, dgamma, dbeta] of LayerNorm from dy, x, mean, rstd[, gamma]",
    .source = "",
    .infer = InferLayerNormGradient,
    .run = RunLayerNormGradient,
    .decompose = DecomposeLayerNormGradient,
    .samples = SamplesLayerNormGradient};

Value GroupNorm(Value x, Value gamma, Value beta, int64_t groups, double eps) {
  return EmitNorm(kGroupNormOp, x, gamma, beta, {{"groups", groups}, {"eps", eps}});
}
Value LayerNorm(Value x, Value gamma, Value beta, double eps) {
  return EmitNorm(kLayerNormOp, x, gamma, beta, {{"eps", eps}});
}

}  // namespace calotype
