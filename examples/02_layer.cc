// A layer of your own. The constructor declares parameters, ExportComputationGraph writes the
// formula; Forward, Backward, saving, loading and the compiled form follow from these two.
#include <fmt/format.h>

#include "core/random.h"
#include "graph/functions.h"
#include "layers/linear.h"

using namespace calotype;

// y = up(silu(gate(x)) * down(x)): a gated layer (Shazeer 2020, arXiv:2002.05202).
class GatedLayer : public Layer {
 public:
  GatedLayer(int64_t width, int64_t inner) : Layer("GatedLayer") {
    gate_ = AddLayer<nn::Linear>("gate",
                                 nn::Linear::Options{.in_features = width, .out_features = inner});
    down_ = AddLayer<nn::Linear>("down",
                                 nn::Linear::Options{.in_features = width, .out_features = inner});
    up_ = AddLayer<nn::Linear>("up",
                               nn::Linear::Options{.in_features = inner, .out_features = width});
  }
  std::vector<Value> ExportComputationGraph(ComputationGraph&,
                                            std::span<const Value> inputs) override {
    Value x = Required(inputs, 0, "x");
    return {up_->Call(Silu(gate_->Call(x)) * down_->Call(x))};
  }

 private:
  nn::Linear *gate_, *down_, *up_;
};

int main() {
  GatedLayer layer(4, 8);
  layer.Initialize(/*seed=*/1);
  for (const ParameterPtr& p : layer.NamedParameters())
    fmt::print("{:12} {}\n", p->name(), p->value().shape());

  // Teach it to turn each vector around, by plain gradient descent.
  Tensor x = Random(2).NormalTensor({64, 4});
  for (int step = 0; step <= 300; ++step) {
    Tensor y = layer.Forward(x), dy(y.shape());
    double loss = 0;
    for (int64_t i = 0; i < y.elements(); ++i) {
      float difference = y.data()[i] - x.data()[i / 4 * 4 + 3 - i % 4];
      loss += difference * difference / static_cast<double>(y.elements());
      dy.data()[i] = 2 * difference / static_cast<float>(y.elements());
    }
    layer.Backward(dy);
    layer.UpdateParameters(/*learning_rate=*/0.5f);
    if (step % 100 == 0) fmt::print("step {:3}: loss {:.4f}\n", step, loss);
  }
  return 0;
}
