// Every op of the table: types, eager against float64, scalar programs against eager bits,
// gradients against differences in float64, text round trip.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/op.h"
#include "graph/text.h"
#include "tests/op_inputs.h"

namespace calotype {
namespace {

// One op on its inputs as a graph; `cotangents` adds inputs v and the gradients of sum(v * y).
struct OpGraph {
  ComputationGraph graph;
  std::vector<Value> inputs, outputs;
  std::vector<int> differentiable;  // numbers of the f32 inputs

  OpGraph(const Op& op, const OpSample& sample) {
    for (size_t i = 0; i < sample.inputs.size(); ++i) {
      inputs.push_back(graph.Input(fmt::format("x{}", i), sample.inputs[i]));
      if (sample.inputs[i].dtype == DType::kF32) differentiable.push_back(static_cast<int>(i));
    }
    outputs = graph.Emit(op, inputs, sample.attrs);
  }
};

class OpTest : public testing::TestWithParam<const Op*> {
 protected:
  const Op& op() const { return *GetParam(); }
  void ForEachSample(const std::function<void(const OpSample&, Random&)>& body) {
    ASSERT_NE(op().samples, nullptr) << op().name << " has no samples";
    int number = 0;
    for (const OpSample& sample : op().samples()) {
      SCOPED_TRACE(fmt::format("{} sample {}: {} {}", op().name, number,
                               fmt::join(sample.inputs, ", "), sample.attrs.ToString()));
      Random random(1234, static_cast<uint64_t>(number++));
      body(sample, random);
    }
    EXPECT_GT(number, 0);
  }
};

// The error that float32 may make: u (2 sqrt(K) + 2) times the largest result for K terms of which
// each result is made; K is bounded by the number of input elements.
double Tolerance(const Op& op, const std::vector<Tensor>& inputs, double largest) {
  if (op.elementwise) return op.elementwise->error_eps * 0x1p-24 * largest + 1e-44;
  double terms = 1;
  for (const Tensor& x : inputs) terms = std::max(terms, static_cast<double>(x.elements()));
  return (2 * std::sqrt(terms) + 2) * 0x1p-24 * 4 * largest + 1e-30;
}

TEST_P(OpTest, EagerMatchesFloat64) {
  ForEachSample([&](const OpSample& sample, Random& random) {
    OpGraph g(op(), sample);
    for (size_t o = 0; o < g.outputs.size(); ++o)
      g.graph.Output(fmt::format("y{}", o), g.outputs[o]);
    std::vector<Tensor> inputs = RandomInputs(op(), sample, random);
    Interpreter interpreter(g.graph);
    std::vector<Tensor> eager = interpreter.Run(inputs);
    std::vector<Tensor> reference = interpreter.RunReference(inputs);
    for (size_t o = 0; o < eager.size(); ++o) {
      ASSERT_EQ(eager[o].type(), g.outputs[o].type());
      ASSERT_EQ(eager[o].shape(), reference[o].shape());
      double largest = 0;
      for (double y : reference[o].values<double>()) largest = std::max(largest, std::abs(y));
      double tolerance = Tolerance(op(), inputs, largest);
      for (int64_t i = 0; i < eager[o].elements(); ++i) {
        ASSERT_NEAR(eager[o].data()[i], reference[o].data<double>()[i], tolerance)
            << "output " << o << " element " << i;
      }
    }
  });
}

TEST_P(OpTest, TextRoundTrip) {
  ForEachSample([&](const OpSample& sample, Random&) {
    OpGraph g(op(), sample);
    g.graph.Output("y", g.outputs[0]);
    std::string text = ToText(g.graph);
    EXPECT_EQ(ToText(ParseText(text)), text);
  });
}

TEST_P(OpTest, ProgramGivesEagerBits) {
  if (!op().elementwise) {
    EXPECT_NE(op().kind, OpKind::kElementwise);
    return;
  }
  const float kInf = std::numeric_limits<float>::infinity();
  const float special[] = {0.0f,   -0.0f,   1.0f,    -1.0f,  kInf,  -kInf,   NAN,
                           1e-42f, -1e-42f, 1e38f,   -1e38f, 88.8f, -103.5f, 0.5f,
                           1.5f,   1e-10f,  12345.f, -0.7f,  2.0f,  0.625f};
  const int count = std::size(special), arity = op().min_arity;
  int64_t total = 1;
  for (int k = 0; k < arity; ++k) total *= count;
  Random random(5);
  const int64_t n = total + 1000;
  std::vector<Tensor> inputs;
  for (int k = 0, step = 1; k < arity; ++k, step *= count) {
    Tensor x = random.UniformTensor({n}, -30, 30);
    for (int64_t i = 0; i < total; ++i) x.data()[i] = special[i / step % count];
    inputs.push_back(x);
  }
  OpSample sample{std::vector<TensorType>(arity, {DType::kF32, Shape{n}}), {}};
  OpGraph g(op(), sample);
  g.graph.Output("y", g.outputs[0]);
  Tensor y = Interpreter(g.graph).Run(inputs)[0];
  for (int64_t i = 0; i < n; ++i) {
    float operands[3] = {}, expected = 0;
    for (int k = 0; k < arity; ++k) operands[k] = inputs[k].data()[i];
    op().elementwise->program.Evaluate(operands, &expected);
    float actual = y.data()[i];
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(actual)) << fmt::format("{}", fmt::join(operands, " "));
    } else {
      ASSERT_EQ(std::memcmp(&expected, &actual, 4), 0)
          << fmt::format("{}: {} against {}", fmt::join(operands, " "), expected, actual);
    }
  }
}

// d/dx of sum(v * y) by Gradients, in float64, against central differences along single elements.
TEST_P(OpTest, GradientMatchesDifferences) {
  if (op().gradient == nullptr) {
    // Only derivative ops and gradient ops may lack one.
    bool derived =
        op().name.find(".d") != std::string_view::npos || op().name.ends_with("Gradient");
    EXPECT_TRUE(derived || op().name == "PhiloxUniform") << op().name;
    return;
  }
  int checked = 0;
  ForEachSample([&](const OpSample& sample, Random& random) {
    OpGraph g(op(), sample);
    if (g.differentiable.empty()) return;
    std::vector<Tensor> values = RandomInputs(op(), sample, random);
    std::vector<Value> cotangents, wrt;
    Value loss;
    for (size_t o = 0; o < g.outputs.size(); ++o) {
      Tensor v = random.UniformTensor(g.outputs[o].shape(), -1, 1);
      values.push_back(v);
      Value cotangent = g.graph.Input(fmt::format("v{}", o), v.type());
      cotangents.push_back(cotangent);
      Value term = Sum(cotangent * g.outputs[o]);
      loss = loss.defined() ? loss + term : term;
    }
    for (int i : g.differentiable) wrt.push_back(g.inputs[i]);
    std::vector<Value> gradients = Gradients(g.outputs, cotangents, wrt);
    g.graph.Output("loss", loss);
    for (size_t i = 0; i < wrt.size(); ++i) g.graph.Output(fmt::format("d{}", i), gradients[i]);
    Verify(g.graph);

    for (Tensor& value : values) {
      if (value.dtype() == DType::kF32) value = value.To(DType::kF64);
    }
    Interpreter interpreter(g.graph);
    std::vector<Tensor> results = interpreter.RunReference(values);
    ComputationGraph forward;  // the loss alone, for the differences
    {
      std::vector<Value> inputs;
      for (size_t i = 0; i < sample.inputs.size(); ++i) {
        inputs.push_back(forward.Input(fmt::format("x{}", i), sample.inputs[i]));
      }
      std::vector<Value> outputs = forward.Emit(op(), inputs, sample.attrs);
      Value sum;
      for (size_t o = 0; o < outputs.size(); ++o) {
        Value term = Sum(forward.Input(fmt::format("v{}", o), outputs[o].type()) * outputs[o]);
        sum = sum.defined() ? sum + term : term;
      }
      forward.Output("loss", sum);
    }
    Interpreter evaluate(forward);
    for (size_t i = 0; i < wrt.size(); ++i) {
      Tensor& x = values[g.differentiable[i]];
      const Tensor& dx = results[1 + i];
      ASSERT_EQ(dx.shape(), x.shape());
      if (x.elements() == 0) continue;
      if (op().name == "StopGradient") {
        EXPECT_THAT(dx.values<double>(), testing::Each(0.0));
        ++checked;
        continue;
      }
      double largest = 0;
      for (double d : dx.values<double>()) largest = std::max(largest, std::abs(d));
      const int64_t picks = std::min<int64_t>(x.elements(), x.elements() > 2000 ? 3 : 8);
      for (int64_t pick = 0; pick < picks; ++pick) {
        int64_t e = picks == x.elements() ? pick : random.Integer(x.elements());
        double& element = x.data<double>()[e];
        const double start = element, h = 6.06e-6 * std::max(1.0, std::abs(start));
        element = start + h;
        double up = evaluate.RunReference(values)[0].Item();
        element = start - h;
        double down = evaluate.RunReference(values)[0].Item();
        element = start;
        double numeric = (up - down) / (2 * h), analytic = dx.data<double>()[e];
        // The loss is a sum of many terms, whose rounding the difference sees divided by h.
        double rounding = 1e-15 * (std::abs(up) + static_cast<double>(x.elements())) / h;
        ASSERT_NEAR(numeric, analytic, 1e-6 * (std::abs(analytic) + 1e-3 * largest) + rounding)
            << "input " << g.differentiable[i] << " element " << e;
        ++checked;
      }
    }
  });
  bool has_f32 = false;
  for (const OpSample& sample : op().samples()) {
    for (const TensorType& type : sample.inputs) has_f32 |= type.dtype == DType::kF32;
  }
  EXPECT_EQ(has_f32, checked > 0);
}

INSTANTIATE_TEST_SUITE_P(All, OpTest, testing::ValuesIn(AllOps().begin(), AllOps().end()),
                         [](const testing::TestParamInfo<const Op*>& info) {
                           std::string name(info.param->name);
                           for (char& c : name) {
                             if (c == '.') c = '_';
                           }
                           return name;
                         });

TEST(OpErrors, NameTheOpAndTheShapes) {
  ComputationGraph graph;
  Value a = graph.Input("a", Shape{2, 3}), b = graph.Input("b", Shape{4, 3});
  auto expect = [](auto f, std::vector<std::string> words) {
    try {
      f();
      FAIL() << "no error";
    } catch (const ShapeError& error) {
      for (const std::string& word : words) {
        EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
      }
    }
  };
  expect([&] { Add(a, b); }, {"Add", "[2, 3]", "[4, 3]"});
  expect([&] { Reshape(a, {5}); }, {"Reshape", "[2, 3]", "[5]"});
  expect([&] { Concat({a, graph.Input("c", Shape{2, 3, 1})}, 0); }, {"Concat", "[2, 3, 1]"});
  expect([&] { Slice(a, 1, 2, 2); }, {"Slice", "[2, 4)", "[2, 3]"});
  expect([&] { Permute(a, {0, 0}); }, {"Permute", "[0, 0]"});
  expect([&] { Broadcast(a, {3, 3}); }, {"Broadcast", "[2, 3]", "[3, 3]"});
  {
    ComputationGraph::Label outer(graph, "down_blocks.0"), inner(graph, "conv1");
    expect([&] { Add(a, b); }, {"down_blocks.0.conv1"});
  }
}

TEST(OpErrors, GatherChecksIndices) {
  ComputationGraph graph;
  Value data = graph.Input("x", Shape{3, 2});
  graph.Output("y", Gather(data, graph.Input("i", {DType::kI64, Shape{2}})));
  Tensor x = Tensor::Zeros({3, 2});
  EXPECT_NO_THROW(
      Interpreter(graph).Run(std::vector<Tensor>{x, Tensor::From<int64_t>({2}, {0, 2})}));
  EXPECT_THROW(Interpreter(graph).Run(std::vector<Tensor>{x, Tensor::From<int64_t>({2}, {0, 3})}),
               ValueError);
  EXPECT_THROW(Interpreter(graph).Run(std::vector<Tensor>{x, Tensor::From<int64_t>({2}, {-1, 0})}),
               ValueError);
}

}  // namespace
}  // namespace calotype
