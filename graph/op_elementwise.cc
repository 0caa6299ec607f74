#include "graph/op_elementwise.h"

#include <array>

#include "core/error.h"
#include "core/parallel.h"
#include "graph/functions.h"

namespace calotype {

namespace {

constexpr int64_t kGrain = 16384;  // elements of one chunk

// The output's index space with neighbouring axes merged wherever every operand allows it,
// innermost last; strides in elements, 0 where an operand is broadcast.
struct Space {
  int rank = 0;
  int arity = 0;
  std::array<int64_t, Shape::kMaxRank> extents{};
  std::array<std::array<int64_t, Shape::kMaxRank>, 3> strides{};
};

Space MakeSpace(const Shape& out, std::span<const Tensor> inputs) {
  Space full;
  full.arity = static_cast<int>(inputs.size());
  for (int axis = 0; axis < out.rank(); ++axis) {
    full.extents[axis] = out[axis];
    for (int k = 0; k < full.arity; ++k) {
      const Shape& shape = inputs[k].shape();
      int own = axis - (out.rank() - shape.rank());
      full.strides[k][axis] = own >= 0 && shape[own] != 1 ? shape.Strides()[own] : 0;
    }
  }
  Space merged;
  merged.arity = full.arity;
  for (int axis = 0; axis < out.rank(); ++axis) {
    if (full.extents[axis] == 1) continue;
    bool merge = merged.rank > 0;
    for (int k = 0; k < full.arity && merge; ++k) {
      merge = merged.strides[k][merged.rank - 1] == full.strides[k][axis] * full.extents[axis];
    }
    int target = merge ? merged.rank - 1 : merged.rank++;
    merged.extents[target] = (merge ? merged.extents[target] : 1) * full.extents[axis];
    for (int k = 0; k < full.arity; ++k) merged.strides[k][target] = full.strides[k][axis];
  }
  if (merged.rank == 0) merged.extents[merged.rank++] = 1;
  return merged;
}

// Calls row(offsets of the operands, offset of the output) for each innermost row in [begin, end).
template <class F>
void ForRows(const Space& s, int64_t begin, int64_t end, F row) {
  int64_t width = s.extents[s.rank - 1];
  for (int64_t r = begin; r < end; ++r) {
    std::array<int64_t, 3> offsets{};
    int64_t rest = r;
    for (int axis = s.rank - 2; axis >= 0; --axis) {
      int64_t i = rest % s.extents[axis];
      rest /= s.extents[axis];
      for (int k = 0; k < s.arity; ++k) offsets[k] += i * s.strides[k][axis];
    }
    row(offsets, r * width);
  }
}

}  // namespace

std::vector<TensorType> InferElementwise(const InferContext& context) {
  Shape shape = context.inputs[0].shape;
  for (const TensorType& input : context.inputs) {
    Check<ShapeError>(input.dtype == DType::kF32, "{}: input is {}, expects f32", context.op->name,
                      input);
    try {
      shape = BroadcastShapes(shape, input.shape);
    } catch (const ShapeError& error) {
      throw ShapeError(fmt::format("{}: {}", context.op->name, error.what()));
    }
  }
  return {{DType::kF32, shape}};
}

void RunElementwise(const RunContext& context) {
  Tensor& out = context.outputs[0];
  int64_t n = out.elements();
  if (n == 0) return;
  Space s = MakeSpace(out.shape(), context.inputs);
  const float* in[3] = {};
  for (int k = 0; k < s.arity; ++k) in[k] = context.inputs[k].data();
  for (int k = s.arity; k < 3; ++k) in[k] = in[0];
  float* y = out.data();
  auto* kernel = context.op->elementwise->run;
  int64_t width = s.extents[s.rank - 1];
  int scalars = 0;
  for (int k = 0; k < s.arity; ++k) scalars |= (s.strides[k][s.rank - 1] == 0) << k;
  if (s.rank == 1) {
    ParallelFor(n, kGrain, [&](int64_t begin, int64_t end) {
      const float* p[3];
      for (int k = 0; k < 3; ++k) p[k] = in[k] + (k < s.arity && !(scalars >> k & 1) ? begin : 0);
      kernel(end - begin, p[0], p[1], p[2], scalars, y + begin);
    });
    return;
  }
  ParallelFor(n / width, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    ForRows(s, begin, end, [&](const auto& offsets, int64_t out_offset) {
      kernel(width, in[0] + offsets[0], in[1] + offsets[1], in[2] + offsets[2], scalars,
             y + out_offset);
    });
  });
}

void ReferenceElementwise(const RunContext& context) {
  Tensor& out = context.outputs[0];
  if (out.elements() == 0) return;
  Space s = MakeSpace(out.shape(), context.inputs);
  double* y = out.data<double>();
  int64_t width = s.extents[s.rank - 1];
  ForRows(s, 0, out.elements() / width, [&](const auto& offsets, int64_t out_offset) {
    for (int64_t i = 0; i < width; ++i) {
      double v[3] = {};
      for (int k = 0; k < s.arity; ++k) {
        v[k] = context.inputs[k].data<double>()[offsets[k] + i * s.strides[k][s.rank - 1]];
      }
      y[out_offset + i] = context.op->elementwise->reference(v);
    }
  });
}

Value SumTo(Value x, const Shape& shape) {
  if (x.shape() == shape) return x;
  int extra = x.rank() - shape.rank();
  std::vector<int64_t> axes;
  for (int axis = 0; axis < x.rank(); ++axis) {
    if (axis < extra || (shape[axis - extra] == 1 && x.dim(axis) != 1)) axes.push_back(axis);
  }
  return Reshape(Sum(x, axes, true), shape);
}

std::vector<Value> GradientElementwise(const GradientContext& context) {
  const Value dy = context.doutputs[0];
  std::vector<Value> result(context.inputs.size());
  for (size_t i = 0; i < context.inputs.size(); ++i) {
    const Op* derivative = context.node.op->elementwise->derivatives[i];
    if (!context.needs[i] || derivative == nullptr) continue;
    const ScalarProgram& program = derivative->elementwise->program;
    const ScalarInstruction& slope = program.code[program.results[0]];
    Value dx;
    if (slope.op == Primitive::kConstant) {
      dx = slope.constant == 1 ? dy : slope.constant == -1 ? Neg(dy) : dy * slope.constant;
    } else if (slope.op == Primitive::kInput) {
      dx = dy * context.inputs[slope.a];
    } else {
      dx = dy * context.graph.EmitOne(*derivative, context.inputs);
    }
    result[i] = SumTo(dx, context.inputs[i].shape());
  }
  return result;
}

namespace {

template <int kArity>
std::vector<OpSample> Samples() {
  const std::vector<std::array<Shape, 3>> shapes = {
      {Shape{}, Shape{}, Shape{}},
      {Shape{1}, Shape{1}, Shape{1}},
      {Shape{7}, Shape{7}, Shape{7}},
      {Shape{0, 3}, Shape{0, 3}, Shape{3}},
      {Shape{65}, Shape{}, Shape{65}},
      {Shape{3, 17}, Shape{17}, Shape{3, 1}},
      {Shape{2, 5, 4, 3}, Shape{5, 1, 1}, Shape{2, 1, 4, 3}},
      {Shape{2, 1, 33}, Shape{3, 1}, Shape{1}},
      {Shape{1, 6, 1, 1}, Shape{2, 6, 3, 5}, Shape{2, 6, 3, 5}},
      {Shape{2, 1, 2, 1, 2, 1, 2, 1}, Shape{1, 2, 1, 2, 1, 2, 1, 2}, Shape{2}},
      {Shape{300, 70}, Shape{300, 70}, Shape{300, 1}},
  };
  std::vector<OpSample> samples;
  for (const auto& s : shapes) {
    OpSample sample;
    for (int k = 0; k < kArity; ++k) sample.inputs.push_back({DType::kF32, s[k]});
    samples.push_back(std::move(sample));
  }
  return samples;
}

}  // namespace

std::vector<OpSample> (*SamplesElementwise(int arity))() {
  return arity == 1 ? Samples<1> : arity == 2 ? Samples<2> : Samples<3>;
}

}  // namespace calotype
