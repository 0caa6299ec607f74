// The gradient of a fused op by way of its decomposition, for the cases that its fused gradient
// does not cover (a gradient that flows into the statistics of a norm, or into an attention mask).
#pragma once

#include "graph/op.h"

namespace calotype {

// Gradients of the inputs of context.node: emits its decomposition and differentiates that.
std::vector<Value> DecomposedGradient(const GradientContext& context);

}  // namespace calotype
