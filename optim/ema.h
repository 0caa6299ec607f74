// Ema: an exponential moving average of the weights, which samples better than the last weights.
// Its averages are Parameters that the training graph updates behind the optimizer's step. The
// decay and its warm-up are those of diffusers' EMAModel.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/parameter.h"
#include "core/tensor.h"
#include "graph/graph.h"

namespace calotype {

struct EmaOptions {
  double decay = 0.9999;          // largest decay, in [0, 1]
  double min_decay = 0;           // smallest, in [0, decay]
  int64_t update_after_step = 0;  // copies the weights up to this update; >= 0
  bool use_ema_warmup =
      false;               // decay 1 - (1 + s / inv_gamma)^-power instead of (1 + s) / (10 + s)
  double inv_gamma = 1;    // > 0; with use_ema_warmup only
  double power = 2.0 / 3;  // > 0; with use_ema_warmup only
};

class Ema {
 public:
  // Averages that start at the parameters' values. Errors: ValueError for an option out of range,
  // no parameters, or one without name or with another one's.
  Ema(const EmaOptions& options, std::vector<ParameterPtr> parameters);

  // Decay of the k-th update, k = 1, 2, ...: with s = k - update_after_step - 1, 0 for s <= 0, else
  // the formula of the options, clamped to [min_decay, decay]. Errors: ValueError for k < 1.
  double Decay(int64_t step) const;

  // Adds average -= (1 - decay) (average - p) to a graph. parameters[i] is the new value of the
  // i-th parameter and `finite`, if defined, skips the update where it is 0; both from
  // Optimizer::ExportUpdates. Declares the input ema.one_minus_decay, f32 [].
  // Errors: ShapeError.
  void ExportUpdates(ComputationGraph& graph, std::span<const Value> parameters,
                     Value finite = {}) const;
  // Names and values of the declared inputs for the k-th update.
  std::vector<std::string> InputNames() const { return {"ema.one_minus_decay"}; }
  std::vector<Tensor> Inputs(int64_t step) const;

  // The averages, named ema.<parameter's name>, for ValuesByName and SetValuesByName.
  const std::vector<ParameterPtr>& state() const { return averages_; }
  // The averages under the parameters' own names, sharing storage: what a sampler's files hold.
  std::map<std::string, Tensor> Weights() const;
  // Exchanges the parameters' values and the averages; a second call changes them back, bit for
  // bit.
  void Swap();

 private:
  EmaOptions options_;
  std::vector<ParameterPtr> parameters_, averages_;
};

}  // namespace calotype
