// CountFlop: the arithmetic that a graph asks for, by which benchmarks state rates.
#pragma once

#include "graph/graph.h"

namespace calotype {

// Floating-point operations of the contractions that the outputs and updates of the graph need: 2
// for each multiply-add of matrix products, convolutions (zeros of the padding included, as other
// counters do) and attention (without the pairs that causality hides). Elementwise work,
// reductions and softmax count 0. What an algorithm saves (Winograd) is not subtracted.
double CountFlop(const ComputationGraph& graph);

}  // namespace calotype
