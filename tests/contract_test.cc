// Contractions on oneDNN against plain loops: random shapes within the rounding bound, small
// integers bit for bit; the kernels of every instruction-set level that this machine has.
#include "core/contract.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "core/attention_kernels.h"
#include "core/contract_reference.h"
#include "core/error.h"
#include "core/isa.h"
#include "core/norm_kernels.h"
#include "core/parallel.h"
#include "core/random.h"
#include "core/tensor.h"

namespace calotype {
namespace {

std::vector<float> RandomFloats(Random& random, int64_t n, bool integers) {
  std::vector<float> x(n);
  for (float& v : x) {
    v = integers ? static_cast<float>(random.Integer(7) - 3) : random.Normal();
  }
  return x;
}

std::vector<double> Doubles(const std::vector<float>& x) { return {x.begin(), x.end()}; }

std::vector<double> Magnitudes(const std::vector<float>& x) {
  std::vector<double> y;
  for (float v : x) y.push_back(std::abs(static_cast<double>(v)));
  return y;
}

// |actual - expected| <= u (2 sqrt(K) + 2) sum |a| |b|, element by element; with integers no error
// at all. `magnitude` holds sum |a| |b|.
void ExpectWithinBound(const std::vector<float>& actual, const std::vector<double>& expected,
                       const std::vector<double>& magnitude, int64_t terms, bool integers) {
  ASSERT_EQ(actual.size(), expected.size());
  double factor = integers ? 0 : 0x1p-24 * (2 * std::sqrt(static_cast<double>(terms)) + 2);
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_LE(std::abs(actual[i] - expected[i]), factor * magnitude[i])
        << "element " << i << ": " << actual[i] << " against " << expected[i];
  }
}

// ------------------------------------------------------------------------------------- MatMul

struct MatMulCase {
  int64_t batch, m, n, k;
  bool transpose_a, transpose_b, share_a, share_b, bias;
};

void CheckMatMul(const MatMulCase& c, Random& random, bool integers) {
  SCOPED_TRACE(fmt::format(
      "batch {} m {} n {} k {} transposed {} {} shared {} {} bias {} integers {}", c.batch, c.m,
      c.n, c.k, c.transpose_a, c.transpose_b, c.share_a, c.share_b, c.bias, integers));
  MatMulShape s;
  s.batch = c.batch;
  s.m = c.m;
  s.n = c.n;
  s.k = c.k;
  s.a_batch = c.share_a ? 0 : c.m * c.k;
  s.a_row = c.transpose_a ? 1 : c.k;
  s.a_col = c.transpose_a ? c.m : 1;
  s.b_batch = c.share_b ? 0 : c.n * c.k;
  s.b_row = c.transpose_b ? 1 : c.n;
  s.b_col = c.transpose_b ? c.k : 1;
  auto a = RandomFloats(random, (c.share_a ? 1 : c.batch) * c.m * c.k, integers);
  auto b = RandomFloats(random, (c.share_b ? 1 : c.batch) * c.n * c.k, integers);
  auto bias = RandomFloats(random, c.n, integers);
  std::vector<float> actual(c.batch * c.m * c.n, std::numeric_limits<float>::quiet_NaN());
  MatMul(s, a.data(), b.data(), c.bias ? bias.data() : nullptr, actual.data());
  std::vector<double> expected(actual.size()), magnitude(actual.size());
  auto da = Doubles(a), db = Doubles(b), dbias = Doubles(bias);
  reference::MatMul<double>(s, da.data(), db.data(), c.bias ? dbias.data() : nullptr,
                            expected.data());
  auto ma = Magnitudes(a), mb = Magnitudes(b), mbias = Magnitudes(bias);
  reference::MatMul<double>(s, ma.data(), mb.data(), c.bias ? mbias.data() : nullptr,
                            magnitude.data());
  ExpectWithinBound(actual, expected, magnitude, c.k + 1, integers);
}

TEST(MatMulTest, RandomShapes) {
  Random random(11);
  const int64_t sizes[] = {1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100};
  int above_tiny = 0;
  for (int i = 0; i < 400; ++i) {
    auto size = [&] { return sizes[random.Integer(std::size(sizes))]; };
    auto flip = [&] { return random.Integer(2) == 1; };
    MatMulCase c{
        1 + random.Integer(3), size(), size(), size(), flip(), flip(), flip(), flip(), flip()};
    above_tiny += c.batch * c.m * c.n * c.k > 4096;
    CheckMatMul(c, random, flip());
  }
  EXPECT_GT(above_tiny, 150);
}

TEST(MatMulTest, LongAndThinShapes) {
  Random random(12);
  for (bool integers : {false, true}) {
    CheckMatMul({1, 4096, 64, 64, false, false, false, false, true}, random, integers);
    CheckMatMul({1, 64, 64, 4096, true, false, false, false, false}, random, integers);
    CheckMatMul({1, 1, 300, 500, false, false, false, false, true}, random, integers);
    CheckMatMul({1, 300, 1, 500, false, true, false, false, true}, random, integers);
    CheckMatMul({5, 1, 64, 128, false, false, false, true, true}, random, integers);
    CheckMatMul({64, 5, 7, 11, false, true, true, false, true}, random, integers);
  }
}

TEST(MatMulTest, EmptySizes) {
  Random random(13);
  CheckMatMul({0, 3, 4, 5, false, false, false, false, true}, random, true);
  CheckMatMul({2, 0, 4, 5, false, false, false, false, true}, random, true);
  CheckMatMul({2, 3, 0, 5, false, false, false, false, true}, random, true);
  CheckMatMul({2, 3, 4, 0, false, false, false, false, true}, random, true);  // the bias alone
}

// ------------------------------------------------------------------------------------- Conv2d

void CheckConv2d(const Conv2dShape& s, Random& random, bool integers) {
  SCOPED_TRACE(
      fmt::format("batch {} {}->{} {}x{} kernel {}x{} stride {} padding {} {} {} {} integers {}",
                  s.batch, s.in, s.out, s.height, s.width, s.kernel_h, s.kernel_w, s.stride, s.top,
                  s.bottom, s.left, s.right, integers));
  int64_t nx = s.batch * s.in * s.height * s.width, nw = s.out * s.in * s.kernel_h * s.kernel_w;
  int64_t ny = s.batch * s.out * s.out_height() * s.out_width();
  auto x = RandomFloats(random, nx, integers), w = RandomFloats(random, nw, integers);
  auto bias = RandomFloats(random, s.out, integers), dy = RandomFloats(random, ny, integers);
  auto dx64 = Doubles(x), dw64 = Doubles(w), db64 = Doubles(bias), dy64 = Doubles(dy);
  auto mx = Magnitudes(x), mw = Magnitudes(w), mb = Magnitudes(bias), my = Magnitudes(dy);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (bool with_bias : {true, false}) {
    SCOPED_TRACE(with_bias ? "forward, bias" : "forward");
    std::vector<float> y(ny, nan);
    Conv2dForward(s, x.data(), w.data(), with_bias ? bias.data() : nullptr, y.data());
    std::vector<double> expected(ny), magnitude(ny);
    reference::Conv2dForward<double>(s, dx64.data(), dw64.data(), with_bias ? db64.data() : nullptr,
                                     expected.data());
    reference::Conv2dForward<double>(s, mx.data(), mw.data(), with_bias ? mb.data() : nullptr,
                                     magnitude.data());
    ExpectWithinBound(y, expected, magnitude, s.in * s.kernel_h * s.kernel_w + 1, integers);
  }
  {
    SCOPED_TRACE("input gradient");
    std::vector<float> dx(nx, nan);
    Conv2dBackwardInput(s, dy.data(), w.data(), dx.data());
    std::vector<double> expected(nx), magnitude(nx);
    reference::Conv2dBackwardInput<double>(s, dy64.data(), dw64.data(), expected.data());
    reference::Conv2dBackwardInput<double>(s, my.data(), mw.data(), magnitude.data());
    ExpectWithinBound(dx, expected, magnitude, s.out * s.kernel_h * s.kernel_w, integers);
  }
  {
    SCOPED_TRACE("weight gradient");
    std::vector<float> dw(nw, nan);
    Conv2dBackwardWeight(s, x.data(), dy.data(), dw.data());
    std::vector<double> expected(nw), magnitude(nw);
    reference::Conv2dBackwardWeight<double>(s, dx64.data(), dy64.data(), expected.data());
    reference::Conv2dBackwardWeight<double>(s, mx.data(), my.data(), magnitude.data());
    ExpectWithinBound(dw, expected, magnitude, s.batch * s.out_height() * s.out_width(), integers);
  }
}

Conv2dShape Square(int64_t batch, int64_t in, int64_t size, int64_t out, int64_t kernel,
                   int64_t stride, int64_t padding) {
  return {batch, in, size, size, out, kernel, kernel, stride, padding, padding, padding, padding};
}

TEST(Conv2dTest, ShapesOfTheModels) {
  Random random(21);
  for (bool integers : {false, true}) {
    CheckConv2d(Square(2, 3, 16, 32, 3, 1, 1), random, integers);
    CheckConv2d(Square(2, 32, 16, 3, 3, 1, 1), random, integers);
    CheckConv2d(Square(2, 64, 8, 64, 3, 1, 1), random, integers);
    CheckConv2d(Square(3, 96, 8, 32, 1, 1, 0), random, integers);
    CheckConv2d(Square(2, 32, 16, 32, 3, 2, 1), random, integers);
    CheckConv2d({1, 16, 9, 9, 16, 3, 3, 2, 0, 1, 0, 1}, random, integers);
  }
}

TEST(Conv2dTest, RandomShapes) {
  Random random(22);
  const int64_t channels[] = {1, 3, 7, 8, 15, 16, 17, 24, 33};
  int above_tiny = 0;
  for (int i = 0; i < 200; ++i) {
    auto channel = [&] { return channels[random.Integer(std::size(channels))]; };
    Conv2dShape s;
    s.batch = 1 + random.Integer(3);
    s.in = channel();
    s.out = channel();
    s.kernel_h = 1 + random.Integer(4);
    s.kernel_w = 1 + random.Integer(4);
    s.height = s.kernel_h + random.Integer(9);
    s.width = s.kernel_w + random.Integer(9);
    s.stride = 1 + random.Integer(3);
    s.top = random.Integer(s.kernel_h);
    s.bottom = random.Integer(s.kernel_h);
    s.left = random.Integer(s.kernel_w);
    s.right = random.Integer(s.kernel_w);
    above_tiny +=
        s.batch * s.out * s.out_height() * s.out_width() * s.in * s.kernel_h * s.kernel_w > 4096;
    CheckConv2d(s, random, random.Integer(2) == 1);
  }
  EXPECT_GT(above_tiny, 80);
}

TEST(Conv2dTest, PointwiseIsNotMixedUpWithAMatMulOfItsShape) {
  // A 1x1 convolution is a product whose bias belongs to the rows of the result.
  Random random(24);
  const int64_t in = 20, out = 18, positions = 25;
  auto w = RandomFloats(random, out * in, true), x = RandomFloats(random, 2 * in * positions, true);
  auto bias = RandomFloats(random, positions, true);
  std::vector<float> y(2 * out * positions), expected(y.size());
  MatMulShape s{.batch = 2,
                .m = out,
                .n = positions,
                .k = in,
                .a_row = in,
                .b_batch = in * positions,
                .b_row = positions};
  Conv2dShape conv = Square(2, in, 5, out, 1, 1, 0);
  for (int i = 0; i < 2; ++i) {
    MatMul(s, w.data(), x.data(), bias.data(), y.data());
    reference::MatMul<float>(s, w.data(), x.data(), bias.data(), expected.data());
    EXPECT_EQ(y, expected);
    Conv2dForward(conv, x.data(), w.data(), bias.data(), y.data());
    reference::Conv2dForward<float>(conv, x.data(), w.data(), bias.data(), expected.data());
    EXPECT_EQ(y, expected);
  }
}

TEST(Conv2dTest, EmptySizesAndErrors) {
  Random random(23);
  CheckConv2d(Square(0, 3, 4, 2, 3, 1, 1), random, true);
  CheckConv2d(Square(2, 0, 4, 2, 3, 1, 1), random, true);
  CheckConv2d(Square(2, 3, 4, 0, 3, 1, 1), random, true);
  float x[1] = {}, y[1] = {};
  EXPECT_THROW(Conv2dForward(Square(1, 1, 2, 1, 4, 2, 0), x, x, nullptr, y), ShapeError);
  EXPECT_THROW(Conv2dForward(Square(1, 1, 2, 1, 1, 0, 0), x, x, nullptr, y), ShapeError);
}

// ------------------------------------------------------------------------------ plans and scratch

TEST(PlanTest, SecondCallAllocatesNothing) {
  Random random(31);
  Conv2dShape s = Square(2, 17, 12, 33, 3, 1, 1);
  auto x = RandomFloats(random, 2 * 17 * 144, false), w = RandomFloats(random, 33 * 17 * 9, false);
  std::vector<float> y(2 * 33 * 144), dx(x.size()), dw(w.size());
  auto call = [&] {
    Conv2dForward(s, x.data(), w.data(), nullptr, y.data());
    Conv2dBackwardInput(s, y.data(), w.data(), dx.data());
    Conv2dBackwardWeight(s, x.data(), y.data(), dw.data());
  };
  call();
  int64_t before = MemoryStats::Allocations();
  call();
  EXPECT_EQ(MemoryStats::Allocations(), before);
}

TEST(PlanTest, OnePlanRunsOnManyThreads) {
  Random random(32);
  Conv2dShape s = Square(2, 16, 10, 16, 3, 1, 1);
  auto w = RandomFloats(random, 16 * 16 * 9, true);
  std::vector<std::vector<float>> inputs, expected, actual;
  for (int t = 0; t < 4; ++t) {
    inputs.push_back(RandomFloats(random, 2 * 16 * 100, true));
    expected.emplace_back(2 * 16 * 100);
    actual.emplace_back(2 * 16 * 100);
    reference::Conv2dForward<float>(s, inputs[t].data(), w.data(), nullptr, expected[t].data());
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        Conv2dForward(s, inputs[t].data(), w.data(), nullptr, actual[t].data());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int t = 0; t < 4; ++t) EXPECT_EQ(actual[t], expected[t]);
}

TEST(PlanTest, MoreShapesThanTheCacheHolds) {
  Random random(33);
  auto a = RandomFloats(random, 1200 * 8, true), b = RandomFloats(random, 64, true);
  std::vector<float> actual(1200 * 8), expected(1200 * 8);
  for (int64_t m = 100; m < 1200; ++m) {
    MatMulShape s{.m = m, .n = 8, .k = 8, .a_row = 8, .b_row = 8};
    MatMul(s, a.data(), b.data(), nullptr, actual.data());
    if (m % 100 != 0) continue;
    reference::MatMul<float>(s, a.data(), b.data(), nullptr, expected.data());
    ASSERT_EQ(actual, expected) << m;
  }
}

// ------------------------------------------------------------------- instruction-set levels

struct Level {
  const char* name;
  const NormKernels& norm;
  const AttentionKernels& attention;
};

std::vector<Level> Levels() {
  std::vector<Level> levels;
#if defined(__x86_64__)
  levels.push_back({"v2", v2::kNormKernels, v2::kAttentionKernels});
  if (HostIsa() >= IsaLevel::v3) {
    levels.push_back({"v3", v3::kNormKernels, v3::kAttentionKernels});
  }
  if (HostIsa() >= IsaLevel::v4) {
    levels.push_back({"v4", v4::kNormKernels, v4::kAttentionKernels});
  }
#else
  levels.push_back({"base", base::kNormKernels, base::kAttentionKernels});
#endif
  return levels;
}

void ExpectNear(const std::vector<float>& actual, const std::vector<double>& expected,
                double tolerance) {
  double largest = 0;
  for (double y : expected) largest = std::max(largest, std::abs(y));
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], tolerance * largest) << "element " << i;
  }
}

TEST(LevelTest, NormsMatchDoubleLoops) {
  Random random(41);
  for (const Level& level : Levels()) {
    for (int64_t width : {1, 5, 16, 31, 64, 65, 130}) {
      SCOPED_TRACE(fmt::format("{} width {}", level.name, width));
      auto x = RandomFloats(random, 3 * width, false), gamma = RandomFloats(random, width, false);
      auto beta = RandomFloats(random, width, false);
      for (float& v : x) v += 1000;  // centring matters
      std::vector<float> y(3 * width), mean(3), rstd(3), p(3 * width);
      level.norm.layer_forward(3, width, 1e-5, x.data(), gamma.data(), beta.data(), y.data(),
                               mean.data(), rstd.data());
      level.norm.softmax_forward(3, width, x.data(), p.data());
      std::vector<double> norm(3 * width), softmax(3 * width);
      for (int64_t row = 0; row < 3; ++row) {
        const float* in = x.data() + row * width;
        double sum = 0, squares = 0, top = in[0], exps = 0;
        for (int64_t i = 0; i < width; ++i) sum += in[i];
        double m = sum / static_cast<double>(width);
        for (int64_t i = 0; i < width; ++i) {
          squares += (in[i] - m) * (in[i] - m);
          top = std::max<double>(top, in[i]);
        }
        for (int64_t i = 0; i < width; ++i) exps += std::exp(in[i] - top);
        double r = 1 / std::sqrt(squares / static_cast<double>(width) + 1e-5);
        for (int64_t i = 0; i < width; ++i) {
          norm[row * width + i] = (in[i] - m) * r * gamma[i] + beta[i];
          softmax[row * width + i] = std::exp(in[i] - top) / exps;
        }
      }
      // The mean near 1000 is rounded to 2^-14; a variance by E[x^2] - mean^2 would lose all
      // digits.
      ExpectNear(y, norm, width == 1 ? 1 : 2e-4);
      ExpectNear(p, softmax, 5e-7);
    }
  }
}

TEST(LevelTest, AttentionMatchesDoubleLoops) {
  Random random(42);
  for (const Level& level : Levels()) {
    for (auto [queries, keys, width] :
         {std::array<int64_t, 3>{5, 7, 3}, {16, 16, 16}, {37, 70, 20}, {64, 64, 16}, {33, 9, 40}}) {
      SCOPED_TRACE(
          fmt::format("{} {} queries, {} keys, width {}", level.name, queries, keys, width));
      AttentionShape s;
      s.queries = queries;
      s.keys = keys;
      s.head_dim = s.value_dim = width;
      s.scale = 0.3f;
      s.block_kv = 32;
      auto q = RandomFloats(random, queries * width, false);
      auto k = RandomFloats(random, keys * width, false),
           v = RandomFloats(random, keys * width, false);
      auto dout = RandomFloats(random, queries * width, false);
      std::vector<float> out(q.size()), lse(queries), dq(q.size()), dk(k.size()), dv(v.size());
      AttentionHead head{};
      head.q = q.data();
      head.k = k.data();
      head.v = v.data();
      head.q_row = head.v_row = width;
      head.out = out.data();
      head.lse = lse.data();
      head.dout = dout.data();
      head.dq = dq.data();
      head.dk = dk.data();
      head.dv = dv.data();
      Tensor scratch(
          {std::max(level.attention.forward_scratch(s), level.attention.backward_scratch(s))});
      level.attention.forward(s, head, 0, queries, scratch.data());
      level.attention.backward(s, head, scratch.data());

      std::vector<double> eout(q.size()), edq(q.size()), edk(k.size()), edv(v.size());
      for (int64_t i = 0; i < queries; ++i) {
        std::vector<double> p(keys), dp(keys);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < keys; ++j) {
          double dot = 0;
          for (int64_t d = 0; d < width; ++d) dot += double{q[i * width + d]} * k[j * width + d];
          sum += p[j] = std::exp(double{s.scale} * dot);
        }
        for (int64_t j = 0; j < keys; ++j) {
          p[j] /= sum;
          for (int64_t d = 0; d < width; ++d) {
            eout[i * width + d] += p[j] * v[j * width + d];
            dp[j] += double{dout[i * width + d]} * v[j * width + d];
            edv[j * width + d] += p[j] * dout[i * width + d];
          }
          delta += p[j] * dp[j];
        }
        for (int64_t j = 0; j < keys; ++j) {
          double ds = p[j] * (dp[j] - delta) * double{s.scale};
          for (int64_t d = 0; d < width; ++d) {
            edq[i * width + d] += ds * k[j * width + d];
            edk[j * width + d] += ds * q[i * width + d];
          }
        }
      }
      ExpectNear(out, eout, 2e-6);
      ExpectNear(dq, edq, 4e-6);
      ExpectNear(dk, edk, 4e-6);
      ExpectNear(dv, edv, 4e-6);
    }
  }
}

}  // namespace
}  // namespace calotype
