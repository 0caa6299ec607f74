#include "optim/ema.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "core/error.h"
#include "graph/functions.h"

namespace calotype {

Ema::Ema(const EmaOptions& options, std::vector<ParameterPtr> parameters)
    : options_(options), parameters_(std::move(parameters)) {
  Check(options.decay >= 0 && options.decay <= 1, "EMA: decay is {}, expected [0, 1]",
        options.decay);
  Check(options.min_decay >= 0 && options.min_decay <= options.decay,
        "EMA: min_decay is {}, expected 0 to decay = {}", options.min_decay, options.decay);
  Check(options.update_after_step >= 0, "EMA: update_after_step is {}, expected >= 0",
        options.update_after_step);
  for (double value : {options.inv_gamma, options.power}) {
    Check(std::isfinite(value) && value > 0, "EMA: inv_gamma or power is {}, expected > 0", value);
  }
  const EmaOptions defaults;
  Check(options.use_ema_warmup ||
            (options.inv_gamma == defaults.inv_gamma && options.power == defaults.power),
        "EMA: inv_gamma and power have no effect without use_ema_warmup");
  Check(!parameters_.empty(), "EMA: there are no parameters");
  std::set<std::string> names;
  for (const ParameterPtr& p : parameters_) {
    Check(p != nullptr && !p->name().empty(), "EMA: a parameter has no name");
    Check(names.insert(p->name()).second, "EMA: two parameters are named \"{}\"", p->name());
    Check(p->value().defined() && p->value().dtype() == DType::kF32,
          "EMA: parameter \"{}\" is not f32", p->name());
    averages_.push_back(
        std::make_shared<Parameter>("ema." + p->name(), p->value().Clone(), /*trainable=*/false));
  }
}

double Ema::Decay(int64_t step) const {
  Check(step >= 1, "EMA: the update number is {}, expected 1 or more", step);
  const int64_t behind = step - options_.update_after_step - 1;
  if (behind <= 0) return 0;
  const double s = static_cast<double>(behind);
  const double decay = options_.use_ema_warmup
                           ? 1 - std::pow(1 + s / options_.inv_gamma, -options_.power)
                           : (1 + s) / (10 + s);
  return std::clamp(decay, options_.min_decay, options_.decay);
}

std::vector<Tensor> Ema::Inputs(int64_t step) const {
  return {Tensor::Scalar(static_cast<float>(1 - Decay(step)))};
}

void Ema::ExportUpdates(ComputationGraph& graph, std::span<const Value> parameters,
                        Value finite) const {
  Check<ShapeError>(parameters.size() == parameters_.size(), "EMA: {} values for {} parameters",
                    parameters.size(), parameters_.size());
  ComputationGraph::Label label(graph, "ema");
  const Value one_minus_decay = graph.Input(InputNames()[0], Shape());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Value p = parameters[i], average = graph.ParameterLeaf(averages_[i]);
    Check<ShapeError>(p.type() == average.type(), "EMA: the value of \"{}\" is {}, expected {}",
                      parameters_[i]->name(), p.type(), average.type());
    const Value updated = average - one_minus_decay * (average - p);
    graph.Update(average, finite.defined() ? Select(finite, updated, average) : updated);
  }
}

std::map<std::string, Tensor> Ema::Weights() const {
  std::map<std::string, Tensor> weights;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    weights.emplace(parameters_[i]->name(), averages_[i]->value());
  }
  return weights;
}

void Ema::Swap() {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto p = parameters_[i]->Write().values(), average = averages_[i]->Write().values();
    std::swap_ranges(p.begin(), p.end(), average.begin());
  }
}

}  // namespace calotype
