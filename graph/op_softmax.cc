// Softmax over the last axis; other axes are permuted to the end.
#include <numeric>
#include <utility>

#include "core/error.h"
#include "core/norm.h"
#include "graph/functions.h"
#include "graph/op.h"

namespace calotype {

extern const Op kSoftmaxOp;

namespace {

std::vector<TensorType> Infer(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  Check<ShapeError>(x.dtype == DType::kF32 && x.shape.rank() >= 1,
                    "Softmax: input is {}, expects f32 with at least one axis", x);
  Check<ShapeError>(x.shape[-1] > 0, "Softmax: the last axis of {} is empty", x);
  return {x};
}

void Run(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  int64_t width = x.shape()[-1];
  SoftmaxForward(x.elements() / width, width, x.data(), context.outputs[0].data());
}

std::vector<Value> Decompose(ComputationGraph&, const ComputationNode&,
                             std::span<const Value> inputs) {
  Value x = inputs[0];
  Value e = Exp(x - Max(x, {-1}, true));
  return {e / Sum(e, {-1}, true)};
}

std::vector<Value> Gradient(const GradientContext& context) {
  Value y = context.outputs[0], dy = context.doutputs[0];
  return {y * (dy - Sum(y * dy, {-1}, true))};
}

std::vector<OpSample> Samples() {
  std::vector<OpSample> samples;
  for (const Shape& shape : {Shape{1}, Shape{7}, Shape{3, 16}, Shape{2, 3, 17}, Shape{5, 33},
                             Shape{2, 4, 3, 77}, Shape{9, 128}, Shape{0, 4}}) {
    samples.push_back({{{DType::kF32, shape}}, {}});
  }
  return samples;
}

}  // namespace

const Op kSoftmaxOp{.name = "Softmax",
                    .kind = OpKind::kCall,
                    .min_arity = 1,
                    .max_arity = 1,
                    .doc = "y = exp(x - max x) / sum exp(x - max x) over the last axis",
                    .source = "",
                    .infer = Infer,
                    .run = Run,
                    .gradient = Gradient,
                    .decompose = Decompose,
                    .samples = Samples};

Value Softmax(Value x, int axis) {
  axis = x.shape().Axis(axis);
  if (axis == x.rank() - 1) return x.graph->EmitOne(kSoftmaxOp, {x});
  std::vector<int64_t> swap(x.rank());
  std::iota(swap.begin(), swap.end(), 0);
  std::swap(swap[axis], swap.back());
  return Permute(x.graph->EmitOne(kSoftmaxOp, {Permute(x, swap)}), swap);
}

}  // namespace calotype
