// UpdateParameters: plain gradient descent on parameters and their gradients, without a graph.
#pragma once

#include <span>

#include "core/parameter.h"

namespace calotype {

// p -= learning_rate * p.gradient for each trainable parameter.
// Errors: ValueError for a learning rate that is not finite or a parameter without gradient ("call
// Backward first"), ShapeError, NumericError naming a parameter whose gradient is not finite.
// Nothing is changed then.
void UpdateParameters(std::span<const ParameterPtr> parameters, float learning_rate);

}  // namespace calotype
