// Conv2d and its two gradients, which are ops of their own.
#include <algorithm>
#include <vector>

#include "core/contract.h"
#include "core/contract_reference.h"
#include "core/error.h"
#include "graph/functions.h"
#include "graph/op.h"

namespace calotype {

extern const Op kConv2dOp, kConv2dInputGradientOp, kConv2dWeightGradientOp;

namespace {

// The attributes shared by the three ops.
Attrs OptionAttrs(const Conv2dOptions& o) {
  return {{"stride", o.stride},
          {"top", o.top},
          {"bottom", o.bottom},
          {"left", o.left},
          {"right", o.right}};
}

// The convolution of x by w; `op` and the types are for the messages.
Conv2dShape MakeShape(std::string_view op, const Attrs& attrs, const Shape& x, const Shape& w) {
  Check<ShapeError>(x.rank() == 4 && w.rank() == 4,
                    "{}: input {} must be [B, C, H, W], weight {} [O, C, KH, KW]", op, x, w);
  Check<ShapeError>(x[1] == w[1], "{}: input {} has {} channels, weight {} expects {}", op, x, x[1],
                    w, w[1]);
  Conv2dShape s;
  s.batch = x[0];
  s.in = x[1];
  s.height = x[2];
  s.width = x[3];
  s.out = w[0];
  s.kernel_h = w[2];
  s.kernel_w = w[3];
  s.stride = attrs.Int("stride");
  s.top = attrs.Int("top");
  s.bottom = attrs.Int("bottom");
  s.left = attrs.Int("left");
  s.right = attrs.Int("right");
  Check<ShapeError>(s.stride >= 1 && std::min({s.top, s.bottom, s.left, s.right}) >= 0,
                    "{}: stride {} must be positive and padding [{}, {}, {}, {}] not negative "
                    "(input {}, weight {})",
                    op, s.stride, s.top, s.bottom, s.left, s.right, x, w);
  Check<ShapeError>(s.kernel_h >= 1 && s.kernel_w >= 1 &&
                        CheckedAdd(s.height, s.top + s.bottom, "conv2d") >= s.kernel_h &&
                        CheckedAdd(s.width, s.left + s.right, "conv2d") >= s.kernel_w,
                    "{}: kernel of weight {} is larger than input {} with padding [{}, {}, {}, {}]",
                    op, w, x, s.top, s.bottom, s.left, s.right);
  return s;
}

void CheckF32(const InferContext& context) {
  for (const TensorType& x : context.inputs) {
    Check<ShapeError>(x.dtype == DType::kF32, "{}: operand {} is not f32", context.op->name, x);
  }
}

Shape OutputShape(const Conv2dShape& s) { return {s.batch, s.out, s.out_height(), s.out_width()}; }

void CheckGradient(std::string_view op, const Shape& dy, const Conv2dShape& s) {
  Check<ShapeError>(dy == OutputShape(s), "{}: gradient is {}, the convolution gives {}", op, dy,
                    OutputShape(s));
}

// ------------------------------------------------------------------------------------ forward

std::vector<TensorType> Infer(const InferContext& context) {
  CheckF32(context);
  const Shape &x = context.inputs[0].shape, &w = context.inputs[1].shape;
  Conv2dShape s = MakeShape("Conv2d", context.attrs, x, w);
  if (context.inputs.size() == 3) {
    const Shape& bias = context.inputs[2].shape;
    Check<ShapeError>(bias == Shape({s.out}),
                      "Conv2d: bias is {}, expects [{}] (input {}, weight {})", bias, s.out, x, w);
  }
  return {{DType::kF32, OutputShape(s)}};
}

Conv2dShape ForwardShape(const RunContext& context) {
  return MakeShape("Conv2d", context.attrs, context.inputs[0].shape(), context.inputs[1].shape());
}

void Run(const RunContext& context) {
  Conv2dForward(ForwardShape(context), context.inputs[0].data(), context.inputs[1].data(),
                context.inputs.size() == 3 ? context.inputs[2].data() : nullptr,
                context.outputs[0].data());
}

void Reference(const RunContext& context) {
  reference::Conv2dForward<double>(
      ForwardShape(context), context.inputs[0].data<double>(), context.inputs[1].data<double>(),
      context.inputs.size() == 3 ? context.inputs[2].data<double>() : nullptr,
      context.outputs[0].data<double>());
}

std::vector<Value> Gradient(const GradientContext& context) {
  Value x = context.inputs[0], w = context.inputs[1], dy = context.doutputs[0];
  std::vector<Value> result(context.inputs.size());
  if (context.needs[0]) {
    Attrs attrs = context.node.attrs;
    attrs.Set("height", x.dim(2));
    attrs.Set("width", x.dim(3));
    result[0] = context.graph.EmitOne(kConv2dInputGradientOp, {dy, w}, attrs);
  }
  if (context.needs[1]) {
    Attrs attrs = context.node.attrs;
    attrs.Set("kernel_h", w.dim(2));
    attrs.Set("kernel_w", w.dim(3));
    result[1] = context.graph.EmitOne(kConv2dWeightGradientOp, {x, dy}, attrs);
  }
  if (context.inputs.size() == 3 && context.needs[2]) result[2] = Sum(dy, {0, 2, 3});
  return result;
}

// ---------------------------------------------------------------------------- input gradient

Conv2dShape InputGradientShape(const Attrs& attrs, const Shape& dy, const Shape& w) {
  constexpr std::string_view op = "Conv2dInputGradient";
  Check<ShapeError>(dy.rank() == 4 && w.rank() == 4, "{}: gradient {} and weight {} need rank 4",
                    op, dy, w);
  Shape x{dy[0], w[1], attrs.Int("height"), attrs.Int("width")};
  Conv2dShape s = MakeShape(op, attrs, x, w);
  CheckGradient(op, dy, s);
  return s;
}

std::vector<TensorType> InferInputGradient(const InferContext& context) {
  CheckF32(context);
  Conv2dShape s =
      InputGradientShape(context.attrs, context.inputs[0].shape, context.inputs[1].shape);
  return {{DType::kF32, {s.batch, s.in, s.height, s.width}}};
}

template <class T>
void RunInputGradient(const RunContext& context,
                      void (*kernel)(const Conv2dShape&, const T*, const T*, T*)) {
  kernel(InputGradientShape(context.attrs, context.inputs[0].shape(), context.inputs[1].shape()),
         context.inputs[0].data<T>(), context.inputs[1].data<T>(), context.outputs[0].data<T>());
}

// --------------------------------------------------------------------------- weight gradient

Conv2dShape WeightGradientShape(const Attrs& attrs, const Shape& x, const Shape& dy) {
  constexpr std::string_view op = "Conv2dWeightGradient";
  Check<ShapeError>(x.rank() == 4 && dy.rank() == 4, "{}: input {} and gradient {} need rank 4", op,
                    x, dy);
  Shape w{dy[1], x[1], attrs.Int("kernel_h"), attrs.Int("kernel_w")};
  Conv2dShape s = MakeShape(op, attrs, x, w);
  CheckGradient(op, dy, s);
  return s;
}

std::vector<TensorType> InferWeightGradient(const InferContext& context) {
  CheckF32(context);
  Conv2dShape s =
      WeightGradientShape(context.attrs, context.inputs[0].shape, context.inputs[1].shape);
  return {{DType::kF32, {s.out, s.in, s.kernel_h, s.kernel_w}}};
}

template <class T>
void RunWeightGradient(const RunContext& context,
                       void (*kernel)(const Conv2dShape&, const T*, const T*, T*)) {
  kernel(WeightGradientShape(context.attrs, context.inputs[0].shape(), context.inputs[1].shape()),
         context.inputs[0].data<T>(), context.inputs[1].data<T>(), context.outputs[0].data<T>());
}

// ------------------------------------------------------------------------------------ samples

struct Case {
  Shape x, w;
  Conv2dOptions options;
  bool bias;
};

std::vector<Case> Cases() {
  return {
      {{1, 1, 1, 1}, {1, 1, 1, 1}, {}, false},
      {{2, 3, 7, 5}, {4, 3, 3, 3}, Conv2dOptions::Padded(1, 1), true},
      {{3, 17, 9, 8}, {15, 17, 3, 3}, Conv2dOptions::Padded(1, 1), true},
      {{2, 16, 8, 8}, {32, 16, 3, 3}, Conv2dOptions::Padded(1, 1), false},
      {{2, 8, 9, 11}, {9, 8, 3, 3}, Conv2dOptions::Padded(2, 1), true},
      {{1, 8, 8, 8}, {8, 8, 3, 3}, {2, 0, 1, 0, 1}, true},  // diffusers' asymmetric downsampling
      {{2, 5, 6, 7}, {6, 5, 3, 2}, {1, 2, 0, 1, 3}, true},
      {{3, 20, 6, 6}, {10, 20, 1, 1}, {}, true},
      {{2, 33, 5, 5}, {17, 33, 1, 1}, {}, false},
      {{2, 6, 7, 7}, {5, 6, 1, 1}, {2, 0, 0, 0, 0}, true},
      {{2, 4, 8, 8}, {6, 4, 5, 5}, {3, 1, 2, 0, 1}, false},
      {{2, 3, 3, 3}, {4, 3, 3, 3}, {}, true},
      {{0, 3, 4, 4}, {2, 3, 3, 3}, Conv2dOptions::Padded(1, 1), true},
  };
}

std::vector<OpSample> Samples() {
  std::vector<OpSample> samples;
  for (const Case& c : Cases()) {
    samples.push_back({{{DType::kF32, c.x}, {DType::kF32, c.w}}, OptionAttrs(c.options)});
    if (c.bias) samples.back().inputs.push_back({DType::kF32, {c.w[0]}});
  }
  return samples;
}

std::vector<OpSample> InputGradientSamples() {
  std::vector<OpSample> samples;
  for (const Case& c : Cases()) {
    Attrs attrs = OptionAttrs(c.options);
    Shape dy = OutputShape(MakeShape("Conv2d", attrs, c.x, c.w));
    attrs.Set("height", c.x[2]);
    attrs.Set("width", c.x[3]);
    samples.push_back({{{DType::kF32, dy}, {DType::kF32, c.w}}, attrs});
  }
  return samples;
}

std::vector<OpSample> WeightGradientSamples() {
  std::vector<OpSample> samples;
  for (const Case& c : Cases()) {
    Attrs attrs = OptionAttrs(c.options);
    Shape dy = OutputShape(MakeShape("Conv2d", attrs, c.x, c.w));
    attrs.Set("kernel_h", c.w[2]);
    attrs.Set("kernel_w", c.w[3]);
    samples.push_back({{{DType::kF32, c.x}, {DType::kF32, dy}}, attrs});
  }
  return samples;
}

}  // namespace

const Op kConv2dOp{
    .name = "Conv2d",
    .kind = OpKind::kCall,
    .min_arity = 2,
    .max_arity = 3,
    .doc =
        "y[b, o, i, j] = bias[o] + sum over c, p, q of w[o, c, p, q] x[b, c, i stride + p - top, "
        "j stride + q - left], zero outside x",
    .source = "",
    .infer = Infer,
    .run = Run,
    .reference = Reference,
    .gradient = Gradient,
    .samples = Samples};

const Op kConv2dInputGradientOp{
    .name = "Conv2dInputGradient",
    .kind = OpKind::kCall,
    .min_arity = 2,
    .max_arity = 2,
    .doc = "dx [B, C, height, width] of Conv2d from dy [B, O, HO, WO] and w [O, C, KH, KW]",
    .source = "",
    .infer = InferInputGradient,
    .run = [](const RunContext& c) { RunInputGradient<float>(c, Conv2dBackwardInput); },
    .reference =
        [](const RunContext& c) {
          RunInputGradient<double>(c, reference::Conv2dBackwardInput<double>);
        },
    .samples = InputGradientSamples};

const Op kConv2dWeightGradientOp{
    .name = "Conv2dWeightGradient",
    .kind = OpKind::kCall,
    .min_arity = 2,
    .max_arity = 2,
    .doc = "dw [O, C, kernel_h, kernel_w] of Conv2d from x [B, C, H, W] and dy [B, O, HO, WO]",
    .source = "",
    .infer = InferWeightGradient,
    .run = [](const RunContext& c) { RunWeightGradient<float>(c, Conv2dBackwardWeight); },
    .reference =
        [](const RunContext& c) {
          RunWeightGradient<double>(c, reference::Conv2dBackwardWeight<double>);
        },
    .samples = WeightGradientSamples};

Value Conv2d(Value x, Value w, Value bias, const Conv2dOptions& options) {
  if (bias.defined()) return x.graph->EmitOne(kConv2dOp, {x, w, bias}, OptionAttrs(options));
  return x.graph->EmitOne(kConv2dOp, {x, w}, OptionAttrs(options));
}

}  // namespace calotype
