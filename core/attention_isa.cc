// Queries lie in the vector lanes: a group is kVectors * kLanes queries (one or two vectors), and
// everything that belongs to a group is stored transposed, [index][query in group]. Keys and values
// are only ever broadcast, so they are read in their own layout without packing. All matrix
// products run through one register tile, Tile().
#include "core/attention_kernels.h"
#include "core/philox.h"
#include "core/simd.h"

namespace calotype::CALOTYPE_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kGroup = 2 * kLanes;  // queries of a full group
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

constexpr float kLowest = -3.40282347e38f;

CALOTYPE_SIMD int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
CALOTYPE_SIMD int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

enum Mode { kOverwrite, kAccumulate, kRescale };

// c[r][x] = (c[r][x] *) + sum_i a[r * a_row + i * a_col] x[i][x] for R rows and V vectors of x;
// kRescale multiplies the old c by `factor` first. Rows of x and c have x_row and c_row floats.
// What is stored is finish(r, v, result).
template <int R, int V, Mode mode, class F>
CALOTYPE_SIMD void Tile(int64_t n, const float* a, int64_t a_row, int64_t a_col, const float* x,
                        int64_t x_row, float* c, int64_t c_row, const Vec* factor, F finish) {
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (mode == kOverwrite) {
        sum[r][v] = Vec{};
      } else {
        sum[r][v] = Load(c + r * c_row + v * kLanes);
        if (mode == kRescale) sum[r][v] *= factor[v];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    Vec right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = Load(x + i * x_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec left = Splat(a[r * a_row + i * a_col]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = Fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) Store(c + r * c_row + v * kLanes, finish(r, v, sum[r][v]));
  }
}

#define CALOTYPE_FINISH(...)                                       \
  [&]([[maybe_unused]] int64_t row, [[maybe_unused]] int v, Vec x) \
      __attribute__((always_inline)) {                             \
    __VA_ARGS__                                                    \
  }

// Tile for any number of rows.
template <int V, Mode mode, class F>
CALOTYPE_SIMD void Product(int64_t rows, int64_t n, const float* a, int64_t a_row, int64_t a_col,
                           const float* x, int64_t x_row, float* c, int64_t c_row,
                           const Vec* factor, F finish) {
  int64_t r = 0;
  auto at_row = CALOTYPE_FINISH(return finish(r + row, v, x););
  for (; r + kTileRows <= rows; r += kTileRows) {
    Tile<kTileRows, V, mode>(n, a + r * a_row, a_row, a_col, x, x_row, c + r * c_row, c_row, factor,
                             at_row);
  }
  if (kTileRows > 4 && r + 4 <= rows) {
    Tile<4, V, mode>(n, a + r * a_row, a_row, a_col, x, x_row, c + r * c_row, c_row, factor,
                     at_row);
    r += 4;
  }
  for (; r < rows; ++r) {
    Tile<1, V, mode>(n, a + r * a_row, a_row, a_col, x, x_row, c + r * c_row, c_row, factor,
                     at_row);
  }
}

template <int V, Mode mode>
CALOTYPE_SIMD void Product(int64_t rows, int64_t n, const float* a, int64_t a_row, int64_t a_col,
                           const float* x, int64_t x_row, float* c, int64_t c_row,
                           const Vec* factor = nullptr) {
  Product<V, mode>(rows, n, a, a_row, a_col, x, x_row, c, c_row, factor,
                   CALOTYPE_FINISH(return x;));
}

// to[d][i] = factor * from[i][d] for `count` tokens i and `width` columns d, and 0 for the tokens
// up to the row length `lanes` of `to`.
CALOTYPE_SIMD void TransposeIn(const float* from, int64_t row, int64_t count, int64_t width,
                               float factor, float* to, int64_t lanes) {
  int64_t i = 0;
#if defined(__SSE4_1__)
  __m128 f = _mm_set1_ps(factor);
  for (; i + 4 <= count; i += 4) {
    int64_t d = 0;
    for (; d + 4 <= width; d += 4) {
      __m128 r0 = _mm_loadu_ps(from + i * row + d), r1 = _mm_loadu_ps(from + (i + 1) * row + d);
      __m128 r2 = _mm_loadu_ps(from + (i + 2) * row + d),
             r3 = _mm_loadu_ps(from + (i + 3) * row + d);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      _mm_storeu_ps(to + d * lanes + i, r0 * f);
      _mm_storeu_ps(to + (d + 1) * lanes + i, r1 * f);
      _mm_storeu_ps(to + (d + 2) * lanes + i, r2 * f);
      _mm_storeu_ps(to + (d + 3) * lanes + i, r3 * f);
    }
    for (; d < width; ++d) {
      for (int64_t j = i; j < i + 4; ++j) to[d * lanes + j] = factor * from[j * row + d];
    }
  }
#endif
  for (; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) to[d * lanes + i] = factor * from[i * row + d];
  }
  if (count < lanes) {
    for (int64_t d = 0; d < width; ++d) {
      for (i = count; i < lanes; ++i) to[d * lanes + i] = 0;
    }
  }
}

// The way back: to[i][d] = from[d][i] * factor[i].
CALOTYPE_SIMD void TransposeOut(const float* from, int64_t lanes, int64_t count, int64_t width,
                                const float* factor, float* to, int64_t row) {
  int64_t i = 0;
#if defined(__SSE4_1__)
  for (; i + 4 <= count; i += 4) {
    __m128 f = _mm_loadu_ps(factor + i);
    int64_t d = 0;
    for (; d + 4 <= width; d += 4) {
      __m128 r0 = _mm_loadu_ps(from + d * lanes + i) * f;
      __m128 r1 = _mm_loadu_ps(from + (d + 1) * lanes + i) * f;
      __m128 r2 = _mm_loadu_ps(from + (d + 2) * lanes + i) * f;
      __m128 r3 = _mm_loadu_ps(from + (d + 3) * lanes + i) * f;
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      _mm_storeu_ps(to + i * row + d, r0);
      _mm_storeu_ps(to + (i + 1) * row + d, r1);
      _mm_storeu_ps(to + (i + 2) * row + d, r2);
      _mm_storeu_ps(to + (i + 3) * row + d, r3);
    }
    for (; d < width; ++d) {
      for (int64_t j = i; j < i + 4; ++j) to[j * row + d] = from[d * lanes + j] * factor[j];
    }
  }
#endif
  for (; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) to[i * row + d] = from[d * lanes + i] * factor[i];
  }
}

// to[i][d] = factor * from[i][d], with zeros up to `lanes` tokens and `to_row` columns.
CALOTYPE_SIMD void CopyPadded(const float* from, int64_t row, int64_t count, int64_t width,
                              float factor, float* to, int64_t to_row, int64_t lanes) {
  Vec f = Splat(factor);
  for (int64_t i = 0; i < count; ++i) {
    const float* in = from + i * row;
    float* out = to + i * to_row;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) Store(out + d, Load(in + d) * f);
    for (; d < width; ++d) out[d] = in[d] * factor;
    for (; d < to_row; ++d) out[d] = 0;
  }
  for (int64_t i = count * to_row; i < lanes * to_row; ++i) to[i] = 0;
}

// Adds the mask to the scores s[key][query] of keys [j0, j0 + keys) and queries from i0 on, and
// sets the future to -inf under `causal`.
template <int V>
CALOTYPE_SIMD void ApplyMask(const AttentionShape& shape, const AttentionMask& mask, int64_t i0,
                             int64_t count, int64_t j0, int64_t keys, float* s) {
  constexpr int64_t kWidth = V * kLanes;
  if (mask.data) {
    for (int64_t j = 0; j < keys; ++j) {
      const float* m = mask.data + (j0 + j) * mask.key + i0 * mask.query;
      if (mask.query == 0) {
        for (int64_t i = 0; i < kWidth; ++i) s[j * kWidth + i] += *m;
      } else {
        for (int64_t i = 0; i < count; ++i) s[j * kWidth + i] += m[i * mask.query];
      }
    }
  }
  if (shape.causal && j0 + keys - 1 > i0) {
    for (int64_t j = 0; j < keys; ++j) {
      int64_t hidden = Min(j0 + j - i0, kWidth);  // queries before this key
      for (int64_t i = 0; i < hidden; ++i) s[j * kWidth + i] = -__builtin_inff();
    }
  }
}

// True if the scores of these keys and queries are what the product gives.
CALOTYPE_SIMD bool Unmasked(const AttentionShape& shape, const AttentionMask& mask, int64_t i0,
                            int64_t j0, int64_t keys) {
  return !mask.data && !(shape.causal && j0 + keys - 1 > i0);
}

// z[query] of key j: what dropout multiplies the weights of queries from i0 on by.
CALOTYPE_SIMD void Keep(const AttentionShape& shape, const AttentionHead& head, int64_t i0,
                        int64_t width, int64_t j, float* z) {
  float kept = 1 / (1 - shape.dropout);
  uint64_t first = head.dropout_base + static_cast<uint64_t>(i0 * shape.keys + j);
  for (int64_t i = 0; i < width; ++i) {
    float u =
        PhiloxUniformAt(shape.seed, shape.stream, first + static_cast<uint64_t>(i * shape.keys));
    z[i] = u >= shape.dropout ? kept : 0.0f;
  }
}

// Keys that the queries before `end` see.
CALOTYPE_SIMD int64_t VisibleKeys(const AttentionShape& shape, int64_t end) {
  return shape.causal ? Min(shape.keys, end) : shape.keys;
}

// ------------------------------------------------------------------------------------- forward

// What forward keeps of a group from one block of keys to the next.
struct ForwardGroup {
  float *q, *out;    // [head_dim], [value_dim] rows of kGroup queries
  float *max, *sum;  // [kGroup]: largest score so far, sum of exp(score - max)
  float* scores;     // [block_kv] rows, shared by the groups
  static int64_t Size(const AttentionShape& s) { return (s.head_dim + s.value_dim + 2) * kGroup; }
};

int64_t ForwardScratch(const AttentionShape& s) {
  int64_t groups = RoundUp(Min(s.block_q, s.queries), kGroup) / kGroup;
  return groups * ForwardGroup::Size(s) + Min(s.block_kv, s.keys) * kGroup;
}

// One block of keys for one group of queries.
template <int V>
CALOTYPE_SIMD void ForwardBlock(const AttentionShape& shape, const AttentionHead& head,
                                const ForwardGroup& g, int64_t i0, int64_t count, int64_t j0,
                                int64_t keys) {
  constexpr int64_t kWidth = V * kLanes;
  const float* k = head.k + j0 * head.q_row;
  float* s = g.scores;
  Vec old[V], max[V], sum[V], factor[V], log2e = Splat(kLog2E);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) max[v] = old[v] = Load(g.max + v * kLanes);
  if (Unmasked(shape, head.mask, i0, j0, keys)) {
    Product<V, kOverwrite>(keys, shape.head_dim, k, head.q_row, 1, g.q, kWidth, s, kWidth, nullptr,
                           CALOTYPE_FINISH(max[v] = Max(max[v], x); return x;));
  } else {
    Product<V, kOverwrite>(keys, shape.head_dim, k, head.q_row, 1, g.q, kWidth, s, kWidth);
    ApplyMask<V>(shape, head.mask, i0, count, j0, keys, s);
    for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) max[v] = Max(max[v], Load(s + j * kWidth + v * kLanes));
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    // Starting from the lowest finite number, -inf scores vanish also if there is nothing else.
    factor[v] = Exp2((old[v] - max[v]) * log2e);
    Store(g.max + v * kLanes, max[v]);
    sum[v] = Load(g.sum + v * kLanes) * factor[v];
  }
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* p = s + j * kWidth + v * kLanes;
      Vec e = Exp2((Load(p) - max[v]) * log2e);
      sum[v] += e;
      Store(p, e);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) Store(g.sum + v * kLanes, sum[v]);
  if (shape.dropout > 0) {
    float z[kWidth];
    for (int64_t j = 0; j < keys; ++j) {
      Keep(shape, head, i0, kWidth, j0 + j, z);
      for (int64_t i = 0; i < kWidth; ++i) s[j * kWidth + i] *= z[i];
    }
  }
  Product<V, kRescale>(shape.value_dim, keys, head.v + j0 * head.v_row, 1, head.v_row, s, kWidth,
                       g.out, kWidth, factor);
}

// Prepares a group of `width` lanes with `count` queries from i0 on.
CALOTYPE_SIMD void StartGroup(const AttentionShape& shape, const AttentionHead& head,
                              const ForwardGroup& g, int64_t i0, int64_t count, int64_t width) {
  TransposeIn(head.q + i0 * head.q_row, head.q_row, count, shape.head_dim, shape.scale, g.q, width);
  for (int64_t i = 0; i < shape.value_dim * width; ++i) g.out[i] = 0;
  for (int64_t i = 0; i < width; ++i) {
    g.max[i] = kLowest;
    g.sum[i] = 0;
  }
}

CALOTYPE_SIMD void FinishGroup(const AttentionShape& shape, const AttentionHead& head,
                               const ForwardGroup& g, int64_t i0, int64_t count, int64_t width) {
  float factor[kGroup];
  for (int64_t i = 0; i < count; ++i) {
    factor[i] = g.sum[i] == 0 ? 0.0f : 1 / g.sum[i];
    head.lse[i0 + i] = g.max[i] + __builtin_logf(g.sum[i]);
  }
  TransposeOut(g.out, width, count, shape.value_dim, factor, head.out + i0 * head.v_row,
               head.v_row);
}

void Forward(const AttentionShape& shape, const AttentionHead& head, int64_t begin, int64_t end,
             float* scratch) {
  int64_t block = Min(shape.block_kv, shape.keys);
  auto group = [&](int64_t i0) {
    float* base = scratch + block * kGroup + (i0 - begin) / kGroup * ForwardGroup::Size(shape);
    ForwardGroup g;
    g.q = base;
    g.out = g.q + shape.head_dim * kGroup;
    g.max = g.out + shape.value_dim * kGroup;
    g.sum = g.max + kGroup;
    g.scores = scratch;
    return g;
  };
  for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
    int64_t count = Min(kGroup, end - i0);
    StartGroup(shape, head, group(i0), i0, count, count > kLanes ? 2 * kLanes : kLanes);
  }
  for (int64_t j0 = 0; j0 < VisibleKeys(shape, end); j0 += block) {
    int64_t keys = Min(block, shape.keys - j0);
    for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
      int64_t count = Min(kGroup, end - i0);
      if (j0 >= VisibleKeys(shape, i0 + count)) continue;
      if (count > kLanes) {
        ForwardBlock<2>(shape, head, group(i0), i0, count, j0, keys);
      } else {
        ForwardBlock<1>(shape, head, group(i0), i0, count, j0, keys);
      }
    }
  }
  for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
    int64_t count = Min(kGroup, end - i0);
    FinishGroup(shape, head, group(i0), i0, count, count > kLanes ? 2 * kLanes : kLanes);
  }
}

// ------------------------------------------------------------------------------------ backward

struct BackwardGroup {
  float *q, *dout;            // transposed: [head_dim], [value_dim] rows
  float *q_rows, *dout_rows;  // [kGroup] rows of padded width
  float* dq;                  // transposed: [head_dim] rows
  float *lse, *delta;         // [kGroup]
};

struct BackwardSizes {
  int64_t d, dv;  // widths rounded up to whole vectors
  int64_t block, groups, group;

  explicit BackwardSizes(const AttentionShape& s)
      : d(RoundUp(s.head_dim, kLanes)),
        dv(RoundUp(s.value_dim, kLanes)),
        block(Min(s.block_kv, s.keys)),
        groups(RoundUp(Min(s.block_q, s.queries), kGroup) / kGroup),
        group((2 * s.head_dim + s.value_dim + d + dv + 2) * kGroup) {}
};

int64_t BackwardScratch(const AttentionShape& s) {
  BackwardSizes n(s);
  return s.keys * (n.d + n.dv) + 2 * n.block * kGroup + n.groups * n.group;
}

// c[r][0, width) += sum_i a[r][i] x[i][0, width) for whole vectors of `width`.
CALOTYPE_SIMD void Outer(int64_t rows, int64_t n, const float* a, int64_t a_row, const float* x,
                         float* c, int64_t width) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    Product<2, kAccumulate>(rows, n, a, a_row, 1, x + d, width, c + d, width);
  }
  if (d < width) Product<1, kAccumulate>(rows, n, a, a_row, 1, x + d, width, c + d, width);
}

template <int V>
CALOTYPE_SIMD void BackwardBlock(const AttentionShape& shape, const AttentionHead& head,
                                 const BackwardSizes& n, const BackwardGroup& g, int64_t i0,
                                 int64_t count, int64_t j0, int64_t keys, float* p, float* ds,
                                 float* dk, float* dv) {
  constexpr int64_t kWidth = V * kLanes;
  Product<V, kOverwrite>(keys, shape.head_dim, head.k + j0 * head.q_row, head.q_row, 1, g.q, kWidth,
                         p, kWidth);
  ApplyMask<V>(shape, head.mask, i0, count, j0, keys, p);
  Product<V, kOverwrite>(keys, shape.value_dim, head.v + j0 * head.v_row, head.v_row, 1, g.dout,
                         kWidth, ds, kWidth);
  Vec lse[V], delta[V], log2e = Splat(kLog2E);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    lse[v] = Load(g.lse + v * kLanes);
    delta[v] = Load(g.delta + v * kLanes);
  }
  for (int64_t j = 0; j < keys; ++j) {
    float z[kWidth];
    if (shape.dropout > 0) Keep(shape, head, i0, kWidth, j0 + j, z);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float *pj = p + j * kWidth + v * kLanes, *dsj = ds + j * kWidth + v * kLanes;
      Vec weight = Exp2((Load(pj) - lse[v]) * log2e), dp = Load(dsj);
      if (shape.dropout > 0) {
        Vec keep = Load(z + v * kLanes);
        dp *= keep;
        Store(pj, weight * keep);
      } else {
        Store(pj, weight);
      }
      Store(dsj, weight * (dp - delta[v]));
    }
  }
  Product<V, kAccumulate>(shape.head_dim, keys, head.k + j0 * head.q_row, 1, head.q_row, ds, kWidth,
                          g.dq, kWidth);
  Outer(keys, kWidth, p, kWidth, g.dout_rows, dv + j0 * n.dv, n.dv);
  Outer(keys, kWidth, ds, kWidth, g.q_rows, dk + j0 * n.d, n.d);
}

CALOTYPE_SIMD void StartBackwardGroup(const AttentionShape& shape, const AttentionHead& head,
                                      const BackwardSizes& n, const BackwardGroup& g, int64_t i0,
                                      int64_t count, int64_t width) {
  const float *q = head.q + i0 * head.q_row, *dout = head.dout + i0 * head.v_row;
  TransposeIn(q, head.q_row, count, shape.head_dim, shape.scale, g.q, width);
  TransposeIn(dout, head.v_row, count, shape.value_dim, 1, g.dout, width);
  CopyPadded(q, head.q_row, count, shape.head_dim, shape.scale, g.q_rows, n.d, width);
  CopyPadded(dout, head.v_row, count, shape.value_dim, 1, g.dout_rows, n.dv, width);
  for (int64_t i = 0; i < shape.head_dim * width; ++i) g.dq[i] = 0;
  for (int64_t i = 0; i < width; ++i) {
    // Lanes without a query, and queries without a visible key, have weight exp(-inf) = 0.
    float lse = i < count ? head.lse[i0 + i] : -__builtin_inff();
    g.lse[i] = lse == -__builtin_inff() ? __builtin_inff() : lse;
    float delta = 0;
    if (i < count) {
      const float *a = dout + i * head.v_row, *b = head.out + (i0 + i) * head.v_row;
      Vec sum = {};
      int64_t d = 0;
      for (; d + kLanes <= shape.value_dim; d += kLanes) sum += Load(a + d) * Load(b + d);
      delta = SumLanes(sum);
      for (; d < shape.value_dim; ++d) delta += a[d] * b[d];
    }
    g.delta[i] = delta;
  }
}

void Backward(const AttentionShape& shape, const AttentionHead& head, float* scratch) {
  BackwardSizes n(shape);
  float *p = scratch, *ds = p + n.block * kGroup, *groups = ds + n.block * kGroup;
  float *dk = groups + n.groups * n.group, *dv = dk + shape.keys * n.d;
  for (int64_t i = 0; i < shape.keys * (n.d + n.dv); ++i) dk[i] = 0;
  for (int64_t begin = 0; begin < shape.queries; begin += n.groups * kGroup) {
    int64_t end = Min(shape.queries, begin + n.groups * kGroup);
    auto group = [&](int64_t i0) {
      BackwardGroup g;
      g.q = groups + (i0 - begin) / kGroup * n.group;
      g.dout = g.q + shape.head_dim * kGroup;
      g.dq = g.dout + shape.value_dim * kGroup;
      g.q_rows = g.dq + shape.head_dim * kGroup;
      g.dout_rows = g.q_rows + n.d * kGroup;
      g.lse = g.dout_rows + n.dv * kGroup;
      g.delta = g.lse + kGroup;
      return g;
    };
    for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
      int64_t count = Min(kGroup, end - i0);
      StartBackwardGroup(shape, head, n, group(i0), i0, count,
                         count > kLanes ? 2 * kLanes : kLanes);
    }
    for (int64_t j0 = 0; j0 < VisibleKeys(shape, end); j0 += n.block) {
      int64_t keys = Min(n.block, shape.keys - j0);
      for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
        int64_t count = Min(kGroup, end - i0);
        if (j0 >= VisibleKeys(shape, i0 + count)) continue;
        if (count > kLanes) {
          BackwardBlock<2>(shape, head, n, group(i0), i0, count, j0, keys, p, ds, dk, dv);
        } else {
          BackwardBlock<1>(shape, head, n, group(i0), i0, count, j0, keys, p, ds, dk, dv);
        }
      }
    }
    float factor[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) factor[i] = shape.scale;
    for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
      int64_t count = Min(kGroup, end - i0);
      TransposeOut(group(i0).dq, count > kLanes ? 2 * kLanes : kLanes, count, shape.head_dim,
                   factor, head.dq + i0 * head.q_row, head.q_row);
    }
  }
  for (int64_t j = 0; j < shape.keys; ++j) {
    for (int64_t d = 0; d < shape.head_dim; ++d) head.dk[j * head.q_row + d] = dk[j * n.d + d];
    for (int64_t d = 0; d < shape.value_dim; ++d) head.dv[j * head.v_row + d] = dv[j * n.dv + d];
  }
}

}  // namespace

extern const AttentionKernels kAttentionKernels = {ForwardScratch, BackwardScratch, Forward,
                                                   Backward};

}  // namespace calotype::CALOTYPE_ISA
