// Functions that emit nodes: what layers, losses and optimizers are written in. Scalars become
// constants; elementwise functions broadcast as NumPy. Errors: ShapeError if values do not fit.
#pragma once

#include <initializer_list>
#include <vector>

#include "graph/graph.h"

namespace calotype {

// --- Elementwise. One function for each line of ops.def, e.g. Value Silu(Value x).
#define OP1(Name, ...) Value Name(Value x);
#define OP2(Name, ...)          \
  Value Name(Value x, Value y); \
  Value Name(Value x, float y); \
  Value Name(float x, Value y);
#define OP3(Name, ...) Value Name(Value x, Value y, Value z);
#include "graph/ops.def"

inline Value operator+(Value x, Value y) { return Add(x, y); }
inline Value operator-(Value x, Value y) { return Sub(x, y); }
inline Value operator*(Value x, Value y) { return Mul(x, y); }
inline Value operator/(Value x, Value y) { return Div(x, y); }
inline Value operator+(Value x, float y) { return Add(x, y); }
inline Value operator-(Value x, float y) { return Sub(x, y); }
inline Value operator*(Value x, float y) { return Mul(x, y); }
inline Value operator/(Value x, float y) { return Div(x, y); }
inline Value operator+(float x, Value y) { return Add(x, y); }
inline Value operator-(float x, Value y) { return Sub(x, y); }
inline Value operator*(float x, Value y) { return Mul(x, y); }
inline Value operator/(float x, Value y) { return Div(x, y); }

// --- Reductions over `axes` (negative ones count from the end; empty: all axes). With keep_dims
// the reduced axes stay with size 1.
Value Sum(Value x, std::vector<int64_t> axes = {}, bool keep_dims = false);
Value Max(Value x, std::vector<int64_t> axes = {}, bool keep_dims = false);
Value Mean(Value x, std::vector<int64_t> axes = {}, bool keep_dims = false);

// --- Views.
Value Reshape(Value x, const Shape& shape);                   // same elements, row-major order
Value Permute(Value x, std::vector<int64_t> axes);            // y.dim(i) = x.dim(axes[i])
Value Broadcast(Value x, const Shape& shape);                 // NumPy's broadcast_to
Value Slice(Value x, int axis, int64_t start, int64_t size);  // x[..., start:start+size, ...]
// Zeros around `x`: low[i] before and high[i] after along axis i.
Value Pad(Value x, std::vector<int64_t> low, std::vector<int64_t> high);
Value Concat(std::vector<Value> parts, int axis);
std::vector<Value> Split(Value x, int axis, std::vector<int64_t> sizes);

// --- Indexing.
// y = x with axis `axis` replaced by the axes of `indices`: y[.., i.., ..] = x[.., indices[i..],
// ..]. indices i32 or i64; Errors at run time: ValueError for an index outside [0, x.dim(axis)).
Value Gather(Value x, Value indices, int axis = 0);
// The adjoint: zeros of `size` along `axis`, dy added at the indices in index order.
Value ScatterAdd(Value dy, Value indices, int axis, int64_t size);
Value Cast(Value x);  // i32/i64 -> f32

// --- Contractions.
// y[..., m, n] = sum_k a[..., m, k] b[..., k, n] (+ bias[n]); transpose_a/b swap the last two axes
// of that operand; leading axes broadcast.
Value MatMul(Value a, Value b, bool transpose_a = false, bool transpose_b = false, Value bias = {});
// Cross-correlation, as torch.nn.functional.conv2d: x [B, C, H, W], w [O, C, KH, KW], bias [O] ->
// [B, O, HO, WO] with HO = (H + top + bottom - KH) / stride + 1.
struct Conv2dOptions {
  int64_t stride = 1;
  int64_t top = 0, bottom = 0, left = 0, right = 0;  // zero padding
  static Conv2dOptions Padded(int64_t stride, int64_t padding) {
    return {stride, padding, padding, padding, padding};
  }
};
Value Conv2d(Value x, Value w, Value bias, const Conv2dOptions& options);

// --- Fused calls.
// y = (x - mean) * rstd * gamma + beta over the channels of a group and all positions; x [B, C,
// ...], gamma, beta [C] (both may be undefined). Wu & He 2018, arXiv:1803.08494.
Value GroupNorm(Value x, Value gamma, Value beta, int64_t groups, double eps);
// The same over the last axis. Ba et al. 2016, arXiv:1607.06450.
Value LayerNorm(Value x, Value gamma, Value beta, double eps);
Value Softmax(Value x, int axis = -1);  // exp(x - max x) / sum exp(x - max x) along the axis

struct AttentionOptions {
  int64_t heads = 1;
  double scale = 1;     // multiplies q k^T
  bool causal = false;  // query i sees keys j <= i
  double dropout = 0;   // probability of dropping an attention weight; needs `seed`
  int64_t stream = 0;   // of the random numbers of dropout; layers that share a seed differ in it
  int64_t block_q = 64,
          block_kv = 64;  // tile of the eager kernel, no effect on the result's meaning
};
struct AttentionResult {
  Value out;  // [B, L, H*Dv]
  Value lse;  // [B, H, L]: log of the sum of exp of the scaled, masked scores
};
// Multi-head attention in token layout: q [B, L, H*D], k [B or 1, S, H*D], v [B or 1, S, H*Dv];
// mask is added to the scaled scores and broadcasts to [B, H, L, S] (rank 4). seed: i64[1]. Never
// stores the L x S scores (Dao et al. 2022, arXiv:2205.14135).
AttentionResult Attention(Value q, Value k, Value v, const AttentionOptions& options,
                          Value mask = {}, Value seed = {});

// --- Random. Uniform numbers in [0, 1): element i is 24 bits of Philox4x32-10 at counter i of
// stream `stream` and key seed[0] (i64[1]).
Value PhiloxUniform(Value seed, const Shape& shape, int64_t stream);

// --- Composites.
Value StopGradient(Value x);  // y = x; no gradient flows to x
// y = x, but operations on y are not merged with equal ones on x, nor fused into what computes x.
Value Barrier(Value x);
// Nearest-neighbour resize of [B, C, H, W]: y[.., i, j] = x[.., floor(i H / h), floor(j W / w)].
Value ResizeNearest(Value x, int64_t height, int64_t width);
Value AvgPool2x2(Value x);  // mean of each 2x2 square of [B, C, H, W]; an odd end is left out
Value MeanSquaredError(Value prediction, Value target);  // mean over all elements; equal shapes

// --- Gradient: d(sum over outputs of <doutput, output>) / d(each of wrt), in the ops of the same
// graph. doutputs may hold undefined values for "1" of a scalar output. A value that does not
// depend on a wrt gives zeros. Errors: UnsupportedError naming an op that has no gradient.
std::vector<Value> Gradients(std::span<const Value> outputs, std::span<const Value> doutputs,
                             std::span<const Value> wrt);

}  // namespace calotype
