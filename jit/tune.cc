#include "jit/tune.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "core/random.h"
#include "graph/functions.h"
#include "jit/compile.h"
#include "jit/contraction_plan.h"
#include "jit/kernel_info.h"
#include "jit/lower.h"
#include "jit/orc.h"
#include "jit/runtime/thread_pool.h"

namespace calotype::jit {

namespace {

constexpr double kFewestProducts = 1e6;  // what takes less than some microseconds is not measured
constexpr double kGain = 0.98;           // another choice than the model's must be this much faster
constexpr int kRounds = 5;
constexpr double kSeconds = 0.05;  // for all calls of one candidate, the first three apart

double Seconds(const std::function<void()>& call) {
  auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The fastest call of each candidate, in turn so that all see the same machine.
std::vector<double> Fastest(const std::vector<std::function<void()>>& candidates) {
  std::vector<double> fastest(candidates.size(), HUGE_VAL), spent(candidates.size(), 0);
  for (const auto& call : candidates) call();
  for (int round = 0; round < kRounds; ++round) {
    for (size_t c = 0; c < candidates.size(); ++c) {
      if (round >= 3 && spent[c] > kSeconds) continue;
      double seconds = Seconds(candidates[c]);
      spent[c] += seconds;
      fastest[c] = std::min(fastest[c], seconds);
    }
  }
  return fastest;
}

// The bytes that the operands of a spec reach, below and above their pointer.
struct Reach {
  int64_t low = 0, high = 0;
};

std::map<int, Reach> ReachOf(const ContractionSpec& spec) {
  std::map<int, Reach> reach;
  auto add = [&](const Operand& operand, std::vector<int64_t> extents) {
    Reach elements{operand.offset, operand.offset + 1};
    for (size_t d = 0; d < extents.size(); ++d) {
      int64_t step = (extents[d] - 1) * operand.strides[d];
      (step < 0 ? elements.low : elements.high) += step;
    }
    Reach& all = reach[operand.pointer];
    all.low = std::min(all.low, elements.low * DTypeSize(operand.dtype));
    all.high = std::max(all.high, elements.high * DTypeSize(operand.dtype));
  };
  std::vector<int64_t> m = spec.m, mk = spec.m, mn = spec.m;
  mk.insert(mk.end(), spec.k.begin(), spec.k.end());
  mn.push_back(spec.n);
  std::vector<int64_t> mkn = mk;
  mkn.push_back(spec.n);
  add(spec.a, mk);
  add(spec.b, mkn);
  for (const auto* operands : {&spec.epilogue.operands, &spec.epilogue.outputs}) {
    for (const Operand& operand : *operands) add(operand, mn);
  }
  return reach;
}

bool Equal(const ContractionPlan& x, const ContractionPlan& y) {
  return x.outer == y.outer && x.panels == y.panels && x.inner == y.inner && x.block == y.block &&
         x.sum_blocks == y.sum_blocks;
}

// The text of an entry of the cache: numbers, a newline after each. Nothing for other text.
std::optional<std::vector<int64_t>> ParseNumbers(const std::string& text) {
  std::vector<int64_t> numbers;
  for (const char *at = text.data(), *end = at + text.size(); at != end;) {
    auto [next, error] = std::from_chars(at, end, numbers.emplace_back());
    if (error != std::errc() || next == end || *next != '\n') return {};
    at = next + 1;
  }
  return numbers;
}

}  // namespace

Tuner::Tuner() : cache_(CompileCache::FromEnvironment()) {}
Tuner::~Tuner() = default;

// What a measurement depends on: what, the code generator, the kind of processor and the threads.
std::string Tuner::Key(const std::string& what) const {
  return fmt::format("choice of {} threads\nbuild {}\n{}\n{}\n", Threads(), kBuildId,
                     ToString(HostTarget()), what);
}

std::optional<Tuner::Numbers> Tuner::Find(const std::string& key, std::string_view what,
                                          size_t count, int64_t least, int64_t most) {
  if (auto it = stored_.find(key); it != stored_.end()) return it->second;
  std::optional<std::string> text = cache_ ? cache_->Find(key) : std::nullopt;
  if (!text) return {};
  std::optional<Numbers> numbers = ParseNumbers(*text);
  auto fits = [&](int64_t number) { return number >= least && number <= most; };
  if (!numbers || numbers->size() != count ||
      !std::all_of(numbers->begin(), numbers->end(), fits)) {
    cache_->Refuse(fmt::format("not {}", what));
    return {};
  }
  return numbers;
}

void Tuner::Store(const std::string& key, const Numbers& numbers) {
  stored_[key] = numbers;
  if (cache_) cache_->Store(key, fmt::format("{}\n", fmt::join(numbers, "\n")));
}

Tuner::Times Tuner::TimesOf(const Shape& x, const Shape& w) {
  ++choices_;
  const std::string key = Key(fmt::format("convolution of {} by {}", x, w));
  constexpr double kUnit = 1e6;  // stored as whole nanoseconds
  auto times = [&](const Numbers& stored) -> Times {
    auto real = [&](size_t i) { return static_cast<double>(stored[i]) / kUnit; };
    return {real(0), real(1), real(2)};
  };
  if (auto found =
          Find(key, "the times of three algorithms", 3, 1, std::numeric_limits<int64_t>::max())) {
    return times(*found);
  }
  ++measured_;
  Random random(0, "tune");
  Tensor picture = random.NormalTensor(x);
  Tensor weight = random.NormalTensor(w);
  Numbers measured;
  for (int tile : {1, 2, 4}) {  // one at a time: transformed kernels are large
    ComputationGraph graph;
    auto parameter = std::make_shared<Parameter>("w", weight);
    Value y = Conv2d(graph.Input("x", x), graph.ParameterLeaf(parameter), {},
                     Conv2dOptions::Padded(1, 1));
    graph.Output("y", y);
    auto executable =
        CompileProgram(std::make_shared<LoweredProgram>(Lower(graph, {.forced_tile = tile})), {});
    std::vector<Tensor> inputs{picture}, outputs = executable->Run(inputs);
    const double ms = 1e3 * Fastest({[&] { executable->Run(inputs, outputs); }})[0];
    measured.push_back(std::max<int64_t>(1, std::llround(ms * kUnit)));
  }
  Store(key, measured);
  return times(measured);
}

int Tuner::ScheduleOf(const ContractionSpec& spec) {
  if (DescribeKernel(KernelSpec(spec)).flop < 2 * kFewestProducts) return 0;
  std::vector<ContractionSpec> candidates;
  std::vector<ContractionPlan> plans;
  for (int schedule = 0; schedule < kSchedules; ++schedule) {
    ContractionSpec candidate = spec;
    candidate.schedule = schedule;
    ContractionPlan plan = PlanContraction(candidate, HostTarget());
    bool known = std::any_of(plans.begin(), plans.end(),
                             [&](const ContractionPlan& other) { return Equal(plan, other); });
    if (known) continue;
    candidates.push_back(std::move(candidate));
    plans.push_back(std::move(plan));
  }
  if (candidates.size() == 1) return 0;
  ++choices_;
  const std::string key = Key(ToString(KernelSpec(spec)));
  if (auto found = Find(key, "a schedule", 1, 0, kSchedules - 1)) {
    return static_cast<int>(found->front());
  }
  ++measured_;
  std::vector<NamedSpec> specs;
  for (const ContractionSpec& candidate : candidates) specs.push_back({candidate, "tune"});
  CompiledKernels kernels = CompileKernels(specs);
  std::vector<void*> pointers;
  std::vector<Tensor> memory;
  Random random(0, "tune");
  for (auto [pointer, reach] : ReachOf(spec)) {
    const int64_t floats = (reach.high - reach.low + 3) / 4;
    memory.push_back(random.NormalTensor({floats}));
    pointers.resize(static_cast<size_t>(pointer) + 1, nullptr);
    pointers[pointer] = static_cast<std::byte*>(memory.back().raw()) - reach.low;
  }
  const int64_t chunks = Chunks(KernelSpec(spec));
  struct Call {
    KernelFunction kernel;
    void* const* pointers;
  };
  std::vector<Call> calls;
  for (KernelFunction kernel : kernels.functions()) calls.push_back({kernel, pointers.data()});
  std::vector<std::function<void()>> runs;
  for (Call& call : calls) {
    runs.push_back([&call, chunks] {
      RunChunks(
          chunks,
          [](void* context, int64_t chunk) {
            auto& c = *static_cast<Call*>(context);
            c.kernel(c.pointers, chunk, chunk + 1);
          },
          &call);
    });
  }
  std::vector<double> seconds = Fastest(runs);
  size_t best = 0;
  for (size_t c = 1; c < seconds.size(); ++c) {
    if (seconds[c] < seconds[best] && seconds[c] < kGain * seconds[0]) best = c;
  }
  const int choice = candidates[best].schedule;
  Store(key, {choice});
  return choice;
}

}  // namespace calotype::jit
