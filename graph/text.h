// Graphs as text: one line per node, readable by people and read back by ParseText, so that a
// failing random test or a dump can be replayed. ToDot draws the same graph for Graphviz, labels as
// clusters.
#pragma once

#include <string>
#include <string_view>

#include "graph/graph.h"

namespace calotype {

// %0 = Input "x" : f32[2, 3]
// %1 = Parameter "w" : f32[4, 3]
// %2 = Constant [0.5] : f32[]
// %3 = MatMul(%0, %1) {transpose_a=0, transpose_b=1} : f32[2, 4] @ unet.proj
// output "y" = %3            (%3.1 is output 1 of node 3)
// update %1 = %5
// Values of constants round-trip; of one with more than `max_constant` elements only the count
// stands there ("[... 5000 values]"), which ParseText refuses.
std::string ToText(const ComputationGraph& graph, int64_t max_constant = 4096);

// Reads the format of ToText. Parameters become new zero-filled Parameters of that name and type.
// Errors: ValueError naming the line.
ComputationGraph ParseText(std::string_view text);

std::string ToDot(const ComputationGraph& graph);  // for `dot -Tsvg`

}  // namespace calotype
