// Indexing: Gather, ScatterAdd, Cast.
#include <cstring>

#include "core/error.h"
#include "core/parallel.h"
#include "graph/functions.h"
#include "graph/op.h"

namespace calotype {

extern const Op kGatherOp, kScatterAddOp, kCastOp;

namespace {

bool IsIndex(DType dtype) { return dtype == DType::kI32 || dtype == DType::kI64; }

int64_t IndexAt(const Tensor& indices, int64_t i) {
  return indices.dtype() == DType::kI32 ? indices.data<int32_t>()[i] : indices.data<int64_t>()[i];
}

// x seen as [outer, size, inner] around `axis`.
struct Split3 {
  int64_t outer = 1, size = 1, inner = 1;
};
Split3 SplitAt(const Shape& shape, int64_t axis) {
  Split3 s;
  for (int i = 0; i < shape.rank(); ++i) {
    (i < axis ? s.outer : i > axis ? s.inner : s.size) *= shape[i];
  }
  return s;
}

void CheckIndices(const Tensor& indices, int64_t size, const char* op) {
  for (int64_t i = 0; i < indices.elements(); ++i) {
    int64_t index = IndexAt(indices, i);
    Check(index >= 0 && index < size, "{}: index {} at position {} is outside [0, {})", op, index,
          i, size);
  }
}

std::vector<TensorType> InferGather(const InferContext& context) {
  const TensorType& x = context.inputs[0];
  const TensorType& indices = context.inputs[1];
  int64_t axis = context.attrs.Int("axis");
  Check<ShapeError>(IsIndex(indices.dtype) && axis >= 0 && axis < x.shape.rank(),
                    "Gather: axis {} of {} by indices {} (i32 or i64)", axis, x, indices);
  std::vector<int64_t> dims;
  for (int i = 0; i < x.shape.rank(); ++i) {
    if (i == axis)
      dims.insert(dims.end(), indices.shape.begin(), indices.shape.end());
    else
      dims.push_back(x.shape[i]);
  }
  return {{x.dtype, Shape(dims)}};
}

void RunGather(const RunContext& context) {
  const Tensor &x = context.inputs[0], &indices = context.inputs[1];
  Tensor& y = context.outputs[0];
  Split3 s = SplitAt(x.shape(), context.attrs.Int("axis"));
  CheckIndices(indices, s.size, "Gather");
  int64_t n = indices.elements(), bytes = s.inner * DTypeSize(x.dtype());
  const auto* from = static_cast<const std::byte*>(x.raw());
  auto* to = static_cast<std::byte*>(y.raw());
  for (int64_t o = 0; o < s.outer; ++o) {
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(to + (o * n + i) * bytes, from + (o * s.size + IndexAt(indices, i)) * bytes,
                  bytes);
    }
  }
}

std::vector<Value> GradientGather(const GradientContext& context) {
  int64_t axis = context.node.attrs.Int("axis");
  return {ScatterAdd(context.doutputs[0], context.inputs[1], static_cast<int>(axis),
                     context.inputs[0].dim(static_cast<int>(axis))),
          Value{}};
}

std::vector<OpSample> SamplesGather() {
  auto sample = [](Shape x, Shape indices, int64_t axis, DType dtype) {
    return OpSample{{{DType::kF32, x}, {dtype, indices}}, {{"axis", axis}}};
  };
  return {sample({5, 3}, {4}, 0, DType::kI64),    sample({5, 17}, {2, 3}, 0, DType::kI32),
          sample({2, 5, 4}, {7}, 1, DType::kI64), sample({2, 3, 5}, {6}, 2, DType::kI64),
          sample({4}, {}, 0, DType::kI64),        sample({4, 2}, {0}, 0, DType::kI64)};
}

// ---------------------------------------------------------------- ScatterAdd

std::vector<TensorType> InferScatterAdd(const InferContext& context) {
  const TensorType &dy = context.inputs[0], &indices = context.inputs[1];
  int64_t axis = context.attrs.Int("axis"), size = context.attrs.Int("size");
  int index_rank = indices.shape.rank();
  bool fits = IsIndex(indices.dtype) && dy.dtype == DType::kF32 && axis >= 0 && size >= 0 &&
              axis + index_rank <= dy.shape.rank();
  for (int i = 0; fits && i < index_rank; ++i) {
    fits = dy.shape[static_cast<int>(axis) + i] == indices.shape[i];
  }
  Check<ShapeError>(fits, "ScatterAdd: {} by indices {} at axis {} to size {}", dy, indices, axis,
                    size);
  std::vector<int64_t> dims(dy.shape.begin(), dy.shape.begin() + axis);
  dims.push_back(size);
  dims.insert(dims.end(), dy.shape.begin() + axis + index_rank, dy.shape.end());
  return {{dy.dtype, Shape(dims)}};
}

template <class T>
void RunScatterAdd(const RunContext& context) {
  const Tensor &dy = context.inputs[0], &indices = context.inputs[1];
  Tensor& out = context.outputs[0];
  Split3 s = SplitAt(out.shape(), context.attrs.Int("axis"));
  CheckIndices(indices, s.size, "ScatterAdd");
  std::memset(out.raw(), 0, out.bytes());
  int64_t n = indices.elements();
  for (int64_t o = 0; o < s.outer; ++o) {
    for (int64_t i = 0; i < n; ++i) {
      T* to = out.data<T>() + (o * s.size + IndexAt(indices, i)) * s.inner;
      const T* from = dy.data<T>() + (o * n + i) * s.inner;
      for (int64_t j = 0; j < s.inner; ++j) to[j] += from[j];
    }
  }
}

std::vector<Value> GradientScatterAdd(const GradientContext& context) {
  return {Gather(context.doutputs[0], context.inputs[1],
                 static_cast<int>(context.node.attrs.Int("axis"))),
          Value{}};
}

std::vector<OpSample> SamplesScatterAdd() {
  auto sample = [](Shape dy, Shape indices, int64_t axis, int64_t size) {
    return OpSample{{{DType::kF32, dy}, {DType::kI64, indices}}, {{"axis", axis}, {"size", size}}};
  };
  return {sample({4, 3}, {4}, 0, 5), sample({2, 3, 17}, {2, 3}, 0, 2), sample({2, 7, 4}, {7}, 1, 5),
          sample({2, 3, 6}, {6}, 2, 3), sample({0, 2}, {0}, 0, 3)};
}

// ---------------------------------------------------------------- Cast

std::vector<TensorType> InferCast(const InferContext& context) {
  Check<ShapeError>(IsIndex(context.inputs[0].dtype), "Cast: input is {}, expects i32 or i64",
                    context.inputs[0]);
  return {{DType::kF32, context.inputs[0].shape}};
}

template <class T>
void RunCast(const RunContext& context) {
  const Tensor& x = context.inputs[0];
  T* y = context.outputs[0].data<T>();
  for (int64_t i = 0; i < x.elements(); ++i) y[i] = static_cast<T>(IndexAt(x, i));
}

std::vector<Value> GradientNone(const GradientContext&) { return {Value{}}; }

std::vector<OpSample> SamplesCast() {
  return {{{{DType::kI64, Shape{5}}}, {}}, {{{DType::kI32, Shape{3, 17}}}, {}}};
}

}  // namespace

const Op kGatherOp{.name = "Gather",
                   .kind = OpKind::kCall,
                   .min_arity = 2,
                   .max_arity = 2,
                   .doc = "y[o.., i.., r..] = x[o.., indices[i..], r..], indices at `axis`",
                   .source = "",
                   .infer = InferGather,
                   .run = RunGather,
                   .reference = RunGather,
                   .gradient = GradientGather,
                   .samples = SamplesGather};
const Op kScatterAddOp{
    .name = "ScatterAdd",
    .kind = OpKind::kCall,
    .min_arity = 2,
    .max_arity = 2,
    .doc = "zeros of `size` along `axis`; y[o.., indices[i..], r..] += dy[o.., i.., r..]",
    .source = "",
    .infer = InferScatterAdd,
    .run = RunScatterAdd<float>,
    .reference = RunScatterAdd<double>,
    .gradient = GradientScatterAdd,
    .samples = SamplesScatterAdd};
const Op kCastOp{.name = "Cast",
                 .kind = OpKind::kCall,
                 .min_arity = 1,
                 .max_arity = 1,
                 .doc = "integers to f32",
                 .source = "",
                 .infer = InferCast,
                 .run = RunCast<float>,
                 .reference = RunCast<double>,
                 .gradient = GradientNone,
                 .samples = SamplesCast};

Value Gather(Value x, Value indices, int axis) {
  return x.graph->EmitOne(kGatherOp, {x, indices}, {{"axis", int64_t{x.shape().Axis(axis)}}});
}
Value ScatterAdd(Value dy, Value indices, int axis, int64_t size) {
  return dy.graph->EmitOne(kScatterAddOp, {dy, indices}, {{"axis", int64_t{axis}}, {"size", size}});
}
Value Cast(Value x) {
  if (x.type().dtype == DType::kF32) return x;
  return x.graph->EmitOne(kCastOp, {x});
}

}  // namespace calotype
