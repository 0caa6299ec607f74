#include "jit/runtime/executable.h"

#if __has_include(<malloc.h>)
#include <malloc.h>
#endif
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>

#include "core/debug.h"
#include "jit/runtime/thread_pool.h"

namespace calotype::jit {

namespace {

using Step = ExecutableData::Step;
using Buffer = ExecutableData::Buffer;

struct Call {
  void (*kernel)(void* const*, int64_t, int64_t);
  void* const* pointers;
};

void RunStep(const Step& step, void* const* pointers) {
  if (step.chunks == 1) {
    step.kernel(pointers, 0, 1);
    return;
  }
  Call call{step.kernel, pointers};
  RunChunks(
      step.chunks,
      [](void* context, int64_t chunk) {
        auto& c = *static_cast<Call*>(context);
        c.kernel(c.pointers, chunk, chunk + 1);
      },
      &call);
}

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A step of a call whose events are recorded. Chunks report under the lock; times are absolute.
struct WatchedStep {
  Call call;
  std::mutex mutex;
  std::vector<std::thread::id>& threads;
  std::vector<RunProfile::Event> events;  // by thread
};

void RunWatchedChunk(void* context, int64_t chunk) {
  auto& watched = *static_cast<WatchedStep*>(context);
  double begin = Now();
  watched.call.kernel(watched.call.pointers, chunk, chunk + 1);
  double end = Now();
  std::lock_guard lock(watched.mutex);
  auto& threads = watched.threads;
  auto known = std::find(threads.begin(), threads.end(), std::this_thread::get_id());
  auto thread = static_cast<size_t>(known - threads.begin());
  if (known == threads.end()) threads.push_back(std::this_thread::get_id());
  if (watched.events.size() <= thread) watched.events.resize(thread + 1);
  RunProfile::Event& event = watched.events[thread];
  if (event.chunks++ == 0) event.begin = begin;
  event.end = end;
}

// Of the whole process.
double CpuSeconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

bool Overlap(const Tensor& a, const Tensor& b) {
  const auto *x = static_cast<const std::byte*>(a.raw()),
             *y = static_cast<const std::byte*>(b.raw());
  return a.bytes() > 0 && b.bytes() > 0 && x < y + b.bytes() && y < x + a.bytes();
}

}  // namespace

// The memory of one call in progress.
struct Executable::Workspace {
  std::shared_ptr<void> arena;
  std::vector<void*> pointers;  // the tables of all steps, one after the other
  // Entries that differ from call to call.
  struct Patch {
    size_t position;
    int buffer;
  };
  std::vector<Patch> patches;
};

// Packed weights of one version of the parameters. Never written while a call uses them.
struct Executable::Prepared {
  std::shared_ptr<void> memory;
  std::vector<uint64_t> versions;
  int64_t number = 0;  // differs after every change
};

// What the rare inputs with these bytes give with these weights. Never written while a call uses
// it. Inputs are compared, not their addresses: callers write into their tensors.
struct Executable::Derived {
  std::shared_ptr<void> memory;
  std::vector<Tensor> inputs;
  int64_t prepared = -1;  // its number
};

// Where the buffers of one call are.
struct Executable::Places {
  void *arena = nullptr, *persistent = nullptr, *derived = nullptr;
  std::span<const Tensor> inputs;
  std::span<Tensor> outputs;
};

Executable::Executable(ExecutableData data) : data_(std::move(data)) {
  timing_ = DebugEnabled("time");
  free_.reserve(64);
  free_.push_back(NewWorkspace());
  Prepare();
  for (const ParameterPtr& parameter : data_.parameters) {
    addresses_.push_back(parameter->value().raw());
  }
}

Executable::~Executable() {
  if (!timing_ || times_.runs == 0) return;
  const std::vector<RunProfile::StepTime>& times = times_.steps;
  std::vector<size_t> order(times.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return times[a].cpu > times[b].cpu; });
  double runs = static_cast<double>(times_.runs), wall = 0, cpu = 0;
  for (const RunProfile::StepTime& time : times) {
    wall += time.wall;
    cpu += time.cpu;
  }
  DebugLine(fmt::format("time: {} steps, {:.3f} ms a run, {:.3f} ms of CPU, {} runs", times.size(),
                        wall / runs * 1e3, cpu / runs * 1e3, times_.runs));
  for (size_t step : order) {
    DebugLine(fmt::format("time: {:9.1f} us {:9.1f} us CPU {:5.1f} %  step {:4} ({} chunks) {}",
                          times[step].wall / runs * 1e6, times[step].cpu / runs * 1e6,
                          100 * times[step].cpu / cpu, step, data_.steps[step].chunks,
                          data_.steps[step].label));
  }
}

void* Executable::Address(const Buffer& buffer, const Places& places) {
  auto at = [&](void* block) { return static_cast<std::byte*>(block) + buffer.offset; };
  switch (buffer.kind) {
    case Buffer::kArena:
      return at(places.arena);
    case Buffer::kPersistent:
      return at(places.persistent);
    case Buffer::kDerived:
      return at(places.derived);
    case Buffer::kInput:
      return places.inputs.empty() ? nullptr : const_cast<void*>(places.inputs[buffer.index].raw());
    case Buffer::kOutput:
      return places.outputs.empty() ? nullptr : places.outputs[buffer.index].raw();
    case Buffer::kFixed:
      return buffer.fixed;
  }
  return nullptr;
}

std::unique_ptr<Executable::Workspace> Executable::NewWorkspace() const {
  auto workspace = std::make_unique<Workspace>();
  workspace->arena = AllocateStorage(std::max<int64_t>(data_.stats.arena_bytes, 64));
  for (auto [offset, bytes] : data_.zeros) {
    std::memset(static_cast<std::byte*>(workspace->arena.get()) + offset, 0,
                static_cast<size_t>(bytes));
  }
  for (const Step& step : data_.steps) {
    for (int b : step.buffers) {
      const Buffer& buffer = data_.buffers[b];
      if (buffer.kind != Buffer::kArena && buffer.kind != Buffer::kFixed) {
        workspace->patches.push_back({workspace->pointers.size(), b});
      }
      bool own = buffer.kind == Buffer::kArena || buffer.kind == Buffer::kFixed;
      workspace->pointers.push_back(own ? Address(buffer, {.arena = workspace->arena.get()})
                                        : nullptr);
    }
  }
  return workspace;
}

// The packed weights of the current versions; makes them if a parameter has changed.
std::shared_ptr<Executable::Prepared> Executable::Prepare() {
  std::lock_guard lock(mutex_);
  if (prepared_) {
    size_t changed = 0;  // the first
    while (changed < data_.packed.size() &&
           prepared_->versions[changed] == data_.packed[changed]->version()) {
      ++changed;
    }
    if (changed == data_.packed.size()) return prepared_;
    if (changed >= data_.prepare_parameters) {  // only derive steps must run again
      auto next = std::make_shared<Prepared>(*prepared_);
      ++next->number;
      for (size_t p = changed; p < data_.packed.size(); ++p) {
        next->versions[p] = data_.packed[p]->version();
      }
      return prepared_ = next;
    }
    Check<UnsupportedError>(
        data_.release.empty(),
        "run: parameter {} has changed, but the weights were released after packing "
        "(release_weights); load the model and compile it again",
        data_.packed[changed]->name());
  }
  // A block that no call uses is written again; otherwise calls keep the old one to their end.
  const bool unused = prepared_ && prepared_.use_count() == 1 && prepared_->memory.use_count() == 1;
  std::shared_ptr<Prepared> next = unused ? prepared_ : std::make_shared<Prepared>();
  if (!next->memory) {
    next->memory = AllocateStorage(std::max<int64_t>(data_.stats.persistent_bytes, 64));
  }
  next->number = prepared_ ? prepared_->number + 1 : 0;
  if (data_.release.empty()) {
    RunSteps(data_.prepare, {.persistent = next->memory.get()});
  } else {
    PrepareAndRelease({.persistent = next->memory.get()});
  }
  next->versions.clear();
  for (const ParameterPtr& parameter : data_.packed) {
    next->versions.push_back(parameter->version());
  }
  if (!data_.prepare.empty()) ++repacks_;
  prepared_ = next;
  return prepared_;
}

// Step by step, so that weights and packed weights are never all in memory.
void Executable::PrepareAndRelease(const Places& places) {
  constexpr int64_t kTrim = int64_t{64} << 20;
  int64_t untrimmed = 0;
  for (size_t s = 0; s < data_.prepare.size(); ++s) {
    RunSteps({&data_.prepare[s], 1}, places);
    for (const ParameterPtr& parameter : data_.release[s]) {
      data_.stats.released_bytes += parameter->value().bytes();
      untrimmed += parameter->value().bytes();
      parameter->Write() = Tensor();
    }
    if (untrimmed >= kTrim || s + 1 == data_.prepare.size()) {
      untrimmed = 0;
#if defined(__GLIBC__)
      malloc_trim(0);  // what was freed between blocks in use goes back to the system
#endif
    }
  }
}

// What the rare inputs give; makes it if their bytes or the weights have changed.
std::shared_ptr<Executable::Derived> Executable::Derive(const Prepared& prepared,
                                                        std::span<const Tensor> inputs) {
  if (data_.derive.empty()) return nullptr;
  std::lock_guard lock(mutex_);
  if (derived_ && derived_->prepared == prepared.number) {
    bool current = true;
    for (size_t i = 0; i < data_.rare_inputs.size(); ++i) {
      const Tensor &now = inputs[data_.rare_inputs[i]], &then = derived_->inputs[i];
      current = current && std::memcmp(now.raw(), then.raw(), now.bytes()) == 0;
    }
    if (current) return derived_;
  }
  std::shared_ptr<Derived> next =
      derived_ && derived_.use_count() == 1 ? derived_ : std::make_shared<Derived>();
  derived_.reset();
  if (!next->memory) {
    next->memory = AllocateStorage(std::max<int64_t>(data_.stats.derived_bytes, 64));
    for (int input : data_.rare_inputs) next->inputs.emplace_back(data_.input_types[input]);
  }
  for (size_t i = 0; i < data_.rare_inputs.size(); ++i) {
    next->inputs[i].CopyFrom(inputs[data_.rare_inputs[i]]);
  }
  RunSteps(data_.derive, {.persistent = prepared.memory.get(),
                          .derived = next->memory.get(),
                          .inputs = inputs,
                          .outputs = {}});
  next->prepared = prepared.number;
  ++derivations_;
  return derived_ = next;
}

void Executable::RunSteps(std::span<const Step> steps, const Places& places) const {
  std::vector<void*> pointers;
  for (const Step& step : steps) {
    pointers.clear();
    for (int b : step.buffers) pointers.push_back(Address(data_.buffers[b], places));
    RunStep(step, pointers.data());
  }
}

void Executable::CheckArguments(std::span<const Tensor> inputs, std::span<Tensor> outputs) const {
  Check<ShapeError>(inputs.size() == data_.input_types.size(),
                    "run: {} inputs given, {} declared ({})", inputs.size(),
                    data_.input_types.size(), fmt::join(data_.input_names, ", "));
  for (size_t i = 0; i < inputs.size(); ++i) {
    Check<ShapeError>(inputs[i].defined(), "run: input \"{}\" is undefined, expects {}",
                      data_.input_names[i], data_.input_types[i]);
    Check<ShapeError>(inputs[i].type() == data_.input_types[i],
                      "run: input \"{}\" is {}, expects {}", data_.input_names[i], inputs[i].type(),
                      data_.input_types[i]);
  }
  Check<ShapeError>(outputs.size() == data_.output_types.size(),
                    "run: {} outputs given, {} declared", outputs.size(),
                    data_.output_types.size());
  for (size_t o = 0; o < outputs.size(); ++o) {
    Check<ShapeError>(outputs[o].defined() && outputs[o].type() == data_.output_types[o],
                      "run: output \"{}\" is {}, expects {}", data_.output_names[o],
                      outputs[o].defined() ? outputs[o].type() : TensorType{},
                      data_.output_types[o]);
    for (size_t i = 0; i < inputs.size(); ++i) {
      Check(!Overlap(outputs[o], inputs[i]), "run: output \"{}\" overlaps input \"{}\"",
            data_.output_names[o], data_.input_names[i]);
    }
    for (size_t p = 0; p < o; ++p) {
      Check(!Overlap(outputs[o], outputs[p]), "run: output \"{}\" overlaps output \"{}\"",
            data_.output_names[o], data_.output_names[p]);
    }
    for (const ParameterPtr& parameter : data_.parameters) {
      Check(!Overlap(outputs[o], parameter->value()), "run: output \"{}\" overlaps parameter {}",
            data_.output_names[o], parameter->name());
    }
  }
}

// The code holds the addresses of the parameters' memory.
void Executable::CheckParameters(std::span<const Tensor> inputs) const {
  for (size_t p = 0; p < addresses_.size(); ++p) {
    const Tensor& value = data_.parameters[p]->value();
    if (addresses_[p] == nullptr || value.raw() == addresses_[p]) continue;
    const bool kept = p < data_.storage.size();  // all parameters or none
    Check(value.defined() || kept,
          "run: parameter {} has been released by other code that was compiled with "
          "release_weights; load the model and compile it again",
          data_.parameters[p]->name());
    Check(!value.defined(),
          "run: parameter {} has another tensor than when the graph was compiled; write into it "
          "(Write().CopyFrom(x)), or compile again",
          data_.parameters[p]->name());
  }
  for (const ParameterPtr& parameter : data_.updated) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      Check(
          !Overlap(inputs[i], parameter->value()),
          "run: input \"{}\" shares memory with parameter {}, which the graph updates; pass a copy",
          data_.input_names[i], parameter->name());
    }
  }
}

void Executable::CheckIndices(const Places& places) const {
  for (const ExecutableData::IndexCheck& check : data_.checks) {
    const void* base = Address(data_.buffers[check.buffer], places);
    int64_t index[2 * Shape::kMaxRank] = {}, total = 1;
    const size_t rank = check.extents.size();
    for (int64_t extent : check.extents) total *= extent;
    for (int64_t n = 0; n < total; ++n) {
      int64_t at = check.offset;
      for (size_t d = 0; d < rank; ++d) at += index[d] * check.strides[d];
      int64_t value = check.dtype == DType::kI32 ? static_cast<const int32_t*>(base)[at]
                                                 : static_cast<const int64_t*>(base)[at];
      Check(value >= 0 && value < check.limit, "{}: index {} at position {} is not in [0, {})",
            check.label, value, n, check.limit);
      for (size_t d = rank; d-- > 0;) {
        if (++index[d] < check.extents[d]) break;
        index[d] = 0;
      }
    }
  }
}

void Executable::Execute(const std::vector<Step>& steps, void* const* pointers) {
  for (const Step& step : steps) {
    RunStep(step, pointers);
    pointers += step.buffers.size();
  }
}

void Executable::ExecuteWatched(void* const* pointers, StepChecker* checker,
                                std::span<void* const> addresses, RunProfile* profile) {
  if (profile) {
    profile->steps.resize(data_.steps.size());
    profile->events.clear();
    ++profile->runs;
  }
  std::vector<std::thread::id> threads;
  double start = Now();
  for (size_t s = 0; s < data_.steps.size(); ++s) {
    const Step& step = data_.steps[s];
    double begin = Now(), cpu = CpuSeconds();
    if (profile && profile->want_events) {
      WatchedStep watched{.call = {step.kernel, pointers}, .threads = threads};
      RunChunks(step.chunks, RunWatchedChunk, &watched);
      for (size_t t = 0; t < watched.events.size(); ++t) {
        const RunProfile::Event& event = watched.events[t];
        if (event.chunks == 0) continue;
        profile->events.push_back({static_cast<int>(s), static_cast<int>(t), event.begin - start,
                                   event.end - start, event.chunks});
      }
    } else {
      RunStep(step, pointers);
    }
    if (profile) {
      profile->steps[s].wall += Now() - begin;
      profile->steps[s].cpu += CpuSeconds() - cpu;
    }
    pointers += step.buffers.size();
    if (checker) checker->AfterStep(StepChecker::kRun, s, addresses);
  }
}

void Executable::Run(std::span<const Tensor> inputs, std::span<Tensor> outputs) {
  if (!timing_) return RunOnce(inputs, outputs, nullptr);
  RunProfile profile;
  RunOnce(inputs, outputs, &profile);
  std::lock_guard lock(time_mutex_);
  times_.runs += profile.runs;
  times_.steps.resize(profile.steps.size());
  for (size_t s = 0; s < profile.steps.size(); ++s) {
    times_.steps[s].wall += profile.steps[s].wall;
    times_.steps[s].cpu += profile.steps[s].cpu;
  }
}

void Executable::Run(std::span<const Tensor> inputs, std::span<Tensor> outputs,
                     RunProfile& profile) {
  RunOnce(inputs, outputs, &profile);
}

void Executable::RunOnce(std::span<const Tensor> inputs, std::span<Tensor> outputs,
                         RunProfile* profile) {
  CheckArguments(inputs, outputs);
  CheckParameters(inputs);
  std::shared_ptr<Prepared> prepared = Prepare();
  Places places{.persistent = prepared->memory.get(), .inputs = inputs, .outputs = outputs};
  CheckIndices(places);
  std::shared_ptr<Derived> derived = Derive(*prepared, inputs);
  if (derived) places.derived = derived->memory.get();

  std::unique_ptr<Workspace> workspace;
  {
    std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      workspace = std::move(free_.back());
      free_.pop_back();
    }
  }
  if (!workspace) workspace = NewWorkspace();
  places.arena = workspace->arena.get();
  for (const Workspace::Patch& patch : workspace->patches) {
    workspace->pointers[patch.position] = Address(data_.buffers[patch.buffer], places);
  }
  if (data_.make_checker || profile) {
    std::unique_ptr<StepChecker> checker;
    std::vector<void*> addresses;
    if (data_.make_checker) {
      checker = data_.make_checker(inputs);
      for (const Buffer& buffer : data_.buffers) addresses.push_back(Address(buffer, places));
      for (size_t s = 0; s < data_.prepare.size(); ++s) {
        checker->AfterStep(StepChecker::kPrepare, s, addresses);
      }
      for (size_t s = 0; s < data_.derive.size(); ++s) {
        checker->AfterStep(StepChecker::kDerive, s, addresses);
      }
    }
    ExecuteWatched(workspace->pointers.data(), checker.get(), addresses, profile);
  } else {
    Execute(data_.steps, workspace->pointers.data());
  }
  for (const ParameterPtr& parameter : data_.updated) parameter->Write();
  ++runs_;
  std::lock_guard lock(mutex_);
  if (free_.size() < free_.capacity()) free_.push_back(std::move(workspace));
}

std::vector<Tensor> Executable::Run(std::span<const Tensor> inputs) {
  std::vector<Tensor> outputs;
  for (const TensorType& type : data_.output_types) outputs.emplace_back(type);
  Run(inputs, outputs);
  return outputs;
}

ExecutableStats Executable::Stats() const {
  ExecutableStats stats = data_.stats;
  stats.runs = runs_;
  stats.repacks = repacks_;
  stats.derivations = derivations_;
  return stats;
}

}  // namespace calotype::jit
