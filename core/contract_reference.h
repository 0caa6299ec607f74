// The definitions of the contractions by plain loops, for T = float or double.
#pragma once

#include <cstdint>

#include "core/contract.h"

namespace calotype::reference {

template <class T>
void MatMul(const MatMulShape& s, const T* a, const T* b, const T* bias, T* c) {
  for (int64_t i = 0; i < s.batch; ++i) {
    for (int64_t m = 0; m < s.m; ++m) {
      for (int64_t n = 0; n < s.n; ++n) {
        T sum = bias ? bias[n] : T(0);
        for (int64_t k = 0; k < s.k; ++k) {
          sum += a[i * s.a_batch + m * s.a_row + k * s.a_col] *
                 b[i * s.b_batch + k * s.b_row + n * s.b_col];
        }
        c[(i * s.m + m) * s.n + n] = sum;
      }
    }
  }
}

// Calls f(x index, w index, y index) for every product of the convolution.
template <class F>
void ForEachProduct(const Conv2dShape& s, F f) {
  int64_t oh = s.out_height(), ow = s.out_width();
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t i = 0; i < oh; ++i)
        for (int64_t j = 0; j < ow; ++j)
          for (int64_t c = 0; c < s.in; ++c)
            for (int64_t kh = 0; kh < s.kernel_h; ++kh)
              for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
                int64_t h = i * s.stride + kh - s.top, w = j * s.stride + kw - s.left;
                if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
                f(((b * s.in + c) * s.height + h) * s.width + w,
                  ((o * s.in + c) * s.kernel_h + kh) * s.kernel_w + kw,
                  ((b * s.out + o) * oh + i) * ow + j);
              }
}

template <class T>
void Conv2dForward(const Conv2dShape& s, const T* x, const T* w, const T* bias, T* y) {
  int64_t plane = s.out_height() * s.out_width();
  for (int64_t i = 0; i < s.batch * s.out * plane; ++i)
    y[i] = bias ? bias[i / plane % s.out] : T(0);
  ForEachProduct(s, [&](int64_t xi, int64_t wi, int64_t yi) { y[yi] += x[xi] * w[wi]; });
}

template <class T>
void Conv2dBackwardInput(const Conv2dShape& s, const T* dy, const T* w, T* dx) {
  for (int64_t i = 0; i < s.batch * s.in * s.height * s.width; ++i) dx[i] = T(0);
  ForEachProduct(s, [&](int64_t xi, int64_t wi, int64_t yi) { dx[xi] += dy[yi] * w[wi]; });
}

template <class T>
void Conv2dBackwardWeight(const Conv2dShape& s, const T* x, const T* dy, T* dw) {
  for (int64_t i = 0; i < s.out * s.in * s.kernel_h * s.kernel_w; ++i) dw[i] = T(0);
  ForEachProduct(s, [&](int64_t xi, int64_t wi, int64_t yi) { dw[wi] += x[xi] * dy[yi]; });
}

}  // namespace calotype::reference
