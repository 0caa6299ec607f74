// GraphRunner: a graph together with what runs it, the interpreter or compiled code. Everything
// that can work on either, from sampling to a whole training step, goes through it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "graph/graph.h"

namespace calotype {

class Interpreter;
namespace jit {
class Executable;
struct CompileOptions;
}  // namespace jit

enum class Backend : uint8_t {
  kEager,  // node by node
  kJit,    // compiled by LLVM
};
std::string_view NameOf(Backend backend);  // "eager", "jit"
// Errors: ValueError for another name.
Backend ParseBackend(std::string_view name);

class GraphRunner {
 public:
  // Takes the graph and compiles it for kJit. Errors: those of jit::Compile.
  GraphRunner(ComputationGraph graph, Backend backend);
  // The options have no effect on kEager.
  GraphRunner(ComputationGraph graph, Backend backend, const jit::CompileOptions& options);
  ~GraphRunner();
  GraphRunner(const GraphRunner&) = delete;

  // Inputs and outputs in the order of the graph's; applies its updates. Errors: ShapeError if the
  // inputs do not fit, ValueError for an index out of range.
  std::vector<Tensor> Run(std::span<const Tensor> inputs);

  // The compiled form, with its Stats(); null for kEager.
  const jit::Executable* compiled() const { return compiled_.get(); }
  // Memory of the values between inputs and outputs in one Run, without what eager kernels take for
  // themselves.
  int64_t value_bytes() const;
  double compile_seconds() const { return compile_seconds_; }  // 0 for eager

 private:
  ComputationGraph graph_;
  std::unique_ptr<Interpreter> interpreter_;
  std::unique_ptr<jit::Executable> compiled_;
  double compile_seconds_ = 0;
};

}  // namespace calotype
