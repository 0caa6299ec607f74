// Op: the one record of an operation. Everything that the system knows about an op is here: shape
// inference, eager kernel, float64 reference, gradient, decomposition, documentation, test samples.
// Elementwise ops are one line in ops.def; other ops are one file op_*.cc plus one line there.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/program.h"
#include "graph/graph.h"

namespace calotype {

enum class OpKind : uint8_t {
  kLeaf,         // Input, Parameter, Constant
  kElementwise,  // one scalar program over broadcast inputs
  kReduce,       // Sum, Max over axes
  kView,         // an index map: Reshape, Permute, Broadcast, Slice, Pad, Concat
  kCall,         // everything else: contractions, norms, attention, gather, random
};

using Types = std::span<const TensorType>;

struct Op;

struct InferContext {
  Types inputs;
  const Attrs& attrs;
  const Op* op = nullptr;  // the op whose types are inferred
};

struct RunContext {
  std::span<const Tensor> inputs;
  std::span<Tensor> outputs;  // allocated with the inferred types
  const Attrs& attrs;
  const Op* op = nullptr;  // the op that runs
};

struct GradientContext {
  ComputationGraph& graph;
  const ComputationNode& node;
  std::span<const Value> inputs;    // x
  std::span<const Value> outputs;   // y
  std::span<const Value> doutputs;  // dy; undefined for an output that nothing uses
  std::span<const bool> needs;      // which inputs need a gradient
};

// A sample for tests: input types and attributes.
struct OpSample {
  std::vector<TensorType> inputs;
  Attrs attrs;
};

// What an elementwise op adds: its scalar program, kernels, and partial derivatives (themselves
// elementwise ops of the same inputs; a derivative op has none of its own).
struct ElementwiseInfo {
  enum Domain : uint8_t { kAny, kPositive, kNonZero };
  ScalarProgram program;          // over float approximations, what the JIT lowers
  const Op* derivatives[3] = {};  // by operand; nullptr for a structural zero and in derivative ops
  Domain domain = kAny;           // of random test inputs
  double error_eps = 0;  // budget against float64 in units of 2^-24 of the largest |result|
  void (*run)(int64_t n, const float* x, const float* y, const float* z, int scalars,
              float* out) = nullptr;  // graph/elementwise_kernels.h
  double (*reference)(const double* operands) = nullptr;
};

struct Op {
  std::string_view name;
  OpKind kind;
  int min_arity, max_arity;  // number of inputs; max_arity -1: any number
  std::string_view doc;      // formula and shapes, one line
  std::string_view source;   // paper or ""
  std::vector<TensorType> (*infer)(const InferContext&);
  // Eager kernel.
  void (*run)(const RunContext&) = nullptr;
  // Float64 reference by plain loops (inputs and outputs f64, indices unchanged); nullptr if
  // `decompose` gives it.
  void (*reference)(const RunContext&) = nullptr;
  // Gradients of the inputs, one for each; undefined where needs[i] is false or it is zero.
  // nullptr: not differentiable.
  std::vector<Value> (*gradient)(const GradientContext&) = nullptr;
  // The same function in smaller ops: the definition of a fused op, and what the JIT compiles when
  // no template fits.
  std::vector<Value> (*decompose)(ComputationGraph&, const ComputationNode&,
                                  std::span<const Value> inputs) = nullptr;
  std::vector<OpSample> (*samples)() = nullptr;
  // Output 0 has the same elements as input 0: eager shares the storage and never calls `run`.
  bool shares_storage = false;
  const ElementwiseInfo* elementwise = nullptr;
};

// All ops, in the order of ops.def, derivative ops last.
std::span<const Op* const> AllOps();
// Errors: ValueError for an unknown name.
const Op& FindOp(std::string_view name);

// The leaves.
extern const Op kInputOp, kParameterOp, kConstantOp;

}  // namespace calotype
