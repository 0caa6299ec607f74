// Every emitter against naive loops on raw memory, for random specifications, at each
// instruction-set level that the machine has. Sums run on small integers, so that they are exact
// and results must have the same bits; elements that a kernel must not touch are compared too.
#include <gtest/gtest.h>

#include <time.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "core/error.h"
#include "jit/contraction_plan.h"
#include "jit/orc.h"
#include "tests/kernel_cases.h"

namespace calotype::jit {
namespace {

class KernelTest : public ::testing::TestWithParam<const char*> {
 protected:
  Target target() const { return MakeTarget(GetParam()); }

  void Check(const std::vector<Case>& cases, uint32_t seed, double tolerance = 0) {
    std::vector<NamedSpec> specs;
    for (const Case& test : cases) specs.push_back({test.spec, "test"});
    CompiledKernels kernels = CompileKernels(specs, target());
    Rng rng(seed);
    double worst = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
      ASSERT_TRUE(Agrees(rng, cases[i], kernels.functions()[i], tolerance, worst)) << "case " << i;
    }
    if (tolerance > 0) RecordProperty("worst", std::to_string(worst / tolerance));
  }
};

INSTANTIATE_TEST_SUITE_P(Levels, KernelTest,
                         ::testing::Values("x86-64", "x86-64-v2", "x86-64-v3", "native"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// --- LoopSpec

TEST_P(KernelTest, LoopsAgreeWithEvaluate) {
  Rng rng(1);
  std::vector<Case> cases;
  for (int i = 0; i < 150; ++i) cases.push_back(RandomLoop(rng, 3000));
  for (int i = 0; i < 10; ++i) cases.push_back(RandomLoop(rng, 400'000));
  Check(cases, 2);
}

// Combinations that LLVM's simplifications have got wrong or might: max(|x|, 0) came out as
// x > 0 ? |x| : 0.
TEST_P(KernelTest, NestedPrimitivesKeepTheirMeaning) {
  using namespace scalar;
  using Function = Sym (*)(Sym, Sym);
  const Function inner[] = {[](Sym x, Sym) { return Fabs(x); },
                            [](Sym x, Sym) { return -x; },
                            [](Sym x, Sym) { return -Fabs(x); },
                            [](Sym x, Sym) { return Floor(x); },
                            [](Sym x, Sym y) { return Where(LessThan(x, y), x, y); },
                            [](Sym x, Sym y) { return Max(x, y); },
                            [](Sym x, Sym y) { return Min(Fabs(x), y); }};
  const Function outer[] = {[](Sym x, Sym y) { return Max(x, y); },
                            [](Sym x, Sym y) { return Min(x, y); },
                            [](Sym x, Sym y) { return Max(y, x); },
                            [](Sym x, Sym y) { return Where(EqualTo(x, x), x, y); },
                            [](Sym x, Sym y) { return Where(LessEqual(y, x), x, -x); },
                            [](Sym x, Sym y) { return Where(x, Fabs(x), y); }};
  std::vector<Case> cases;
  for (Function f : inner) {
    for (Function g : outer) {
      for (int second = 0; second < 3; ++second) {  // 0, 1, or another input
        LoopSpec s;
        s.extents = {500};
        s.inputs = {{0, DType::kF32, 0, {1}}, {1, DType::kF32, 0, {1}}};
        s.outputs = {{2, DType::kF32, 0, {1}}};
        s.program = Recorded(2, [&](auto& in) {
          Sym y = second < 2 ? Constant(in[0], second) : in[1];
          return g(f(in[0], y), y);
        });
        cases.push_back({s, std::deque<BufferPlan>(3, {DType::kF32, 500, 0}), {}});
      }
    }
  }
  Check(cases, 18);
}

TEST_P(KernelTest, Transposes) {
  Rng rng(3);
  std::vector<Case> cases;
  for (auto [b, c, p] : {std::array<int64_t, 3>{2, 32, 64},
                         {1, 3, 256},
                         {3, 17, 33},
                         {1, 64, 4096},
                         {64, 40, 16},
                         {1, 320, 77}}) {
    for (bool to_last : {false, true}) {
      Case test;
      LoopSpec s;
      s.extents = to_last ? Index{b, p, c} : Index{b, c, p};
      s.inputs = {{0, DType::kF32, 0, {c * p, 1, to_last ? p : c}}};
      s.outputs = {{1, DType::kF32, 0, {c * p, to_last ? c : p, 1}}};
      s.program = Identity();
      test.buffers = {{DType::kF32, b * c * p, 0}, {DType::kF32, b * c * p, 0}};
      test.spec = s;
      cases.push_back(test);
    }
  }
  Check(cases, 4);
}

TEST_P(KernelTest, Chains) {
  Rng rng(11);
  std::vector<Case> cases;
  for (int64_t width : {1, 5, 16, 33, 320}) {
    for (int64_t rows : {1, 3, 8}) {
      for (int64_t turns : {1, 2, 17, 64}) cases.push_back(RowChain(rng, turns, rows, width));
    }
  }
  cases.push_back(RowChain(rng, 4096, 1, 64));
  Check(cases, 4);
}

// Short inner dimensions with operands that repeat along them or around them: groups of channels.
TEST_P(KernelTest, Groups) {
  std::vector<Case> loops, sums;
  for (int64_t group : {2, 3, 4, 5, 8, 10, 12, 20, 40}) {
    for (int64_t groups : {1, 4, 7, 32}) {
      int64_t channels = group * groups, pixels = 9;
      std::deque<BufferPlan> buffers = {{DType::kF32, 2 * pixels * channels},
                                        {DType::kF32, 2 * groups},
                                        {DType::kF32, group},
                                        {DType::kF32, channels},
                                        {DType::kF32, 2 * pixels * channels}};
      LoopSpec s;
      s.extents = {2, pixels, groups, group};
      s.inputs = {{0, DType::kF32, 0, {pixels * channels, channels, group, 1}},
                  {1, DType::kF32, 0, {groups, 0, 1, 0}},
                  {2, DType::kF32, 0, {0, 0, 0, 1}},
                  {3, DType::kF32, 0, {0, 0, group, 1}}};
      s.program = Recorded(4, [](auto& in) { return (in[0] - in[1]) * in[2] + in[3]; });
      s.outputs = {{4, DType::kF32, 0, s.inputs[0].strides}};
      loops.push_back({s, buffers, {}});
      ReduceSpec r;
      r.extents = {2, groups};
      r.reduced = {pixels, group};
      for (Operand input : s.inputs) {
        std::swap(input.strides[1], input.strides[2]);
        r.inputs.push_back(input);
      }
      r.program = s.program;
      r.epilogue = {Identity(), {}, {{4, DType::kF32, 0, {groups, 1}}}};
      sums.push_back({r, buffers, {}});
    }
  }
  Check(loops, 16);
  Check(sums, 17);
}

TEST_P(KernelTest, IntegerCopiesKeepAllBits) {
  LoopSpec s;
  s.extents = {3, 5};
  s.inputs = {{0, DType::kI64, 0, {1, 3}}};
  s.outputs = {{1, DType::kI64, 0, {5, 1}}};
  s.program = Identity();
  CompiledKernels kernels = CompileKernels(std::vector<NamedSpec>{{s, "copy"}}, target());
  std::vector<int64_t> x(15), y(15, 0);
  for (int i = 0; i < 15; ++i) x[i] = (int64_t{1} << 60) + i;
  void* pointers[] = {x.data(), y.data()};
  kernels.functions()[0](pointers, 0, Chunks(KernelSpec(s)));
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 5; ++j) EXPECT_EQ(y[5 * i + j], x[i + 3 * j]);
  }
}

// --- ReduceSpec

TEST_P(KernelTest, ReductionsAreExactOnIntegers) {
  Rng rng(5);
  std::vector<Case> cases;
  for (int i = 0; i < 120; ++i) cases.push_back(RandomReduce(rng, 5000));
  for (int i = 0; i < 10; ++i) cases.push_back(RandomReduce(rng, 300'000));
  Check(cases, 6);
}

// --- ContractionSpec

TEST_P(KernelTest, ContractionsAreExactOnIntegers) {
  Rng rng(7);
  std::vector<Case> cases;
  for (int i = 0; i < 60; ++i) cases.push_back(RandomContraction(rng, 30'000));
  for (int64_t m : {1, 2, 5, 6, 7, 12, 13, 25}) {
    for (int64_t n : {1, 3, 8, 16, 17, 32, 47, 64}) {
      cases.push_back(MatrixProduct(rng, m, n, rng.Between(1, 20), rng.Chance(0.5)));
    }
  }
  cases.push_back(MatrixProduct(rng, 301, 77, 99, true));
  cases.push_back(Convolution(rng, 2, 8, 8, 4, 1, 32, 3, 1));
  cases.push_back(Convolution(rng, 1, 5, 7, 3, 2, 16, 3, 2));
  cases.push_back(Convolution(rng, 3, 16, 16, 8, 2, 32, 3, 1));
  cases.push_back(Convolution(rng, 2, 6, 6, 32, 1, 3, 3, 1));
  cases.push_back(Convolution(rng, 1, 4, 4, 5, 3, 8, 1, 1));
  cases.push_back(WeightGradient(8, 16, 5, 33, false));
  cases.push_back(WeightGradient(32, 8, 14, 20, true));
  cases.push_back(MatrixProduct(rng, 220, 16, 3500, true));
  cases.push_back(MatrixProduct(rng, 9, 40, 3500, true));
  // The cases reach the special forms of the plan.
  int parts_of_cut_sums = 0, lanes_along_sums = 0, parts = 0;
  for (const Case& test : cases) {
    ContractionPlan plan = PlanContraction(std::get<ContractionSpec>(test.spec), target());
    parts_of_cut_sums += plan.sum_blocks > 0 && plan.block > 0;
    parts += plan.sum_blocks == 0 && plan.block > 0;
    lanes_along_sums += plan.lane < 0;
  }
  EXPECT_GT(parts, 0);
  EXPECT_GT(lanes_along_sums, 0);
  if (target().vector_width >= 8) {
    EXPECT_GT(parts_of_cut_sums, 0);
  }
  Check(cases, 8);
}

// --- Attention

const AttentionCase kAttentionCases[] = {
    {1, 1, 1, 1, 1, 1},
    {2, 2, 5, 7, 3, 4},
    {2, 4, 64, 8, 16, 16},
    {1, 2, 70, 77, 40, 40},
    {1, 1, 33, 300, 24, 20},
    {2, 2, 16, 16, 5, 17},
    {2, 3, 17, 13, 16, 16, false, 0, true},
    {2, 2, 40, 40, 8, 8, true},
    {1, 1, 150, 200, 16, 16, true},
    {2, 2, 21, 30, 8, 12, false, 1},
    {2, 2, 21, 140, 8, 12, true, 2, true},
    {1, 2, 35, 11, 8, 8, false, 3},
};

TEST_P(KernelTest, Attention) {
  std::vector<Case> cases;
  for (const AttentionCase& c : kAttentionCases) cases.push_back(Attention(c));
  // Another layout: heads outside, dimensions with a stride.
  Case odd = Attention({2, 2, 20, 20, 6, 6});
  auto& s = std::get<AttentionSpec>(odd.spec);
  for (Operand* o : {&s.q, &s.k, &s.v, &s.out}) o->strides = {2 * 6 * 20, 6 * 20, 1, 20};
  cases.push_back(odd);
  Check(cases, 10, 2e-6);
}

TEST_P(KernelTest, AttentionGradients) {
  std::vector<Case> cases;
  for (const AttentionCase& c : kAttentionCases) {
    cases.push_back(AttentionGradient(c));
    if (c.queries > 64) cases.push_back(AttentionGradient(c, 64));
  }
  Check(cases, 11, 4e-6);
}

// --- Gather, ScatterAdd, Philox

TEST_P(KernelTest, GathersAndScatters) {
  Rng rng(12);
  std::vector<Case> gathers, scatters;
  for (int i = 0; i < 30; ++i) {
    auto [gather, scatter] = RandomGatherAndScatter(rng);
    gathers.push_back(gather);
    scatters.push_back(scatter);
  }
  Check(gathers, 13);
  Check(scatters, 14);
}

TEST_P(KernelTest, PhiloxAgreesWithCore) {
  std::vector<Case> cases;
  for (int64_t elements : {1, 5, 16, 33, 1000, 100'000}) cases.push_back(PhiloxNumbers(elements));
  Check(cases, 15);
}

// --- What holds for all kernels

struct Memory {
  std::deque<GuardedBuffer> buffers;
  std::vector<void*> pointers;
  explicit Memory(const Case& test, uint32_t seed = 1) {
    Rng rng(seed);
    for (const BufferPlan& plan : test.buffers) {
      pointers.push_back(buffers.emplace_back(plan.elements * DTypeSize(plan.dtype)).data());
      Fill(rng, plan, pointers.back());
    }
  }
  std::vector<float> Floats(size_t i) {
    const auto* data = static_cast<const float*>(pointers[i]);
    return {data, data + buffers[i].bytes() / 4};
  }
};

TEST_P(KernelTest, ResultsDoNotDependOnTheCut) {
  std::vector<Case> cases = {Layer(8, 16, 32, 32, 16), Attention({4, 4, 64, 64, 16, 16})};
  Case sum;
  ReduceSpec s;
  s.extents = {64};
  s.reduced = {4096};
  s.inputs = {{0, DType::kF32, 0, {4096, 1}}};
  s.program = Identity();
  s.epilogue = {Identity(), {}, {{1, DType::kF32, 0, {1}}}};
  sum.spec = s;
  sum.buffers = {{DType::kF32, 64 * 4096, 0}, {DType::kF32, 64, 0}};
  for (BufferPlan& plan : sum.buffers) plan.plain = true;
  cases.push_back(sum);
  std::vector<NamedSpec> specs;
  for (const Case& test : cases) specs.push_back({test.spec, "cut"});
  CompiledKernels kernels = CompileKernels(specs, target());
  for (size_t i = 0; i < cases.size(); ++i) {
    int64_t chunks = Chunks(cases[i].spec);
    ASSERT_GT(chunks, 1);
    Memory whole(cases[i]), cut(cases[i]);
    kernels.functions()[i](whole.pointers.data(), 0, chunks);
    for (int64_t c = chunks; c-- > 0;) kernels.functions()[i](cut.pointers.data(), c, c + 1);
    for (size_t j = 0; j < whole.buffers.size(); ++j) {
      EXPECT_EQ(std::memcmp(whole.pointers[j], cut.pointers[j], whole.buffers[j].bytes()), 0)
          << "case " << i << " buffer " << j;
    }
  }
}

// |error| <= u (2 sqrt(K) + 2) sum |a b|, u = 2^-24: numbers in [0, 1) make it sharp.
TEST_P(KernelTest, LongSumsStayInTheErrorBound) {
  constexpr int64_t kRows = 3, kLong = 200'000, kDepth = 3000;
  ReduceSpec rows, columns;
  rows.extents = {kRows};
  rows.reduced = {kLong};
  rows.inputs = {{0, DType::kF32, 0, {kLong, 1}}};
  rows.program = Identity();
  rows.epilogue = {Identity(), {}, {{1, DType::kF32, 0, {1}}}};
  columns = rows;
  columns.inputs[0].strides = {1, kRows};
  ContractionSpec product;
  product.m = {5};
  product.n = 33;
  product.k = {kDepth};
  product.a = {0, DType::kF32, 0, {kDepth, 1}};
  product.b = {2, DType::kF32, 0, {0, 33, 1}};
  product.epilogue = {Identity(), {}, {{1, DType::kF32, 0, {33, 1}}}};
  CompiledKernels kernels = CompileKernels(
      std::vector<NamedSpec>{{rows, "rows"}, {columns, "columns"}, {product, "product"}}, target());
  Rng rng(3);
  std::vector<float> x(kRows * kLong), w(kDepth * 33), y(5 * 33);
  for (float& value : x) value = static_cast<float>(rng.Below(1 << 24)) * 0x1p-24f;
  for (float& value : w) value = static_cast<float>(rng.Below(1 << 24)) * 0x1p-24f;
  void* pointers[] = {x.data(), y.data(), w.data()};
  auto check = [&](double exact, float result, double depth) {
    double bound = 0x1p-24 * (2 * std::sqrt(depth) + 2) * exact;
    EXPECT_LE(std::abs(result - exact), bound);
  };
  for (int which : {0, 1}) {
    const ReduceSpec& s = which == 0 ? rows : columns;
    kernels.functions()[which](pointers, 0, Chunks(KernelSpec(s)));
    for (int64_t i = 0; i < kRows; ++i) {
      double exact = 0;
      for (int64_t j = 0; j < kLong; ++j) {
        exact += x[i * s.inputs[0].strides[0] + j * s.inputs[0].strides[1]];
      }
      check(exact, y[i], kLong);
    }
  }
  kernels.functions()[2](pointers, 0, Chunks(KernelSpec(product)));
  for (int64_t i = 0; i < 5; ++i) {
    for (int64_t j = 0; j < 33; ++j) {
      double exact = 0;
      for (int64_t k = 0; k < kDepth; ++k) exact += double{x[i * kDepth + k]} * w[k * 33 + j];
      check(exact, y[i * 33 + j], kDepth);
    }
  }
}

// Loops that other compilers turn into memset and memcpy: the linker knows no symbol outside the
// kernel, so a call would fail to link.
TEST_P(KernelTest, FillsAndCopiesCallNothing) {
  LoopSpec fill, copy;
  fill.extents = {100'000};
  fill.program = {0, {{Primitive::kConstant, 0, 0, 0, 0.0f}}, {0}};
  fill.outputs = {{0, DType::kF32, 0, {1}}};
  copy.extents = {100'000};
  copy.program = Identity();
  copy.inputs = {{0, DType::kF32, 0, {1}}};
  copy.outputs = {{1, DType::kF32, 0, {1}}};
  CompiledKernels kernels =
      CompileKernels(std::vector<NamedSpec>{{fill, "fill"}, {copy, "copy"}}, target());
  std::vector<float> x(100'000, 3.0f), y(100'000, 4.0f);
  void* pointers[] = {x.data(), y.data()};
  kernels.functions()[0](pointers, 0, Chunks(KernelSpec(fill)));
  kernels.functions()[1](pointers, 0, Chunks(KernelSpec(copy)));
  EXPECT_EQ(x, std::vector<float>(100'000, 0.0f));
  EXPECT_EQ(x, y);
}

// The bodies of innermost loops in LLVM's assembly text.
std::vector<std::vector<std::string>> InnermostLoops(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::vector<std::string>> loops;
  std::vector<std::string> body;
  std::string line, label, last_label;
  while (std::getline(file, line)) {
    if (line.starts_with(".L") && line.find(':') != std::string::npos) {
      last_label = line.substr(0, line.find(':'));
    }
    if (line.find("Inner Loop Header") != std::string::npos) {
      label = last_label;
      body.clear();
    } else if (!label.empty()) {
      body.push_back(line);
      if (line.find("\tj") != std::string::npos && line.ends_with(label)) {
        loops.push_back(body);
        label.clear();
      }
    }
  }
  return loops;
}

// A product of packed panels: b [n / panel][k][panel], batch matrices of each.
ContractionSpec PanelProduct(int64_t batch, int64_t m, int64_t n, int64_t k, int64_t panel) {
  ContractionSpec s;
  s.m = {batch, n / panel, m};
  s.n = panel;
  s.k = {k};
  s.a = {0, DType::kF32, 0, {m * k, 0, k, 1}};
  s.b = {1, DType::kF32, 0, {k * n, k * panel, 0, panel, 1}};
  s.epilogue = {Identity(), {}, {{2, DType::kF32, 0, {m * n, panel, n, 1}}}};
  return s;
}

// Products, direct convolutions of stride 1 and 2, the products of Winograd's form, a sum that is
// cut into blocks: their innermost loops touch no stack.
TEST_P(KernelTest, InnermostLoopsOfContractionsStayInRegisters) {
  const std::filesystem::path folder =
      ::testing::TempDir() + "calotype_kernel_test_" + std::to_string(getpid());
  Target machine = target();
  const int64_t panel = 2 * machine.vector_width;
  Rng rng(1);
  std::vector<NamedSpec> specs = {
      {Layer(2, 16, 32, 32, panel).spec, "conv 32"},
      {Convolution(rng, 1, 16, 16, 64, 1, panel, 3, 2).spec, "stride 2"},
      {PanelProduct(1, 1024, 320, 320, panel), "product"},
      {PanelProduct(36, 64, 320, 320, panel), "winograd products"},
      {PanelProduct(1, 64, 2 * panel, 11520, panel), "cut sum"}};
  setenv("CALOTYPE_DUMP", folder.c_str(), 1);
  CompiledKernels kernels = CompileKernels(specs, machine);
  unsetenv("CALOTYPE_DUMP");
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".s") continue;
    ++files;
    size_t products = 0;
    for (const std::vector<std::string>& loop : InnermostLoops(entry.path().string())) {
      size_t here = 0;
      std::string stack;
      for (const std::string& line : loop) {
        here += line.find(machine.fma ? "\tvfmadd" : "\tmulps") != std::string::npos;
        if (line.find("(%rsp") != std::string::npos) stack += line + "\n";
      }
      products = std::max(products, here);
      if (here > 0) {
        EXPECT_EQ(stack, "") << entry.path();
      }
    }
    EXPECT_GE(products, 8u) << entry.path();
  }
  EXPECT_EQ(files, specs.size());
  std::filesystem::remove_all(folder);
}

double ThreadSeconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double GigaflopsPerSecond(KernelFunction function, const Case& test, double flops) {
  Memory memory(test);
  double best = 1e9;
  for (int run = 0; run < 20; ++run) {
    double start = ThreadSeconds();
    function(memory.pointers.data(), 0, Chunks(test.spec));
    best = std::min(best, ThreadSeconds() - start);
  }
  return flops / best * 1e-9;
}

// A part of the multiply-add peak that this machine shows in a loop without loads, on one thread.
TEST(KernelSpeed, ContractionsComeNearThePeak) {
  const Target& machine = HostTarget();
  int64_t width = machine.vector_width, panel = 2 * width;
  Case peak;
  ContractionSpec s;
  s.m = {4};
  s.n = panel;
  s.k = {300'000};
  s.a = {0, DType::kF32, 0, {1, 0}};
  s.b = {1, DType::kF32, 0, {0, 0, 1}};
  s.epilogue = {Identity(), {}, {{2, DType::kF32, 0, {panel, 1}}}};
  peak.spec = s;
  peak.buffers = {{DType::kF32, 4}, {DType::kF32, panel}, {DType::kF32, 4 * panel}};
  Case product;
  s.m = {320 / panel, 1024};
  s.k = {320};
  s.a = {0, DType::kF32, 0, {0, 320, 1}};
  s.b = {1, DType::kF32, 0, {320 * panel, 0, panel, 1}};
  s.epilogue.outputs[0].strides = {panel, 320, 1};
  product.spec = s;
  product.buffers = {
      {DType::kF32, 1024 * 320}, {DType::kF32, 320 * 320}, {DType::kF32, 1024 * 320}};
  std::vector<std::pair<Case, double>> cases = {
      {peak, 8.0 * static_cast<double>(panel) * 3e5},
      {product, 2.0 * 1024 * 320 * 320},
      {Layer(16, 16, 32, 32, panel), 18.0 * 16 * 256 * 32 * 32},
      {Layer(16, 8, 64, 64, panel), 18.0 * 16 * 64 * 64 * 64}};
  std::vector<NamedSpec> specs;
  for (const auto& [test, flops] : cases) specs.push_back({test.spec, "speed"});
  CompiledKernels kernels = CompileKernels(specs);
  double most = GigaflopsPerSecond(kernels.functions()[0], peak, cases[0].second);
  const char* names[] = {"peak", "matrix product 1024x320x320", "3x3 32->32 at 16x16",
                         "3x3 64->64 at 8x8"};
  std::printf("%-28s %7.1f GFLOP/s\n", names[0], most);
  for (size_t i = 1; i < cases.size(); ++i) {
    double rate = GigaflopsPerSecond(kernels.functions()[i], cases[i].first, cases[i].second);
    std::printf("%-28s %7.1f GFLOP/s, %3.0f %% of the peak\n", names[i], rate, 100 * rate / most);
    // Well below what a quiet machine shows, so that only a broken kernel fails.
    EXPECT_GT(rate, 0.4 * most) << names[i];
  }
}

TEST(CompileKernelsTest, EqualSpecsShareOneKernel) {
  Case a = Layer(1, 4, 4, 8, 8), b = Layer(1, 4, 4, 8, 8), c = Layer(1, 5, 4, 8, 8);
  CompiledKernels kernels =
      CompileKernels(std::vector<NamedSpec>{{a.spec, "a"}, {b.spec, "b"}, {c.spec, "c"}});
  EXPECT_EQ(kernels.compiled(), 2);
  EXPECT_EQ(kernels.functions()[0], kernels.functions()[1]);
  EXPECT_NE(kernels.functions()[0], kernels.functions()[2]);
}

TEST(CompileKernelsTest, ErrorsAreTyped) {
  EXPECT_THROW(MakeTarget("z80"), ValueError);
  LoopSpec s;
  s.extents = {4};
  s.inputs = {{0, DType::kF64, 0, {1}}};
  s.outputs = {{1, DType::kF32, 0, {1}}};
  s.program = Identity();
  EXPECT_THROW(CompileKernels(std::vector<NamedSpec>{{s, "f64"}}), UnsupportedError);
  s.inputs[0] = {0, DType::kF32, 0, {1, 1}};
  EXPECT_THROW(CompileKernels(std::vector<NamedSpec>{{s, "rank"}}), InternalError);
  s.inputs.clear();
  EXPECT_THROW(CompileKernels(std::vector<NamedSpec>{{s, "no input"}}), InternalError);
}

}  // namespace
}  // namespace calotype::jit
