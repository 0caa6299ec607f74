// Executable: a graph together with what runs it, the interpreter or compiled code. Everything that
// can work on either, from sampling to a whole training step, goes through it.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "graph/graph.h"

namespace calotype {

class Interpreter;
class CompiledGraph;

enum class Backend : uint8_t {
  kEager,  // node by node
  kJit,    // compiled by LLVM
};
std::string_view NameOf(Backend backend);  // "eager", "jit"
// Errors: ValueError for another name.
Backend ParseBackend(std::string_view name);

class Executable {
 public:
  // Takes the graph and compiles it for kJit. Errors: those of Compile.
  Executable(ComputationGraph graph, Backend backend);
  ~Executable();
  Executable(const Executable&) = delete;

  // Inputs and outputs in the order of the graph's; applies its updates. Errors: ShapeError if the
  // inputs do not fit, ValueError for an index out of range.
  std::vector<Tensor> Run(std::span<const Tensor> inputs);

  const ComputationGraph& graph() const { return graph_; }
  double compile_seconds() const { return compile_seconds_; }  // 0 for eager

 private:
  ComputationGraph graph_;
  std::unique_ptr<Interpreter> interpreter_;
  std::unique_ptr<CompiledGraph> compiled_;
  double compile_seconds_ = 0;
};

}  // namespace calotype
