// Checks one layer: Forward against the float64 reference of its exported graph, the gradient graph
// against central differences in float64, Backward against the gradient graph in float64.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/random.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "layers/layer.h"

namespace calotype {

inline double Dot(const Tensor& a, const Tensor& b) {
  double sum = 0;
  for (int64_t i = 0; i < a.elements(); ++i) sum += a.data<double>()[i] * b.data<double>()[i];
  return sum;
}

inline double LargestAbs(const Tensor& t) {
  Tensor values = t.To(DType::kF64);
  double largest = 0;
  for (double x : values.values<double>()) largest = std::max(largest, std::abs(x));
  return largest;
}

// Largest |a - b| relative to the largest |b|.
inline double RelativeError(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.shape(), b.shape());
  if (a.shape() != b.shape()) return 1e300;
  Tensor x = a.To(DType::kF64), y = b.To(DType::kF64);
  double error = 0;
  for (int64_t i = 0; i < x.elements(); ++i) {
    double difference = std::abs(x.data<double>()[i] - y.data<double>()[i]);
    error = std::isnan(difference) ? 1e300 : std::max(error, difference);
  }
  return error / std::max(LargestAbs(b), 1e-30);
}

struct LayerTolerances {
  double forward = 5e-6, backward = 2e-5;  // float32 against float64
  double difference = 1e-6;                // gradient graph against central differences
};

// The layer as plain functions in float64: outputs, and gradients of sum <output, v>.
class LayerReference {
 public:
  LayerReference(Layer& layer, const std::vector<Tensor>& inputs) {
    std::vector<Value> values, outputs, cotangents, wrt;
    for (size_t i = 0; i < inputs.size(); ++i) {
      values.push_back(inputs[i].defined() ? graph_.Input(fmt::format("x{}", i), inputs[i].type())
                                           : Value{});
      if (!inputs[i].defined()) continue;
      inputs_.push_back(inputs[i].dtype() == DType::kF32 ? inputs[i].To(DType::kF64) : inputs[i]);
      if (inputs[i].dtype() == DType::kF32) {
        differentiable_.push_back(inputs_.size() - 1);
        wrt.push_back(values.back());
      }
    }
    outputs = layer.ExportComputationGraph(graph_, values);
    parameters_ = layer.NamedParameters();
    for (const ParameterPtr& parameter : parameters_)
      wrt.push_back(graph_.ParameterLeaf(parameter));
    Random random(17, "cotangent");
    for (size_t i = 0; i < outputs.size(); ++i) {
      graph_.Output(fmt::format("y{}", i), outputs[i]);
      cotangents.push_back(graph_.Input(fmt::format("v{}", i), outputs[i].type()));
      cotangents_.push_back(random.NormalTensor(outputs[i].shape()));
      inputs_.push_back(cotangents_.back().To(DType::kF64));
    }
    std::vector<Value> gradients = Gradients(outputs, cotangents, wrt);
    for (size_t i = 0; i < gradients.size(); ++i) {
      graph_.Output(fmt::format("g{}", i), gradients[i]);
    }
    outputs_ = outputs.size();
  }

  size_t outputs() const { return outputs_; }
  const std::vector<Tensor>& cotangents() const { return cotangents_; }
  const std::vector<size_t>& differentiable() const { return differentiable_; }
  // Outputs, then gradients of the differentiable inputs and of the parameters.
  std::vector<Tensor> Run() const { return Interpreter(graph_).RunReference(inputs_, Values()); }
  // sum <output, v> with the k-th differentiable input or parameter moved by `step` * direction.
  double Loss(size_t k, const Tensor& direction, double step) const {
    std::vector<Tensor> inputs = inputs_, parameters = Values();
    auto move = [&](Tensor& t) {
      t = t.Clone();
      for (int64_t i = 0; i < t.elements(); ++i) {
        t.data<double>()[i] += step * direction.data<double>()[i];
      }
    };
    if (k < differentiable_.size()) {
      move(inputs[differentiable_[k]]);
    } else {
      // Parameters are passed in the order in which the graph reads them.
      const ParameterPtr& moved = parameters_[k - differentiable_.size()];
      auto order = graph_.Parameters();
      for (size_t i = 0; i < order.size(); ++i) {
        if (order[i] == moved) move(parameters[i]);
      }
    }
    auto results = Interpreter(graph_).RunReference(inputs, parameters);
    double loss = 0;
    for (size_t i = 0; i < outputs_; ++i) {
      loss += Dot(results[i], cotangents_[i].To(DType::kF64));
    }
    return loss;
  }

 private:
  std::vector<Tensor> Values() const {
    std::vector<Tensor> values;
    for (const ParameterPtr& p : graph_.Parameters()) values.push_back(p->value().To(DType::kF64));
    return values;
  }

  ComputationGraph graph_;
  size_t outputs_ = 0;
  std::vector<Tensor> inputs_, cotangents_;
  std::vector<size_t> differentiable_;
  std::vector<ParameterPtr> parameters_;
};

inline void CheckLayer(Layer& layer, const std::vector<Tensor>& inputs,
                       const LayerTolerances& tolerances = {}) {
  // Norms and biases away from 1 and 0, so that a mix-up shows.
  Random noise(23, "parameters");
  for (const ParameterPtr& parameter : layer.NamedParameters()) {
    for (float& x : parameter->Write().values()) x += 0.1f * noise.Normal();
  }
  LayerReference reference(layer, inputs);
  std::vector<Tensor> expected = reference.Run();

  std::vector<Tensor> outputs = layer.Forward(inputs);
  ASSERT_EQ(outputs.size(), reference.outputs());
  for (size_t i = 0; i < outputs.size(); ++i) {
    EXPECT_LE(RelativeError(outputs[i], expected[i]), tolerances.forward) << "output " << i;
  }

  // Gradients: those of inputs that are absent or integers are undefined.
  std::vector<Tensor> input_gradients = layer.Backward(reference.cotangents()), actual;
  std::vector<std::string> names;
  ASSERT_EQ(input_gradients.size(), inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    bool expects = inputs[i].defined() && inputs[i].dtype() == DType::kF32;
    EXPECT_EQ(input_gradients[i].defined(), expects) << "input " << i;
    if (!expects) continue;
    actual.push_back(input_gradients[i]);
    names.push_back(fmt::format("input {}", i));
  }
  for (const ParameterPtr& parameter : layer.NamedParameters()) {
    actual.push_back(parameter->gradient);
    names.push_back(parameter->name());
  }
  double scale = 0;
  for (size_t k = 0; k < actual.size(); ++k) {
    scale = std::max(scale, LargestAbs(expected[reference.outputs() + k]));
  }
  for (size_t k = 0; k < actual.size(); ++k) {
    const Tensor& gradient = expected[reference.outputs() + k];
    double largest = LargestAbs(gradient);
    // A gradient that is zero in exact arithmetic has no scale of its own.
    EXPECT_LE(RelativeError(actual[k], gradient) * largest,
              tolerances.backward * (largest + 0.05 * scale))
        << names[k];

    // Along one random direction, and along single elements.
    Random random(29, names[k]);
    for (int trial = 0; trial < 3; ++trial) {
      Tensor direction = random.NormalTensor(gradient.shape()).To(DType::kF64);
      if (trial > 0) {
        int64_t element = random.Integer(gradient.elements());
        for (int64_t i = 0; i < gradient.elements(); ++i) {
          direction.data<double>()[i] = i == element ? 1 : 0;
        }
      }
      constexpr double kStep = 1e-5;
      double difference =
          (reference.Loss(k, direction, kStep) - reference.Loss(k, direction, -kStep)) /
          (2 * kStep);
      double bound =
          tolerances.difference * std::max({std::abs(difference), largest, 1e-3 * scale});
      EXPECT_NEAR(Dot(gradient, direction), difference, bound) << names[k] << " trial " << trial;
    }
  }
}

}  // namespace calotype
