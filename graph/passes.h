// Passes: pure functions from graph to graph. Each keeps the meaning of the graph bit for bit.
#pragma once

#include <span>
#include <string_view>

#include "graph/graph.h"

namespace calotype {

// Evaluates operations whose inputs are all constants (results up to 65,536 elements).
ComputationGraph Fold(const ComputationGraph& graph);

// Rewrites by local rules: x * 1, x / 1, x - 0, -(-x), chains of views, a Broadcast that the
// elementwise reader does itself, reductions over axes of size 1.
ComputationGraph Simplify(const ComputationGraph& graph);

// Replaces every op that has a decomposition by it.
ComputationGraph Decompose(const ComputationGraph& graph);

struct Pass {
  std::string_view name;
  ComputationGraph (*run)(const ComputationGraph&);
};
// The list that execution runs, in order: simplify, fold. Common subexpressions and dead code
// vanish in every pass, because graphs are rebuilt through Emit from their outputs.
std::span<const Pass> StandardPasses();

// False if CALOTYPE_PASSES switches the pass `name` off ("fuse" is the fusion of the JIT).
bool PassEnabled(std::string_view name);

// Runs StandardPasses(), verifying after each. CALOTYPE_PASSES=-fold,-simplify switches passes off
// (Errors: ValueError for an unknown name); CALOTYPE_DUMP=dir writes the text after each pass that
// changed something; CALOTYPE_DEBUG=pass prints sizes and "(unchanged)" to stderr.
ComputationGraph Optimize(const ComputationGraph& graph);

}  // namespace calotype
