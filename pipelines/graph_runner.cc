#include "pipelines/graph_runner.h"

#include <chrono>

#include "core/error.h"
#include "graph/interpreter.h"
#include "graph/passes.h"
#include "jit/compile.h"

namespace calotype {

std::string_view NameOf(Backend backend) { return backend == Backend::kEager ? "eager" : "jit"; }

Backend ParseBackend(std::string_view name) {
  if (name == "eager") return Backend::kEager;
  Check(name == "jit", "backend `{}` is unknown; there are eager and jit", name);
  return Backend::kJit;
}

GraphRunner::GraphRunner(ComputationGraph graph, Backend backend)
    : GraphRunner(std::move(graph), backend, jit::CompileOptions{}) {}

GraphRunner::GraphRunner(ComputationGraph graph, Backend backend,
                         const jit::CompileOptions& options)
    : graph_(std::move(graph)) {
  if (backend == Backend::kEager) {
    graph_ = Optimize(graph_);
    interpreter_ = std::make_unique<Interpreter>(graph_);
    return;
  }
  auto start = std::chrono::steady_clock::now();
  compiled_ = jit::Compile(graph_, options);
  compile_seconds_ =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

GraphRunner::~GraphRunner() = default;

int64_t GraphRunner::value_bytes() const {
  return compiled_ ? compiled_->Stats().arena_bytes : interpreter_->PeakBytes();
}

std::vector<Tensor> GraphRunner::Run(std::span<const Tensor> inputs) {
  return compiled_ ? compiled_->Run(inputs) : interpreter_->Run(inputs);
}

}  // namespace calotype
