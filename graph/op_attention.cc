// Attention and its gradient.
#include "core/attention.h"

#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "graph/functions.h"
#include "graph/op.h"
#include "graph/op_decompose.h"

namespace calotype {

extern const Op kAttentionOp, kAttentionGradientOp;

namespace {

// Inputs of Attention: q, k, v, then the mask if attribute "mask" is 1, then the seed if "dropout"
// is positive. AttentionGradient has out, lse and dout between v and the mask.
struct Operands {
  size_t mask = 0, seed = 0;  // positions; 0 if absent
  size_t count = 0;

  Operands(const Attrs& attrs, bool gradient) {
    count = gradient ? 6 : 3;
    if (attrs.Int("mask")) mask = count++;
    if (attrs.Float("dropout") > 0) seed = count++;
  }
};

template <class Range>
std::string ShapeList(const Range& shapes) {
  std::string text;
  for (const Shape& shape : shapes) text += (text.empty() ? "" : ", ") + shape.ToString();
  return text;
}

// Checks everything and fills all but the seed.
AttentionShape MakeShape(std::string_view op, const Attrs& attrs, const std::vector<Shape>& shapes,
                         const Operands& operands) {
  Check<ShapeError>(shapes.size() == operands.count, "{}: {} inputs, expects {} (inputs {})", op,
                    shapes.size(), operands.count, ShapeList(shapes));
  const Shape &q = shapes[0], &k = shapes[1], &v = shapes[2];
  std::string text = fmt::format("{}: q {}, k {}, v {}", op, q, k, v);
  Check<ShapeError>(q.rank() == 3 && k.rank() == 3 && v.rank() == 3,
                    "{}: expects [batch, tokens, heads * width]", text);
  AttentionShape s;
  s.heads = attrs.Int("heads");
  Check<ShapeError>(s.heads >= 1 && q[2] % s.heads == 0 && v[2] % s.heads == 0,
                    "{}: {} heads do not divide the widths {} and {}", text, s.heads, q[2], v[2]);
  Check<ShapeError>(k[2] == q[2], "{}: widths of q and k differ", text);
  Check<ShapeError>(k[1] == v[1] && k[0] == v[0], "{}: k and v differ in batch or tokens", text);
  Check<ShapeError>(k[0] == q[0] || k[0] == 1, "{}: the batch of k and v must be {} or 1", text,
                    q[0]);
  Check<ShapeError>(k[1] >= 1, "{}: there are no keys", text);
  s.batch = q[0];
  s.kv_batch = k[0];
  s.queries = q[1];
  s.keys = k[1];
  s.head_dim = q[2] / s.heads;
  s.value_dim = v[2] / s.heads;
  s.scale = static_cast<float>(attrs.Float("scale"));
  s.causal = attrs.Int("causal");
  s.dropout = static_cast<float>(attrs.Float("dropout"));
  s.stream = static_cast<uint64_t>(attrs.Int("stream"));
  s.block_q = attrs.Int("block_q");
  s.block_kv = attrs.Int("block_kv");
  Check(s.dropout >= 0 && s.dropout < 1, "{}: dropout {} is not in [0, 1)", op, s.dropout);
  Check(s.block_q >= 1 && s.block_kv >= 1, "{}: block sizes {} and {} must be positive", op,
        s.block_q, s.block_kv);
  if (operands.mask) {
    const Shape& mask = shapes[operands.mask];
    Shape scores{s.batch, s.heads, s.queries, s.keys};
    bool fits = mask.rank() == 4;
    for (int i = 0; fits && i < 4; ++i) fits = mask[i] == 1 || mask[i] == scores[i];
    Check<ShapeError>(fits, "{}: mask {} does not broadcast to the scores {}", text, mask, scores);
  }
  return s;
}

AttentionMask MakeMask(const Tensor& mask) {
  const Shape& shape = mask.shape();
  auto strides = shape.Strides();
  auto stride = [&](int axis) { return shape[axis] == 1 ? 0 : strides[axis]; };
  return {mask.data(), stride(0), stride(1), stride(2), stride(3)};
}

std::vector<Shape> Shapes(Types types) {
  std::vector<Shape> shapes;
  for (const TensorType& type : types) shapes.push_back(type.shape);
  return shapes;
}

void CheckTypes(const InferContext& context, const Operands& operands) {
  for (size_t i = 0; i < context.inputs.size(); ++i) {
    TensorType seed{DType::kI64, {1}};
    bool is_seed = operands.seed && i == operands.seed;
    Check<ShapeError>(is_seed ? context.inputs[i] == seed : context.inputs[i].dtype == DType::kF32,
                      "{}: input {} is {}, expects {}", context.op->name, i, context.inputs[i],
                      is_seed ? "a seed i64[1]" : "f32");
  }
}

// Shape and mask of a running op.
struct Prepared {
  AttentionShape shape;
  AttentionMask mask;

  Prepared(const RunContext& context, bool gradient) {
    Operands operands(context.attrs, gradient);
    std::vector<Shape> shapes;
    for (const Tensor& x : context.inputs) shapes.push_back(x.shape());
    shape = MakeShape(context.op->name, context.attrs, shapes, operands);
    if (operands.mask) mask = MakeMask(context.inputs[operands.mask]);
    if (operands.seed) {
      shape.seed = static_cast<uint64_t>(context.inputs[operands.seed].data<int64_t>()[0]);
    }
  }
};

std::vector<TensorType> Infer(const InferContext& context) {
  Operands operands(context.attrs, false);
  AttentionShape s = MakeShape("Attention", context.attrs, Shapes(context.inputs), operands);
  CheckTypes(context, operands);
  return {{DType::kF32, {s.batch, s.queries, s.heads * s.value_dim}},
          {DType::kF32, {s.batch, s.heads, s.queries}}};
}

void Run(const RunContext& context) {
  Prepared p(context, false);
  AttentionForward(p.shape, p.mask, context.inputs[0].data(), context.inputs[1].data(),
                   context.inputs[2].data(), context.outputs[0].data(), context.outputs[1].data());
}

std::vector<TensorType> InferGradient(const InferContext& context) {
  Operands operands(context.attrs, true);
  AttentionShape s =
      MakeShape("AttentionGradient", context.attrs, Shapes(context.inputs), operands);
  CheckTypes(context, operands);
  Shape out{s.batch, s.queries, s.heads * s.value_dim}, lse{s.batch, s.heads, s.queries};
  Check<ShapeError>(context.inputs[3].shape == out && context.inputs[4].shape == lse &&
                        context.inputs[5].shape == out,
                    "AttentionGradient: out {}, lse {}, dout {} do not fit q {}, k {}, v {}",
                    context.inputs[3], context.inputs[4], context.inputs[5], context.inputs[0],
                    context.inputs[1], context.inputs[2]);
  return {context.inputs[0], context.inputs[1], context.inputs[2]};
}

void RunGradient(const RunContext& context) {
  Prepared p(context, true);
  auto in = [&](size_t i) { return context.inputs[i].data(); };
  AttentionBackward(p.shape, p.mask, in(0), in(1), in(2), in(3), in(4), in(5),
                    context.outputs[0].data(), context.outputs[1].data(),
                    context.outputs[2].data());
}

// ------------------------------------------------------------------------------- decomposition

constexpr float kLowest = std::numeric_limits<float>::lowest();

// [B, tokens, heads * width] <-> [B, heads, tokens, width]
Value SplitHeads(Value x, int64_t heads) {
  return Permute(Reshape(x, {x.dim(0), x.dim(1), heads, x.dim(2) / heads}), {0, 2, 1, 3});
}
Value MergeHeads(Value x) {
  return Reshape(Permute(x, {0, 2, 1, 3}), {x.dim(0), x.dim(2), x.dim(1) * x.dim(3)});
}

// The scores [B, H, L, S] and what dropout multiplies the weights by (undefined without dropout).
struct Scores {
  AttentionShape s;
  Value scores, keep;

  Scores(ComputationGraph& graph, const ComputationNode& node, std::span<const Value> inputs,
         bool gradient) {
    Operands operands(node.attrs, gradient);
    std::vector<Shape> shapes;
    for (const Value& x : inputs) shapes.push_back(x.shape());
    s = MakeShape(node.op->name, node.attrs, shapes, operands);
    scores = MatMul(SplitHeads(inputs[0], s.heads), SplitHeads(inputs[1], s.heads), false, true) *
             static_cast<float>(s.scale);
    if (operands.mask) scores = scores + inputs[operands.mask];
    if (s.causal) {
      Tensor future({s.queries, s.keys});
      for (int64_t i = 0; i < s.queries; ++i) {
        for (int64_t j = 0; j < s.keys; ++j) {
          future.data()[i * s.keys + j] = j > i ? -std::numeric_limits<float>::infinity() : 0.0f;
        }
      }
      scores = scores + graph.Constant(future);
    }
    if (operands.seed) {
      Value u =
          PhiloxUniform(inputs[operands.seed], scores.shape(), static_cast<int64_t>(s.stream));
      keep = LessOrEqual(s.dropout, u) / (1 - s.dropout);
    }
  }

  Value Dropped(Value weights) const { return keep.defined() ? weights * keep : weights; }
};

std::vector<Value> Decompose(ComputationGraph& graph, const ComputationNode& node,
                             std::span<const Value> inputs) {
  Scores x(graph, node, inputs, false);
  // A finite maximum also where all keys are masked; the softmax does not depend on it, so neither
  // does the gradient.
  Value top = StopGradient(Maximum(Max(x.scores, {-1}, true), kLowest));
  Value e = Exp(x.scores - top);
  Value sum = Sum(e, {-1}, true);
  // The sum is at least 1, or 0 where all keys are masked.
  Value weights = x.Dropped(e / Maximum(sum, 1e-30f));
  Value out = MatMul(weights, SplitHeads(inputs[2], x.s.heads));
  Value lse = Reshape(Log(sum) + top, {x.s.batch, x.s.heads, x.s.queries});
  return {MergeHeads(out), lse};
}

std::vector<Value> DecomposeGradient(ComputationGraph& graph, const ComputationNode& node,
                                     std::span<const Value> inputs) {
  Scores x(graph, node, inputs, true);
  const AttentionShape& s = x.s;
  auto heads = [&](size_t i) { return SplitHeads(inputs[i], s.heads); };
  Value q = heads(0), k = heads(1), v = heads(2), out = heads(3), dout = heads(5);
  Value lse = Reshape(inputs[4], {s.batch, s.heads, s.queries, 1});
  // exp(-inf - 0) = 0 where all keys are masked and lse is -inf.
  Value weights = Exp(x.scores - Select(Less(lse, kLowest), graph.Constant(0.0f), lse));
  Value dweights = x.Dropped(MatMul(dout, v, false, true));
  Value dscores = weights * (dweights - Sum(dout * out, {-1}, true));
  Value dq = MatMul(dscores, k) * s.scale;
  Value dk = MatMul(dscores, q, true) * s.scale;
  Value dv = MatMul(x.Dropped(weights), dout, true);
  // A batch of keys shared by all queries collects their gradients.
  auto collect = [&](Value d) {
    return s.kv_batch == s.batch ? MergeHeads(d) : MergeHeads(Sum(d, {0}, true));
  };
  return {MergeHeads(dq), collect(dk), collect(dv)};
}

std::vector<Value> Gradient(const GradientContext& context) {
  Operands operands(context.node.attrs, false);
  bool fused = context.doutputs[0].defined() && !context.doutputs[1].defined() &&
               !(operands.mask && context.needs[operands.mask]);
  // The gradient of the mask has the size of the scores anyway, and nothing in a model reads the
  // log-sum-exp: both go through the decomposition.
  if (!fused) return DecomposedGradient(context);
  std::vector<Value> inputs(context.inputs.begin(), context.inputs.begin() + 3);
  inputs.insert(inputs.end(), {context.outputs[0], context.outputs[1], context.doutputs[0]});
  inputs.insert(inputs.end(), context.inputs.begin() + 3, context.inputs.end());
  std::vector<Value> result = context.graph.Emit(kAttentionGradientOp, inputs, context.node.attrs);
  result.resize(context.inputs.size());
  return result;
}

// ------------------------------------------------------------------------------------- samples

struct Case {
  int64_t batch, kv_batch, heads, queries, keys, head_dim, value_dim;
  bool causal;
  double dropout;
  std::vector<int64_t> mask;  // empty: none
  int64_t block_q = 64, block_kv = 64;
};

std::vector<OpSample> Samples(bool gradient) {
  std::vector<Case> cases = {
      {1, 1, 1, 1, 1, 1, 1, false, 0, {}},
      {1, 1, 1, 2, 2, 3, 2, true, 0, {}},
      {2, 2, 2, 5, 7, 3, 4, false, 0, {}},
      {2, 1, 3, 17, 13, 16, 16, false, 0, {}},
      {3, 3, 1, 33, 70, 8, 5, false, 0, {}, 16, 32},
      {2, 2, 2, 20, 20, 16, 16, true, 0, {}, 8, 8},
      {1, 1, 2, 12, 31, 40, 40, true, 0, {}},
      {2, 2, 2, 9, 11, 5, 6, false, 0, {2, 1, 1, 11}},
      {2, 1, 2, 9, 11, 5, 6, false, 0, {1, 2, 9, 11}, 4, 4},
      {2, 2, 2, 9, 11, 5, 6, true, 0, {2, 2, 9, 11}},
      {2, 2, 2, 18, 11, 8, 8, false, 0.3, {}},
      {1, 1, 2, 18, 18, 8, 8, true, 0.5, {1, 1, 18, 18}, 32, 5},
      {0, 1, 2, 3, 4, 2, 2, false, 0, {}},
      {2, 2, 2, 0, 4, 2, 2, false, 0, {}},
  };
  std::vector<OpSample> samples;
  for (const Case& c : cases) {
    auto f32 = [](Shape shape) { return TensorType{DType::kF32, shape}; };
    OpSample s;
    TensorType out = f32({c.batch, c.queries, c.heads * c.value_dim});
    s.inputs = {f32({c.batch, c.queries, c.heads * c.head_dim}),
                f32({c.kv_batch, c.keys, c.heads * c.head_dim}),
                f32({c.kv_batch, c.keys, c.heads * c.value_dim})};
    if (gradient) {
      s.inputs.insert(s.inputs.end(), {out, f32({c.batch, c.heads, c.queries}), out});
    }
    if (!c.mask.empty()) s.inputs.push_back(f32(Shape(c.mask)));
    if (c.dropout > 0) s.inputs.push_back({DType::kI64, {1}});
    s.attrs = {{"heads", c.heads},
               {"scale", 0.4},
               {"causal", int64_t{c.causal}},
               {"dropout", c.dropout},
               {"stream", int64_t{5}},
               {"block_q", c.block_q},
               {"block_kv", c.block_kv},
               {"mask", int64_t{!c.mask.empty()}}};
    samples.push_back(s);
  }
  return samples;
}

}  // namespace

const Op kAttentionOp{
    .name = "Attention",
    .kind = OpKind::kCall,
    .min_arity = 3,
    .max_arity = 5,
    .doc =
        "out = softmax(scale q k^T + mask) v for each head, q [B, L, H D], k [B or 1, S, H D], "
        "v [B or 1, S, H Dv]; also gives lse [B, H, L]",
    .source = "Dao et al. 2022, arXiv:2205.14135",
    .infer = Infer,
    .run = Run,
    .gradient = Gradient,
    .decompose = Decompose,
    .samples = [] { return Samples(false); }};

const Op kAttentionGradientOp{
    .name = "AttentionGradient",
    .kind = OpKind::kCall,
    .min_arity = 6,
    .max_arity = 8,
    .doc =
        "dq, dk, dv of Attention from q, k, v, out, lse, dout, probabilities recomputed from lse",
    .source = "Dao et al. 2022, arXiv:2205.14135",
    .infer = InferGradient,
    .run = RunGradient,
    .decompose = DecomposeGradient,
    .samples = [] { return Samples(true); }};

AttentionResult Attention(Value q, Value k, Value v, const AttentionOptions& options, Value mask,
                          Value seed) {
  Check(options.dropout == 0 || seed.defined(), "Attention: dropout {} needs a seed",
        options.dropout);
  std::vector<Value> inputs = {q, k, v};
  if (mask.defined()) inputs.push_back(mask);
  if (options.dropout > 0) inputs.push_back(seed);
  std::vector<Value> result = q.graph->Emit(kAttentionOp, inputs,
                                            {{"heads", options.heads},
                                             {"scale", options.scale},
                                             {"causal", int64_t{options.causal}},
                                             {"dropout", options.dropout},
                                             {"stream", options.stream},
                                             {"block_q", options.block_q},
                                             {"block_kv", options.block_kv},
                                             {"mask", int64_t{mask.defined()}}});
  return {result[0], result[1]};
}

}  // namespace calotype
