#include "diffusion/guidance.h"

#include <cmath>
#include <span>

#include "core/error.h"

namespace calotype {
namespace {

double StandardDeviation(std::span<const float> values) {
  double mean = 0, squares = 0;
  for (float v : values) mean += v;
  mean /= static_cast<double>(values.size());
  for (float v : values) squares += (v - mean) * (v - mean);
  return std::sqrt(squares / static_cast<double>(values.size() - 1));
}

}  // namespace

Tensor Guidance::Apply(const Tensor& model_outputs) const {
  Check(active(), "guidance: scale is {}, guidance is active only above 1", scale);
  Check(rescale >= 0 && rescale <= 1, "guidance: rescale is {}, expected [0, 1]", rescale);
  Check<ShapeError>(
      model_outputs.defined() && model_outputs.dtype() == DType::kF32 &&
          model_outputs.shape().rank() >= 1 && model_outputs.shape()[0] >= 2 &&
          model_outputs.shape()[0] % 2 == 0,
      "guidance: the model outputs must be f32 [2B, ...], got {}",
      model_outputs.defined() ? ToString(model_outputs.type()) : "an undefined tensor");
  const int64_t B = model_outputs.shape()[0] / 2;
  Tensor result(model_outputs.shape().With(0, B));
  const size_t n = static_cast<size_t>(result.elements()), size = n / static_cast<size_t>(B);
  Check<ShapeError>(rescale == 0 || size >= 2,
                    "guidance: rescale needs samples of at least 2 elements, got {}",
                    model_outputs.type());
  const std::span<const float> u = model_outputs.values().first(n);
  const std::span<const float> c = model_outputs.values().last(n);
  const std::span<float> o = result.values();
  for (size_t i = 0; i < n; ++i) o[i] = static_cast<float>(u[i] + scale * (c[i] - double{u[i]}));
  if (rescale == 0) return result;
  for (size_t first = 0; first < n; first += size) {
    const std::span<float> sample = o.subspan(first, size);
    const double wanted = StandardDeviation(c.subspan(first, size));
    const double factor = rescale * wanted / StandardDeviation(sample) + (1 - rescale);
    // A constant sample has no deviation to rescale.
    if (!std::isfinite(factor)) continue;
    for (float& v : sample) v = static_cast<float>(v * factor);
  }
  return result;
}

}  // namespace calotype
