#include "jit/compile_check.h"

#include <cmath>

#include "graph/op.h"

namespace calotype::jit {

namespace {

// All values of the graph, eagerly, without applying its updates.
std::vector<std::vector<Tensor>> Interpret(const ComputationGraph& graph,
                                           std::span<const Tensor> inputs) {
  const auto& nodes = graph.nodes();
  std::vector<std::vector<Tensor>> values(nodes.size());
  for (size_t i = 0; i < inputs.size(); ++i) values[graph.inputs()[i]] = {inputs[i]};
  for (size_t i = 0; i < nodes.size(); ++i) {
    const ComputationNode& node = nodes[i];
    if (node.op == &kInputOp) continue;
    if (node.parameter) {
      values[i] = {node.parameter->value().Clone()};
    } else if (node.constant.defined()) {
      values[i] = {node.constant};
    } else {
      std::vector<Tensor> operands;
      for (ValueId id : node.inputs) operands.push_back(values[id.node][id.output]);
      if (node.op->shares_storage) {
        values[i] = {operands[0].Reshape(node.types[0].shape)};
        continue;
      }
      for (const TensorType& type : node.types) values[i].emplace_back(type);
      node.op->run({operands, values[i], node.attrs, node.op});
    }
  }
  return values;
}

class Checker : public StepChecker {
 public:
  Checker(std::shared_ptr<const LoweredProgram> program, std::span<const Tensor> inputs)
      : program_(std::move(program)), values_(Interpret(program_->graph, inputs)) {}

  void AfterStep(Part part, size_t step, std::span<void* const> addresses) override {
    const Step& s = (part == kPrepare  ? program_->prepare
                     : part == kDerive ? program_->derive
                                       : program_->steps)[step];
    for (const auto& [value, view] : s.results) {
      const Tensor& expected = values_[value.node][value.output];
      if (expected.dtype() != DType::kF32) continue;
      Compare(s, value, view, expected, static_cast<const float*>(addresses[view.buffer]));
    }
  }

 private:
  void Compare(const Step& step, ValueId value, const View& view, const Tensor& expected,
               const float* memory) const {
    // Pieces of all axes, outermost first: a row-major walk of the value.
    std::vector<Piece> pieces;
    for (const Axis& axis : view.axes) pieces.insert(pieces.end(), axis.begin(), axis.end());
    double largest = 0;
    for (float x : expected.values()) {
      if (std::isfinite(x)) largest = std::max(largest, std::abs(static_cast<double>(x)));
    }
    const double tolerance = 1e-3 * largest + 1e-30;
    std::vector<int64_t> index(pieces.size(), 0);
    for (int64_t i = 0; i < expected.elements(); ++i) {
      int64_t at = view.offset;
      for (size_t d = 0; d < pieces.size(); ++d) at += index[d] * pieces[d].stride;
      float is = memory[at], should = expected.data()[i];
      bool same = is == should || (std::isnan(is) && std::isnan(should)) ||
                  std::abs(static_cast<double>(is) - should) <= tolerance;
      Check<NumericError>(
          same,
          "CALOTYPE_JIT=check: step \"{}\" computes node {} ({} {}) differently: element {} "
          "is {}, the interpreter says {}",
          step.label, value.node, program_->graph.node(value.node).op->name,
          program_->graph.type(value), i, is, should);
      for (size_t d = pieces.size(); d-- > 0;) {
        if (++index[d] < pieces[d].extent) break;
        index[d] = 0;
      }
    }
  }

  std::shared_ptr<const LoweredProgram> program_;
  std::vector<std::vector<Tensor>> values_;
};

}  // namespace

std::function<std::unique_ptr<StepChecker>(std::span<const Tensor>)> MakeChecker(
    std::shared_ptr<const LoweredProgram> program) {
  return [program](std::span<const Tensor> inputs) -> std::unique_ptr<StepChecker> {
    return std::make_unique<Checker>(program, inputs);
  };
}

}  // namespace calotype::jit
