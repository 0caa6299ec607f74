// The compiler as a whole: every op and small networks, compiled and eager side by side.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/op.h"
#include "graph/text.h"
#include "jit/compile.h"
#include "jit/lower.h"
#include "tests/op_inputs.h"

namespace calotype::jit {
namespace {

struct Difference {
  bool bits_equal = true;
  double worst = 0;  // largest |x - y| / (largest |y|)
};

Difference Compare(const Tensor& x, const Tensor& y) {
  Difference d;
  d.bits_equal = x.bytes() == 0 || std::memcmp(x.raw(), y.raw(), x.bytes()) == 0;
  if (x.dtype() != DType::kF32) return d;
  double largest = 1e-30, error = 0;
  for (int64_t i = 0; i < x.elements(); ++i) {
    float a = x.data()[i], b = y.data()[i];
    if (std::isnan(a) && std::isnan(b)) continue;
    if (a == b) continue;
    largest = std::max(largest, std::abs(static_cast<double>(b)));
    error = std::max(error, std::abs(static_cast<double>(a) - b));
  }
  for (float b : y.values()) {
    if (std::isfinite(b)) largest = std::max(largest, std::abs(static_cast<double>(b)));
  }
  d.worst = error / largest;
  return d;
}

class OpJitTest : public testing::TestWithParam<const Op*> {};

TEST_P(OpJitTest, CompiledMatchesEager) {
  const Op& op = *GetParam();
  int number = 0;
  for (const OpSample& sample : op.samples()) {
    SCOPED_TRACE(fmt::format("{} sample {}: {} {}", op.name, number, fmt::join(sample.inputs, ", "),
                             sample.attrs.ToString()));
    Random random(99, static_cast<uint64_t>(number++));
    ComputationGraph graph;
    std::vector<Value> inputs;
    for (size_t i = 0; i < sample.inputs.size(); ++i) {
      inputs.push_back(graph.Input(fmt::format("x{}", i), sample.inputs[i]));
    }
    std::vector<Value> outputs = graph.Emit(op, inputs, sample.attrs);
    for (size_t o = 0; o < outputs.size(); ++o) graph.Output(fmt::format("y{}", o), outputs[o]);
    std::vector<Tensor> x = RandomInputs(op, sample, random);
    std::vector<Tensor> eager = Interpreter(graph).Run(x);
    std::unique_ptr<Executable> compiled;
    ASSERT_NO_THROW(compiled = Compile(graph)) << ToText(graph);
    std::vector<Tensor> jit = compiled->Run(x);
    bool exact = op.kind == OpKind::kElementwise || op.kind == OpKind::kView ||
                 op.name == "Gather" || op.name == "Cast" || op.name == "ScatterAdd" ||
                 op.name == "PhiloxUniform" || op.name == "StopGradient" || op.name == "Max";
    for (size_t o = 0; o < eager.size(); ++o) {
      ASSERT_EQ(jit[o].type(), eager[o].type());
      Difference d = Compare(jit[o], eager[o]);
      if (exact) {
        EXPECT_TRUE(d.bits_equal) << "output " << o << " differs by " << d.worst;
      } else {
        EXPECT_LE(d.worst, 2e-5) << "output " << o;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllOps, OpJitTest, testing::ValuesIn(AllOps().begin(), AllOps().end()),
                         [](const auto& info) {
                           std::string name(info.param->name);
                           std::replace(name.begin(), name.end(), '.', '_');
                           return name;
                         });

}  // namespace
}  // namespace calotype::jit
