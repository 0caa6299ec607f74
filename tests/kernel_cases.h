// Random kernel specifications, the memory they name, and the comparison of a kernel with the
// reference: shared parts of kernel_test.cc.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <limits>
#include <optional>
#include <random>

#include "core/scalar.h"
#include "jit/kernel.h"
#include "tests/kernel_reference.h"

namespace calotype::jit {

using reference::GuardedBuffer;
using reference::Index;

class Rng {
 public:
  explicit Rng(uint32_t seed) : engine_(seed) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  int64_t Between(int64_t low, int64_t high) { return low + Below(high - low + 1); }
  bool Chance(double p) { return std::uniform_real_distribution<>(0, 1)(engine_) < p; }
  float Normal() { return static_cast<float>(std::normal_distribution<>()(engine_)); }
  int64_t Pick(std::initializer_list<int64_t> values) {
    return values.begin()[Below(static_cast<int64_t>(values.size()))];
  }
  std::mt19937& engine() { return engine_; }

 private:
  std::mt19937 engine_;
};

// What one pointer points to.
struct BufferPlan {
  DType dtype = DType::kF32;
  int64_t elements = 0;
  int64_t most_integer = 4;  // values are integers in [-most, most]; 0: normal numbers
  int64_t least_integer = -4;
  bool plain = false;  // normal numbers only, no special values
  // If positive: 0, -1 or -inf, and -inf in all of every third row of so many elements.
  int64_t mask_row = 0;
};

// A specification under test and the buffers that its operands name.
struct Case {
  KernelSpec spec;
  std::deque<BufferPlan> buffers;
  std::optional<KernelSpec> prepare;  // run by the reference first, on both memories
};

inline ScalarProgram Identity() {
  ScalarProgram program{1, {{Primitive::kInput, 0}}, {0}};
  return program;
}

template <class F>
ScalarProgram Recorded(int inputs, F f) {
  scalar::Recorder recorder;
  std::vector<scalar::Sym> in;
  for (int i = 0; i < inputs; ++i) in.push_back(recorder.Input(i));
  scalar::Sym result = f(in);
  return recorder.Finish(inputs, result);
}

// Random instructions over all primitives; those with a restricted domain get arguments inside it.
inline ScalarProgram RandomProgram(Rng& rng, int inputs, int length, int results) {
  using namespace scalar;
  Recorder recorder;
  std::vector<Sym> v;
  for (int i = 0; i < inputs; ++i) v.push_back(recorder.Input(i));
  if (v.empty()) v.push_back(recorder.Record({Primitive::kConstant, 0, 0, 0, 0.75f}));
  auto any = [&] { return v[rng.Below(static_cast<int64_t>(v.size()))]; };
  for (int i = 0; i < length; ++i) {
    Sym x = any(), y = any(), z = any();
    switch (rng.Below(20)) {
      case 0:
        v.push_back(Constant(x, rng.Normal()));
        break;
      case 1:
        v.push_back(x + y);
        break;
      case 2:
        v.push_back(x - y);
        break;
      case 3:
        v.push_back(x * y);
        break;
      case 4:
        v.push_back(x / y);
        break;
      case 5:
        v.push_back(Max(x, y));
        break;
      case 6:
        v.push_back(Min(x, y));
        break;
      case 7:
        v.push_back(-x);
        break;
      case 8:
        v.push_back(Fabs(x));
        break;
      case 9:
        v.push_back(SquareRoot(x));
        break;
      case 10:
        v.push_back(Floor(x));
        break;
      case 11:
        v.push_back(Round(x));
        break;
      case 12:
        v.push_back(LessThan(x, y));
        break;
      case 13:
        v.push_back(LessEqual(x, y));
        break;
      case 14:
        v.push_back(EqualTo(x, y));
        break;
      case 15:
        v.push_back(Where(x, y, z));
        break;
      case 16:
        v.push_back(Exponential(x));
        break;
      case 17:
        v.push_back(Logarithm(x));
        break;
      case 18:
        v.push_back(Sine(x));
        break;
      case 19:
        v.push_back(ErrorFunction(x));
        break;
    }
  }
  ScalarProgram program = recorder.Finish(inputs, v.back());
  for (int r = 1; r < results; ++r) {
    program.results.push_back(
        static_cast<int32_t>(rng.Below(static_cast<int64_t>(program.code.size()))));
  }
  return program;
}

// An operand over `extents` in memory of its own: dimensions in random order, gaps, an offset;
// inputs may repeat along dimensions.
inline Operand RandomOperand(Rng& rng, Case& test, const std::vector<int64_t>& extents, bool output,
                             double shuffled = 0.4, double repeated = 0.25) {
  Operand operand;
  operand.pointer = static_cast<int>(test.buffers.size());
  operand.offset = rng.Pick({0, 0, 3, 16});
  std::vector<size_t> order(extents.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (rng.Chance(shuffled)) std::shuffle(order.begin(), order.end(), rng.engine());
  operand.strides.assign(extents.size(), 0);
  int64_t stride = rng.Chance(0.85) ? 1 : rng.Between(2, 3);
  for (size_t i = order.size(); i-- > 0;) {
    size_t d = order[i];
    if (!output && rng.Chance(repeated)) continue;
    operand.strides[d] = stride;
    stride *= std::max<int64_t>(extents[d], 1);
    if (rng.Chance(0.2)) stride += rng.Between(1, 5);
  }
  BufferPlan plan;
  plan.elements = operand.offset + 1;
  for (size_t d = 0; d < extents.size(); ++d) {
    plan.elements += std::max<int64_t>(extents[d] - 1, 0) * operand.strides[d];
  }
  // Sometimes a dimension runs backwards.
  for (size_t d = 0; d < extents.size(); ++d) {
    if (!rng.Chance(0.05)) continue;
    operand.offset += std::max<int64_t>(extents[d] - 1, 0) * operand.strides[d];
    operand.strides[d] = -operand.strides[d];
  }
  test.buffers.push_back(plan);
  return operand;
}

inline std::vector<float> Special() {
  float inf = std::numeric_limits<float>::infinity();
  return {0.0f, -0.0f, inf,   -inf, std::nanf(""), 1e-40f, -1e-42f,   3e38f,
          0.5f, 1.5f,  -2.5f, 1e9f, -88.5f,        127.0f, 8388609.0f};
}

inline void Fill(Rng& rng, const BufferPlan& plan, void* data) {
  static const std::vector<float> special = Special();
  for (int64_t i = 0; i < plan.elements; ++i) {
    int64_t integer = rng.Between(plan.least_integer, plan.most_integer);
    if (plan.dtype == DType::kI32) {
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(integer);
    } else if (plan.dtype == DType::kI64) {
      static_cast<int64_t*>(data)[i] = integer;
    } else if (plan.mask_row > 0) {
      bool closed = i / plan.mask_row % 3 == 1;
      static_cast<float*>(data)[i] = closed            ? -INFINITY
                                     : rng.Chance(0.5) ? 0
                                     : rng.Chance(0.5) ? -1
                                                       : -INFINITY;
    } else if (plan.plain) {
      static_cast<float*>(data)[i] = rng.Normal();
    } else if (plan.most_integer > 0) {
      static_cast<float*>(data)[i] = static_cast<float>(integer);
    } else {
      float x = 3 * rng.Normal();
      if (rng.Chance(0.1)) x = special[rng.Below(static_cast<int64_t>(special.size()))];
      static_cast<float*>(data)[i] = x;
    }
  }
}

inline void CallInPieces(Rng& rng, KernelFunction function, void* const* pointers, int64_t chunks) {
  if (rng.Chance(0.5)) return function(pointers, 0, chunks);
  std::vector<int64_t> cuts = {0, chunks};
  for (int i = 0; i < 5; ++i) cuts.push_back(rng.Between(0, chunks));
  std::sort(cuts.begin(), cuts.end());
  for (size_t i = cuts.size() - 1; i-- > 0;) function(pointers, cuts[i], cuts[i + 1]);
}

// Two equal copies of the memory that a case's operands name: one for the kernel, one for the
// reference.
struct CaseMemory {
  std::deque<GuardedBuffer> ours, theirs;
  std::vector<void*> our_pointers, their_pointers;

  CaseMemory(Rng& rng, const Case& test) {
    for (const BufferPlan& plan : test.buffers) {
      int64_t bytes = plan.elements * DTypeSize(plan.dtype);
      our_pointers.push_back(ours.emplace_back(bytes).data());
      their_pointers.push_back(theirs.emplace_back(bytes).data());
      Fill(rng, plan, ours.back().data());
      std::memcpy(theirs.back().data(), ours.back().data(), bytes);
    }
    if (test.prepare) {
      reference::Run(std::get<AttentionSpec>(*test.prepare), our_pointers.data());
      reference::Run(std::get<AttentionSpec>(*test.prepare), their_pointers.data());
    }
  }

  void RunReference(const KernelSpec& spec) {
    std::visit([&](const auto& s) { reference::Run(s, their_pointers.data()); }, spec);
  }

  // Compares all of the memory, bit by bit; NaNs are equal. A positive tolerance allows for that
  // part of the largest magnitude in the buffer.
  ::testing::AssertionResult Equal(const KernelSpec& spec, double tolerance, double& worst) const {
    for (size_t i = 0; i < ours.size(); ++i) {
      if (!ours[i].MarginIntact()) {
        return ::testing::AssertionFailure()
               << "wrote outside buffer " << i << ": " << ToString(spec);
      }
      const auto* x = static_cast<const uint32_t*>(our_pointers[i]);
      const auto* y = static_cast<const uint32_t*>(their_pointers[i]);
      double largest = 0;
      for (int64_t j = 0; j < ours[i].bytes() / 4; ++j) {
        float b = std::bit_cast<float>(y[j]);
        if (std::isfinite(b)) largest = std::max<double>(largest, std::abs(b));
      }
      for (int64_t j = 0; j < ours[i].bytes() / 4; ++j) {
        float a = std::bit_cast<float>(x[j]), b = std::bit_cast<float>(y[j]);
        if (x[j] == y[j] || (std::isnan(a) && std::isnan(b))) continue;
        double error = std::abs(static_cast<double>(a) - b) / largest;
        if (tolerance > 0 && error <= tolerance) {
          worst = std::max(worst, error);
          continue;
        }
        return ::testing::AssertionFailure() << "buffer " << i << " word " << j << ": " << a
                                             << " instead of " << b << " in " << ToString(spec);
      }
    }
    return ::testing::AssertionSuccess();
  }
};

// Runs the kernel and the reference on equal memory and compares.
inline ::testing::AssertionResult Agrees(Rng& rng, const Case& test, KernelFunction function,
                                         double tolerance, double& worst) {
  CaseMemory memory(rng, test);
  CallInPieces(rng, function, memory.our_pointers.data(), Chunks(test.spec));
  memory.RunReference(test.spec);
  return memory.Equal(test.spec, tolerance, worst);
}

// --- LoopSpec

inline Case RandomLoop(Rng& rng, int64_t most) {
  Case test;
  LoopSpec s;
  int rank = static_cast<int>(rng.Between(0, 4));
  int64_t elements = 1;
  for (int d = 0; d < rank; ++d) {
    int64_t extent = rng.Pick({1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 40});
    if (elements * extent > most) extent = 1;
    if (rng.Chance(0.01)) extent = 0;
    elements *= std::max<int64_t>(extent, 1);
    s.extents.push_back(extent);
  }
  int inputs = static_cast<int>(rng.Between(0, 3)), outputs = static_cast<int>(rng.Between(1, 2));
  for (int i = 0; i < inputs; ++i) {
    s.inputs.push_back(RandomOperand(rng, test, s.extents, false));
    test.buffers.back().most_integer = 0;
    if (rng.Chance(0.15)) {
      s.inputs.back().dtype = test.buffers.back().dtype =
          rng.Chance(0.5) ? DType::kI32 : DType::kI64;
      test.buffers.back().most_integer = 20'000'000;
    }
  }
  for (int i = 0; i < outputs; ++i) {
    // Sometimes in place.
    if (i < inputs && s.inputs[i].dtype == DType::kF32 && rng.Chance(0.2) &&
        !std::count(s.inputs[i].strides.begin(), s.inputs[i].strides.end(), 0)) {
      s.outputs.push_back(s.inputs[i]);
    } else {
      s.outputs.push_back(RandomOperand(rng, test, s.extents, true));
    }
  }
  s.program = RandomProgram(rng, inputs, static_cast<int>(rng.Pick({0, 1, 2, 3, 8})), outputs);
  test.spec = s;
  return test;
}

// --- ReduceSpec

inline Epilogue RandomEpilogue(Rng& rng, Case& test, const std::vector<int64_t>& extents) {
  Epilogue e;
  int operands = static_cast<int>(rng.Pick({0, 0, 1, 2}));
  int outputs = static_cast<int>(rng.Pick({1, 1, 2}));
  for (int i = 0; i < operands; ++i) {
    e.operands.push_back(RandomOperand(rng, test, extents, false, 0.2, 0.4));
  }
  for (int i = 0; i < outputs; ++i) {
    e.outputs.push_back(RandomOperand(rng, test, extents, true, 0.2));
  }
  e.program = RandomProgram(rng, 1 + operands, static_cast<int>(rng.Pick({0, 1, 2, 4})), outputs);
  return e;
}

inline Case RandomReduce(Rng& rng, int64_t most) {
  Case test;
  ReduceSpec s;
  s.kind = rng.Chance(0.7) ? ReduceSpec::kSum : ReduceSpec::kMax;
  int64_t elements = 1;
  auto extents = [&](int64_t rank) {
    std::vector<int64_t> result;
    for (int64_t d = 0; d < rank; ++d) {
      int64_t extent = rng.Pick({1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 100, 300});
      if (elements * extent > most) extent = 1;
      if (rng.Chance(0.01)) extent = 0;
      elements *= std::max<int64_t>(extent, 1);
      result.push_back(extent);
    }
    return result;
  };
  if (rng.Chance(0.5)) {
    s.extents = extents(rng.Between(0, 3));
    s.reduced = extents(rng.Between(1, 3));
  } else {
    s.reduced = extents(rng.Between(1, 3));
    s.extents = extents(rng.Between(0, 3));
  }
  int inputs = static_cast<int>(rng.Between(1, 2));
  for (int i = 0; i < inputs; ++i) {
    s.inputs.push_back(RandomOperand(rng, test, reference::Join(s.extents, s.reduced), false));
  }
  // Exact on integers; without zeros of both signs among the candidates for a maximum.
  bool product = s.kind == ReduceSpec::kSum && rng.Chance(0.5);
  s.program = Recorded(inputs, [&](auto& in) {
    return inputs == 1 ? in[0] : product ? in[0] * in[1] : Max(in[0], in[1]);
  });
  s.epilogue = RandomEpilogue(rng, test, s.extents);
  test.spec = s;
  return test;
}

// --- ChainSpec

// Of `turns` blocks of rows, whose rows and blocks may lie apart: the sum of each row, its largest
// difference from the sum, and y = (x - sum) * largest + gain.
inline Case RowChain(Rng& rng, int64_t turns, int64_t rows, int64_t width) {
  Case test;
  const int64_t step = width + rng.Pick({0, 0, 1, 16}), block = rows * step + rng.Pick({0, 0, 5});
  const int64_t backwards = rng.Chance(0.3) ? -1 : 1;
  auto matrix = [&](int pointer) {
    int64_t offset = rng.Pick({0, 3}) + (backwards < 0 ? (turns - 1) * block : 0);
    return Operand{pointer, DType::kF32, offset, {step, 1}, backwards * block};
  };
  auto column = [&](int pointer, bool wide) {
    Operand operand{pointer, DType::kF32, 0, {1}, rows};
    if (wide) operand.strides.push_back(0);
    return operand;
  };
  const int64_t elements = turns * block + 3;
  test.buffers = {{DType::kF32, elements},
                  {DType::kF32, turns * rows},
                  {DType::kF32, turns * rows},
                  {DType::kF32, width},
                  {DType::kF32, elements}};
  const Operand x = matrix(0);
  ReduceSpec sum{.extents = {rows}, .reduced = {width}, .inputs = {x}, .program = Identity()};
  sum.epilogue = {Identity(), {}, {column(1, false)}};
  ReduceSpec largest{.kind = ReduceSpec::kMax, .extents = {rows}, .reduced = {width}};
  largest.inputs = {x, column(1, true)};
  largest.program = Recorded(2, [](const auto& v) { return v[0] - v[1]; });
  largest.epilogue = {Identity(), {}, {column(2, false)}};
  LoopSpec loop{.extents = {rows, width}};
  loop.inputs = {x, column(1, true), column(2, true), {3, DType::kF32, 0, {0, 1}}};
  loop.program = Recorded(4, [](const auto& v) { return (v[0] - v[1]) * v[2] + v[3]; });
  loop.outputs = {matrix(4)};
  test.spec = ChainSpec{turns, {sum, largest, loop}};
  return test;
}

// --- ContractionSpec

inline void Plan(Case& test, const Operand& operand, const std::vector<int64_t>& extents) {
  BufferPlan plan;
  plan.elements = operand.offset + 1;
  for (size_t d = 0; d < extents.size(); ++d) {
    plan.elements += std::max<int64_t>(extents[d] - 1, 0) * operand.strides[d];
  }
  test.buffers.push_back(plan);
}

// y[m, n] = sum_k x[m, k] w[k, n] with each matrix in one of its two layouts.
inline Case MatrixProduct(Rng& rng, int64_t m, int64_t n, int64_t k, bool plain) {
  Case test;
  ContractionSpec s;
  s.m = {m};
  s.n = n;
  s.k = {k};
  bool at = !plain && rng.Chance(0.3), bt = !plain && rng.Chance(0.3),
       ct = !plain && rng.Chance(0.2);
  s.a = {0, DType::kF32, 0, at ? Index{1, m} : Index{k, 1}};
  Plan(test, s.a, {m, k});
  s.b = {1, DType::kF32, 0, bt ? Index{0, 1, k} : Index{0, n, 1}};
  Plan(test, s.b, {m, k, n});
  s.epilogue = RandomEpilogue(rng, test, {m, n});
  Operand& out = s.epilogue.outputs[0];
  out.offset = 0;
  out.strides = ct ? Index{1, m} : Index{n, 1};
  test.buffers[out.pointer].elements = m * n;
  test.spec = s;
  return test;
}

// A convolution of x [B, H, W, C] by w [panels, kh, kw, C, N] to [B, h, w, panels, N].
inline Case Convolution(Rng& rng, int64_t batch, int64_t rows, int64_t columns, int64_t in,
                        int64_t panels, int64_t out, int64_t kernel, int64_t stride) {
  Case test;
  ContractionSpec s;
  int64_t height = (rows - 1) * stride + kernel, width = (columns - 1) * stride + kernel;
  s.m = {batch, panels, rows, columns};
  s.n = out;
  s.k = {kernel, kernel, in};
  s.a = {0,
         DType::kF32,
         0,
         {height * width * in, 0, stride * width * in, stride * in, width * in, in, 1}};
  s.b = {1,
         DType::kF32,
         0,
         {0, kernel * kernel * in * out, 0, 0, kernel * in * out, in * out, out, 1}};
  std::vector<int64_t> all = {batch, panels, rows, columns, kernel, kernel, in, out};
  Plan(test, s.a, {batch, panels, rows, columns, kernel, kernel, in});
  Plan(test, s.b, all);
  s.epilogue = RandomEpilogue(rng, test, {batch, panels, rows, columns, out});
  test.spec = s;
  return test;
}

// The gradient of 3x3 weights: x [B, S + 2, S + 2, C] and dy [B, S, S, N] to dw [3, 3, C, N] or, if
// `transposed`, [N, C, 3, 3]. Its sum is long.
inline Case WeightGradient(int64_t batch, int64_t size, int64_t in, int64_t out, bool transposed) {
  Case test;
  ContractionSpec s;
  int64_t row = (size + 2) * in, picture = (size + 2) * row;
  s.m = {3, 3, in};
  s.n = out;
  s.k = {batch, size, size};
  s.a = {0, DType::kF32, 0, {row, in, 1, picture, row, in}};
  s.b = {1, DType::kF32, 0, {0, 0, 0, size * size * out, size * out, out, 1}};
  s.epilogue.program = Identity();
  s.epilogue.outputs = {{2, DType::kF32, 0, {3 * in * out, in * out, out, 1}}};
  if (transposed) s.epilogue.outputs[0].strides = {3, 1, 9, 9 * in};
  test.buffers = {{DType::kF32, batch * picture},
                  {DType::kF32, batch * size * size * out},
                  {DType::kF32, 9 * in * out}};
  test.spec = s;
  return test;
}

// Any strides at all.
inline Case RandomContraction(Rng& rng, int64_t most) {
  Case test;
  ContractionSpec s;
  int64_t size = 1;
  auto extent = [&] {
    int64_t e = rng.Pick({1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 20, 33});
    if (size * e > most) e = 1;
    if (rng.Chance(0.005)) e = 0;
    size *= std::max<int64_t>(e, 1);
    return e;
  };
  for (int64_t i = rng.Between(0, 3); i > 0; --i) s.m.push_back(extent());
  s.n = extent();
  for (int64_t i = rng.Between(0, 3); i > 0; --i) s.k.push_back(extent());
  s.a = RandomOperand(rng, test, reference::Join(s.m, s.k), false, 0.4, 0.3);
  s.b =
      RandomOperand(rng, test, reference::Join(reference::Join(s.m, s.k), {s.n}), false, 0.4, 0.4);
  s.epilogue = RandomEpilogue(rng, test, reference::Join(s.m, {s.n}));
  test.spec = s;
  return test;
}

// A layer of the U-Net: 3x3 convolution of x [B, S + 2, S + 2, C] by packed w [O / N][3][3][C][N].
inline Case Layer(int64_t batch, int64_t size, int64_t in, int64_t out, int64_t panel) {
  Case test;
  ContractionSpec s;
  int64_t padded = size + 2;
  s.m = {batch, out / panel, size, size};
  s.n = panel;
  s.k = {3, 3, in};
  s.a = {0, DType::kF32, 0, {padded * padded * in, 0, padded * in, in, padded * in, in, 1}};
  s.b = {1, DType::kF32, 0, {0, 9 * in * panel, 0, 0, 3 * in * panel, in * panel, panel, 1}};
  s.epilogue.program = Identity();
  s.epilogue.outputs = {{2, DType::kF32, 0, {size * size * out, panel, size * out, out, 1}}};
  test.buffers = {{DType::kF32, batch * padded * padded * in, 0},
                  {DType::kF32, 9 * in * out, 0},
                  {DType::kF32, batch * size * size * out, 0}};
  for (BufferPlan& plan : test.buffers) plan.plain = true;
  test.spec = s;
  return test;
}

// --- Attention

// Token layout [B, L, H * D]: strides over b, h, i, d; a batch stride of 0 shares the memory.
inline Operand Tokens(Case& test, int64_t batch, int64_t heads, int64_t tokens, int64_t width,
                      bool shared) {
  Operand operand;
  operand.pointer = static_cast<int>(test.buffers.size());
  operand.strides = {shared ? 0 : tokens * heads * width, width, heads * width, 1};
  test.buffers.push_back({DType::kF32, (shared ? 1 : batch) * tokens * heads * width, 0});
  return operand;
}

struct AttentionCase {
  int64_t batch, heads, queries, keys, head_dim, value_dim;
  bool causal = false;
  int mask = 0;  // 1: [B, 1, 1, S], 2: [1, 1, L, S], 3: [B, H, L, S]
  bool shared = false;
};

inline Case Attention(const AttentionCase& c) {
  Case test;
  AttentionSpec s;
  s.batch = c.batch;
  s.heads = c.heads;
  s.queries = c.queries;
  s.keys = c.keys;
  s.head_dim = c.head_dim;
  s.value_dim = c.value_dim;
  s.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
  s.causal = c.causal;
  s.has_mask = c.mask > 0;
  s.q = Tokens(test, c.batch, c.heads, c.queries, c.head_dim, false);
  s.k = Tokens(test, c.batch, c.heads, c.keys, c.head_dim, c.shared);
  s.v = Tokens(test, c.batch, c.heads, c.keys, c.value_dim, c.shared);
  s.out = Tokens(test, c.batch, c.heads, c.queries, c.value_dim, false);
  s.lse = {4, DType::kF32, 0, {c.heads * c.queries, c.queries, 1}};
  test.buffers.push_back({DType::kF32, c.batch * c.heads * c.queries, 0});
  if (c.mask > 0) {
    s.mask = {5, DType::kF32, 0, {}};
    int64_t all = c.heads * c.queries * c.keys, one = c.queries * c.keys;
    s.mask.strides = c.mask == 1   ? Index{c.keys, 0, 0, 1}
                     : c.mask == 2 ? Index{0, 0, c.keys, 1}
                                   : Index{all, one, c.keys, 1};
    test.buffers.push_back({DType::kF32,
                            c.mask == 1   ? c.batch * c.keys
                            : c.mask == 2 ? one
                                          : c.batch * all,
                            0});
  }
  for (BufferPlan& plan : test.buffers) plan.plain = true;
  if (c.mask > 0) test.buffers.back().mask_row = c.keys;
  test.spec = s;
  return test;
}

// out and lse come from the forward kernel's reference. part > 0: sums for each so many queries.
inline Case AttentionGradient(const AttentionCase& c, int64_t part = 0) {
  Case test = Attention(c);
  AttentionGradientSpec g;
  g.forward = std::get<AttentionSpec>(test.spec);
  test.prepare = test.spec;
  g.dout = Tokens(test, c.batch, c.heads, c.queries, c.value_dim, false);
  g.dq = Tokens(test, c.batch, c.heads, c.queries, c.head_dim, false);
  g.dk = Tokens(test, c.batch, c.heads, c.keys, c.head_dim, c.shared);
  g.dv = Tokens(test, c.batch, c.heads, c.keys, c.value_dim, c.shared);
  g.part = part;
  for (auto [operand, step] : {std::pair{&g.dk, &g.dk_step}, std::pair{&g.dv, &g.dv_step}}) {
    BufferPlan& plan = test.buffers[operand->pointer];
    *step = plan.elements;
    plan.elements *= g.Parts();
  }
  for (BufferPlan& plan : test.buffers) plan.plain = true;
  test.spec = g;
  return test;
}

// --- Gather, ScatterAdd, Philox

// A gather and a scatter of the same extents.
inline std::pair<Case, Case> RandomGatherAndScatter(Rng& rng) {
  std::vector<int64_t> outer, index, inner;
  if (rng.Chance(0.5)) outer = {rng.Between(1, 3)};
  for (int64_t d = rng.Between(0, 2); d > 0; --d) index.push_back(rng.Between(1, 6));
  for (int64_t d = rng.Between(0, 2); d > 0; --d) inner.push_back(rng.Pick({1, 3, 8, 16, 37, 64}));
  int64_t axis = rng.Between(1, 9);
  std::vector<int64_t> small = reference::Join(reference::Join(outer, {axis}), inner);
  std::vector<int64_t> large = reference::Join(reference::Join(outer, index), inner);
  auto indices = [&](Case& test) {
    Operand operand = RandomOperand(rng, test, index, false, 0, 0);
    BufferPlan& plan = test.buffers.back();
    operand.dtype = plan.dtype = rng.Chance(0.5) ? DType::kI32 : DType::kI64;
    plan.least_integer = 0;
    plan.most_integer = axis - 1;
    return operand;
  };
  Case gather, scatter;
  GatherSpec g{outer, index, inner, axis, {}, {}, {}};
  g.x = RandomOperand(rng, gather, small, false, 0.1, 0);
  g.indices = indices(gather);
  g.out = RandomOperand(rng, gather, large, true, 0.1);
  if (rng.Chance(0.2)) {
    g.x.dtype = g.out.dtype = DType::kI64;
    gather.buffers[g.x.pointer].dtype = gather.buffers[g.out.pointer].dtype = DType::kI64;
  }
  gather.spec = g;
  ScatterAddSpec s{outer, index, inner, axis, {}, {}, {}};
  s.dy = RandomOperand(rng, scatter, large, false, 0.1, 0);
  s.indices = indices(scatter);
  s.out = RandomOperand(rng, scatter, small, true, 0.1);
  scatter.spec = s;
  return {gather, scatter};
}

inline Case PhiloxNumbers(int64_t elements) {
  Case test;
  test.buffers = {{DType::kI64, 1, 2'000'000'000, -2'000'000'000}, {DType::kF32, elements}};
  test.spec = PhiloxSpec{elements,
                         7 * elements + (int64_t{3} << 33),
                         {0, DType::kI64, 0, {1}},
                         {1, DType::kF32, 0, {1}}};
  return test;
}

}  // namespace calotype::jit
