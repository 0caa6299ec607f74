// Random inputs that suit an op's sample: indices in range, positive operands where the domain
// asks.
#pragma once

#include <vector>

#include "core/random.h"
#include "graph/op.h"

namespace calotype {

// Uniform numbers in the op's domain; indices that are valid for Gather and ScatterAdd.
inline std::vector<Tensor> RandomInputs(const Op& op, const OpSample& sample, Random& random) {
  std::vector<Tensor> inputs;
  for (const TensorType& type : sample.inputs) {
    if (type.dtype == DType::kF32) {
      Tensor x = random.UniformTensor(type.shape, -2, 2);
      auto domain = op.elementwise ? op.elementwise->domain : ElementwiseInfo::kAny;
      for (float& value : x.values()) {
        if (domain == ElementwiseInfo::kPositive) value = std::abs(value) + 0.1f;
        if (domain == ElementwiseInfo::kNonZero) value += value < 0 ? -0.3f : 0.3f;
      }
      // The statistics of a norm's gradient must be those of a norm: positive rstd.
      if (op.name.ends_with("NormGradient") && inputs.size() == 3) {
        for (float& value : x.values()) value = std::abs(value) + 0.5f;
      }
      inputs.push_back(x);
      continue;
    }
    int64_t range = 1000;
    if (op.name == "Gather")
      range = sample.inputs[0].shape[static_cast<int>(sample.attrs.Int("axis"))];
    if (op.name == "ScatterAdd") range = sample.attrs.Int("size");
    std::vector<int64_t> values(type.shape.elements());
    for (int64_t& value : values) value = random.Integer(range);
    inputs.push_back(Tensor::From(type.shape, values).To(type.dtype));
  }
  return inputs;
}

}  // namespace calotype
