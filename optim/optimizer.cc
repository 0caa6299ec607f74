#include "optim/optimizer.h"

#include <cmath>
#include <limits>
#include <set>

#include "core/error.h"
#include "graph/functions.h"

namespace calotype {
namespace {

template <class... F>
struct Overload : F... {
  using F::operator()...;
};
template <class... F>
Overload(F...) -> Overload<F...>;  // clang needs it before version 17

void CheckNotNegative(const char* rule, const char* name, double value) {
  Check(std::isfinite(value) && value >= 0, "{}: {} is {}, expected a number >= 0", rule, name,
        value);
}

void CheckRule(const Sgd& rule) {
  CheckNotNegative("SGD", "momentum", rule.momentum);
  CheckNotNegative("SGD", "weight_decay", rule.weight_decay);
  Check(rule.dampening >= 0 && rule.dampening <= 1, "SGD: dampening is {}, expected [0, 1]",
        rule.dampening);
  Check(rule.dampening == 0 || rule.momentum > 0, "SGD: dampening is {}, which needs momentum > 0",
        rule.dampening);
  Check(!rule.nesterov || (rule.momentum > 0 && rule.dampening == 0),
        "SGD: nesterov needs momentum > 0 and dampening 0, got {} and {}", rule.momentum,
        rule.dampening);
}

void CheckAdam(const char* name, double beta1, double beta2, double eps, double weight_decay) {
  for (double beta : {beta1, beta2}) {
    Check(beta >= 0 && beta < 1, "{}: a beta is {}, expected [0, 1)", name, beta);
  }
  Check(std::isfinite(eps) && eps > 0, "{}: eps is {}, expected a number > 0", name, eps);
  CheckNotNegative(name, "weight_decay", weight_decay);
}

float Float(double x) { return static_cast<float>(x); }

// New m, new v, and the step m / (sqrt(v) / sqrt(1 - beta2^k) + eps) times lr / (1 - beta1^k).
struct AdamStep {
  Value m, v, step;
};
AdamStep EmitAdam(double beta1, double beta2, double eps, std::span<const Value> inputs, Value g,
                  std::span<const Value> state) {
  const Value learning_rate = inputs[0], correction1 = inputs[1], correction2_sqrt = inputs[2];
  const Value m = state[0] + (g - state[0]) * Float(1 - beta1);
  const Value v = state[1] * Float(beta2) + Square(g) * Float(1 - beta2);
  const Value denominator = Sqrt(v) / correction2_sqrt + Float(eps);
  return {m, v, learning_rate / correction1 * m / denominator};
}

// The rules: the new values of a parameter and its state, from its gradient g and the inputs.

std::vector<Value> EmitRule(const Sgd& rule, std::span<const Value> inputs, Value p, Value g,
                            std::span<const Value> state) {
  const Value learning_rate = inputs[0];
  if (rule.weight_decay > 0) g = g + p * Float(rule.weight_decay);
  if (rule.momentum == 0) return {p - learning_rate * g};
  // The state starts at 0, so the first update's b = g needs no case of its own.
  const Value buffer = state[0] * Float(rule.momentum) + (rule.dampening > 0 ? g * inputs[1] : g);
  const Value direction = rule.nesterov ? g + buffer * Float(rule.momentum) : buffer;
  return {p - learning_rate * direction, buffer};
}

std::vector<Value> EmitRule(const Adam& rule, std::span<const Value> inputs, Value p, Value g,
                            std::span<const Value> state) {
  if (rule.weight_decay > 0) g = g + p * Float(rule.weight_decay);
  const AdamStep adam = EmitAdam(rule.beta1, rule.beta2, rule.eps, inputs, g, state);
  return {p - adam.step, adam.m, adam.v};
}

std::vector<Value> EmitRule(const AdamW& rule, std::span<const Value> inputs, Value p, Value g,
                            std::span<const Value> state) {
  if (rule.weight_decay > 0) p = p * (1.0f - inputs[0] * Float(rule.weight_decay));
  const AdamStep adam = EmitAdam(rule.beta1, rule.beta2, rule.eps, inputs, g, state);
  return {p - adam.step, adam.m, adam.v};
}

}  // namespace

Optimizer::Optimizer(Rule rule, std::vector<ParameterPtr> parameters, double max_gradient_norm)
    : rule_(rule), parameters_(std::move(parameters)), max_gradient_norm_(max_gradient_norm) {
  const std::vector<const char*> state_names =
      std::visit(Overload{[](const Sgd& sgd) -> std::vector<const char*> {
                            CheckRule(sgd);
                            if (sgd.momentum == 0) return {};
                            return {"momentum_buffer"};
                          },
                          [](const Adam& adam) -> std::vector<const char*> {
                            CheckAdam("Adam", adam.beta1, adam.beta2, adam.eps, adam.weight_decay);
                            return {"exp_avg", "exp_avg_sq"};
                          },
                          [](const AdamW& adam) -> std::vector<const char*> {
                            CheckAdam("AdamW", adam.beta1, adam.beta2, adam.eps, adam.weight_decay);
                            return {"exp_avg", "exp_avg_sq"};
                          }},
                 rule_);
  CheckNotNegative("optimizer", "max_gradient_norm", max_gradient_norm_);
  Check(!parameters_.empty(), "optimizer: there are no parameters to train");
  state_per_parameter_ = static_cast<int>(state_names.size());
  std::set<std::string> names;
  for (const ParameterPtr& p : parameters_) {
    Check(p != nullptr && !p->name().empty(), "optimizer: a parameter has no name");
    Check(names.insert(p->name()).second, "optimizer: two parameters are named \"{}\"", p->name());
    Check(p->trainable(), "optimizer: parameter \"{}\" is not trainable", p->name());
    Check(p->value().defined() && p->value().dtype() == DType::kF32,
          "optimizer: parameter \"{}\" is not f32", p->name());
    for (const char* kind : state_names) {
      state_.push_back(std::make_shared<Parameter>(fmt::format("optimizer.{}.{}", kind, p->name()),
                                                   Tensor::Zeros(p->value().shape()),
                                                   /*trainable=*/false));
    }
  }
}

std::vector<std::string> Optimizer::InputNames() const {
  std::vector<std::string> names{"optimizer.learning_rate"};
  if (const Sgd* sgd = std::get_if<Sgd>(&rule_)) {
    if (sgd->dampening > 0) names.push_back("optimizer.gradient_weight");
  } else {
    names.push_back("optimizer.bias_correction1");
    names.push_back("optimizer.bias_correction2_sqrt");
  }
  return names;
}

std::vector<Tensor> Optimizer::Inputs(int64_t step, double learning_rate) const {
  Check(step >= 1, "optimizer: the update number is {}, expected 1 or more", step);
  CheckNotNegative("optimizer", "learning_rate", learning_rate);
  std::vector<double> values{learning_rate};
  const auto corrections = [&](const auto& adam) {
    const double k = static_cast<double>(step);
    values.push_back(1 - std::pow(adam.beta1, k));
    values.push_back(std::sqrt(1 - std::pow(adam.beta2, k)));
  };
  std::visit(Overload{[&](const Sgd& sgd) {
                        if (sgd.dampening > 0) values.push_back(step == 1 ? 1 : 1 - sgd.dampening);
                      },
                      [&](const Adam& adam) { corrections(adam); },
                      [&](const AdamW& adam) { corrections(adam); }},
             rule_);
  std::vector<Tensor> tensors;
  for (double value : values) tensors.push_back(Tensor::Scalar(Float(value)));
  return tensors;
}

Optimizer::Exported Optimizer::ExportUpdates(ComputationGraph& graph,
                                             std::span<const Value> gradients) const {
  Check<ShapeError>(gradients.size() == parameters_.size(),
                    "optimizer: {} gradients for {} parameters", gradients.size(),
                    parameters_.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Parameter& p = *parameters_[i];
    Check<ShapeError>(gradients[i].defined() && gradients[i].type() == p.value().type(),
                      "optimizer: the gradient of \"{}\" is {}, the parameter {}", p.name(),
                      gradients[i].defined() ? ToString(gradients[i].type()) : "undefined",
                      p.value().type());
  }
  ComputationGraph::Label label(graph, "optimizer");
  std::vector<Value> inputs;
  for (const std::string& name : InputNames()) inputs.push_back(graph.Input(name, Shape()));

  Exported exported;
  Value squares;
  for (const Value& g : gradients) {
    const Value sum = Sum(Square(g));
    squares = squares.defined() ? squares + sum : sum;
  }
  exported.gradient_norm = Sqrt(squares);
  exported.finite = LessOrEqual(exported.gradient_norm, std::numeric_limits<float>::max());
  Value scale;
  if (max_gradient_norm_ > 0) {
    scale = Minimum(Float(max_gradient_norm_) / (exported.gradient_norm + 1e-6f), 1.0f);
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    std::vector<Value> targets{graph.ParameterLeaf(parameters_[i])};
    for (int j = 0; j < state_per_parameter_; ++j) {
      targets.push_back(graph.ParameterLeaf(state_[i * state_per_parameter_ + j]));
    }
    const Value g = scale.defined() ? gradients[i] * scale : gradients[i];
    const std::span<const Value> state = std::span<const Value>(targets).subspan(1);
    const std::vector<Value> results = std::visit(
        [&](const auto& rule) { return EmitRule(rule, inputs, targets[0], g, state); }, rule_);
    for (size_t j = 0; j < targets.size(); ++j) {
      const Value result = Select(exported.finite, results[j], targets[j]);
      graph.Update(targets[j], result);
      if (j == 0) exported.parameters.push_back(result);
    }
  }
  return exported;
}

}  // namespace calotype
