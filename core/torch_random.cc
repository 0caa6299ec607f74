#include "core/torch_random.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>

namespace calotype {
namespace {

constexpr int kBlock = 16, kHalf = 8;

// The logarithm and the sine and cosine of Cephes (S. Moshier) in float32, each multiplication and
// addition fused where PyTorch's compiler fuses them.
float Log(float x) {
  x = std::max(x, std::numeric_limits<float>::min());
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 126);
  x = std::bit_cast<float>((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  if (x < 0.707106781186547524f) {
    exponent -= 1;
    x = (x - 1.0f) + x;
  } else {
    x -= 1.0f;
  }
  constexpr std::array kSeries{-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                               1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                               -2.4999993993e-1f, 3.3333331174e-1f};
  float y = 7.0376836292e-2f;
  for (float c : kSeries) y = std::fma(y, x, c);
  const float z = x * x;
  y = std::fma(y * x, z, exponent * -2.12194440e-4f) - z * 0.5f;
  return std::fma(exponent, 0.693359375f, x + y);
}

struct SinCos {
  float sine, cosine;
};
SinCos SinCosOf(float x) {  // x >= 0
  const int octant = (static_cast<int>(x * 1.27323954473516f) + 1) & ~1;
  const float y = static_cast<float>(octant);
  x = std::fma(y, -0.78515625f, x);
  x = std::fma(y, -2.4187564849853515625e-4f, x);
  x = std::fma(y, -3.77489497744594108e-8f, x);
  const float z = x * x;
  float c = std::fma(2.443315711809948e-5f, z, -1.388731625493765e-3f);
  c = std::fma(c, z, 4.166664568298827e-2f) * z;
  c = std::fma(c, z, -(z * 0.5f)) + 1.0f;
  float s = std::fma(-1.9515295891e-4f, z, 8.3321608736e-3f);
  s = std::fma(s, z, -1.6666654611e-1f) * z;
  s = std::fma(s, x, x);
  if (octant & 2) std::swap(s, c);
  return {octant & 4 ? -s : s, (octant + 2) & 4 ? -c : c};
}

// Box-Muller in place: uniform numbers of [0, 1) in, normal ones out.
void ToNormal(float* block) {
  for (int i = 0; i < kHalf; ++i) {
    const float radius = std::sqrt(-2.0f * Log(1.0f - block[i]));
    const SinCos angle = SinCosOf(static_cast<float>(2 * std::numbers::pi) * block[i + kHalf]);
    block[i] = radius * angle.cosine;
    block[i + kHalf] = radius * angle.sine;
  }
}
void ToNormal(double* block) {
  for (int i = 0; i < kHalf; ++i) {
    const double radius = std::sqrt(-2 * std::log(1 - block[i]));
    const double angle = 2 * std::numbers::pi * block[i + kHalf];
    block[i] = radius * std::cos(angle);
    block[i + kHalf] = radius * std::sin(angle);
  }
}

}  // namespace

uint64_t TorchRandom::Next64() {
  const uint64_t high = Next();
  return (high << 32) | Next();
}

float TorchRandom::Uniform() { return static_cast<float>(Next() & 0xffffff) * 0x1p-24f; }

double TorchRandom::UniformDouble() {
  return static_cast<double>(Next64() & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
}

Tensor TorchRandom::UniformTensor(const Shape& shape, double low, double high, DType dtype) {
  Check(low <= high, "torch random: the range [{}, {}) is empty", low, high);
  Tensor result(shape, dtype);
  if (dtype == DType::kF64) {
    for (double& x : result.values<double>()) x = UniformDouble() * (high - low) + low;
    return result;
  }
  // The range is float32, the arithmetic double.
  const float first = static_cast<float>(low), range = static_cast<float>(high) - first;
  for (float& x : result.values()) x = static_cast<float>(double{Uniform()} * range + first);
  return result;
}

double TorchRandom::Normal() {
  if (waiting_) {
    const double value = *waiting_;
    waiting_.reset();
    return value;
  }
  const double u1 = UniformDouble(), u2 = UniformDouble();
  const double radius = std::sqrt(-2 * std::log1p(-u2)), angle = 2 * std::numbers::pi * u1;
  waiting_ = radius * std::sin(angle);
  return radius * std::cos(angle);
}

template <class T>
void TorchRandom::FillNormal(std::span<T> values) {
  auto draw = [&](T* first, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if constexpr (sizeof(T) == 8) first[i] = UniformDouble();
      if constexpr (sizeof(T) == 4) first[i] = Uniform();
    }
  };
  if (values.size() < kBlock) {
    for (T& x : values) x = static_cast<T>(Normal());
    return;
  }
  draw(values.data(), values.size());
  for (size_t i = 0; i + kBlock <= values.size(); i += kBlock) ToNormal(&values[i]);
  if (values.size() % kBlock == 0) return;
  T* last = values.data() + values.size() - kBlock;
  draw(last, kBlock);
  ToNormal(last);
}

Tensor TorchRandom::NormalTensor(const Shape& shape, DType dtype) {
  Tensor result(shape, dtype);
  if (dtype == DType::kF64) {
    FillNormal(result.values<double>());
  } else {
    FillNormal(result.values());
  }
  return result;
}

Tensor TorchRandom::IntegerTensor(int64_t low, int64_t high, const Shape& shape) {
  Check(low < high, "torch random: the range [{}, {}) is empty", low, high);
  const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  Tensor result(shape, DType::kI64);
  for (int64_t& x : result.values<int64_t>()) {
    const uint64_t bits = range >> 28 ? Next64() : Next();
    x = static_cast<int64_t>(static_cast<uint64_t>(low) + bits % range);
  }
  return result;
}

}  // namespace calotype
