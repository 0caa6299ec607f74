#include "pipelines/executable.h"

#include "core/error.h"
#include "graph/interpreter.h"

namespace calotype {

class CompiledGraph {};

std::string_view NameOf(Backend backend) { return backend == Backend::kEager ? "eager" : "jit"; }

Backend ParseBackend(std::string_view name) {
  if (name == "eager") return Backend::kEager;
  Check(name == "jit", "backend `{}` is unknown; there are eager and jit", name);
  return Backend::kJit;
}

Executable::Executable(ComputationGraph graph, Backend backend) : graph_(std::move(graph)) {
  if (backend == Backend::kEager) {
    interpreter_ = std::make_unique<Interpreter>(graph_);
  } else {
    Fail<UnsupportedError>("the code generator is not linked yet");
  }
}

Executable::~Executable() = default;

std::vector<Tensor> Executable::Run(std::span<const Tensor> inputs) {
  return interpreter_->Run(inputs);
}

}  // namespace calotype
