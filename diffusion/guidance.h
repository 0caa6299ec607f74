// Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): the model runs on a batch of
// twice the samples, first without (u), then with the prompt (c), and the outputs are extrapolated.
#pragma once

#include "core/tensor.h"

namespace calotype {

struct Guidance {
  // g: 1 is the model with the prompt, more follows the prompt more closely. As in diffusers,
  // guidance is active, and the batch doubled, only if g > 1; any other g means the model with the
  // prompt alone.
  double scale = 7.5;
  // phi in [0, 1]: share of the rescaling that gives the result the standard deviation of c per
  // sample (Lin et al. 2023, arXiv:2305.08891, section 3.4).
  double rescale = 0;

  bool active() const { return scale > 1; }

  // u + g (c - u), then phi * std(c) / std(o) * o + (1 - phi) * o, for outputs f32 [2B, ...] = [u;
  // c]; returns [B, ...]. std is over all but the first axis, with divisor n - 1. Errors:
  // ValueError if guidance is not active or rescale is outside [0, 1]; ShapeError.
  Tensor Apply(const Tensor& model_outputs) const;
};

}  // namespace calotype
