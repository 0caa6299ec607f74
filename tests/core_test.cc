// Shapes, tensors, errors, threads, random numbers and the scalar approximations.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

#include "core/error.h"
#include "core/json.h"
#include "core/parallel.h"
#include "core/random.h"
#include "core/scalar.h"
#include "core/tensor.h"
#include "tests/expect_error.h"

namespace calotype {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

TEST(ShapeTest, AxesStridesAndText) {
  Shape s{2, 3, 4};
  EXPECT_EQ(s.elements(), 24);
  EXPECT_EQ(s[-1], 4);
  EXPECT_EQ(s.ToString(), "[2, 3, 4]");
  EXPECT_THAT(s.Strides(), ElementsAre(12, 4, 1, 0, 0, 0, 0, 0));
  EXPECT_EQ(Shape{}.elements(), 1);
  EXPECT_EQ((Shape{3, 0}).elements(), 0);
  EXPECT_THROW(s[3], ShapeError);
  EXPECT_THROW(s[-4], ShapeError);
}

TEST(ShapeTest, OverflowIsAnErrorInEveryOrder) {
  const int64_t big = int64_t{1} << 40;
  EXPECT_THROW((Shape{big, big}), ShapeError);
  EXPECT_THROW((Shape{big, big, 0}), ShapeError);  // a zero hides nothing
  EXPECT_THROW((Shape{0, big, big}), ShapeError);
  EXPECT_THROW((Shape{std::numeric_limits<int64_t>::max(), 2}), ShapeError);
  EXPECT_THROW((Shape{-1, 2}), ShapeError);
  EXPECT_THROW((Shape{(int64_t{1} << 48) + 1}), ShapeError);
  EXPECT_NO_THROW((Shape{int64_t{1} << 48}));
  EXPECT_THROW(Shape(std::vector<int64_t>(9, 1)), ShapeError);
  EXPECT_THROW(CheckedMul(big, big, "x"), ShapeError);
  EXPECT_THROW(CheckedAdd(std::numeric_limits<int64_t>::max(), 1, "x"), ShapeError);
}

TEST(ShapeTest, BroadcastIsNumPys) {
  EXPECT_EQ(BroadcastShapes({3, 1}, {2, 1, 4}), (Shape{2, 3, 4}));
  EXPECT_EQ(BroadcastShapes({}, {5}), Shape{5});
  EXPECT_EQ(BroadcastShapes({1}, {0}), Shape{0});
  EXPECT_THAT(MessageOf<ShapeError>([] { BroadcastShapes({2}, {3}); }), HasSubstr("[2] and [3]"));
}

TEST(TensorTest, CopiesShareAndClonesDoNot) {
  Tensor a = Tensor::From<float>({2, 2}, {1, 2, 3, 4});
  Tensor shared = a, view = a.Reshape({4}), clone = a.Clone();
  a.data()[0] = 9;
  EXPECT_EQ(shared.data()[0], 9);
  EXPECT_EQ(view.data()[0], 9);
  EXPECT_EQ(clone.data()[0], 1);
  EXPECT_TRUE(view.SharesStorage(a));
  EXPECT_FALSE(a.Unique());
  EXPECT_TRUE(clone.Unique());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a.raw()) % 64, 0u);
}

TEST(TensorTest, ErrorsAreTyped) {
  Tensor a = Tensor::Zeros({2, 3});
  EXPECT_THROW(a.Reshape({5}), ShapeError);
  EXPECT_THROW(a.data<int64_t>(), ShapeError);
  EXPECT_THROW(Tensor().data(), ShapeError);
  EXPECT_THROW(a.Item(), ShapeError);
  EXPECT_THROW(a.CopyFrom(Tensor::Zeros({3, 2})), ShapeError);
  // An undefined tensor has the type f32[] but no element.
  Tensor undefined, scalar = Tensor::Scalar(1);
  EXPECT_THROW(undefined.Clone(), ShapeError);
  EXPECT_THROW(undefined.To(DType::kF64), ShapeError);
  EXPECT_THROW(undefined.Item(), ShapeError);
  EXPECT_THROW(undefined.CopyFrom(scalar), ShapeError);
  EXPECT_THROW(scalar.CopyFrom(undefined), ShapeError);
  EXPECT_THAT(MessageOf<ShapeError>([] {
                Tensor::From<float>({3}, {1, 2});
              }),
              HasSubstr("2 values do not fill shape [3]"));
  // Far more than the machine has: an error, not a crash.
  EXPECT_THROW(Tensor(Shape{int64_t{1} << 47}), OutOfMemoryError);
}

TEST(TensorTest, Conversions) {
  Tensor x = Tensor::From<float>({3}, {1.5f, -2, 0});
  EXPECT_THAT(x.To(DType::kF64).values<double>(), ElementsAre(1.5, -2, 0));
  EXPECT_THAT(x.To(DType::kI32).values<int32_t>(), ElementsAre(1, -2, 0));
  EXPECT_EQ(Tensor::Scalar(2.5f).Item(), 2.5);
}

TEST(TensorTest, MemoryIsCounted) {
  const int64_t before = MemoryStats::LiveBytes();
  MemoryStats::ResetPeak();
  {
    Tensor x({1000});
    EXPECT_GE(MemoryStats::LiveBytes() - before, 4000);
  }
  EXPECT_EQ(MemoryStats::LiveBytes(), before);
  EXPECT_GE(MemoryStats::PeakBytes() - before, 4000);
}

TEST(ParallelTest, EveryIndexOnceWithAnyNumberOfThreads) {
  const int threads = Threads();
  for (int n : {1, 2, 3}) {
    SetThreads(n);
    for (int64_t size : {0, 1, 7, 1000}) {
      std::vector<int> hits(size, 0);
      ParallelFor(size, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++hits[i];
      });
      EXPECT_EQ(std::accumulate(hits.begin(), hits.end(), 0), size);
      EXPECT_TRUE(std::all_of(hits.begin(), hits.end(), [](int h) { return h == 1; }));
    }
  }
  SetThreads(threads);
  EXPECT_THROW(SetThreads(0), ValueError);
}

TEST(ParallelTest, NestedLoopsRunInTheirThread) {
  std::vector<int> hits(64, 0);
  ParallelFor(8, 1, [&](int64_t begin, int64_t) {
    ParallelFor(8, 1, [&](int64_t inner, int64_t) { ++hits[begin * 8 + inner]; });
  });
  EXPECT_TRUE(std::all_of(hits.begin(), hits.end(), [](int h) { return h == 1; }));
}

// The known answers that the authors of the generator publish (Random123, kat_vectors).
TEST(RandomTest, PhiloxKnownAnswers) {
  EXPECT_THAT(Philox4x32({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  constexpr uint32_t f = 0xffffffff;
  EXPECT_THAT(Philox4x32({f, f, f, f}, {f, f}),
              ElementsAre(0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu));
  EXPECT_THAT(
      Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      ElementsAre(0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u));
}

TEST(RandomTest, PositionContinuesExactly) {
  Random a(7, "weights"), b(7, "weights");
  for (int i = 0; i < 5; ++i) a.Next();
  b.set_position(a.position());
  for (int i = 0; i < 20; ++i) EXPECT_EQ(a.Next(), b.Next());
}

TEST(RandomTest, StreamsAndSeedsDiffer) {
  EXPECT_NE(Random(7, "a").Next(), Random(7, "b").Next());
  EXPECT_NE(Random(7, "a").Next(), Random(8, "a").Next());
}

TEST(RandomTest, MomentsOfTheDistributions) {
  Random random(1);
  const int n = 200000;
  double uniform = 0, normal = 0, square = 0, fourth = 0;
  std::vector<int> counts(6, 0);
  for (int i = 0; i < n; ++i) {
    double u = random.Uniform(), z = random.Normal();
    ASSERT_TRUE(u >= 0 && u < 1);
    uniform += u / n;
    normal += z / n;
    square += z * z / n;
    fourth += z * z * z * z / n;
    ++counts[random.Integer(6)];
  }
  EXPECT_NEAR(uniform, 0.5, 0.003);
  EXPECT_NEAR(normal, 0, 0.01);
  EXPECT_NEAR(square, 1, 0.02);
  EXPECT_NEAR(fourth, 3, 0.1);
  for (int count : counts) EXPECT_NEAR(count, n / 6.0, 1000);
  EXPECT_THROW(random.Integer(0), ValueError);
}

// Every 397th of all floats in [low, high]: the largest error against double in units of 2^-24,
// relative to the result or absolute.
template <class F, class G>
double WorstError(F f, G g, float low, float high, bool relative) {
  double worst = 0;
  auto sweep = [&](float from, float to, float sign) {
    uint32_t last = __builtin_bit_cast(uint32_t, to);
    for (uint32_t bits = __builtin_bit_cast(uint32_t, from); bits <= last; bits += 397) {
      float x = sign * __builtin_bit_cast(float, bits);
      double expected = g(static_cast<double>(x)), error = std::abs(f(x) - expected);
      if (std::abs(expected) < 1.2e-38) continue;
      worst = std::max(worst, relative ? error / std::abs(expected) : error);
    }
  };
  if (high > 0) sweep(std::max(low, 1e-30f), high, 1);
  if (low < 0) sweep(1e-30f, -low, -1);
  return worst * 0x1p24;
}

TEST(ScalarTest, ApproximationsKeepTheirBounds) {
  auto wrap = [](auto f) { return [f](float x) { return static_cast<double>(f(x)); }; };
#define CALOTYPE_WORST(name, std_name, low, high, relative)                                     \
  WorstError(                                                                                   \
      wrap([](float x) { return scalar::name(x); }), [](double x) { return std_name(x); }, low, \
      high, relative)
  EXPECT_LE(CALOTYPE_WORST(Exponential, std::exp, -87, 88.7f, true), 2);
  EXPECT_LE(CALOTYPE_WORST(Logarithm, std::log, 1e-30f, 1e30f, true), 2);
  EXPECT_LE(CALOTYPE_WORST(Sine, std::sin, -8192, 8192, false), 2);
  EXPECT_LE(CALOTYPE_WORST(Cosine, std::cos, -8192, 8192, false), 2);
  EXPECT_LE(CALOTYPE_WORST(HyperbolicTangent, std::tanh, -100, 100, true), 3);
  EXPECT_LE(CALOTYPE_WORST(ErrorFunction, std::erf, -10, 10, true), 4);
#undef CALOTYPE_WORST
}

TEST(ScalarTest, SpecialValues) {
  const float inf = INFINITY;
  EXPECT_EQ(scalar::Exponential(-inf), 0);
  EXPECT_EQ(scalar::Exponential(inf), inf);
  EXPECT_EQ(scalar::Exponential(-103.0f), std::exp(-103.0f));  // a denormal
  EXPECT_TRUE(std::isnan(scalar::Exponential(NAN)));
  EXPECT_EQ(scalar::Logarithm(0.0f), -inf);
  EXPECT_EQ(scalar::Logarithm(inf), inf);
  EXPECT_TRUE(std::isnan(scalar::Logarithm(-1.0f)));
  EXPECT_NEAR(scalar::Logarithm(1e-42f), std::log(1e-42f), 1e-4);
  EXPECT_EQ(scalar::HyperbolicTangent(-inf), -1);
  EXPECT_EQ(scalar::ErrorFunction(inf), 1);
  EXPECT_EQ(scalar::Logistic(-inf), 0);
  EXPECT_TRUE(std::isnan(scalar::Max(NAN, 1.0f)) && std::isnan(scalar::Max(1.0f, NAN)));
  EXPECT_TRUE(std::isnan(scalar::Min(NAN, 1.0f)) && std::isnan(scalar::Min(1.0f, NAN)));
}

TEST(JsonTest, TextAndBack) {
  const nlohmann::json value = ParseJson(R"( {"b": [1, -2.5, null, true], "a": "\u00e9\n"} )");
  EXPECT_EQ(JsonText(value), "{\"a\":\"\u00e9\\n\",\"b\":[1,-2.5,null,true]}");
  EXPECT_EQ(JsonFile(ParseJson("{\"a\":1}")), "{\n  \"a\": 1\n}\n");
  EXPECT_EQ(JsonText(ParseJson<nlohmann::ordered_json>(R"({"b":1,"a":2})")), R"({"b":1,"a":2})");
  EXPECT_EQ(JsonText(std::string("\"x\"\t")), R"("\"x\"\t")");
  EXPECT_TRUE(ParseJson("{").is_discarded());
  EXPECT_THAT(MessageOf<ValueError>([] { JsonText(std::string("\xff")); }), HasSubstr("UTF-8"));
}

// The JSON library calls itself for each level where it writes and destroys.
TEST(JsonTest, DeepNestingIsRefused) {
  auto nested = [](size_t levels, const std::string& inner = "") {
    std::string open, close;
    for (size_t i = 0; i < levels; ++i) {
      open += i % 2 ? "[" : "{\"a\\\"\\\\\": ";
      close.insert(0, i % 2 ? "]" : "}");
    }
    return open + (inner.empty() ? "{}" : inner) + close;
  };
  for (size_t levels : {size_t{100}, size_t{200000}}) {
    EXPECT_TRUE(ParseJson(nested(levels)).is_discarded());
    EXPECT_TRUE(ParseJson<nlohmann::ordered_json>(nested(levels)).is_discarded());
    EXPECT_THAT(MessageOf<FileError>([&] { ParseJsonObject(nested(levels), "a.json"); }),
                HasSubstr("a.json: not a JSON object: nested deeper than 100 levels"));
    EXPECT_THROW(ParseJsonObject<ValueError>(nested(levels), "x"), ValueError);
  }
  EXPECT_THAT(MessageOf<FileError>([&] { ParseJsonObject(std::string(200000, '['), "x"); }),
              HasSubstr("nested deeper"));
  EXPECT_EQ(JsonText(ParseJson(nested(99))).size(), nested(99).size() - 50);  // one space each
  // Brackets in strings and lists side by side are no nesting.
  ParseJsonObject(nested(99, "\"\\\"" + std::string(1000, '[') + "\""), "x");
  std::string wide = "[[]";
  for (int i = 0; i < 1000; ++i) wide += ", [{}]";
  EXPECT_EQ(ParseJson(wide + "]").size(), 1001u);
}

TEST(JsonTest, WhatIsNoObjectIsNamedWithItsPlace) {
  auto message = [](const std::string& text) {
    return MessageOf<FileError>([&] { ParseJsonObject(text, "a.json"); });
  };
  EXPECT_THAT(
      message("{\"a\": 1,\n \"b\" 2}"),
      HasSubstr("a.json: not a JSON object: parse error at line 2, column 6: syntax error"));
  EXPECT_THAT(message("{\"b\" 2}"), HasSubstr("object: parse error at column 6: syntax error"));
  EXPECT_THAT(message(""), HasSubstr("unexpected end of input"));
  EXPECT_THAT(message("[]"), HasSubstr("a.json: not a JSON object: it is an array"));
  EXPECT_THAT(message("{\"a\": 1e999}"), HasSubstr("number overflow"));
  // Neither the bytes nor the length of the input get into the message.
  EXPECT_THAT(message("{\"a\": \"\xff\"}"), Not(HasSubstr("\xff")));
  EXPECT_LT(message("{\"" + std::string(100000, 'x')).size(), 300u);
  EXPECT_LT(message("{\"a\": 1e" + std::string(100000, '9') + "}").size(), 300u);
  EXPECT_LT(message(std::string(100000, '[')).size(), 300u);
  EXPECT_THROW(ParseJsonObject<ValueError>("1", "x"), ValueError);

  std::vector<std::string> keys;
  ParseJsonObject(R"({"a": {"b": 1}, "a": 2})", "x",
                  [&](const std::string& key) { keys.push_back(key); });
  EXPECT_THAT(keys, ElementsAre("a", "b", "a"));
}

}  // namespace
}  // namespace calotype
