// Compile: from a graph to machine code. Every node of the graph is compiled; one that cannot be is
// an error that names it, never a silent return to the interpreter.
//
// CALOTYPE_JIT=check runs the interpreter beside the compiled code and stops at the first step
// whose result differs (NumericError naming it); CALOTYPE_JIT=off makes JitEnabled() false and
// Compile an error. CALOTYPE_DEBUG=fuse prints the regions, CALOTYPE_DEBUG=time the time of each
// step.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "graph/graph.h"
#include "jit/runtime/executable.h"

namespace calotype::jit {

struct LoweredProgram;

enum class Winograd : uint8_t { kAuto, kOff };
// Errors: ValueError for a name other than auto and off.
Winograd ParseWinograd(std::string_view name);

struct CompileOptions {
  bool fuse = true;  // false: every elementwise node is a kernel of its own (to bisect)
  // kAuto: 3x3 convolutions are computed by Winograd's F(4x4, 3x3) or F(2x2, 3x3) where that pays:
  // two to three times as fast, with up to twice the rounding error of the direct sum. Their
  // transformed kernels, 4 or 1.8 times as large as the kernels, stay within winograd_bytes
  // altogether; with release_weights they take the place of the kernels.
  Winograd winograd = Winograd::kAuto;
  int64_t winograd_bytes = int64_t{4} << 30;
  // Measures on this machine which algorithm and which order of the tiles is fastest for each
  // convolution and product, instead of estimating it. Each shape is run a few times in each
  // variant: seconds for a small U-Net, minutes for large pictures. What has been measured is kept
  // in the compile cache.
  bool tune = false;
  // Frees the weights that have been packed, so that they are not in memory twice. The graph's
  // layers lose them: to compile again, or to run eagerly, make the model again. What was compiled
  // without this keeps its own. Errors: UnsupportedError for a graph that updates parameters.
  bool release_weights = false;
  // The most that the values of one run and the packed weights may take, beside the parameters,
  // inputs and outputs, which are the caller's. 0: the memory of the machine.
  int64_t memory_bytes = 0;
  bool check = false;  // as CALOTYPE_JIT=check
  // Names of inputs that keep their value over many calls, such as a prompt's context over the
  // steps of sampling. What depends on them and on parameters alone is computed when their bytes
  // have changed, and kept; results are those of a graph compiled without. Errors: ValueError for
  // a name that is no input.
  std::vector<std::string> rare_inputs;
};

// False with CALOTYPE_JIT=off. Errors: ValueError for an unknown value of the variable.
bool JitEnabled();
// True under CALOTYPE_JIT=check.
bool CheckRequested();

// Compiles `graph` for the host. The result keeps the graph's parameters alive and needs neither
// the graph nor its layers. Errors: UnsupportedError naming op, label and shapes of a node that
// cannot be compiled; OutOfMemoryError naming the bytes needed if they are over the budget, before
// anything is compiled; FileError if the folder of the compile cache cannot be used (jit/cache.h);
// InternalError.
std::unique_ptr<Executable> Compile(const ComputationGraph& graph,
                                    const CompileOptions& options = {});

// The last part of Compile, for the tuner: from the lowered graph to machine code.
// `count` may add to the statistics.
std::unique_ptr<Executable> CompileProgram(
    std::shared_ptr<LoweredProgram> program, const CompileOptions& options,
    const std::function<void(ExecutableStats&)>& count = nullptr);

// A function that is compiled for each set of input types it is called with. Keeps the most
// recently used `capacity` specialisations.
class CompiledFunction {
 public:
  // Builds the graph for inputs of these types; errors (a wrong rank or channel count) pass
  // through.
  using Build = std::function<ComputationGraph(std::span<const TensorType> inputs)>;
  struct Stats {
    int64_t compiled = 0;  // specialisations so far
    int64_t evicted = 0;
    int64_t alive = 0;
  };

  explicit CompiledFunction(Build build, const CompileOptions& options = {}, size_t capacity = 16);

  std::vector<Tensor> Run(std::span<const Tensor> inputs) { return For(inputs)->Run(inputs); }
  // The specialisation for inputs like these.
  std::shared_ptr<Executable> For(std::span<const Tensor> inputs);
  Stats stats() const;

 private:
  struct Entry {
    std::vector<TensorType> types;
    std::shared_ptr<Executable> executable;
  };
  Build build_;
  CompileOptions options_;
  size_t capacity_;
  mutable std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
  int64_t compiled_ = 0, evicted_ = 0;
};

}  // namespace calotype::jit
