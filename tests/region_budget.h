// A running error bound beside the float64 reference: every value of a graph together with how far
// float32 arithmetic may take it, element by element, from the magnitudes of what is summed.
//   sums of K products: u (2 sqrt(K) + 2) sum |a||b| and the operands' errors (Higham & Mary 2019,
//     doi:10.1137/18M1226312; factor 2 for the constant); u (K + 2) if the terms are all about
//     equal, since the roundings are then not independent
//   elementwise: the op's own budget, and how far the result moves when an operand moves by its
//   error, or all of them do
//   Winograd's form: the same bound on its transformed patches and kernels, |A'| (|G| |w| |G'| o
//     |B'| |x| |B|) |A|, which covers that it mixes the pixels of a patch.
// Fused ops are bounded through their decomposition.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "graph/op.h"
#include "graph/passes.h"

namespace calotype::region_fuzz {

constexpr double kUnit = 0x1p-24;

struct Bounded {
  Tensor value, error;  // f64; the error is undefined for indices
};

// Bounds of the convolution of x by w in Winograd's form F(4x4, 3x3) with the points 0,
// +-sqrt(1/2),
// +-sqrt(2), infinity; `turned`: by the kernel turned by 180 degrees with its channels exchanged
// (the gradient of the input). Output pixel (0, 0) reads x from (-top, -left).
inline Tensor WinogradBound(const Tensor& x, const Tensor& w, const Shape& y, int64_t top,
                            int64_t left, bool turned) {
  constexpr double a = M_SQRT1_2, b = M_SQRT2;
  static constexpr double kInput[6][6] = {{1, 0, 2.5, 0, 1, 0},     {0, 2 * a, 2, a, 1, 0},
                                          {0, 2 * a, 2, a, 1, 0},   {0, b / 2, 0.5, b, 1, 0},
                                          {0, b / 2, 0.5, b, 1, 0}, {0, 1, 0, 2.5, 0, 1}};
  static constexpr double kWeight[6][3] = {{1, 0, 0},
                                           {2. / 3, 2 * a / 3, 1. / 3},
                                           {2. / 3, 2 * a / 3, 1. / 3},
                                           {1. / 6, b / 6, 1. / 3},
                                           {1. / 6, b / 6, 1. / 3},
                                           {0, 0, 1}};
  static constexpr double kOutput[4][6] = {{1, 1, 1, 1, 1, 0},
                                           {0, a, a, b, b, 0},
                                           {0, 0.5, 0.5, 2, 2, 0},
                                           {0, a / 2, a / 2, 2 * b, 2 * b, 1}};
  const int64_t batch = x.shape()[0], in = x.shape()[1], height = x.shape()[2],
                width = x.shape()[3], out = y[1];
  // |G| |w| |G'| for each pair of channels.
  std::vector<double> kernels(static_cast<size_t>(out * in * 36), 0.0);
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t c = 0; c < in; ++c) {
      double g[9];
      for (int p = 0; p < 9; ++p) {
        int64_t at = turned ? (c * out + o) * 9 + 8 - p : (o * in + c) * 9 + p;
        g[p] = std::abs(w.data<double>()[at]);
      }
      for (int i = 0; i < 6; ++i)
        for (int j = 0; j < 6; ++j)
          for (int p = 0; p < 9; ++p)
            kernels[(o * in + c) * 36 + i * 6 + j] += kWeight[i][p / 3] * kWeight[j][p % 3] * g[p];
    }
  }
  Tensor bound = Tensor::Zeros(y, DType::kF64);
  std::vector<double> patches(static_cast<size_t>(in * 36));
  // The transforms' roundings: up to 4 in a line of an input or a kernel, 6 in one of an output.
  const double factor = kUnit * (2 * std::sqrt(static_cast<double>(in + 28)) + 2);
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t i0 = 0; i0 < y[2]; i0 += 4) {
      for (int64_t j0 = 0; j0 < y[3]; j0 += 4) {
        for (int64_t c = 0; c < in; ++c) {
          double d[36], half[36] = {};
          for (int64_t p = 0; p < 36; ++p) {
            int64_t i = i0 + p / 6 - top, j = j0 + p % 6 - left;
            bool inside = i >= 0 && i < height && j >= 0 && j < width;
            d[p] = inside ? std::abs(x.data<double>()[((n * in + c) * height + i) * width + j]) : 0;
          }
          for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j)
              for (int k = 0; k < 6; ++k) half[i * 6 + j] += kInput[i][k] * d[k * 6 + j];
          for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j) {
              double sum = 0;
              for (int k = 0; k < 6; ++k) sum += half[i * 6 + k] * kInput[j][k];
              patches[c * 36 + i * 6 + j] = sum;
            }
        }
        for (int64_t o = 0; o < out; ++o) {
          double m[36] = {}, half[24] = {};
          for (int64_t c = 0; c < in; ++c)
            for (int p = 0; p < 36; ++p)
              m[p] += patches[c * 36 + p] * kernels[(o * in + c) * 36 + p];
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 6; ++j)
              for (int k = 0; k < 6; ++k) half[i * 6 + j] += kOutput[i][k] * m[k * 6 + j];
          for (int i = 0; i < 4 && i0 + i < y[2]; ++i)
            for (int j = 0; j < 4 && j0 + j < y[3]; ++j) {
              double sum = 0;
              for (int k = 0; k < 6; ++k) sum += half[i * 6 + k] * kOutput[j][k];
              bound.data<double>()[((n * out + o) * y[2] + i0 + i) * y[3] + j0 + j] = factor * sum;
            }
        }
      }
    }
  }
  return bound;
}

class BudgetInterpreter {
 public:
  // `winograd`: 3x3 convolutions of stride 1 may be computed in Winograd's form.
  BudgetInterpreter(const ComputationGraph& graph, bool winograd)
      : graph_(FullyDecomposed(graph)), winograd_(winograd) {}

  // The outputs, then the updates' sources.
  std::vector<Bounded> Run(std::span<const Tensor> inputs) {
    const auto& nodes = graph_.nodes();
    values_.assign(nodes.size(), {});
    largest_ = 0;
    for (size_t i = 0; i < inputs.size(); ++i) values_[graph_.inputs()[i]] = {Leaf(inputs[i])};
    for (size_t i = 0; i < nodes.size(); ++i) {
      const ComputationNode& node = nodes[i];
      if (node.parameter) {
        values_[i] = {Leaf(node.parameter->value())};
      } else if (node.constant.defined()) {
        values_[i] = {Leaf(node.constant)};
      } else if (node.op->kind != OpKind::kLeaf) {
        RunNode(node, values_[i]);
      }
    }
    std::vector<Bounded> results;
    auto add = [&](ValueId id) { results.push_back(values_[id.node][id.output]); };
    for (const GraphOutput& output : graph_.outputs()) add(output.value);
    for (const GraphUpdate& update : graph_.updates()) add(update.source);
    return results;
  }
  // The largest finite magnitude in the last run, sums taken over magnitudes: integers below 2^24
  // are exact in float32 whatever the order of the sums.
  double largest() const { return largest_; }

 private:
  static ComputationGraph FullyDecomposed(const ComputationGraph& graph) {
    ComputationGraph current = Clone(graph);
    auto open = [&] {
      return std::any_of(current.nodes().begin(), current.nodes().end(),
                         [](const ComputationNode& node) { return node.op->decompose != nullptr; });
    };
    while (open()) current = calotype::Decompose(current);
    return current;
  }

  static Bounded Leaf(const Tensor& x) {
    if (x.dtype() != DType::kF32) return {x, {}};
    return {x.To(DType::kF64), Tensor::Zeros(x.shape(), DType::kF64)};
  }

  template <class F>
  static Tensor Map(const Tensor& x, F f) {
    Tensor y(x.shape(), DType::kF64);
    for (int64_t i = 0; i < x.elements(); ++i) y.data<double>()[i] = f(x.data<double>()[i]);
    return y;
  }

  Tensor Reference(const ComputationNode& node, std::span<const Tensor> operands) {
    std::vector<Tensor> outputs;
    for (const TensorType& type : node.types) {
      outputs.emplace_back(type.shape, type.dtype == DType::kF32 ? DType::kF64 : type.dtype);
    }
    Check<InternalError>(node.op->reference != nullptr && outputs.size() == 1,
                         "error budget: no rule for {}", node.op->name);
    node.op->reference({operands, outputs, node.attrs, node.op});
    return outputs[0];
  }

  void Watch(const Tensor& x) {
    for (double v : x.values<double>()) {
      if (std::isfinite(v)) largest_ = std::max(largest_, std::abs(v));
    }
  }

  void RunNode(const ComputationNode& node, std::vector<Bounded>& results) {
    std::vector<Tensor> x, e;
    for (ValueId id : node.inputs) {
      const Bounded& operand = values_[id.node][id.output];
      x.push_back(operand.value);
      e.push_back(operand.error.defined() ? operand.error : operand.value);
    }
    Bounded y{Reference(node, x), {}};
    if (y.value.dtype() != DType::kF64) {
      results = {y};
      return;
    }
    std::string_view name = node.op->name;
    if (node.op->elementwise) {
      y.error = ElementwiseError(node, x, e, y.value);
    } else if (name == "Sum" || name == "MatMul" || name.starts_with("Conv2d") ||
               name == "ScatterAdd") {
      y.error = SumError(node, x, e, y.value);
    } else if (node.op->kind == OpKind::kView || name == "Max" || name == "Gather" ||
               name == "StopGradient") {
      y.error = Reference(node, e);  // |max(x + e) - max(x)| <= max(e)
    } else {
      Check<InternalError>(name == "Cast", "error budget: no rule for {}", name);
      y.error = Tensor::Zeros(y.value.shape(), DType::kF64);
    }
    Watch(y.value);
    results = {y};
  }

  // The operand's element for each element of `shape`.
  static std::vector<int64_t> Positions(const Shape& operand, const Shape& shape) {
    std::vector<int64_t> positions(shape.elements(), 0);
    int64_t stride = 1, repeat = 1;
    for (int d = 1; d <= shape.rank(); ++d) {
      int64_t extent = shape[-d];
      if (d <= operand.rank() && operand[-d] != 1) {
        for (size_t i = 0; i < positions.size(); ++i) {
          positions[i] += static_cast<int64_t>(i) / repeat % extent * stride;
        }
        stride *= extent;
      }
      repeat *= extent;
    }
    return positions;
  }

  static Tensor ElementwiseError(const ComputationNode& node, const std::vector<Tensor>& x,
                                 const std::vector<Tensor>& e, const Tensor& y) {
    const ElementwiseInfo& info = *node.op->elementwise;
    std::vector<std::vector<int64_t>> at;
    for (const Tensor& operand : x) at.push_back(Positions(operand.shape(), y.shape()));
    Tensor error(y.shape(), DType::kF64);
    for (int64_t i = 0; i < y.elements(); ++i) {
      double v[3] = {}, f = y.data<double>()[i];
      for (size_t k = 0; k < x.size(); ++k) v[k] = x[k].data<double>()[at[k][i]];
      // Approximations are budgeted relative to 1 where they may cancel (graph/ops.def).
      double scale = info.error_eps > 2 ? std::max(std::abs(f), 1.0) : std::abs(f);
      double sum = kUnit * info.error_eps * scale;
      int moving = 0;
      for (size_t k = 0; k < x.size(); ++k) {
        double moved = e[k].data<double>()[at[k][i]], middle = v[k];
        if (moved == 0) continue;
        double most = 0;
        for (double there : {middle + moved, middle - moved}) {
          v[k] = there;
          most = std::max(most, std::abs(info.reference(v) - f));
        }
        v[k] = middle;
        sum += most;
        ++moving;
      }
      // Two operands of about zero: both moves at once count.
      for (int corner = 0; moving > 1 && corner < 1 << x.size(); ++corner) {
        double there[3] = {v[0], v[1], v[2]};
        for (size_t k = 0; k < x.size(); ++k) {
          const double moved = e[k].data<double>()[at[k][i]];
          there[k] += corner >> k & 1 ? moved : -moved;
        }
        sum = std::max(sum, std::abs(info.reference(there) - f) + kUnit * info.error_eps * scale);
      }
      error.data<double>()[i] = std::isfinite(f) ? sum : 0;  // the -inf of a mask is exact
    }
    return error;
  }

  // The number of products in each result of a node that sums.
  static double Terms(const ComputationNode& node, const std::vector<Tensor>& x) {
    auto count = [](const Tensor& t) { return static_cast<double>(t.elements()); };
    double results = static_cast<double>(std::max<int64_t>(1, node.types[0].shape.elements()));
    if (node.op->name == "Sum") return count(x[0]) / results;
    if (node.op->name == "ScatterAdd") return static_cast<double>(x[1].elements());
    if (node.op->name == "MatMul") {
      return static_cast<double>(x[0].shape()[node.attrs.Int("transpose_a") ? -2 : -1]);
    }
    const Shape& w = x[1].shape();
    if (node.op->name == "Conv2d") return static_cast<double>(w[1] * w[2] * w[3]);
    return static_cast<double>(w[0] * w[2] * w[3]);
  }

  Tensor SumError(const ComputationNode& node, const std::vector<Tensor>& x,
                  const std::vector<Tensor>& e, const Tensor& y) {
    std::vector<Tensor> size, moved;
    bool exact_operands = true;
    for (size_t k = 0; k < x.size(); ++k) {
      if (x[k].dtype() != DType::kF64) {
        size.push_back(x[k]);
        moved.push_back(x[k]);
        continue;
      }
      size.push_back(Map(x[k], [](double v) { return std::abs(v); }));
      Tensor both = size[k].Clone();
      for (int64_t i = 0; i < both.elements(); ++i) {
        both.data<double>()[i] += e[k].data<double>()[i];
        exact_operands = exact_operands && e[k].data<double>()[i] == 0;
      }
      moved.push_back(both);
    }
    Tensor magnitude = Reference(node, size);
    Watch(magnitude);
    double factor = kUnit * (2 * std::sqrt(Terms(node, x)) + 2);
    Tensor rounding = Map(magnitude, [&](double v) { return factor * v; });
    std::string_view name = node.op->name;
    if (name == "Sum") {
      // Sums of terms that hardly differ repeat the same roundings, which then add up.
      double terms = Terms(node, x);
      Tensor squares = Reference(node, std::vector{Map(x[0], [](double v) { return v * v; })});
      for (int64_t i = 0; i < rounding.elements(); ++i) {
        double square = y.data<double>()[i] * y.data<double>()[i];
        if (squares.data<double>()[i] * terms - square > square / 64) continue;
        rounding.data<double>()[i] = kUnit * (terms + 2) * magnitude.data<double>()[i];
      }
    }
    bool gradient = name == "Conv2dInputGradient";
    if (winograd_ && (name == "Conv2d" || gradient) && node.attrs.Int("stride") == 1 &&
        x[1].shape()[2] == 3 && x[1].shape()[3] == 3) {
      int64_t top = node.attrs.Int("top"), left = node.attrs.Int("left");
      Tensor bound = WinogradBound(x[0], x[1], y.shape(), gradient ? 2 - top : top,
                                   gradient ? 2 - left : left, gradient);
      for (int64_t i = 0; i < rounding.elements(); ++i) {
        double& r = rounding.data<double>()[i];
        r = std::max(r, bound.data<double>()[i] + kUnit * magnitude.data<double>()[i]);
      }
    }
    if (exact_operands) return rounding;
    // (|a| + ea)(|b| + eb) - |a||b|, summed.
    Tensor error = Reference(node, moved);
    for (int64_t i = 0; i < error.elements(); ++i) {
      error.data<double>()[i] += rounding.data<double>()[i] - magnitude.data<double>()[i];
    }
    return error;
  }

  ComputationGraph graph_;
  bool winograd_;
  std::vector<std::vector<Bounded>> values_;
  double largest_ = 0;
};

}  // namespace calotype::region_fuzz
