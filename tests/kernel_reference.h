// Naive double-precision execution of kernel specifications on raw memory: what tests compare
// generated kernels with.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "core/random.h"
#include "jit/kernel.h"
#include "tests/guarded_buffer.h"

namespace calotype::jit::reference {

using Index = std::vector<int64_t>;

// Calls f for every index of `extents`, the last running fastest.
inline void ForEach(const std::vector<int64_t>& extents,
                    const std::function<void(const Index&)>& f) {
  Index index(extents.size(), 0);
  for (int64_t e : extents) {
    if (e == 0) return;
  }
  for (;;) {
    f(index);
    size_t d = extents.size();
    while (d > 0 && ++index[d - 1] == extents[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

inline int64_t Position(const Operand& operand, const Index& index) {
  int64_t position = operand.offset;
  for (size_t d = 0; d < operand.strides.size(); ++d) position += index[d] * operand.strides[d];
  return position;
}

inline double Read(const Operand& operand, void* const* pointers, const Index& index) {
  int64_t i = Position(operand, index);
  const void* base = pointers[operand.pointer];
  if (operand.dtype == DType::kI32) return static_cast<const int32_t*>(base)[i];
  if (operand.dtype == DType::kI64)
    return static_cast<double>(static_cast<const int64_t*>(base)[i]);
  return static_cast<const float*>(base)[i];
}

inline float& At(const Operand& operand, void* const* pointers, const Index& index) {
  return static_cast<float*>(pointers[operand.pointer])[Position(operand, index)];
}

inline std::vector<float> Evaluate(const ScalarProgram& program, const std::vector<float>& in) {
  std::vector<float> out(program.results.size());
  program.Evaluate(in.data(), out.data());
  return out;
}

inline Index Join(Index x, const Index& y) {
  x.insert(x.end(), y.begin(), y.end());
  return x;
}

inline void StoreEpilogue(const Epilogue& epilogue, void* const* pointers, const Index& index,
                          double result) {
  std::vector<float> in = {static_cast<float>(result)};
  for (const Operand& o : epilogue.operands)
    in.push_back(static_cast<float>(Read(o, pointers, index)));
  std::vector<float> out = Evaluate(epilogue.program, in);
  for (size_t r = 0; r < out.size(); ++r) At(epilogue.outputs[r], pointers, index) = out[r];
}

inline void Run(const LoopSpec& s, void* const* pointers) {
  ForEach(s.extents, [&](const Index& index) {
    std::vector<float> in;
    for (const Operand& o : s.inputs) in.push_back(static_cast<float>(Read(o, pointers, index)));
    std::vector<float> out = Evaluate(s.program, in);
    for (size_t r = 0; r < out.size(); ++r) At(s.outputs[r], pointers, index) = out[r];
  });
}

inline void Run(const ReduceSpec& s, void* const* pointers) {
  bool sum = s.kind == ReduceSpec::kSum;
  ForEach(s.extents, [&](const Index& index) {
    double result = sum ? 0 : -std::numeric_limits<double>::infinity();
    ForEach(s.reduced, [&](const Index& r) {
      std::vector<float> in;
      for (const Operand& o : s.inputs) {
        in.push_back(static_cast<float>(Read(o, pointers, Join(index, r))));
      }
      double x = Evaluate(s.program, in)[0];
      result = sum ? result + x : std::max(result, x);
    });
    StoreEpilogue(s.epilogue, pointers, index, result);
  });
}

inline void Run(const ChainSpec& s, void* const* pointers) {
  auto move = [](std::vector<Operand>& operands, int64_t turn) {
    for (Operand& operand : operands) operand.offset += turn * operand.chain;
  };
  for (int64_t turn = 0; turn < s.extent; ++turn) {
    for (ChainSpec::Link link : s.links) {
      if (auto* loop = std::get_if<LoopSpec>(&link)) {
        move(loop->inputs, turn);
        move(loop->outputs, turn);
        Run(*loop, pointers);
        continue;
      }
      auto& reduce = std::get<ReduceSpec>(link);
      move(reduce.inputs, turn);
      move(reduce.epilogue.operands, turn);
      move(reduce.epilogue.outputs, turn);
      Run(reduce, pointers);
    }
  }
}

inline void Run(const ContractionSpec& s, void* const* pointers) {
  size_t m = s.m.size();
  const auto* a = static_cast<const float*>(pointers[s.a.pointer]);
  const auto* b = static_cast<const float*>(pointers[s.b.pointer]);
  auto move = [](const Operand& o, size_t first, const Index& index, size_t count) {
    int64_t position = 0;
    for (size_t d = 0; d < count; ++d) position += index[d] * o.strides[first + d];
    return position;
  };
  ForEach(Join(s.m, {s.n}), [&](const Index& index) {
    int64_t a0 = s.a.offset + move(s.a, 0, index, m);
    int64_t b0 = s.b.offset + move(s.b, 0, index, m) + index.back() * s.b.strides.back();
    double result = 0;
    ForEach(s.k, [&](const Index& k) {
      result += double{a[a0 + move(s.a, m, k, k.size())]} * b[b0 + move(s.b, m, k, k.size())];
    });
    StoreEpilogue(s.epilogue, pointers, index, result);
  });
}

// Scores of one query and what softmax makes of them; none is left where all keys are masked.
struct Softmax {
  std::vector<double> weights;
  double lse;
};

inline Softmax Weights(const AttentionSpec& s, void* const* p, int64_t b, int64_t h, int64_t i) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> scores(s.keys);
  double top = -kInfinity, sum = 0;
  for (int64_t j = 0; j < s.keys; ++j) {
    double score = 0;
    for (int64_t d = 0; d < s.head_dim; ++d)
      score += Read(s.q, p, {b, h, i, d}) * Read(s.k, p, {b, h, j, d});
    score *= s.scale;
    if (s.has_mask) score += Read(s.mask, p, {b, h, i, j});
    if (s.causal && j > i) score = -kInfinity;
    scores[j] = score;
    top = std::max(top, score);
  }
  if (top == -kInfinity) return {std::vector<double>(s.keys, 0.0), -kInfinity};
  for (double& score : scores) sum += score = std::exp(score - top);
  for (double& score : scores) score /= sum;
  return {scores, top + std::log(sum)};
}

inline void Run(const AttentionSpec& s, void* const* p) {
  ForEach({s.batch, s.heads, s.queries}, [&](const Index& x) {
    Softmax softmax = Weights(s, p, x[0], x[1], x[2]);
    for (int64_t d = 0; d < s.value_dim; ++d) {
      double sum = 0;
      for (int64_t j = 0; j < s.keys; ++j)
        sum += softmax.weights[j] * Read(s.v, p, {x[0], x[1], j, d});
      At(s.out, p, {x[0], x[1], x[2], d}) = static_cast<float>(sum);
    }
    At(s.lse, p, x) = static_cast<float>(softmax.lse);
  });
}

// Takes D from exact weights and values; `out` and `lse` in memory are not read.
inline void Run(const AttentionGradientSpec& g, void* const* p) {
  const AttentionSpec& s = g.forward;
  auto add = [&](std::vector<double>& sums, const Operand& o, const Index& x, double value) {
    sums[Position(o, x)] += value;
  };
  auto sums = [&](const Operand& o, int64_t rows, int64_t columns) {
    return std::vector<double>(Position(o, {s.batch - 1, s.heads - 1, rows - 1, columns - 1}) + 1,
                               0.0);
  };
  std::vector<double> dq = sums(g.dq, s.queries, s.head_dim);
  std::vector<std::vector<double>> dk(g.Parts(), sums(g.dk, s.keys, s.head_dim)),
      dv(g.Parts(), sums(g.dv, s.keys, s.value_dim));
  ForEach({s.batch, s.heads, s.queries}, [&](const Index& x) {
    int64_t b = x[0], h = x[1], i = x[2], part = g.part > 0 ? i / g.part : 0;
    Softmax softmax = Weights(s, p, b, h, i);
    std::vector<double> dweights(s.keys, 0.0);
    double delta = 0;
    for (int64_t j = 0; j < s.keys; ++j) {
      for (int64_t d = 0; d < s.value_dim; ++d) {
        double dout = Read(g.dout, p, {b, h, i, d});
        dweights[j] += dout * Read(s.v, p, {b, h, j, d});
        add(dv[part], g.dv, {b, h, j, d}, softmax.weights[j] * dout);
      }
      delta += softmax.weights[j] * dweights[j];
    }
    for (int64_t j = 0; j < s.keys; ++j) {
      double dscore = s.scale * softmax.weights[j] * (dweights[j] - delta);
      for (int64_t d = 0; d < s.head_dim; ++d) {
        add(dq, g.dq, {b, h, i, d}, dscore * Read(s.k, p, {b, h, j, d}));
        add(dk[part], g.dk, {b, h, j, d}, dscore * Read(s.q, p, {b, h, i, d}));
      }
    }
  });
  auto store = [&](const std::vector<double>& from, const Operand& o, int64_t rows, int64_t columns,
                   int64_t shift = 0) {
    Operand to = o;
    to.offset += shift;
    ForEach({s.batch, s.heads, rows, columns},
            [&](const Index& x) { At(to, p, x) = static_cast<float>(from[Position(o, x)]); });
  };
  store(dq, g.dq, s.queries, s.head_dim);
  for (int64_t part = 0; part < g.Parts(); ++part) {
    store(dk[part], g.dk, s.keys, s.head_dim, part * g.dk_step);
    store(dv[part], g.dv, s.keys, s.value_dim, part * g.dv_step);
  }
}

inline int64_t ReadIndex(const Operand& indices, void* const* p, const Index& i) {
  return static_cast<int64_t>(Read(indices, p, i));
}

inline void Run(const GatherSpec& s, void* const* p) {
  ForEach(s.outer, [&](const Index& o) {
    ForEach(s.index, [&](const Index& i) {
      ForEach(s.inner, [&](const Index& r) {
        int64_t from = Position(s.x, Join(Join(o, {ReadIndex(s.indices, p, i)}), r));
        int64_t to = Position(s.out, Join(Join(o, i), r));
        std::memcpy(static_cast<char*>(p[s.out.pointer]) + to * DTypeSize(s.out.dtype),
                    static_cast<char*>(p[s.x.pointer]) + from * DTypeSize(s.x.dtype),
                    DTypeSize(s.x.dtype));
      });
    });
  });
}

inline void Run(const ScatterAddSpec& s, void* const* p) {
  ForEach(s.outer, [&](const Index& o) {
    ForEach(s.inner, [&](const Index& r) {
      for (int64_t a = 0; a < s.axis_size; ++a) At(s.out, p, Join(Join(o, {a}), r)) = 0;
      ForEach(s.index, [&](const Index& i) {
        At(s.out, p, Join(Join(o, {ReadIndex(s.indices, p, i)}), r)) +=
            At(s.dy, p, Join(Join(o, i), r));
      });
    });
  });
}

inline void Run(const PhiloxSpec& s, void* const* p) {
  uint64_t seed = static_cast<const uint64_t*>(p[s.seed.pointer])[s.seed.offset];
  for (int64_t i = 0; i < s.elements; ++i) {
    uint64_t stream = static_cast<uint64_t>(s.stream), index = static_cast<uint64_t>(i);
    auto words = Philox4x32({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                             static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)},
                            {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    static_cast<float*>(p[s.out.pointer])[s.out.offset + i] =
        static_cast<float>(words[0] >> 8) * 0x1p-24f;
  }
}

}  // namespace calotype::jit::reference
