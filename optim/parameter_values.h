// Values of parameters by name: how weights, optimizer state and averages get into checkpoints and
// back.
#pragma once

#include <map>
#include <span>
#include <string>

#include "core/parameter.h"
#include "core/tensor.h"

namespace calotype {

// The tensors share storage with the parameters.
std::map<std::string, Tensor> ValuesByName(std::span<const ParameterPtr> parameters);
// Copies values into the parameters of the same names. Errors, before anything is changed:
// ValueError naming a parameter that is missing in `values` or a value that belongs to none,
// ShapeError.
void SetValuesByName(std::span<const ParameterPtr> parameters,
                     const std::map<std::string, Tensor>& values);

}  // namespace calotype
