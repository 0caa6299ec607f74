// MatMul: batched matrix product with broadcasting, transposed operands and an optional bias.
#include <vector>

#include "core/contract.h"
#include "core/contract_reference.h"
#include "core/error.h"
#include "graph/functions.h"
#include "graph/op.h"
#include "graph/op_elementwise.h"

namespace calotype {

extern const Op kMatMulOp;

namespace {

// The shape without its last two axes.
Shape BatchOf(const Shape& shape) { return Shape(std::span(shape.begin(), shape.rank() - 2)); }

// Rows and columns of the operand as the product sees it.
struct Matrix {
  int64_t rows, cols;
  Matrix(const Shape& shape, bool transposed)
      : rows(shape[transposed ? -1 : -2]), cols(shape[transposed ? -2 : -1]) {}
};

std::vector<TensorType> Infer(const InferContext& context) {
  bool ta = context.attrs.Int("transpose_a"), tb = context.attrs.Int("transpose_b");
  const TensorType &a = context.inputs[0], &b = context.inputs[1];
  std::string text = fmt::format("MatMul: {}{} x {}{}", a, ta ? "^T" : "", b, tb ? "^T" : "");
  for (const TensorType& x : context.inputs) {
    Check<ShapeError>(x.dtype == DType::kF32, "{}: operand {} is not f32", text, x);
  }
  Check<ShapeError>(a.shape.rank() >= 2 && b.shape.rank() >= 2,
                    "{}: operands need at least two axes", text);
  Matrix ma(a.shape, ta), mb(b.shape, tb);
  Check<ShapeError>(ma.cols == mb.rows, "{}: inner sizes {} and {} differ", text, ma.cols, mb.rows);
  if (context.inputs.size() == 3) {
    const TensorType& bias = context.inputs[2];
    Check<ShapeError>(bias.shape == Shape({mb.cols}), "{}: bias is {}, expects [{}]", text, bias,
                      mb.cols);
  }
  std::vector<int64_t> dims;
  try {
    dims = BroadcastShapes(BatchOf(a.shape), BatchOf(b.shape)).ToVector();
  } catch (const ShapeError&) {
    Fail<ShapeError>("{}: leading axes {} and {} do not broadcast", text, BatchOf(a.shape),
                     BatchOf(b.shape));
  }
  dims.push_back(ma.rows);
  dims.push_back(mb.cols);
  return {{DType::kF32, Shape(dims)}};
}

// Strides of the batch axes of an operand, in elements, 0 where it broadcasts.
std::vector<int64_t> BatchStrides(const Shape& shape, int batch_rank) {
  std::vector<int64_t> result(batch_rank, 0);
  auto strides = shape.Strides();
  int offset = batch_rank - (shape.rank() - 2);
  for (int i = 0; i < shape.rank() - 2; ++i) {
    if (shape[i] != 1) result[offset + i] = strides[i];
  }
  return result;
}

// Calls product(shape, a offset, b offset, c offset) for the products that make up the op: adjacent
// batch axes with one stride for each operand become one batch.
template <class F>
void ForEachProduct(const RunContext& context, F product) {
  bool ta = context.attrs.Int("transpose_a"), tb = context.attrs.Int("transpose_b");
  const Shape &a = context.inputs[0].shape(), &b = context.inputs[1].shape();
  const Shape& c = context.outputs[0].shape();
  Matrix ma(a, ta), mb(b, tb);
  MatMulShape s;
  s.m = ma.rows;
  s.n = mb.cols;
  s.k = ma.cols;
  s.a_row = ta ? 1 : s.k;
  s.a_col = ta ? s.m : 1;
  s.b_row = tb ? 1 : s.n;
  s.b_col = tb ? s.k : 1;
  if (c.elements() == 0) return;

  struct Axis {
    int64_t size, a, b;
  };
  std::vector<Axis> axes;
  int rank = c.rank() - 2;
  auto a_strides = BatchStrides(a, rank), b_strides = BatchStrides(b, rank);
  for (int i = 0; i < rank; ++i) {
    if (c[i] == 1) continue;
    Axis axis{c[i], a_strides[i], b_strides[i]};
    if (!axes.empty() && axes.back().a == axis.a * axis.size &&
        axes.back().b == axis.b * axis.size) {
      axes.back() = {axes.back().size * axis.size, axis.a, axis.b};
    } else {
      axes.push_back(axis);
    }
  }
  if (!axes.empty()) {
    s.batch = axes.back().size;
    s.a_batch = axes.back().a;
    s.b_batch = axes.back().b;
    axes.pop_back();
  }
  int64_t outer = 1;
  for (const Axis& axis : axes) outer *= axis.size;
  for (int64_t i = 0; i < outer; ++i) {
    int64_t rest = i, a_offset = 0, b_offset = 0;
    for (size_t x = axes.size(); x-- > 0;) {
      int64_t index = rest % axes[x].size;
      rest /= axes[x].size;
      a_offset += index * axes[x].a;
      b_offset += index * axes[x].b;
    }
    product(s, a_offset, b_offset, i * s.batch * s.m * s.n);
  }
}

void Run(const RunContext& context) {
  const float *a = context.inputs[0].data(), *b = context.inputs[1].data();
  const float* bias = context.inputs.size() == 3 ? context.inputs[2].data() : nullptr;
  float* c = context.outputs[0].data();
  ForEachProduct(context, [&](const MatMulShape& s, int64_t a0, int64_t b0, int64_t c0) {
    MatMul(s, a + a0, b + b0, bias, c + c0);
  });
}

void Reference(const RunContext& context) {
  const double *a = context.inputs[0].data<double>(), *b = context.inputs[1].data<double>();
  const double* bias = context.inputs.size() == 3 ? context.inputs[2].data<double>() : nullptr;
  double* c = context.outputs[0].data<double>();
  ForEachProduct(context, [&](const MatMulShape& s, int64_t a0, int64_t b0, int64_t c0) {
    reference::MatMul<double>(s, a + a0, b + b0, bias, c + c0);
  });
}

// [..., r, c] -> [... * r, c]
Value Flatten(Value x) {
  int64_t rows = 1;
  for (int i = 0; i < x.rank() - 1; ++i) rows *= x.dim(i);
  return Reshape(x, {rows, x.dim(-1)});
}

std::vector<Value> Gradient(const GradientContext& context) {
  bool ta = context.node.attrs.Int("transpose_a"), tb = context.node.attrs.Int("transpose_b");
  Value a = context.inputs[0], b = context.inputs[1], dy = context.doutputs[0];
  std::vector<Value> result(context.inputs.size());
  if (context.needs[0]) {
    Value da = ta ? MatMul(b, dy, tb, true) : MatMul(dy, b, false, !tb);
    result[0] = SumTo(da, a.shape());
  }
  if (context.needs[1]) {
    if (b.rank() == 2 && !ta) {  // a weight shared by all rows: one tall product, no sum after it
      a = Flatten(a);
      dy = Flatten(dy);
    }
    Value db = tb ? MatMul(dy, a, true, ta) : MatMul(a, dy, !ta, false);
    result[1] = SumTo(db, b.shape());
  }
  if (context.inputs.size() == 3 && context.needs[2]) {
    result[2] = Sum(Flatten(context.doutputs[0]), {0});
  }
  return result;
}

std::vector<OpSample> Samples() {
  auto sample = [](Shape a, Shape b, bool ta, bool tb, int64_t bias = -1) {
    OpSample s{{{DType::kF32, a}, {DType::kF32, b}},
               {{"transpose_a", int64_t{ta}}, {"transpose_b", int64_t{tb}}}};
    if (bias >= 0) s.inputs.push_back({DType::kF32, {bias}});
    return s;
  };
  return {
      sample({1, 1}, {1, 1}, false, false),
      sample({3, 5}, {5, 7}, false, false, 7),
      sample({17, 33}, {33, 15}, false, false),
      sample({33, 17}, {33, 15}, true, false),
      sample({17, 33}, {15, 33}, false, true, 15),
      sample({33, 17}, {15, 33}, true, true),
      sample({64, 65}, {65, 31}, false, false, 31),
      sample({3, 13, 16}, {16, 20}, false, false, 20),  // a weight shared by a batch
      sample({3, 13, 16}, {20, 16}, false, true),
      sample({3, 16, 13}, {16, 20}, true, false),
      sample({13, 16}, {3, 16, 20}, false, false),
      sample({2, 3, 9, 16}, {2, 3, 16, 11}, false, false, 11),
      sample({2, 3, 9, 16}, {2, 1, 11, 16}, false, true),
      sample({2, 1, 9, 16}, {3, 16, 11}, false, false),
      sample({1, 3, 9, 16}, {2, 1, 16, 11}, false, false),
      sample({2, 3, 2, 16, 9}, {2, 1, 2, 16, 11}, true, false),
      sample({1, 64}, {64, 100}, false, false, 100),
      sample({100, 64}, {64, 1}, false, false, 1),
      sample({0, 4}, {4, 3}, false, false),
      sample({3, 0}, {0, 2}, false, false, 2),
      sample({0, 3, 4}, {4, 5}, false, false),
  };
}

}  // namespace

const Op kMatMulOp{
    .name = "MatMul",
    .kind = OpKind::kCall,
    .min_arity = 2,
    .max_arity = 3,
    .doc =
        "y[..., m, n] = sum_k a[..., m, k] b[..., k, n] (+ bias[n]); leading axes broadcast, "
        "transpose_a and transpose_b swap the last two axes of an operand",
    .source = "",
    .infer = Infer,
    .run = Run,
    .reference = Reference,
    .gradient = Gradient,
    .samples = Samples};

Value MatMul(Value a, Value b, bool transpose_a, bool transpose_b, Value bias) {
  Attrs attrs{{"transpose_a", int64_t{transpose_a}}, {"transpose_b", int64_t{transpose_b}}};
  if (bias.defined()) return a.graph->EmitOne(kMatMulOp, {a, b, bias}, std::move(attrs));
  return a.graph->EmitOne(kMatMulOp, {a, b}, std::move(attrs));
}

}  // namespace calotype
