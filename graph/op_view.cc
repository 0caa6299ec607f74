// Views: ops that only move elements. Reshape, Permute, Broadcast, Slice, Pad, Concat,
// StopGradient, Barrier.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/error.h"
#include "graph/functions.h"
#include "graph/op.h"
#include "graph/op_elementwise.h"
#include "graph/strided_copy.h"

namespace calotype {

extern const Op kReshapeOp, kPermuteOp, kBroadcastOp, kSliceOp, kPadOp, kConcatOp, kStopGradientOp,
    kBarrierOp;

namespace {

std::vector<int64_t> StridesOf(const Shape& shape) {
  auto strides = shape.Strides();
  return {strides.begin(), strides.begin() + shape.rank()};
}

const std::byte* At(const Tensor& x, int64_t offset) {
  return static_cast<const std::byte*>(x.raw()) + offset * DTypeSize(x.dtype());
}
std::byte* At(Tensor& x, int64_t offset) {
  return static_cast<std::byte*>(x.raw()) + offset * DTypeSize(x.dtype());
}

std::vector<int64_t> ShapeAttr(const Shape& shape) { return shape.ToVector(); }

OpSample MakeSample(Shape shape, Attrs attrs) { return {{{DType::kF32, shape}}, std::move(attrs)}; }
using Ints = std::vector<int64_t>;

// ---------------------------------------------------------------- Reshape, StopGradient

std::vector<TensorType> InferReshape(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  Shape shape(context.attrs.Ints("shape"));
  Check<ShapeError>(shape.elements() == x.shape.elements(),
                    "Reshape: {} has {} elements, {} has {}", x, x.shape.elements(), shape,
                    shape.elements());
  return {{x.dtype, shape}};
}

void RunReshape(const RunContext& context) {
  std::memcpy(context.outputs[0].raw(), context.inputs[0].raw(), context.outputs[0].bytes());
}

std::vector<Value> GradientReshape(const GradientContext& context) {
  return {Reshape(context.doutputs[0], context.inputs[0].shape())};
}

std::vector<OpSample> SamplesReshape() {
  return {MakeSample({}, {{"shape", Ints{1, 1}}}),
          MakeSample({6}, {{"shape", Ints{2, 3}}}),
          MakeSample({2, 3, 4}, {{"shape", Ints{6, 4}}}),
          MakeSample({0, 3}, {{"shape", Ints{3, 0}}}),
          MakeSample({2, 12, 5}, {{"shape", Ints{2, 3, 4, 5}}}),
          MakeSample({4, 3, 2}, {{"shape", Ints{2, 12}}})};
}

std::vector<TensorType> InferSame(const InferContext& context) { return {context.inputs[0]}; }

std::vector<Value> GradientNone(const GradientContext&) { return {Value{}}; }

std::vector<Value> GradientBarrier(const GradientContext& context) { return {context.doutputs[0]}; }

std::vector<OpSample> SamplesStop() { return {MakeSample({3, 5}, {})}; }

// ---------------------------------------------------------------- Permute

std::vector<TensorType> InferPermute(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  const auto& axes = context.attrs.Ints("axes");
  Ints sorted = axes, all(x.shape.rank());
  std::sort(sorted.begin(), sorted.end());
  std::iota(all.begin(), all.end(), 0);
  Check<ShapeError>(sorted == all, "Permute: axes [{}] are no permutation of the axes of {}",
                    fmt::join(axes, ", "), x);
  Ints dims;
  for (int64_t axis : axes) dims.push_back(x.shape[static_cast<int>(axis)]);
  return {{x.dtype, Shape(dims)}};
}

void RunPermute(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  Tensor& y = context.outputs[0];
  Ints strides = StridesOf(x.shape()), permuted;
  for (int64_t axis : context.attrs.Ints("axes")) permuted.push_back(strides[axis]);
  StridedCopy(DTypeSize(x.dtype()), y.shape().dims(), x.raw(), permuted, y.raw(),
              StridesOf(y.shape()));
}

std::vector<Value> GradientPermute(const GradientContext& context) {
  const auto& axes = context.node.attrs.Ints("axes");
  Ints inverse(axes.size());
  for (size_t i = 0; i < axes.size(); ++i) inverse[axes[i]] = static_cast<int64_t>(i);
  return {Permute(context.doutputs[0], inverse)};
}

std::vector<OpSample> SamplesPermute() {
  return {MakeSample({5}, {{"axes", Ints{0}}}),
          MakeSample({3, 7}, {{"axes", Ints{1, 0}}}),
          MakeSample({2, 5, 3, 4}, {{"axes", Ints{0, 2, 3, 1}}}),
          MakeSample({2, 3, 4, 5}, {{"axes", Ints{0, 3, 1, 2}}}),
          MakeSample({3, 1, 0}, {{"axes", Ints{2, 0, 1}}}),
          MakeSample({33, 65}, {{"axes", Ints{1, 0}}}),
          MakeSample({2, 17, 3, 8}, {{"axes", Ints{0, 2, 1, 3}}})};
}

// ---------------------------------------------------------------- Broadcast

std::vector<TensorType> InferBroadcast(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  Shape shape(context.attrs.Ints("shape"));
  bool fits = x.shape.rank() <= shape.rank();
  for (int i = 1; fits && i <= x.shape.rank(); ++i) {
    fits = x.shape[-i] == shape[-i] || x.shape[-i] == 1;
  }
  Check<ShapeError>(fits, "Broadcast: {} does not broadcast to {}", x, shape);
  return {{x.dtype, shape}};
}

void RunBroadcast(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  Tensor& y = context.outputs[0];
  Ints strides(y.shape().rank(), 0), own = StridesOf(x.shape());
  int extra = y.shape().rank() - x.shape().rank();
  for (int axis = 0; axis < x.shape().rank(); ++axis) {
    if (x.shape()[axis] != 1) strides[axis + extra] = own[axis];
  }
  StridedCopy(DTypeSize(x.dtype()), y.shape().dims(), x.raw(), strides, y.raw(),
              StridesOf(y.shape()));
}

std::vector<Value> GradientBroadcast(const GradientContext& context) {
  return {SumTo(context.doutputs[0], context.inputs[0].shape())};
}

std::vector<OpSample> SamplesBroadcast() {
  return {MakeSample({}, {{"shape", Ints{3, 5}}}), MakeSample({1}, {{"shape", Ints{7}}}),
          MakeSample({5, 1}, {{"shape", Ints{2, 5, 17}}}),
          MakeSample({2, 3, 1, 4, 1}, {{"shape", Ints{2, 3, 2, 4, 2}}}),
          MakeSample({1, 3}, {{"shape", Ints{0, 3}}})};
}

// ---------------------------------------------------------------- Slice

std::vector<TensorType> InferSlice(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  int axis = static_cast<int>(context.attrs.Int("axis"));
  int64_t start = context.attrs.Int("start"), size = context.attrs.Int("size");
  Check<ShapeError>(axis >= 0 && axis < x.shape.rank() && start >= 0 && size >= 0 &&
                        start <= x.shape[axis] - size,
                    "Slice: [{}, {}) along axis {} is outside {}", start, start + size, axis, x);
  return {{x.dtype, x.shape.With(axis, size)}};
}

void RunSlice(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  Tensor& y = context.outputs[0];
  Ints strides = StridesOf(x.shape());
  int64_t offset = context.attrs.Int("start") * strides[context.attrs.Int("axis")];
  StridedCopy(DTypeSize(x.dtype()), y.shape().dims(), At(x, offset), strides, y.raw(),
              StridesOf(y.shape()));
}

std::vector<Value> GradientSlice(const GradientContext& context) {
  Value x = context.inputs[0];
  int axis = static_cast<int>(context.node.attrs.Int("axis"));
  Ints low(x.rank(), 0), high(x.rank(), 0);
  low[axis] = context.node.attrs.Int("start");
  high[axis] = x.dim(axis) - low[axis] - context.node.attrs.Int("size");
  return {Pad(context.doutputs[0], low, high)};
}

std::vector<OpSample> SamplesSlice() {
  auto attrs = [](int64_t axis, int64_t start, int64_t size) {
    return Attrs{{"axis", axis}, {"start", start}, {"size", size}};
  };
  return {MakeSample({7}, attrs(0, 2, 3)),       MakeSample({3, 17}, attrs(1, 1, 15)),
          MakeSample({4, 5, 6}, attrs(0, 1, 2)), MakeSample({4, 5, 6}, attrs(1, 0, 5)),
          MakeSample({4, 5}, attrs(1, 5, 0)),    MakeSample({2, 8, 3, 3}, attrs(1, 4, 4))};
}

// ---------------------------------------------------------------- Pad

std::vector<TensorType> InferPad(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  const auto& low = context.attrs.Ints("low");
  const auto& high = context.attrs.Ints("high");
  Check<ShapeError>(static_cast<int>(low.size()) == x.shape.rank() && low.size() == high.size(),
                    "Pad: low [{}] and high [{}] do not fit {}", fmt::join(low, ", "),
                    fmt::join(high, ", "), x);
  Ints dims;
  for (int axis = 0; axis < x.shape.rank(); ++axis) {
    dims.push_back(CheckedAdd(CheckedAdd(x.shape[axis], low[axis], "Pad"), high[axis], "Pad"));
  }
  return {{x.dtype, Shape(dims)}};
}

void RunPad(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  Tensor& y = context.outputs[0];
  std::memset(y.raw(), 0, y.bytes());
  Ints strides = StridesOf(y.shape());
  const auto& low = context.attrs.Ints("low");
  int64_t offset = std::inner_product(low.begin(), low.end(), strides.begin(), int64_t{0});
  StridedCopy(DTypeSize(x.dtype()), x.shape().dims(), x.raw(), StridesOf(x.shape()), At(y, offset),
              strides);
}

std::vector<Value> GradientPad(const GradientContext& context) {
  Value x = context.inputs[0], dx = context.doutputs[0];
  const auto& low = context.node.attrs.Ints("low");
  for (int axis = 0; axis < x.rank(); ++axis) {
    if (dx.dim(axis) != x.dim(axis)) dx = Slice(dx, axis, low[axis], x.dim(axis));
  }
  return {dx};
}

std::vector<OpSample> SamplesPad() {
  auto attrs = [](Ints low, Ints high) { return Attrs{{"low", low}, {"high", high}}; };
  return {MakeSample({5}, attrs({2}, {0})), MakeSample({3, 17}, attrs({0, 1}, {1, 2})),
          MakeSample({2, 3, 4, 5}, attrs({0, 0, 1, 1}, {0, 0, 1, 1})),
          MakeSample({0, 2}, attrs({1, 0}, {1, 1}))};
}

// ---------------------------------------------------------------- Concat

std::vector<TensorType> InferConcat(const InferContext& context) {
  TensorType out = context.inputs[0];
  int axis = static_cast<int>(context.attrs.Int("axis"));
  Check<ShapeError>(axis >= 0 && axis < out.shape.rank(), "Concat: axis {} is outside {}", axis,
                    out);
  int64_t size = 0;
  for (const TensorType& part : context.inputs) {
    bool fits = part.dtype == out.dtype && part.shape.rank() == out.shape.rank();
    for (int i = 0; fits && i < out.shape.rank(); ++i) {
      fits = i == axis || part.shape[i] == out.shape[i];
    }
    Check<ShapeError>(fits, "Concat: {} and {} differ outside axis {}", out, part, axis);
    size = CheckedAdd(size, part.shape[axis], "Concat");
  }
  return {{out.dtype, out.shape.With(axis, size)}};
}

void RunConcat(const RunContext& context) {
  Tensor& y = context.outputs[0];
  int axis = static_cast<int>(context.attrs.Int("axis"));
  Ints strides = StridesOf(y.shape());
  int64_t start = 0;
  for (const Tensor& part : context.inputs) {
    StridedCopy(DTypeSize(y.dtype()), part.shape().dims(), part.raw(), StridesOf(part.shape()),
                At(y, start * strides[axis]), strides);
    start += part.shape()[axis];
  }
}

std::vector<Value> GradientConcat(const GradientContext& context) {
  int axis = static_cast<int>(context.node.attrs.Int("axis"));
  std::vector<Value> result;
  int64_t start = 0;
  for (const Value& part : context.inputs) {
    result.push_back(Slice(context.doutputs[0], axis, start, part.dim(axis)));
    start += part.dim(axis);
  }
  return result;
}

std::vector<OpSample> SamplesConcat() {
  auto sample = [](std::vector<Shape> shapes, int64_t axis) {
    OpSample result{{}, {{"axis", axis}}};
    for (const Shape& shape : shapes) result.inputs.push_back({DType::kF32, shape});
    return result;
  };
  return {sample({{3}}, 0), sample({{3}, {4}}, 0), sample({{2, 3}, {2, 0}, {2, 5}}, 1),
          sample({{2, 4, 3, 3}, {2, 5, 3, 3}}, 1), sample({{1, 17}, {3, 17}}, 0)};
}

}  // namespace

const Op kReshapeOp{.name = "Reshape",
                    .kind = OpKind::kView,
                    .min_arity = 1,
                    .max_arity = 1,
                    .doc = "the same elements in row-major order under `shape`",
                    .source = "",
                    .infer = InferReshape,
                    .run = RunReshape,
                    .reference = RunReshape,
                    .gradient = GradientReshape,
                    .samples = SamplesReshape,
                    .shares_storage = true};
const Op kStopGradientOp{.name = "StopGradient",
                         .kind = OpKind::kView,
                         .min_arity = 1,
                         .max_arity = 1,
                         .doc = "y = x; its gradient is zero",
                         .source = "",
                         .infer = InferSame,
                         .run = RunReshape,
                         .reference = RunReshape,
                         .gradient = GradientNone,
                         .samples = SamplesStop,
                         .shares_storage = true};
const Op kBarrierOp{.name = "Barrier",
                    .kind = OpKind::kView,
                    .min_arity = 1,
                    .max_arity = 1,
                    .doc = "y = x; operations on y are not merged with equal ones on x",
                    .source = "",
                    .infer = InferSame,
                    .run = RunReshape,
                    .reference = RunReshape,
                    .gradient = GradientBarrier,
                    .samples = SamplesStop,
                    .shares_storage = true};
const Op kPermuteOp{.name = "Permute",
                    .kind = OpKind::kView,
                    .min_arity = 1,
                    .max_arity = 1,
                    .doc = "y.dim(i) = x.dim(axes[i])",
                    .source = "",
                    .infer = InferPermute,
                    .run = RunPermute,
                    .reference = RunPermute,
                    .gradient = GradientPermute,
                    .samples = SamplesPermute};
const Op kBroadcastOp{.name = "Broadcast",
                      .kind = OpKind::kView,
                      .min_arity = 1,
                      .max_arity = 1,
                      .doc = "x repeated to `shape` by NumPy's rule",
                      .source = "",
                      .infer = InferBroadcast,
                      .run = RunBroadcast,
                      .reference = RunBroadcast,
                      .gradient = GradientBroadcast,
                      .samples = SamplesBroadcast};
const Op kSliceOp{.name = "Slice",
                  .kind = OpKind::kView,
                  .min_arity = 1,
                  .max_arity = 1,
                  .doc = "y = x[start, start + size) along `axis`",
                  .source = "",
                  .infer = InferSlice,
                  .run = RunSlice,
                  .reference = RunSlice,
                  .gradient = GradientSlice,
                  .samples = SamplesSlice};
const Op kPadOp{.name = "Pad",
                .kind = OpKind::kView,
                .min_arity = 1,
                .max_arity = 1,
                .doc = "zeros around x: low[i] before and high[i] after along axis i",
                .source = "",
                .infer = InferPad,
                .run = RunPad,
                .reference = RunPad,
                .gradient = GradientPad,
                .samples = SamplesPad};
const Op kConcatOp{.name = "Concat",
                   .kind = OpKind::kView,
                   .min_arity = 1,
                   .max_arity = -1,
                   .doc = "the inputs one after the other along `axis`",
                   .source = "",
                   .infer = InferConcat,
                   .run = RunConcat,
                   .reference = RunConcat,
                   .gradient = GradientConcat,
                   .samples = SamplesConcat};

Value Reshape(Value x, const Shape& shape) {
  if (x.shape() == shape) return x;
  return x.graph->EmitOne(kReshapeOp, {x}, {{"shape", ShapeAttr(shape)}});
}

Value StopGradient(Value x) { return x.graph->EmitOne(kStopGradientOp, {x}); }
Value Barrier(Value x) { return x.graph->EmitOne(kBarrierOp, {x}); }

Value Permute(Value x, std::vector<int64_t> axes) {
  Ints identity(x.rank());
  std::iota(identity.begin(), identity.end(), 0);
  if (axes == identity) return x;
  return x.graph->EmitOne(kPermuteOp, {x}, {{"axes", axes}});
}

Value Broadcast(Value x, const Shape& shape) {
  if (x.shape() == shape) return x;
  return x.graph->EmitOne(kBroadcastOp, {x}, {{"shape", ShapeAttr(shape)}});
}

Value Slice(Value x, int axis, int64_t start, int64_t size) {
  int64_t index = x.shape().Axis(axis);
  if (start == 0 && size == x.dim(axis)) return x;
  return x.graph->EmitOne(kSliceOp, {x}, {{"axis", index}, {"start", start}, {"size", size}});
}

Value Pad(Value x, std::vector<int64_t> low, std::vector<int64_t> high) {
  auto zero = [](int64_t n) { return n == 0; };
  if (std::all_of(low.begin(), low.end(), zero) && std::all_of(high.begin(), high.end(), zero))
    return x;
  return x.graph->EmitOne(kPadOp, {x}, {{"low", low}, {"high", high}});
}

Value Concat(std::vector<Value> parts, int axis) {
  Check(!parts.empty(), "Concat: no inputs");
  if (parts.size() == 1) return parts[0];
  return parts[0].graph->EmitOne(kConcatOp, parts,
                                 {{"axis", int64_t{parts[0].shape().Axis(axis)}}});
}

std::vector<Value> Split(Value x, int axis, std::vector<int64_t> sizes) {
  int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  Check<ShapeError>(total == x.dim(axis), "Split: sizes [{}] do not add up to axis {} of {}",
                    fmt::join(sizes, ", "), axis, x.shape());
  std::vector<Value> parts;
  int64_t start = 0;
  for (int64_t size : sizes) {
    parts.push_back(Slice(x, axis, start, size));
    start += size;
  }
  return parts;
}

}  // namespace calotype
