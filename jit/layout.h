// Layouts: for every value of a graph the dense order of axes in which it is best kept in memory.
// Graph inputs, parameters and outputs are row-major; convolutions give channels-last; elementwise
// results, reductions and views follow what they read. A graph of convolutions is thereby
// channels-last throughout without any rule about rank 4.
#pragma once

#include <vector>

#include "graph/graph.h"
#include "jit/view.h"

namespace calotype::jit {

// For each node and output a dense view (buffer -1) in the preferred order of axes.
std::vector<std::vector<View>> PreferredLayouts(const ComputationGraph& graph);

}  // namespace calotype::jit
