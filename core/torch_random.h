// TorchRandom: the random numbers of PyTorch's CPU generator (MT19937), bit for bit, so that a seed
// gives the noise, and thus the picture, that it gives there. Normal numbers are those of PyTorch
// 2 on x86-64 with AVX2: large tensors go through its single-precision logarithm, sine and cosine,
// reproduced here down to where it fuses multiplications and additions.
#pragma once

#include <cstdint>
#include <optional>
#include <random>

#include "core/tensor.h"

namespace calotype {

class TorchRandom {
 public:
  // torch.manual_seed(seed); only the low 32 bits count, as there.
  explicit TorchRandom(uint64_t seed) : engine_(static_cast<uint32_t>(seed)) {}

  uint32_t Next() { return static_cast<uint32_t>(engine_()); }  // the next 32 bits
  uint64_t Next64();                                            // two numbers, the first one high

  // torch.empty(shape).uniform_(low, high): [low, high), 24 bits; torch.rand for 0 and 1. kF64: 53
  // bits. Errors: ShapeError for an integer dtype; ValueError unless low <= high.
  Tensor UniformTensor(const Shape& shape, double low = 0, double high = 1,
                       DType dtype = DType::kF32);
  // torch.randn. Fewer than 16 numbers are drawn one by one, in double, in pairs whose second half
  // waits for the next such call; more in blocks of 16, the last of which starts over if the count
  // is no multiple of 16. Errors: ShapeError for an integer dtype.
  Tensor NormalTensor(const Shape& shape, DType dtype = DType::kF32);
  // torch.randint(low, high, shape), i64: 32 bits modulo the range, from 2^28 numbers on 64
  // (PyTorch before 2.7: from 2^32 on). Errors: ValueError unless low < high.
  Tensor IntegerTensor(int64_t low, int64_t high, const Shape& shape);

 private:
  float Uniform();
  double UniformDouble();
  double Normal();
  template <class T>
  void FillNormal(std::span<T> values);

  std::mt19937 engine_;
  std::optional<double> waiting_;  // second half of a pair of normal numbers
};

}  // namespace calotype
