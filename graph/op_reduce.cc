// Sum and Max over axes.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/parallel.h"
#include "graph/functions.h"
#include "graph/op.h"

namespace calotype {

extern const Op kSumOp, kMaxOp;

namespace {

// attrs "axes" are sorted, in range and never empty unless the rank is 0; the axes disappear.
std::vector<int64_t> NormalAxes(Value x, const std::vector<int64_t>& axes, const char* op) {
  std::vector<int64_t> result;
  if (axes.empty()) {
    for (int axis = 0; axis < x.rank(); ++axis) result.push_back(axis);
    return result;
  }
  for (int64_t axis : axes) result.push_back(x.shape().Axis(static_cast<int>(axis)));
  std::sort(result.begin(), result.end());
  Check<ShapeError>(std::adjacent_find(result.begin(), result.end()) == result.end(),
                    "{}: axes [{}] name an axis of {} twice", op, fmt::join(axes, ", "), x.shape());
  return result;
}

bool IsReduced(const std::vector<int64_t>& axes, int axis) {
  return std::find(axes.begin(), axes.end(), axis) != axes.end();
}

Shape KeptShape(const Shape& shape, const std::vector<int64_t>& axes, bool keep_dims) {
  std::vector<int64_t> dims;
  for (int axis = 0; axis < shape.rank(); ++axis) {
    if (!IsReduced(axes, axis))
      dims.push_back(shape[axis]);
    else if (keep_dims)
      dims.push_back(1);
  }
  return Shape(dims);
}

std::vector<TensorType> Infer(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  const auto& axes = context.attrs.Ints("axes");
  Check<ShapeError>(x.dtype == DType::kF32, "{}: input is {}, expects f32", context.op->name, x);
  Check<ShapeError>(std::is_sorted(axes.begin(), axes.end()) &&
                        (axes.empty() || (axes.front() >= 0 && axes.back() < x.shape.rank())),
                    "{}: axes [{}] do not fit {}", context.op->name, fmt::join(axes, ", "), x);
  if (context.op == &kMaxOp) {
    for (int64_t axis : axes) {
      Check<ShapeError>(x.shape[static_cast<int>(axis)] > 0, "Max: axis {} of {} is empty", axis,
                        x);
    }
  }
  return {{DType::kF32, KeptShape(x.shape, axes, false)}};
}

// Offsets of all index combinations of the given axes, row-major.
std::vector<int64_t> Offsets(const std::vector<std::pair<int64_t, int64_t>>& axes) {
  std::vector<int64_t> offsets{0};
  for (auto [size, stride] : axes) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * size);
    for (int64_t offset : offsets) {
      for (int64_t i = 0; i < size; ++i) next.push_back(offset + i * stride);
    }
    offsets = std::move(next);
  }
  return offsets;
}

// The reduction of T in a fixed order; `Fold` combines an accumulator and an element.
template <class T, class Fold>
void Reduce(const RunContext& context, double start, Fold fold) {
  const Shape& shape = context.inputs[0].shape();
  const auto& axes = context.attrs.Ints("axes");
  const T* x = context.inputs[0].data<T>();
  T* y = context.outputs[0].data<T>();
  // Neighbouring axes of one kind merge; the innermost group is treated apart.
  std::vector<std::pair<int64_t, int64_t>> kept, reduced;
  int64_t stride = 1;
  bool inner_reduced = shape.rank() == 0 || IsReduced(axes, shape.rank() - 1);
  int64_t inner = 1;
  bool in_inner = true;
  for (int axis = shape.rank() - 1; axis >= 0; --axis) {
    bool is_reduced = IsReduced(axes, axis);
    if (in_inner && is_reduced == inner_reduced) {
      inner *= shape[axis];
    } else {
      in_inner = false;
      auto& list = is_reduced ? reduced : kept;
      list.insert(list.begin(), {shape[axis], stride});
    }
    stride *= shape[axis];
  }
  const std::vector<int64_t> outer = Offsets(kept), inside = Offsets(reduced);
  int64_t work = std::max<int64_t>(1, inner * static_cast<int64_t>(inside.size()));
  int64_t grain = std::max<int64_t>(1, 32768 / work);
  if (inner_reduced) {
    constexpr int kLanes = 8;
    ParallelFor(outer.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        double lanes[kLanes];
        std::fill(lanes, lanes + kLanes, start);
        for (int64_t offset : inside) {
          const T* row = x + outer[o] + offset;
          int64_t i = 0;
          for (; i + kLanes <= inner; i += kLanes) {
            for (int l = 0; l < kLanes; ++l)
              lanes[l] = fold(lanes[l], static_cast<double>(row[i + l]));
          }
          for (; i < inner; ++i)
            lanes[i % kLanes] = fold(lanes[i % kLanes], static_cast<double>(row[i]));
        }
        double total = lanes[0];
        for (int l = 1; l < kLanes; ++l) total = fold(total, lanes[l]);
        y[o] = static_cast<T>(total);
      }
    });
  } else {
    // Columns in strips, so that one output row with a long reduction still has parallel work.
    constexpr int64_t kStrip = 256;
    int64_t strips = (inner + kStrip - 1) / kStrip;
    ParallelFor(outer.size() * strips, grain, [&](int64_t begin, int64_t end) {
      double sums[kStrip];
      for (int64_t item = begin; item < end; ++item) {
        int64_t o = item / strips, first = item % strips * kStrip;
        int64_t count = std::min(kStrip, inner - first);
        std::fill(sums, sums + count, start);
        for (int64_t offset : inside) {
          const T* row = x + outer[o] + offset + first;
          for (int64_t i = 0; i < count; ++i) sums[i] = fold(sums[i], static_cast<double>(row[i]));
        }
        for (int64_t i = 0; i < count; ++i) y[o * inner + first + i] = static_cast<T>(sums[i]);
      }
    });
  }
}

template <class T>
void RunSum(const RunContext& context) {
  Reduce<T>(context, 0.0, [](double a, double b) { return a + b; });
}

template <class T>
void RunMax(const RunContext& context) {
  Reduce<T>(context, -std::numeric_limits<double>::infinity(),
            [](double a, double b) { return a > b ? a : (a != a ? a : b); });
}

// y or dy with the reduced axes back as size 1.
Value Unreduced(Value y, const Value& x, const Attrs& attrs) {
  return Reshape(y, KeptShape(x.shape(), attrs.Ints("axes"), true));
}

std::vector<Value> GradientSum(const GradientContext& context) {
  Value x = context.inputs[0];
  return {Broadcast(Unreduced(context.doutputs[0], x, context.node.attrs), x.shape())};
}

// Shared equally among equal maxima, as torch.amax.
std::vector<Value> GradientMax(const GradientContext& context) {
  Value x = context.inputs[0];
  const Attrs& attrs = context.node.attrs;
  Value hit = Equals(x, Unreduced(context.outputs[0], x, attrs));
  Value count = Unreduced(Sum(hit, attrs.Ints("axes")), x, attrs);
  return {hit * (Unreduced(context.doutputs[0], x, attrs) / count)};
}

std::vector<OpSample> Samples() {
  auto sample = [](Shape shape, std::vector<int64_t> axes) {
    return OpSample{{{DType::kF32, shape}}, {{"axes", axes}}};
  };
  return {sample({}, {}),
          sample({1}, {0}),
          sample({7}, {0}),
          sample({5, 17}, {1}),
          sample({5, 17}, {0}),
          sample({5, 17}, {0, 1}),
          sample({2, 6, 3, 5}, {0, 2, 3}),
          sample({2, 6, 3, 5}, {1}),
          sample({2, 6, 3, 5}, {1, 3}),
          sample({3, 33, 65}, {2}),
          sample({3, 33, 65}, {0, 1}),
          sample({2, 3, 4, 2, 3}, {0, 2, 4}),
          sample({64, 700}, {0})};
}

std::vector<OpSample> SumSamples() {
  std::vector<OpSample> samples = Samples();
  samples.push_back({{{DType::kF32, Shape{0, 3}}}, {{"axes", std::vector<int64_t>{0}}}});
  samples.push_back({{{DType::kF32, Shape{3, 0}}}, {{"axes", std::vector<int64_t>{0}}}});
  return samples;
}

Value EmitReduce(const Op& op, Value x, const std::vector<int64_t>& axes, bool keep_dims) {
  std::vector<int64_t> normal = NormalAxes(x, axes, op.name.data());
  Value y = x.graph->EmitOne(op, {x}, {{"axes", normal}});
  return keep_dims ? Reshape(y, KeptShape(x.shape(), normal, true)) : y;
}

}  // namespace

const Op kSumOp{.name = "Sum",
                .kind = OpKind::kReduce,
                .min_arity = 1,
                .max_arity = 1,
                .doc = "y = sum of x over `axes`, which disappear",
                .source = "",
                .infer = Infer,
                .run = RunSum<float>,
                .reference = RunSum<double>,
                .gradient = GradientSum,
                .samples = SumSamples};

const Op kMaxOp{.name = "Max",
                .kind = OpKind::kReduce,
                .min_arity = 1,
                .max_arity = 1,
                .doc = "y = largest element of x over `axes`, which disappear; NaN if one is NaN",
                .source = "",
                .infer = Infer,
                .run = RunMax<float>,
                .reference = RunMax<double>,
                .gradient = GradientMax,
                .samples = Samples};

Value Sum(Value x, std::vector<int64_t> axes, bool keep_dims) {
  return EmitReduce(kSumOp, x, axes, keep_dims);
}
Value Max(Value x, std::vector<int64_t> axes, bool keep_dims) {
  return EmitReduce(kMaxOp, x, axes, keep_dims);
}
Value Mean(Value x, std::vector<int64_t> axes, bool keep_dims) {
  Value sum = Sum(x, axes, keep_dims);
  double count = static_cast<double>(x.shape().elements()) /
                 static_cast<double>(std::max<int64_t>(1, sum.shape().elements()));
  return sum * static_cast<float>(1.0 / count);
}

}  // namespace calotype
