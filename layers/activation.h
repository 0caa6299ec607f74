// Activation functions by the names that diffusers' configurations use.
#pragma once

#include <string>
#include <string_view>

#include "graph/functions.h"
#include "layers/layer.h"

namespace calotype {

// f(x) for name = "silu" (also "swish"), "gelu" (exact, with erf), "gelu-approximate" (tanh form),
// "quick_gelu", "mish", "relu", "identity".
// Errors: ValueError for any other name, listing the known ones.
Value Activate(std::string_view name, Value x);
// Errors: as Activate; for constructors, so that a wrong name is found at once.
void CheckActivation(std::string_view name);

namespace nn {

// y = f(x), elementwise, any shape.
class Activation : public Layer {
 public:
  explicit Activation(std::string name);  // Errors: as Activate
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  std::string name_;
};

}  // namespace nn
}  // namespace calotype
