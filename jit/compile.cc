#include "jit/compile.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>
#include <set>
#include <string_view>

#include "core/debug.h"
#include "graph/passes.h"
#include "jit/compile_check.h"
#include "jit/kernel.h"
#include "jit/kernel_info.h"
#include "jit/orc.h"
#include "jit/plan.h"
#include "jit/tune.h"

namespace calotype::jit {

namespace {

enum class Mode { kOn, kOff, kCheck };

Mode EnvironmentMode() {
  const char* text = std::getenv("CALOTYPE_JIT");
  std::string_view mode = text ? text : "";
  if (mode.empty() || mode == "on") return Mode::kOn;
  if (mode == "off") return Mode::kOff;
  Check(mode == "check", "CALOTYPE_JIT is \"{}\"; it must be on, off or check", mode);
  return Mode::kCheck;
}

double MillisecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

ExecutableData::Buffer Convert(const Buffer& buffer, const LoweredProgram& program) {
  using To = ExecutableData::Buffer;
  To to;
  to.index = buffer.index;
  to.offset = buffer.offset;
  switch (buffer.storage) {
    case Storage::kArena:
      to.kind = To::kArena;
      break;
    case Storage::kPersistent:
      to.kind = To::kPersistent;
      break;
    case Storage::kDerived:
      to.kind = To::kDerived;
      break;
    case Storage::kInput:
      to.kind = To::kInput;
      break;
    case Storage::kOutput:
      to.kind = To::kOutput;
      break;
    case Storage::kParameter:
      to.kind = To::kFixed;
      to.fixed = const_cast<void*>(program.parameters[buffer.index]->value().raw());
      break;
    case Storage::kConstant:
      to.kind = To::kFixed;
      to.fixed = const_cast<void*>(program.constants[buffer.index].raw());
      break;
  }
  return to;
}

ExecutableData::IndexCheck Convert(const IndexCheck& check) {
  ExecutableData::IndexCheck to{.buffer = check.view.buffer,
                                .dtype = check.view.dtype,
                                .offset = check.view.offset,
                                .extents = {},
                                .strides = {},
                                .limit = check.limit,
                                .label = check.label};
  for (const Axis& axis : check.view.axes) {
    for (const Piece& piece : axis) {
      if (piece.stride == 0) continue;
      to.extents.push_back(piece.extent);
      to.strides.push_back(piece.stride);
    }
  }
  Check<UnsupportedError>(to.extents.size() <= 2 * Shape::kMaxRank,
                          "{}: indices have {} dimensions", check.label, to.extents.size());
  return to;
}

int64_t MachineBytes() {
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
}

void CheckBudget(const MemoryPlan& plan, int64_t budget) {
  Check(budget >= 0, "compile: a memory budget of {} bytes", budget);
  const int64_t needed =
      CheckedAdd(CheckedAdd(plan.arena_bytes, plan.persistent_bytes, "memory plan"),
                 plan.derived_bytes, "memory plan");
  const char* whose = budget == 0 ? "the machine has" : "the budget is";
  if (budget == 0) budget = MachineBytes();
  Check<OutOfMemoryError>(
      needed <= budget,
      "compile: {} bytes of memory are needed ({} for the values of a run, {} for packed weights), "
      "{} {} bytes; give more, a smaller batch or picture, or winograd = off",
      needed, plan.arena_bytes, plan.persistent_bytes + plan.derived_bytes, whose, budget);
}

// For each prepare step the parameters that no later step reads.
std::vector<std::vector<ParameterPtr>> Releases(const LoweredProgram& program,
                                                const ExecutableData& data) {
  std::map<int, size_t> last;  // number of the parameter -> prepare step
  std::set<int> read;          // in every run
  auto over = [&](const std::vector<Step>& steps, auto f) {
    for (size_t s = 0; s < steps.size(); ++s) {
      for (int b : steps[s].buffers) {
        if (program.buffers[b].storage == Storage::kParameter) f(program.buffers[b].index, s);
      }
    }
  };
  over(program.prepare, [&](int parameter, size_t s) { last[parameter] = s; });
  over(program.derive, [&](int parameter, size_t) { read.insert(parameter); });
  over(program.steps, [&](int parameter, size_t) { read.insert(parameter); });
  for (const IndexCheck& index : program.checks) {
    const Buffer& buffer = program.buffers[index.view.buffer];
    if (buffer.storage == Storage::kParameter) read.insert(buffer.index);
  }
  std::vector<std::vector<ParameterPtr>> release(program.prepare.size());
  for (auto [parameter, step] : last) {
    if (!read.count(parameter)) release[step].push_back(data.parameters[parameter]);
  }
  bool none = std::all_of(release.begin(), release.end(), [](const auto& l) { return l.empty(); });
  if (none) release.clear();
  return release;
}

}  // namespace

Winograd ParseWinograd(std::string_view name) {
  if (name == "auto") return Winograd::kAuto;
  Check(name == "off", "winograd is `{}`; it must be auto or off", name);
  return Winograd::kOff;
}

bool JitEnabled() { return EnvironmentMode() != Mode::kOff; }
bool CheckRequested() { return EnvironmentMode() == Mode::kCheck; }

std::unique_ptr<Executable> Compile(const ComputationGraph& graph, const CompileOptions& options) {
  Mode mode = EnvironmentMode();
  Check<UnsupportedError>(mode != Mode::kOff, "compile: CALOTYPE_JIT=off forbids it; run eagerly");
  Check<UnsupportedError>(!options.release_weights || graph.updates().empty(),
                          "compile: the graph updates {} parameters, so none can be released",
                          graph.updates().size());
  CompileOptions chosen = options;
  chosen.check |= mode == Mode::kCheck;
  Check<UnsupportedError>(!chosen.check || !options.release_weights,
                          "compile: checking reads the weights, so they cannot be released");
  auto start = std::chrono::steady_clock::now();
  std::unique_ptr<Tuner> tuner;
  if (options.tune) tuner = std::make_unique<Tuner>();
  auto program = std::make_shared<LoweredProgram>(Lower(
      graph, {.fuse = options.fuse && PassEnabled("fuse"),
              .tuner = tuner.get(),
              .winograd_bytes = options.winograd == Winograd::kOff ? 0 : options.winograd_bytes,
              .rare_inputs = options.rare_inputs}));
  for (Step& step : program->steps) {
    auto* contraction = std::get_if<ContractionSpec>(&step.spec);
    if (tuner && contraction) contraction->schedule = tuner->ScheduleOf(*contraction);
  }
  const double lower_ms = MillisecondsSince(start);
  return CompileProgram(std::move(program), chosen, [&](ExecutableStats& stats) {
    stats.lower_ms = lower_ms;
    if (!tuner) return;
    stats.tuned = tuner->choices();
    stats.measured = tuner->measured();
  });
}

std::unique_ptr<Executable> CompileProgram(std::shared_ptr<LoweredProgram> program,
                                           const CompileOptions& options,
                                           const std::function<void(ExecutableStats&)>& count) {
  MemoryPlan plan = PlanMemory(*program);
  CheckBudget(plan, options.memory_bytes);
  ExecutableData data;
  if (count) count(data.stats);

  if (DebugEnabled("fuse")) DebugLine(ToString(*program));
  if (!DumpFolder().empty()) Dump("lowered.txt", ToString(*program));
  if (DebugEnabled("mem")) {
    DebugLine(fmt::format("mem: arena {} bytes, {} live at most, {} persistent", plan.arena_bytes,
                          plan.max_live_bytes, plan.persistent_bytes));
  }

  auto start = std::chrono::steady_clock::now();
  std::vector<NamedSpec> specs;
  for (const auto* steps : {&program->prepare, &program->derive, &program->steps}) {
    for (const Step& step : *steps) specs.push_back({step.spec, step.label});
  }
  auto kernels = std::make_shared<CompiledKernels>(CompileKernels(specs));
  data.stats.compile_ms = MillisecondsSince(start);
  size_t next = 0;
  auto convert = [&](const std::vector<Step>& steps) {
    std::vector<ExecutableData::Step> result;
    for (const Step& step : steps) {
      int64_t chunks = Chunks(step.spec);
      Check<InternalError>(chunks > 0, "compile: step \"{}\" is empty", step.label);
      KernelInfo info = DescribeKernel(step.spec);
      result.push_back({kernels->functions()[next], chunks, step.buffers, step.label, info.kind,
                        info.shape, info.flop});
      ++next;
    }
    return result;
  };
  data.prepare = convert(program->prepare);
  data.derive = convert(program->derive);
  data.steps = convert(program->steps);
  for (const Buffer& buffer : program->buffers) data.buffers.push_back(Convert(buffer, *program));
  for (const IndexCheck& check : program->checks) data.checks.push_back(Convert(check));
  for (int32_t input : program->graph.inputs()) {
    data.input_names.push_back(program->graph.node(input).name);
    data.input_types.push_back(program->graph.node(input).types[0]);
  }
  for (const GraphOutput& output : program->graph.outputs()) {
    data.output_names.push_back(output.name);
    data.output_types.push_back(program->graph.type(output.value));
  }
  data.zeros = plan.zeros;
  data.parameters = program->parameters;
  data.constants = program->constants;
  auto add = [](auto& list, const auto& element) {
    if (std::find(list.begin(), list.end(), element) == list.end()) list.push_back(element);
  };
  for (int index : program->updated) data.updated.push_back(program->parameters[index]);
  for (const auto* steps : {&program->prepare, &program->derive}) {
    if (steps == &program->derive) data.prepare_parameters = data.packed.size();
    for (const Step& step : *steps) {
      for (int b : step.buffers) {
        const Buffer& buffer = program->buffers[b];
        if (buffer.storage == Storage::kInput) add(data.rare_inputs, buffer.index);
        if (buffer.storage == Storage::kParameter) {
          add(data.packed, program->parameters[buffer.index]);
        }
      }
    }
  }
  if (options.release_weights) {
    data.release = Releases(*program, data);
  } else {
    for (const ParameterPtr& parameter : data.parameters)
      data.storage.push_back(parameter->value());
  }
  data.stats.regions = program->regions;
  data.stats.conversions = program->conversions;
  data.stats.copies = program->copies;
  data.stats.steps = static_cast<int>(data.steps.size());
  data.stats.prepare_steps = static_cast<int>(data.prepare.size());
  data.stats.derive_steps = static_cast<int>(data.derive.size());
  data.stats.kernels = static_cast<int>(kernels->different());
  data.stats.cache_hits = static_cast<int>(kernels->cache().hits);
  data.stats.cache_misses = static_cast<int>(kernels->cache().misses);
  data.stats.cache_unstored = static_cast<int>(kernels->cache().unstored);
  data.stats.cache_problem = kernels->cache().problem;
  data.stats.code_bytes = kernels->code_bytes();
  data.stats.arena_bytes = plan.arena_bytes;
  data.stats.max_live_bytes = plan.max_live_bytes;
  data.stats.persistent_bytes = plan.persistent_bytes;
  data.stats.derived_bytes = plan.derived_bytes;
  data.code = kernels;
  if (options.check) data.make_checker = MakeChecker(program);
  return std::make_unique<Executable>(std::move(data));
}

CompiledFunction::CompiledFunction(Build build, const CompileOptions& options, size_t capacity)
    : build_(std::move(build)), options_(options), capacity_(capacity) {
  Check<UnsupportedError>(!options.release_weights,
                          "compiled function: release_weights would take the weights from what is "
                          "compiled for other types");
  Check(capacity >= 1, "compiled function: capacity {} must be at least 1", capacity);
}

std::shared_ptr<Executable> CompiledFunction::For(std::span<const Tensor> inputs) {
  std::lock_guard lock(mutex_);
  auto matches = [&](const Entry& entry) {
    return std::equal(inputs.begin(), inputs.end(), entry.types.begin(), entry.types.end(),
                      [](const Tensor& x, const TensorType& type) { return x.type() == type; });
  };
  auto it = std::find_if(entries_.begin(), entries_.end(), matches);
  if (it != entries_.end()) {
    entries_.splice(entries_.begin(), entries_, it);
    return entries_.front().executable;
  }
  Entry entry;
  for (const Tensor& x : inputs) entry.types.push_back(x.type());
  entry.executable = Compile(build_(entry.types), options_);
  ++compiled_;
  entries_.push_front(std::move(entry));
  if (entries_.size() > capacity_) {
    entries_.pop_back();
    ++evicted_;
  }
  return entries_.front().executable;
}

CompiledFunction::Stats CompiledFunction::stats() const {
  std::lock_guard lock(mutex_);
  return {compiled_, evicted_, static_cast<int64_t>(entries_.size())};
}

}  // namespace calotype::jit
