// Measurements of a model, eager beside compiled: the demo and `calotype bench` report them.
#pragma once

#include <cstdint>
#include <functional>

#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"

namespace calotype {

struct Comparison {
  double eager_ms = 0, jit_ms = 0;  // median of alternating calls
  double compile_seconds = 0;
  double max_rel_difference =
      0;  // largest |jit - eager| over the largest |eager|, over all outputs
};

// Runs the graph on both for about `seconds` each, alternating, after one call for warm-up. Graphs
// with updates change their parameters, so these are compared before the first timed call only.
Comparison Compare(const std::function<ComputationGraph()>& make_graph,
                   std::span<const Tensor> inputs, double seconds = 1);

// One U-Net call on a batch of noise with the context of the model's empty caption.
Comparison CompareUNet(DiffusionModel& model, int64_t batch, double seconds = 1);

}  // namespace calotype
