// The kernels and layers that `calotype bench --kernels` times: the shapes of Stable Diffusion 1.5
// that most of its time goes to, each as a graph of its own.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "graph/graph.h"

namespace calotype {

struct KernelCase {
  std::string name;                         // "conv3x3 320->320 64x64"
  double flop = 0;                          // CountFlop of the graph
  std::function<ComputationGraph()> graph;  // a new one with the same parameters at every call
  std::vector<Tensor> inputs;
};

// Matrix product, 3x3 convolutions, self- and cross-attention. Built anew at every call: drop it
// after use, the inputs take memory.
std::vector<KernelCase> KernelCases();
// Every layer of a U-Net by its class name, and the two attention layers of this library.
std::vector<KernelCase> LayerCases();

}  // namespace calotype
