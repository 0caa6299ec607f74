// Executable: compiled code ready to run. A flat list of kernel calls over one arena, without
// allocation, locking or dispatch per step. Links no compiler.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "core/parameter.h"
#include "core/tensor.h"
#include "jit/runtime/run_profile.h"

namespace calotype::jit {

// What compiling and running have cost so far.
struct ExecutableStats {
  int regions = 0;               // kernels that compute
  int conversions = 0;           // kernels that only change a layout, packing of weights included
  int copies = 0;                // kernels that only move or clear elements otherwise
  int steps = 0;                 // kernel calls in a run
  int prepare_steps = 0;         // kernel calls after a change of parameters
  int derive_steps = 0;          // kernel calls after a change of rare inputs
  int kernels = 0;               // different kernels
  int cache_hits = 0;            // of them those that the compile cache held (jit/cache.h)
  int cache_misses = 0;          // those that it did not; both 0 without a cache
  int cache_unstored = 0;        // those that could not be stored in it
  std::string cache_problem;     // why an entry was refused or not stored, the last one
  int64_t code_bytes = 0;        // of their object files
  int64_t arena_bytes = 0;       // memory of one run
  int64_t max_live_bytes = 0;    // the least that any plan of it can need
  int64_t persistent_bytes = 0;  // packed weights
  int64_t derived_bytes = 0;     // what depends on rare inputs
  int64_t released_bytes = 0;    // of weights that were freed after packing
  int tuned = 0, measured = 0;   // choices made by measuring; those measured just now
  double lower_ms = 0, compile_ms = 0;
  int64_t runs = 0;
  int64_t repacks = 0;      // runs of the prepare steps
  int64_t derivations = 0;  // runs of the derive steps
};

// Compares the results of steps with an interpreter (CALOTYPE_JIT=check).
class StepChecker {
 public:
  enum Part : uint8_t { kPrepare, kDerive, kRun };
  virtual ~StepChecker() = default;
  // Called after each step of a part; `addresses` are those of all buffers. Errors: NumericError.
  virtual void AfterStep(Part part, size_t step, std::span<void* const> addresses) = 0;
};

// What Compile hands over.
struct ExecutableData {
  struct Buffer {
    enum Kind : uint8_t { kArena, kPersistent, kDerived, kInput, kOutput, kFixed } kind = kArena;
    int index = 0;          // of the input or output
    int64_t offset = 0;     // bytes
    void* fixed = nullptr;  // of parameters and constants
  };
  struct Step {
    void (*kernel)(void* const* pointers, int64_t begin, int64_t end) = nullptr;
    int64_t chunks = 1;
    std::vector<int> buffers;
    std::string label;
    std::string kind = {}, shape = {};  // for people
    double flop = 0;                    // of its contractions, a multiply-add counts 2
  };
  // Indices that must lie in [0, limit).
  struct IndexCheck {
    int buffer = 0;
    DType dtype = DType::kI64;
    int64_t offset = 0;
    std::vector<int64_t> extents, strides;
    int64_t limit = 0;
    std::string label;
  };
  std::vector<std::string> input_names, output_names;
  std::vector<TensorType> input_types, output_types;
  std::vector<Buffer> buffers;
  std::vector<Step> prepare, derive, steps;
  // If not empty: for each prepare step the parameters that are freed after it. Packing is then
  // done only once.
  std::vector<std::vector<ParameterPtr>> release;
  // Keeps what the code points to, also if another executable of the same parameters releases it:
  // the values of `parameters`, or nothing with release_weights.
  std::vector<Tensor> storage;
  std::vector<IndexCheck> checks;
  // Parts of the arena, offset and bytes, that are zero before the first run.
  std::vector<std::pair<int64_t, int64_t>> zeros;
  std::vector<ParameterPtr> parameters;  // all that the code reads or writes
  // Read by the prepare steps, of which there are prepare_parameters, then those that only derive
  // steps read.
  std::vector<ParameterPtr> packed;
  size_t prepare_parameters = 0;
  std::vector<int> rare_inputs;       // read by the derive steps
  std::vector<ParameterPtr> updated;  // written by the steps
  std::vector<Tensor> constants;
  std::shared_ptr<void> code;
  ExecutableStats stats;
  std::function<std::unique_ptr<StepChecker>(std::span<const Tensor>)> make_checker;
};

class Executable {
 public:
  explicit Executable(ExecutableData data);
  ~Executable();
  Executable(const Executable&) = delete;

  // Runs the graph: inputs in the order of its inputs, outputs in the order of its outputs. Applies
  // its updates to the parameters, whose versions grow. Weights changed since the last call (see
  // Parameter::Write) are seen. Several threads may call Run at once if the graph has no updates.
  // Errors: ShapeError naming an input that does not fit, ValueError for an index out of range, for
  // a parameter whose tensor has been replaced instead of written to or that other code with
  // release_weights has freed, or for an input that shares memory with a parameter that the graph
  // updates; then nothing has been written.
  std::vector<Tensor> Run(std::span<const Tensor> inputs);
  // As above into existing tensors, which must not overlap inputs, parameters or each other
  // (Errors: ValueError). Allocates nothing unless weights or rare inputs have changed or
  // calls overlap.
  void Run(std::span<const Tensor> inputs, std::span<Tensor> outputs);
  // The same, adding what each step took to `profile`, which only this call may use meanwhile.
  void Run(std::span<const Tensor> inputs, std::span<Tensor> outputs, RunProfile& profile);

  const std::vector<TensorType>& input_types() const { return data_.input_types; }
  const std::vector<TensorType>& output_types() const { return data_.output_types; }
  ExecutableStats Stats() const;
  // The kernel calls of a run, in order.
  std::span<const ExecutableData::Step> steps() const { return data_.steps; }

 private:
  struct Workspace;
  struct Prepared;
  struct Derived;
  struct Places;

  void CheckArguments(std::span<const Tensor> inputs, std::span<Tensor> outputs) const;
  void CheckParameters(std::span<const Tensor> inputs) const;
  void CheckIndices(const Places& places) const;
  std::shared_ptr<Prepared> Prepare();
  std::shared_ptr<Derived> Derive(const Prepared& prepared, std::span<const Tensor> inputs);
  std::unique_ptr<Workspace> NewWorkspace() const;
  static void* Address(const ExecutableData::Buffer& buffer, const Places& places);
  void PrepareAndRelease(const Places& places);
  void RunSteps(std::span<const ExecutableData::Step> steps, const Places& places) const;
  void Execute(const std::vector<ExecutableData::Step>& steps, void* const* pointers);
  void RunOnce(std::span<const Tensor> inputs, std::span<Tensor> outputs, RunProfile* profile);
  void ExecuteWatched(void* const* pointers, StepChecker* checker, std::span<void* const> addresses,
                      RunProfile* profile);

  ExecutableData data_;
  std::vector<const void*> addresses_;  // of the parameters; null for those released
  std::mutex mutex_;                    // guards prepared_, derived_ and free_
  std::shared_ptr<Prepared> prepared_;
  std::shared_ptr<Derived> derived_;
  std::vector<std::unique_ptr<Workspace>> free_;
  std::atomic<int64_t> runs_ = 0, repacks_ = 0, derivations_ = 0;
  bool timing_ = false;
  std::mutex time_mutex_;
  RunProfile times_;  // with CALOTYPE_DEBUG=time, guarded by time_mutex_
};

}  // namespace calotype::jit
