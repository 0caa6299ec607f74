// Random regions, compiled, against float64: each element within an error bound that is derived
// from the magnitudes of what it sums (tests/region_budget.h), or, for regions of exact operations
// on small integers, equal.
//   region_fuzz_test [--seed N] [--count N]      count regions from seed N on
//   region_fuzz_test --replay FILE               a graph that a failure printed
// Inputs, outputs and the program's own memory lie between pages that cannot be touched, and memory
// that nobody has written is NaN; a second call must give the same bits, and so must other numbers
// of threads, and a call after one in which the inputs that are declared rare were others. A
// failing region is shrunk (links left out, sizes halved) while it fails, and printed as text for
// --replay.
#include <gtest/gtest.h>

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <ctime>
#include <deque>
#include <fstream>
#include <sstream>

#include "core/parallel.h"
#include "graph/interpreter.h"
#include "graph/text.h"
#include "jit/compile.h"
#include "jit/target.h"
#include "tests/guarded_buffer.h"
#include "tests/region_budget.h"
#include "tests/region_fuzz.h"

namespace calotype::region_fuzz {
namespace {

using jit::reference::GuardedBuffer;

int64_t g_seed = 0, g_count = 1100;
std::string g_replay;

sigjmp_buf g_crash;
volatile std::sig_atomic_t g_catching = 0;
std::string g_current;  // what runs, for a crash that cannot be caught

void OnCrash(int signal) {
  if (g_catching) siglongjmp(g_crash, signal);
  [[maybe_unused]] auto written = write(2, g_current.data(), g_current.size());
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

// What a case is checked by beside its graph.
struct Mode {
  uint64_t seed = 0;
  bool exact = false, large = false, winograd = false;
  bool at_start = false;  // memory begins, instead of ends, at a page that cannot be touched
  bool rare = false;      // some inputs are declared to change rarely (CompileOptions::rare_inputs)
};

struct Totals {
  int regions = 0, exact = 0, bounded = 0, threads = 0, rare = 0, steps = 0;
  double worst = 0, compile_seconds = 0;  // of CPU
  std::array<double, kAnchors> worst_of{}, regions_of{}, steps_of{};
};

double CpuSeconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

std::vector<Tensor> Inputs(const ComputationGraph& graph, const Mode& mode) {
  std::vector<Tensor> inputs;
  for (int32_t i : graph.inputs()) {
    const ComputationNode& node = graph.node(i);
    inputs.push_back(Data(mode.seed, node.name, node.types[0], mode.exact));
  }
  return inputs;
}

bool SameBits(const Tensor& x, const Tensor& y) {
  return x.type() == y.type() && (x.bytes() == 0 || std::memcmp(x.raw(), y.raw(), x.bytes()) == 0);
}

// One compiled graph and memory for its inputs and outputs between guard pages.
class Runner {
 public:
  Runner(const ComputationGraph& graph, const Mode& mode)
      : graph_(graph), inputs_(Inputs(graph, mode)), at_start_(mode.at_start) {
    for (const GraphUpdate& update : graph.updates()) {
      parameters_.push_back(graph.node(update.target.node).parameter);
      before_.push_back(parameters_.back()->value().Clone());
    }
    jit::CompileOptions options;
    if (!mode.winograd) options.winograd_bytes = 0;
    others_ = inputs_;
    for (size_t i = 0; mode.rare && i < inputs_.size(); ++i) {
      const ComputationNode& node = graph.node(graph.inputs()[i]);
      if (Random(mode.seed, "rare " + node.name).Integer(2) == 0) continue;
      options.rare_inputs.push_back(node.name);
      others_[i] = Data(mode.seed + 1, node.name, node.types[0], mode.exact);
    }
    Guarded guarded(*this);
    executable_ = jit::Compile(graph, options);
  }

  // The outputs, then what the updates have written; the parameters have their old values again.
  // `others`: other numbers in the inputs that change rarely. Errors: text in `problem`.
  std::vector<Tensor> Run(std::string& problem, bool others = false) {
    const std::vector<Tensor>& given = others ? others_ : inputs_;
    std::deque<GuardedBuffer> memory;
    auto borrow = [&](const TensorType& type) {
      int64_t bytes = type.shape.elements() * DTypeSize(type.dtype);
      GuardedBuffer& buffer = memory.emplace_back(bytes, at_start_);
      std::memset(buffer.data(), 0xff, bytes);
      return Tensor::Borrow(type.shape, type.dtype, buffer.data());
    };
    std::vector<Tensor> inputs, outputs, results;
    for (const Tensor& x : given) inputs.emplace_back(borrow(x.type())).CopyFrom(x);
    for (const TensorType& type : executable_->output_types()) outputs.push_back(borrow(type));
    Guarded guarded(*this);
    int signal = Threads() == 1 ? sigsetjmp(g_crash, 1) : 0;
    if (signal == 0) {
      g_catching = Threads() == 1;
      try {
        executable_->Run(inputs, outputs);
      } catch (const Error& error) {
        problem = error.what();
      }
    } else {
      problem = fmt::format("signal {} in compiled code", signal);
    }
    g_catching = 0;
    for (const Tensor& y : outputs) results.push_back(y.Clone());
    for (size_t p = 0; p < parameters_.size(); ++p) {
      results.push_back(parameters_[p]->value().Clone());
      parameters_[p]->Write().CopyFrom(before_[p]);
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!SameBits(inputs[i], given[i])) problem += fmt::format("; input {} was changed", i);
    }
    for (size_t m = 0; m < memory.size(); ++m) {
      if (!memory[m].MarginIntact()) {
        problem += fmt::format("; wrote outside argument {} ({} inputs)", m, inputs.size());
      }
    }
    return results;
  }

  const std::vector<Tensor>& inputs(bool others = false) const {
    return others ? others_ : inputs_;
  }
  int steps() const { return executable_->Stats().steps; }
  std::string NameOf(size_t result) const {
    size_t outputs = graph_.outputs().size();
    if (result < outputs) return graph_.outputs()[result].name;
    return "update of " + parameters_[result - outputs]->name();
  }

 private:
  struct Guarded {
    explicit Guarded(const Runner& r) {
      SetStorageGuard(r.at_start_ ? StorageGuard::kBelow : StorageGuard::kAbove);
    }
    ~Guarded() { SetStorageGuard(StorageGuard::kOff); }
  };

  const ComputationGraph& graph_;
  std::vector<Tensor> inputs_, others_, before_;
  std::vector<ParameterPtr> parameters_;  // that updates write
  bool at_start_;
  std::unique_ptr<jit::Executable> executable_;
};

// Which result is too far from float64; empty if none is.
std::string Difference(const ComputationGraph& graph, const Mode& mode, const Runner& runner,
                       const std::vector<Tensor>& results, bool others, bool& exact,
                       double* worst) {
  const std::vector<Tensor>& inputs = runner.inputs(others);
  std::vector<Tensor> reference = Interpreter(graph).RunReference(inputs);
  BudgetInterpreter budget(graph, mode.winograd);
  std::vector<Bounded> bounds = budget.Run(inputs);
  exact = mode.exact && budget.largest() < 0x1p24;
  for (size_t o = 0; o < results.size(); ++o) {
    if (results[o].dtype() != DType::kF32) continue;
    const float* y = results[o].data();
    const double *r = reference[o].data<double>(), *b = bounds[o].error.data<double>();
    for (int64_t i = 0; i < results[o].elements(); ++i) {
      double v = y[i];
      if (v == r[i] || (std::isnan(v) && std::isnan(r[i]))) continue;
      double error = std::abs(v - r[i]);
      // The result's own rounding, and numbers below the normal ones.
      double bound = exact ? 0 : b[i] + kUnit * std::abs(r[i]) + 1e-37;
      if (worst && bound > 0) *worst = std::max(*worst, error / bound);
      if (error <= bound) continue;
      return fmt::format("{}[{}] is {} instead of {}, {} off; allowed are {}{}", runner.NameOf(o),
                         i, v, r[i], error, bound, others ? " (with other rare inputs)" : "");
    }
  }
  return "";
}

// What is wrong with the compiled graph; empty if nothing is.
std::string Problem(const ComputationGraph& graph, const Mode& mode, Totals& totals,
                    double* worst = nullptr) {
  std::string problem;
  try {
    SetThreads(1);
    double start = CpuSeconds();
    Runner runner(graph, mode);
    totals.compile_seconds += CpuSeconds() - start;
    totals.steps += runner.steps();
    std::vector<Tensor> results = runner.Run(problem);
    if (!problem.empty()) return problem;
    bool exact = false;
    if (mode.rare) {
      ++totals.rare;
      std::vector<Tensor> others = runner.Run(problem, /*others=*/true);
      if (!problem.empty()) return problem;
      if (!mode.large) problem = Difference(graph, mode, runner, others, true, exact, worst);
      if (!problem.empty()) return problem;
    }
    // Again: with the leftovers of the first call in memory, with more threads.
    std::vector<int> calls = {1};
    if (mode.large || mode.seed % 5 == 0) {
      ++totals.threads;
      calls = {2, 3};
    }
    for (int threads : calls) {
      SetThreads(threads);
      std::vector<Tensor> again = runner.Run(problem);
      SetThreads(1);
      if (!problem.empty()) return problem;
      for (size_t o = 0; o < again.size(); ++o) {
        if (!SameBits(results[o], again[o])) {
          return fmt::format("{} has other bits in another call, with {} threads", runner.NameOf(o),
                             threads);
        }
      }
    }
    if (mode.large) return "";
    problem = Difference(graph, mode, runner, results, false, exact, worst);
    ++(exact ? totals.exact : totals.bounded);
  } catch (const std::exception& error) {
    SetThreads(1);
    return fmt::format("{} {}", error.what(), problem);
  }
  return problem;
}

Mode ModeOf(const Region& region) {
  return {region.seed,     region.exact,         region.large,
          region.winograd, region.seed % 2 == 1, region.seed % 7 < 2};
}

std::string Describe(const ComputationGraph& graph, const Mode& mode) {
  return fmt::format("# seed {} exact {} large {} winograd {} at_start {} rare {}\n{}", mode.seed,
                     int{mode.exact}, int{mode.large}, int{mode.winograd}, int{mode.at_start},
                     int{mode.rare}, ToText(graph));
}

std::string ProblemOf(const Region& region, Totals& totals, double* worst = nullptr) {
  ComputationGraph graph = Builder(region).Build();
  g_current =
      fmt::format("\n{} region\n{}", kAnchorNames[region.anchor], Describe(graph, ModeOf(region)));
  return Problem(graph, ModeOf(region), totals, worst);
}

// The smallest region found that still has a problem.
Region Shrink(Region region, std::string& problem) {
  Totals unused;
  int tries = 60;
  auto fails = [&](const Region& smaller) {
    if (--tries < 0) return false;
    std::string text;
    try {
      text = ProblemOf(smaller, unused);
    } catch (const std::exception&) {
      return false;  // not a valid graph any more
    }
    if (text.empty()) return false;
    problem = text;
    region = smaller;
    return true;
  };
  for (bool progress = true; progress && tries > 0;) {
    progress = false;
    for (auto links : {&Region::prologue, &Region::epilogue}) {
      for (size_t i = (region.*links).size(); i-- > 0;) {
        Region smaller = region;
        (smaller.*links).erase((smaller.*links).begin() + static_cast<int64_t>(i));
        progress |= fails(smaller);
      }
    }
    for (size_t d = 0; d < region.sizes.size(); ++d) {
      for (int64_t size : {int64_t{1}, region.sizes[d] / 2, region.sizes[d] - 1}) {
        if (size < 1 || size >= region.sizes[d]) continue;
        Region smaller = region;
        smaller.sizes[d] = size;
        if (fails(smaller)) {
          progress = true;
          break;
        }
      }
    }
  }
  return region;
}

TEST(RegionFuzz, CompiledRegionsAgreeWithFloat64) {
  Totals totals;
  int failures = 0;
  const double start = CpuSeconds();
  for (int64_t i = 0; i < g_count && failures < 5; ++i) {
    Region region = MakeRegion(static_cast<uint64_t>(g_seed + i));
    ++totals.regions;
    double worst = 0;
    int steps = totals.steps;
    std::string problem = ProblemOf(region, totals, &worst);
    ++totals.regions_of[region.anchor];
    totals.steps_of[region.anchor] += totals.steps - steps;
    totals.worst = std::max(totals.worst, worst);
    totals.worst_of[region.anchor] = std::max(totals.worst_of[region.anchor], worst);
    if (problem.empty()) continue;
    ++failures;
    std::string first = problem;
    Region shrunk = Shrink(region, problem);
    ADD_FAILURE() << kAnchorNames[region.anchor] << " region of seed " << region.seed << " on "
                  << jit::HostTarget().cpu << ": " << first
                  << "\nshrunk (for --replay): " << problem << "\n"
                  << Describe(Builder(shrunk).Build(), ModeOf(shrunk));
  }
  std::printf(
      "%d regions from seed %lld on %s: %d exact, %d by error bound, %d with 1, 2 and 3 "
      "threads, %d with rare inputs, %.1f kernels, %.1f ms of CPU (%.1f to compile) a region; "
      "worst error / bound "
      "%.3f\n",
      totals.regions, static_cast<long long>(g_seed), jit::HostTarget().cpu.c_str(), totals.exact,
      totals.bounded, totals.threads, totals.rare,
      static_cast<double>(totals.steps) / totals.regions,
      1e3 * (CpuSeconds() - start) / totals.regions, 1e3 * totals.compile_seconds / totals.regions,
      totals.worst);
  for (int a = 0; a < kAnchors; ++a) {
    if (totals.regions_of[a] == 0) continue;
    std::printf("  %-18s %5.1f kernels, worst error / bound %.3f\n",
                std::string(kAnchorNames[a]).c_str(), totals.steps_of[a] / totals.regions_of[a],
                totals.worst_of[a]);
  }
}

// A bound that nothing exceeds finds nothing: results without one of 40 terms must be refused.
TEST(RegionFuzz, TheBudgetRefusesASingleMissingTerm) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3, 40}), w = graph.Input("w", Shape{5, 40});
  graph.Output("y", Silu(MatMul(x, w, false, true)));
  Mode mode{.seed = 1};
  std::vector<Tensor> inputs = Inputs(graph, mode);
  std::vector<Bounded> bounds = BudgetInterpreter(graph, false).Run(inputs);
  for (int64_t i = 0; i < 40; ++i) {  // each row without one of its terms
    std::vector<Tensor> less = {inputs[0].Clone(), inputs[1]};
    for (int row = 0; row < 3; ++row) less[0].data()[row * 40 + i] = 0;
    std::vector<Tensor> wrong = Interpreter(graph).RunReference(less);
    int64_t refused = 0;
    for (int64_t e = 0; e < wrong[0].elements(); ++e) {
      double error = std::abs(wrong[0].data<double>()[e] - bounds[0].value.data<double>()[e]);
      refused += error > bounds[0].error.data<double>()[e];
    }
    EXPECT_GE(refused, 14) << "of 15, term " << i;
  }
}

TEST(RegionFuzz, Replay) {
  std::ifstream file(g_replay);
  ASSERT_TRUE(file.good()) << g_replay;
  std::string line, text, key;
  Mode mode;
  while (std::getline(file, line)) {
    if (!line.starts_with("#")) {
      text += line + "\n";
      continue;
    }
    std::istringstream words(line.substr(1));
    for (uint64_t value; words >> key >> value;) {
      if (key == "seed") mode.seed = value;
      if (key == "exact") mode.exact = value != 0;
      if (key == "large") mode.large = value != 0;
      if (key == "winograd") mode.winograd = value != 0;
      if (key == "at_start") mode.at_start = value != 0;
      if (key == "rare") mode.rare = value != 0;
    }
  }
  ComputationGraph graph = ParseText(text);
  for (const ParameterPtr& p : graph.Parameters()) {
    p->Write().CopyFrom(Data(mode.seed, p->name(), p->value().type(), mode.exact));
  }
  Totals totals;
  double worst = 0;
  EXPECT_EQ(Problem(graph, mode, totals, &worst), "");
  std::printf("worst error / bound %.3f\n", worst);
}

}  // namespace
}  // namespace calotype::region_fuzz

int main(int argc, char** argv) {
  using namespace calotype::region_fuzz;
  setenv("CALOTYPE_CACHE", "off", 1);  // thousands of kernels that nobody asks for again
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; i += 2) {
    std::string name = argv[i];
    if (i + 1 < argc && name == "--seed") {
      g_seed = std::atoll(argv[i + 1]);
    } else if (i + 1 < argc && name == "--count") {
      g_count = std::atoll(argv[i + 1]);
    } else if (i + 1 < argc && name == "--replay") {
      g_replay = argv[i + 1];
    } else {
      std::fprintf(stderr, "usage: region_fuzz_test [--seed N] [--count N] [--replay FILE]\n");
      return 2;
    }
  }
  testing::GTEST_FLAG(filter) = g_replay.empty() ? "-*.Replay" : "*.Replay";
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) std::signal(signal, OnCrash);
  return RUN_ALL_TESTS();
}
