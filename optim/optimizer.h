// Optimizer: gradients in, new parameters out, as nodes of the training graph. Its state (momentum,
// moments) is Parameters of its own that the same graph updates; nothing that changes between steps
// is baked in: the learning rate and the bias corrections are declared inputs. One step is
//
//   Optimizer optimizer(AdamW{}, parameters, /*max_gradient_norm=*/1);
//   auto step = optimizer.ExportUpdates(graph, Gradients(...));  // once, when the graph is built
//   graph.Output("gradient_norm", step.gradient_norm);
//   inputs += optimizer.Inputs(k, learning_rate);     // for the k-th update, k = 1, 2, and so on
//
// A step whose gradient norm is not finite changes neither parameters nor state, bit for bit; the
// caller sees it in the norm and does not count it as an update.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "core/parameter.h"
#include "core/tensor.h"
#include "graph/graph.h"

namespace calotype {

// The rules are torch.optim's, in its order of operations; g is the clipped gradient.

// g += weight_decay p;  b = momentum b + (1 - dampening) g, at the first update b = g;
// p -= lr (nesterov ? g + momentum b : b). Without momentum p -= lr g. State: momentum_buffer.
struct Sgd {
  double momentum = 0;      // >= 0
  double dampening = 0;     // in [0, 1]; needs momentum
  double weight_decay = 0;  // >= 0
  bool nesterov = false;    // needs momentum and no dampening
};

// g += weight_decay p;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;
// p -= lr / (1 - beta1^k) m / (sqrt(v) / sqrt(1 - beta2^k) + eps). State: exp_avg, exp_avg_sq.
// Kingma & Ba 2014, arXiv:1412.6980.
struct Adam {
  double beta1 = 0.9;       // in [0, 1)
  double beta2 = 0.999;     // in [0, 1)
  double eps = 1e-8;        // > 0
  double weight_decay = 0;  // >= 0
};

// Adam with decoupled weight decay: p *= 1 - lr weight_decay instead of the change of g.
// Loshchilov & Hutter 2017, arXiv:1711.05101.
struct AdamW {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.01;
};

class Optimizer {
 public:
  using Rule = std::variant<Sgd, Adam, AdamW>;

  // State of zeros for `parameters`. max_gradient_norm: if the root of the sum of squares of all
  // gradients exceeds it, they are multiplied by max_gradient_norm / (norm + 1e-6), as
  // torch.nn.utils.clip_grad_norm_ does; 0: no clipping.
  // Errors: ValueError for an option out of range, no parameters, or a parameter that is not f32,
  // not trainable, or has no name or another one's.
  Optimizer(Rule rule, std::vector<ParameterPtr> parameters, double max_gradient_norm = 0);

  struct Exported {
    std::vector<Value> parameters;  // the new values
    Value gradient_norm;            // f32 []: before clipping
    Value finite;                   // f32 []: 1 if the norm is finite, else 0 and nothing changes
  };
  // Declares the inputs and adds the updates of all parameters and of the state. gradients[i]
  // belongs to the i-th parameter. Errors: ShapeError naming the parameter.
  Exported ExportUpdates(ComputationGraph& graph, std::span<const Value> gradients) const;

  // Names of the declared inputs, f32 [] each, in order of declaration: optimizer.learning_rate;
  // Adam and AdamW: optimizer.bias_correction1 = 1 - beta1^k, optimizer.bias_correction2_sqrt =
  // sqrt(1 - beta2^k); Sgd with dampening: optimizer.gradient_weight = k == 1 ? 1 : 1 - dampening.
  std::vector<std::string> InputNames() const;
  // Their values for the k-th update. `step` = k counts updates that changed something, from 1.
  // Errors: ValueError unless step >= 1 and the learning rate is finite and >= 0.
  std::vector<Tensor> Inputs(int64_t step, double learning_rate) const;

  const std::vector<ParameterPtr>& parameters() const { return parameters_; }
  // The state, named optimizer.exp_avg.<parameter's name> and so on.
  const std::vector<ParameterPtr>& state() const { return state_; }

 private:
  Rule rule_;
  std::vector<ParameterPtr> parameters_;
  double max_gradient_norm_;
  int state_per_parameter_ = 0;
  std::vector<ParameterPtr> state_;  // state_per_parameter_ for each parameter, in its order
};

}  // namespace calotype
