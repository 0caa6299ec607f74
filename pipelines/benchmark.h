// Measurements of a model, eager beside compiled: the demo and `calotype bench` report them.
#pragma once

#include <cstdint>
#include <functional>

#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"

namespace calotype {

struct Comparison {
  double eager_ms = 0, jit_ms = 0;  // fastest of alternating calls: noise only adds
  double compile_seconds = 0;
  double max_rel_difference =
      0;  // largest |jit - eager| over the largest |eager|, over all outputs
};

// Runs the graph on both for about `seconds` each, alternating, after one call that compares them.
Comparison Compare(const std::function<ComputationGraph()>& make_graph,
                   std::span<const Tensor> inputs, double seconds = 1);

// One U-Net call on random pictures and contexts.
Comparison CompareUNet(DiffusionModel& model, int64_t batch, double seconds = 1);
// One AdamW training step with clipping and averages on random pictures, at a learning rate of 0.
Comparison CompareTrainingStep(DiffusionModel& model, int64_t batch, double seconds = 1);

// A model with random weights and an invented vocabulary around the U-Net of that name (see
// UNetOf).
std::unique_ptr<DiffusionModel> RandomModel(const std::string& unet);

}  // namespace calotype
