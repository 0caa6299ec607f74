// Random graphs: compiled code against eager execution and the float64 reference.
//   random_graph_test [--seed N] [--count N] [--gradients N]
// runs `count` graphs from seed N on, the last `gradients` of them with gradients.
//
// A graph of elementwise ops and views must give the same bits compiled and eager. For others the
// root mean square error against float64 may be at most twice (three times for results of fewer
// than 1,000 elements) that of eager execution or of float64 runs in which every node is disturbed
// by as much as float32 may disturb it (a running error bound, by sampling), whichever is larger.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>

#include "graph/interpreter.h"
#include "graph/passes.h"
#include "graph/text.h"
#include "jit/compile.h"
#include "tests/random_graph.h"

namespace calotype {
namespace {

int64_t g_seed = 1, g_count = 2000, g_gradients = 500;

constexpr double kUnit = 0x1p-24;

struct Size {
  double root_mean_square = 0, largest = 0;
  bool finite = true;
  double zeros = 0;  // share of elements
};

Size SizeOf(const Tensor& x) {
  Size size;
  if (x.elements() == 0) return size;
  for (double v : x.values<double>()) {
    size.finite = size.finite && std::isfinite(v);
    size.root_mean_square += v * v;
    size.largest = std::max(size.largest, std::abs(v));
    size.zeros += v == 0;
  }
  size.root_mean_square = std::sqrt(size.root_mean_square / static_cast<double>(x.elements()));
  size.zeros /= static_cast<double>(x.elements());
  return size;
}

double RootMeanSquareError(const Tensor& x, const Tensor& reference) {
  Tensor wide = x.dtype() == DType::kF64 ? x : x.To(DType::kF64);
  double sum = 0;
  for (int64_t i = 0; i < x.elements(); ++i) {
    double d = wide.data<double>()[i] - reference.data<double>()[i];
    sum += d * d;
  }
  return std::sqrt(sum / static_cast<double>(std::max<int64_t>(1, x.elements())));
}

Tensor Absolute(const Tensor& x) {
  if (x.dtype() != DType::kF64) return x;
  Tensor y = x.Clone();
  for (double& v : y.values<double>()) v = std::abs(v);
  return y;
}

// The number of products in each result of a node that sums.
double Terms(const ComputationNode& node, const std::vector<Tensor>& operands) {
  auto size = [](const Tensor& x) { return static_cast<double>(x.elements()); };
  double results = static_cast<double>(std::max<int64_t>(1, node.types[0].shape.elements()));
  if (node.op->kind == OpKind::kReduce) return size(operands[0]) / results;
  if (node.op->name == "MatMul") {
    return static_cast<double>(operands[0].shape()[node.attrs.Int("transpose_a") ? -2 : -1]);
  }
  const Shape& w = operands[1].shape();
  if (node.op->name == "Conv2d") return static_cast<double>(w[1] * w[2] * w[3]);
  if (node.op->name == "Conv2dInputGradient") return static_cast<double>(w[0] * w[2] * w[3]);
  return static_cast<double>(w[0] * w[2] * w[3]);  // weight gradient: batch and pixels of dy
}

// All outputs in float64 with every node's result disturbed at random within what float32 allows.
std::vector<Tensor> Disturbed(const ComputationGraph& graph, std::span<const Tensor> inputs,
                              Random& random) {
  const auto& nodes = graph.nodes();
  std::vector<std::vector<Tensor>> values(nodes.size());
  auto wide = [](const Tensor& x) { return x.dtype() == DType::kF32 ? x.To(DType::kF64) : x; };
  for (size_t i = 0; i < inputs.size(); ++i) values[graph.inputs()[i]] = {wide(inputs[i])};
  for (size_t i = 0; i < nodes.size(); ++i) {
    const ComputationNode& node = nodes[i];
    if (node.op->kind == OpKind::kLeaf) {
      if (node.parameter) values[i] = {wide(node.parameter->value())};
      if (node.constant.defined()) values[i] = {wide(node.constant)};
      continue;
    }
    std::vector<Tensor> operands, absolute;
    for (ValueId id : node.inputs) {
      operands.push_back(values[id.node][id.output]);
      absolute.push_back(Absolute(operands.back()));
    }
    std::vector<Tensor> bounds;
    for (const TensorType& type : node.types) {
      DType dtype = type.dtype == DType::kF32 ? DType::kF64 : type.dtype;
      values[i].emplace_back(type.shape, dtype);
      bounds.emplace_back(type.shape, dtype);
    }
    node.op->reference({operands, values[i], node.attrs, node.op});
    std::string_view name = node.op->name;
    bool sums =
        name == "Sum" || name == "MatMul" || name.starts_with("Conv2d") || name == "ScatterAdd";
    if (sums) {
      node.op->reference({absolute, bounds, node.attrs, node.op});
      double factor = 4;
      if (name != "ScatterAdd") factor = 2 * std::sqrt(Terms(node, operands)) + 2;
      for (int64_t e = 0; e < values[i][0].elements(); ++e) {
        double noise = 2 * static_cast<double>(random.Uniform()) - 1;
        values[i][0].data<double>()[e] += noise * kUnit * factor * bounds[0].data<double>()[e];
      }
    } else if (node.op->kind == OpKind::kElementwise) {
      double factor = std::max(1.0, node.op->elementwise->error_eps);
      for (double& v : values[i][0].values<double>()) {
        if (!std::isfinite(v)) continue;  // the -inf of a causal mask
        v += (2 * static_cast<double>(random.Uniform()) - 1) * kUnit * factor * std::abs(v);
      }
    }
  }
  std::vector<Tensor> outputs;
  for (const GraphOutput& output : graph.outputs()) {
    outputs.push_back(values[output.value.node][output.value.output]);
  }
  return outputs;
}

ComputationGraph FullyDecomposed(const ComputationGraph& graph) {
  ComputationGraph current = Clone(graph);
  auto open = [&] {
    return std::any_of(current.nodes().begin(), current.nodes().end(),
                       [](const ComputationNode& node) { return node.op->decompose != nullptr; });
  };
  while (open()) current = Decompose(current);
  return current;
}

struct Totals {
  int exact = 0, bounded = 0, unusable = 0, nodes = 0, steps = 0;
  double worst = 0, compile_ms = 0, run_ms = 0;
};

double Milliseconds() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// False if the graph leaves the range of sensible numbers and another is to be drawn.
bool RunOne(uint64_t seed, bool gradients, Totals& totals) {
  RandomGraph g = RandomGraphBuilder(seed, gradients).Build();
  auto describe = [&] {
    return fmt::format("seed {}{}\n{}", seed, gradients ? " with gradients" : "",
                       ToText(g.graph, 16));
  };
  Interpreter interpreter(g.graph);
  std::vector<Tensor> reference = interpreter.RunReference(g.inputs);
  for (const Tensor& y : reference) {
    Size size = SizeOf(y);
    if (!size.finite || size.largest > 1e6) return false;
  }
  if (SizeOf(reference[0]).zeros > 0.3) return false;

  std::vector<Tensor> eager = interpreter.Run(g.inputs);
  std::vector<Tensor> compiled;
  try {
    double start = Milliseconds();
    auto executable = jit::Compile(g.graph);
    totals.compile_ms += Milliseconds() - start;
    totals.steps += executable->Stats().steps;
    compiled = executable->Run(g.inputs);
  } catch (const Error& error) {
    ADD_FAILURE() << error.what() << "\n" << describe();
    return true;
  }
  totals.nodes += static_cast<int>(g.graph.nodes().size());

  if (g.exact) {
    ++totals.exact;
    for (size_t o = 0; o < eager.size(); ++o) {
      if (eager[o].bytes() == 0) continue;
      EXPECT_EQ(std::memcmp(eager[o].raw(), compiled[o].raw(), eager[o].bytes()), 0)
          << "output " << o << " has other bits than eager\n"
          << describe();
    }
    return true;
  }
  ++totals.bounded;
  ComputationGraph parts = FullyDecomposed(g.graph);
  Random random(seed, "disturbance");
  std::vector<double> allowed(eager.size(), 0);
  // A result of few elements says little about its error's size; more trials make up for it.
  int64_t fewest = INT64_MAX;
  for (const Tensor& y : eager) fewest = std::min(fewest, y.elements());
  const int64_t trials = std::clamp<int64_t>(200 / std::max<int64_t>(1, fewest), 3, 12);
  for (int64_t trial = 0; trial < trials; ++trial) {
    std::vector<Tensor> disturbed = Disturbed(parts, g.inputs, random);
    for (size_t o = 0; o < eager.size(); ++o) {
      double error = RootMeanSquareError(disturbed[o], reference[o]);
      EXPECT_TRUE(std::isfinite(error)) << "no error bound\n" << describe();
      allowed[o] = std::max(allowed[o], error);
    }
  }
  for (size_t o = 0; o < eager.size(); ++o) {
    double own = RootMeanSquareError(compiled[o], reference[o]);
    double factor = eager[o].elements() < 1000 ? 3 : 2;
    double bound = factor * std::max(allowed[o], RootMeanSquareError(eager[o], reference[o])) +
                   kUnit * SizeOf(reference[o]).root_mean_square + 1e-37;
    totals.worst = std::max(totals.worst, own / bound);
    EXPECT_LE(own, bound) << "output " << o << ": error " << own << ", eager has "
                          << RootMeanSquareError(eager[o], reference[o]) << ", allowed " << bound
                          << " at size " << SizeOf(reference[o]).root_mean_square << "\n"
                          << describe();
  }
  return true;
}

TEST(RandomGraph, CompiledEagerAndFloat64Agree) {
  Totals totals;
  constexpr int kMostFailures = 10;
  for (int64_t i = 0; i < g_count; ++i) {
    bool gradients = i >= g_count - g_gradients;
    bool done = false;
    for (int64_t attempt = 0; attempt < 20 && !done; ++attempt) {
      done = RunOne(static_cast<uint64_t>(g_seed + i + attempt * 1000000), gradients, totals);
      totals.unusable += !done;
    }
    EXPECT_TRUE(done) << "seed " << g_seed + i << ": no usable graph in 20 attempts";
    auto* result = testing::UnitTest::GetInstance()->current_test_info()->result();
    if (result->total_part_count() > kMostFailures) break;
  }
  std::printf(
      "%d graphs by bits, %d by error bound (worst error / bound %.3f), %d drawn again; "
      "%.1f nodes and %.1f kernels a graph, %.1f ms compile\n",
      totals.exact, totals.bounded, totals.worst, totals.unusable,
      static_cast<double>(totals.nodes) / (totals.exact + totals.bounded),
      static_cast<double>(totals.steps) / (totals.exact + totals.bounded),
      totals.compile_ms / (totals.exact + totals.bounded));
}

}  // namespace
}  // namespace calotype

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string name = argv[i];
    int64_t value = std::atoll(argv[i + 1]);
    if (name == "--seed") {
      calotype::g_seed = value;
    } else if (name == "--count") {
      calotype::g_count = value;
    } else if (name == "--gradients") {
      calotype::g_gradients = value;
    } else {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      return 2;
    }
  }
  calotype::g_gradients = std::min(calotype::g_gradients, calotype::g_count);
  return RUN_ALL_TESTS();
}
