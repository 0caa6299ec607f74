// Lowering: from a graph to a list of kernels over buffers. Values are strided views of buffers;
// views in the graph cost nothing where strides can express them; Pad and Concat give buffers that
// their producers write into; elementwise chains are fused into regions (lower_groups.h). The
// result is plain data: jit/plan.h places its buffers in memory, jit/orc.h compiles its kernels,
// jit/runtime/executable.h runs it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "graph/graph.h"
#include "jit/kernel.h"
#include "jit/view.h"

namespace calotype::jit {

enum class Storage : uint8_t {
  kArena,       // lives within one run
  kPersistent,  // made from parameters and constants, kept until a parameter changes
  kDerived,     // made from rare inputs as well, kept until one of them changes
  kInput,       // these four are the caller's: `index` is the number of the
  kOutput,      // input, output, parameter or constant
  kParameter,
  kConstant,
};

struct Buffer {
  Storage storage = Storage::kArena;
  int index = 0;
  DType dtype = DType::kF32;
  int64_t elements = 0;
  int64_t offset = 0;  // bytes inside the arena, the persistent or the derived block: PlanMemory
  std::string label;
  // Not empty: some elements are zeros that no step writes, the text says which. Such a buffer
  // shares its memory only with those of the same text.
  std::string zeros = {};
};

// One kernel call.
struct Step {
  KernelSpec spec;
  std::vector<int> buffers;  // pointer number -> buffer
  std::string label;
  // Graph values that this step completes, with their places: what check mode compares.
  std::vector<std::pair<ValueId, View>> results;
  bool clears = false;  // writes zeros that no other step ever changes
};

// All indices at `view` must be in [0, limit).
struct IndexCheck {
  View view;
  int64_t limit = 0;
  std::string label;
};

struct LoweredProgram {
  ComputationGraph graph;  // after decomposition: what the steps compute
  std::vector<Buffer> buffers;
  std::vector<Step> prepare;  // parameters and constants -> persistent buffers
  std::vector<Step> derive;   // and rare inputs -> derived buffers
  std::vector<Step> steps;
  std::vector<IndexCheck> checks;  // before the first step
  std::vector<ParameterPtr> parameters;
  std::vector<int> updated;  // numbers of the parameters that the steps write
  std::vector<Tensor> constants;
  int regions = 0;      // kernels that compute
  int conversions = 0;  // kernels that only move elements into another layout (packing included)
  int copies = 0;       // kernels that only move elements otherwise: borders, assembly, outputs
};

class Tuner;

struct LowerOptions {
  bool fuse = true;
  Tuner* tuner = nullptr;  // measures what the cost models would estimate (jit/tune.h)
  int64_t winograd_bytes = int64_t{4} << 30;  // memory for the kernels of lower_winograd.h
  // 2 or 4: every 3x3 convolution that can be computed by Winograd's of this tile is; 1: none.
  int forced_tile = 0;
  std::vector<std::string> rare_inputs;  // see CompileOptions
};

// Errors: UnsupportedError naming op, label and shapes of a node that cannot be compiled.
LoweredProgram Lower(const ComputationGraph& graph, const LowerOptions& options = {});

// The graph in the ops that the lowering knows: fused ops without a kernel decomposed, the padding
// of convolutions explicit.
ComputationGraph Normalize(const ComputationGraph& graph, const LowerOptions& options = {});

// Joins steps that follow one another and work row by row (a norm's statistics, then its result)
// into chains, where what one writes is only read by others for the same row.
void ChainSteps(LoweredProgram& program);

// Calls f(operand, written) for every operand of a kernel that the kernel accesses.
void ForEachOperand(KernelSpec& spec, const std::function<void(Operand&, bool)>& f);
void ForEachOperand(const KernelSpec& spec, const std::function<void(const Operand&, bool)>& f);

// The regions, one line for each step.
std::string ToString(const LoweredProgram& program);

}  // namespace calotype::jit
