// Kernel specifications: what the lowering asks the emitters to generate. A spec is plain data with
// constant extents and strides; equal specs are compiled once. Every kernel has the signature
//   void kernel(void* const* pointers, int64_t begin, int64_t end)
// and computes chunks [begin, end) of Chunks(spec); `pointers` holds the base addresses that the
// operands name. Chunks depend on the spec alone, so results do not depend on the thread count.
//
// An output may lie in the memory of an input only element for element (the same addresses at the
// same indices of a LoopSpec or of an epilogue); outputs otherwise overlap nothing.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "core/program.h"
#include "core/tensor.h"

namespace calotype::jit {

using KernelFunction = void (*)(void* const* pointers, int64_t begin, int64_t end);

// A strided view of one buffer: element (i0, i1, ...) is at
// pointers[pointer] + (offset + sum_d i_d * strides[d]) elements. A stride of 0 broadcasts.
struct Operand {
  int pointer = 0;
  DType dtype = DType::kF32;
  int64_t offset = 0;
  std::vector<int64_t> strides;
  int64_t chain = 0;  // the stride along the loop of a ChainSpec around it
  bool operator==(const Operand&) const = default;
};

// Elementwise work on a tile in registers before it is stored. Program input 0 is the anchor's
// result, input 1 + i is operands[i]; result r is stored to outputs[r]. Strides are over the
// anchor's output space. An identity is a program whose result is input 0.
struct Epilogue {
  ScalarProgram program;
  std::vector<Operand> operands;
  std::vector<Operand> outputs;
  bool operator==(const Epilogue&) const = default;
};

// for each index of `extents`: outputs = program(inputs). Elementwise chains, copies, packing.
struct LoopSpec {
  std::vector<int64_t> extents;  // outermost first; the innermost is vectorized
  std::vector<Operand> inputs;   // i32/i64 operands are converted to f32
  ScalarProgram program;
  std::vector<Operand> outputs;
  bool operator==(const LoopSpec&) const = default;
};

// for each index of `extents`: reduce program(inputs) over `reduced`, then the epilogue.
// Operand strides of `inputs`: extents..., reduced...; of the epilogue: extents...
struct ReduceSpec {
  enum Kind : uint8_t { kSum, kMax } kind = kSum;
  std::vector<int64_t> extents, reduced;
  std::vector<Operand> inputs;
  ScalarProgram program;
  Epilogue epilogue;
  bool operator==(const ReduceSpec&) const = default;
};

// for each index of [0, extent): all links, one after the other. What a link writes for an index
// the next ones read for the same index, while it is still in cache: the statistics of a row, then
// the row normalised.
struct ChainSpec {
  using Link = std::variant<LoopSpec, ReduceSpec>;
  int64_t extent = 1;
  std::vector<Link> links;
  bool operator==(const ChainSpec&) const = default;
};

// c[m..., n] = epilogue(sum over k... of a[m..., k...] * b[m..., k..., n]): matrix products, direct
// convolutions, and the gradients of both are all of this form. m are the outer output dimensions
// (batch, weight panel, rows, columns), k the reduction (kernel row, kernel column, channel).
// Strides: a: m..., k...; b: m..., k..., n; epilogue operands and outputs: m..., n.
struct ContractionSpec {
  std::vector<int64_t> m;
  int64_t n = 1;
  std::vector<int64_t> k;
  Operand a, b;
  Epilogue epilogue;
  int schedule = 0;  // which of kSchedules (contraction_plan.h) orders the tiles
  bool operator==(const ContractionSpec&) const = default;
};

// out[b, h, i, :] = sum_j P[i, j] v[b, h, j, :], P = softmax_j(scale q_i . k_j + mask). Strides:
// q, out: b, h, i, d; k, v: b, h, j, d; mask: b, h, i, j (0 broadcasts); lse: b, h, i. Dropout is
// not compiled here.
struct AttentionSpec {
  int64_t batch = 1, heads = 1, queries = 1, keys = 1, head_dim = 1, value_dim = 1;
  double scale = 1;
  bool causal = false, has_mask = false;
  Operand q, k, v, mask, out, lse;
  bool operator==(const AttentionSpec&) const = default;
};

// The gradients of AttentionSpec from dout, with probabilities recomputed from lse. dq, dk, dv and
// (has_dmask) the gradient of the unreduced scores are written; out and dout give D = sum(out
// dout). With part > 0 the queries are cut into parts of so many (a multiple of 64), and what part
// p adds to dk and dv is written dk_step * p and dv_step * p elements further on: the sum over the
// parts, which may be computed at the same time, is left to the caller.
struct AttentionGradientSpec {
  AttentionSpec forward;
  Operand dout, dq, dk, dv;
  int64_t part = 0, dk_step = 0, dv_step = 0;
  int64_t Parts() const { return part > 0 ? (forward.queries + part - 1) / part : 1; }
  bool operator==(const AttentionGradientSpec&) const = default;
};

// out[o..., i..., r...] = x[o..., indices[i...], r...]. Strides over o, i, r (x: o, axis, r).
// Indices outside [0, axis_size) must be checked by the caller before the kernel runs.
struct GatherSpec {
  std::vector<int64_t> outer, index, inner;
  int64_t axis_size = 0;
  Operand x;        // strides: outer..., axis, inner...
  Operand indices;  // strides: index...
  Operand out;      // strides: outer..., index..., inner...
  bool operator==(const GatherSpec&) const = default;
};

// out = 0; out[o..., indices[i...], r...] += dy[o..., i..., r...] in index order.
struct ScatterAddSpec {
  std::vector<int64_t> outer, index, inner;
  int64_t axis_size = 0;
  Operand dy, indices, out;
  bool operator==(const ScatterAddSpec&) const = default;
};

// Uniform numbers of graph op PhiloxUniform: out dense, `elements` of them; seed i64[1].
struct PhiloxSpec {
  int64_t elements = 0, stream = 0;
  Operand seed, out;
  bool operator==(const PhiloxSpec&) const = default;
};

using KernelSpec = std::variant<LoopSpec, ReduceSpec, ChainSpec, ContractionSpec, AttentionSpec,
                                AttentionGradientSpec, GatherSpec, ScatterAddSpec, PhiloxSpec>;

// A canonical text of the whole spec: the key of the compile cache, and what dumps print.
std::string ToString(const KernelSpec& spec);

// How many chunks the kernel has, by an estimate of its work: 1 for a small one, 0 for one without
// results. The kernel may be called with any ranges that cover [0, Chunks(spec)) once.
int64_t Chunks(const KernelSpec& spec);

}  // namespace calotype::jit
