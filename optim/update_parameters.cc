#include "optim/update_parameters.h"

#include <cmath>

#include "core/error.h"
#include "core/parallel.h"

namespace calotype {

void UpdateParameters(std::span<const ParameterPtr> parameters, float learning_rate) {
  Check(std::isfinite(learning_rate), "update parameters: the learning rate is {}", learning_rate);
  for (const ParameterPtr& p : parameters) {
    if (!p->trainable()) continue;
    Check(p->gradient.defined(), "update parameters: \"{}\" has no gradient; call Backward first",
          p->name());
    Check<ShapeError>(p->gradient.type() == p->value().type(),
                      "update parameters: \"{}\" is {}, its gradient {}", p->name(),
                      p->value().type(), p->gradient.type());
    for (float g : p->gradient.values()) {
      Check<NumericError>(std::isfinite(g), "update parameters: the gradient of \"{}\" holds {}",
                          p->name(), g);
    }
  }
  for (const ParameterPtr& p : parameters) {
    if (!p->trainable()) continue;
    const float* g = p->gradient.data();
    Tensor& value = p->Write();
    float* w = value.data();
    ParallelFor(value.elements(), 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) w[i] -= learning_rate * g[i];
    });
  }
}

}  // namespace calotype
