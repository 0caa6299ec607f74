// AttentionSpec: the scores of a block of keys go to scratch on the stack, the running maximum and
// sum stay in registers, and what has been summed of the values is scaled whenever the maximum
// grows (Dao et al. 2022, arXiv:2205.14135). Scores are kept in units of log2.
#include "jit/emit_attention.h"

#include <llvm/IR/Intrinsics.h>

#include <algorithm>
#include <limits>
#include <numbers>

#include "core/error.h"
#include "core/scalar.h"

namespace calotype::jit {

AttentionTiles::AttentionTiles(Emitter& e, const AttentionSpec& spec)
    : e_(e), spec_(spec), width_(e.target.vector_width), align_(4 * e.target.vector_width) {
  vectors_ = spec.queries > width_ ? 2 : 1;
  rows_ = e.target.vector_registers >= 32 ? 8 : e.target.fma ? 6 : 4;
  lanes_ = int64_t{vectors_} * width_;
  for (const Operand* operand : {&spec.q, &spec.k, &spec.v, &spec.out}) {
    Check<InternalError>(operand->strides.size() == 4, "attention kernel: {} strides instead of 4",
                         operand->strides.size());
  }
  Check<InternalError>(
      spec.lse.strides.size() == 3 && (!spec.has_mask || spec.mask.strides.size() == 4),
      "attention kernel: {} strides of lse, {} of the mask", spec.lse.strides.size(),
      spec.mask.strides.size());
}

void AttentionTiles::CheckScratch(int64_t rows) const {
  constexpr int64_t kMostBytes = 1 << 20;
  Check<UnsupportedError>(
      rows * lanes_ * 4 <= kMostBytes,
      "attention: head width {} (values {}) needs {} bytes of stack, at most {} are "
      "used; use more heads",
      spec_.head_dim, spec_.value_dim, rows * lanes_ * 4, kMostBytes);
}

AttentionTiles::Value* AttentionTiles::Head(const Operand& operand, Value* batch, Value* head) {
  Value* pointer = e_.Base(operand);
  pointer = e_.At(pointer, operand.dtype, batch, operand.strides[0]);
  return e_.At(pointer, operand.dtype, head, operand.strides[1]);
}

void AttentionTiles::LoadTransposed(Value* x, int64_t row, int64_t column, int64_t count,
                                    int64_t valid, double factor, Value* scratch) {
  auto scaled = [&](Value* value) {
    return factor == 1 ? value : e_.b.CreateFMul(value, e_.Splat(factor, width_));
  };
  for (int v = 0; v < vectors_; ++v) {
    int lanes = ValidOf(valid, v);
    Value* rows = e_.At(x, DType::kF32, int64_t{v} * width_ * row);
    if (column != 1) {
      e_.For(count, [&](Value* d) {
        Value* from = e_.At(rows, DType::kF32, d, column);
        SetVector(scaled(e_.Load(from, DType::kF32, row, width_, lanes)), Row(scratch, d), 0, v);
      });
      continue;
    }
    auto block = [&](Value* d, int columns) {
      Values loaded(width_, e_.Splat(0.0, width_));
      for (int lane = 0; lane < lanes; ++lane) {
        Value* from = e_.At(e_.At(rows, DType::kF32, d, 1), DType::kF32, lane * row);
        loaded[lane] = e_.Load(from, DType::kF32, 1, width_, columns);
      }
      loaded = e_.Transpose(loaded);
      for (int c = 0; c < columns; ++c) SetVector(scaled(loaded[c]), Row(scratch, d), c, v);
    };
    int64_t whole = count / width_ * width_;
    e_.For(e_.I64(0), e_.I64(whole), width_, [&](Value* d) { block(d, width_); });
    if (whole < count) block(e_.I64(whole), static_cast<int>(count - whole));
  }
}

void AttentionTiles::StoreTransposed(Value* scratch, int64_t count, int64_t valid,
                                     const Values& factors, Value* x, int64_t row, int64_t column) {
  for (int v = 0; v < vectors_; ++v) {
    int lanes = ValidOf(valid, v);
    Value* rows = e_.At(x, DType::kF32, int64_t{v} * width_ * row);
    if (column != 1) {
      e_.For(count, [&](Value* d) {
        Value* value = e_.b.CreateFMul(Vector(Row(scratch, d), 0, v), factors[v]);
        e_.Store(value, e_.At(rows, DType::kF32, d, column), DType::kF32, row, width_, lanes);
      });
      continue;
    }
    auto block = [&](Value* d, int columns) {
      Values values(width_, e_.Splat(0.0, width_));
      for (int c = 0; c < columns; ++c) {
        values[c] = e_.b.CreateFMul(Vector(Row(scratch, d), c, v), factors[v]);
      }
      values = e_.Transpose(values);
      for (int lane = 0; lane < lanes; ++lane) {
        Value* to = e_.At(e_.At(rows, DType::kF32, d, 1), DType::kF32, lane * row);
        e_.Store(values[lane], to, DType::kF32, 1, width_, columns);
      }
    };
    int64_t whole = count / width_ * width_;
    e_.For(e_.I64(0), e_.I64(whole), width_, [&](Value* d) { block(d, width_); });
    if (whole < count) block(e_.I64(whole), static_cast<int>(count - whole));
  }
}

AttentionTiles::Values AttentionTiles::Tile(int rows, int64_t steps, const Broadcast& a,
                                            const Lanes& b, Values sums) {
  return e_.Fold(steps, std::move(sums), [&](Value* s, const Values& before) {
    Values after = before;
    Value* x = e_.At(a.pointer, DType::kF32, s, a.step);
    Value* y = e_.At(b.pointer, DType::kF32, s, b.step);
    Values lanes;
    for (int v = 0; v < b.vectors; ++v) {
      int valid = b.valid < 0 ? width_ : ValidOf(b.valid, v);
      Value* from = e_.At(y, DType::kF32, int64_t{v} * width_ * b.stride);
      lanes.push_back(e_.Load(from, DType::kF32, b.stride, width_, valid));
    }
    for (int r = 0; r < rows; ++r) {
      Value* repeated = e_.Load(e_.At(x, DType::kF32, r * a.row), DType::kF32, 0, width_, width_);
      for (int v = 0; v < b.vectors; ++v) {
        Value*& sum = after[r * b.vectors + v];
        sum = e_.MultiplyAdd(repeated, lanes[v], sum);
      }
    }
    return after;
  });
}

AttentionTiles::Values AttentionTiles::FoldTiles(
    int64_t n, Values state, llvm::function_ref<Values(Value*, int, const Values&)> body) {
  if (n == 0) return state;
  int64_t tiles = (n + rows_ - 1) / rows_;
  int64_t size = (n + tiles - 1) / tiles;  // even tiles
  int64_t full = n / size;
  state = e_.Fold(full, std::move(state), [&](Value* number, const Values& now) {
    return body(e_.Mul(number, size), static_cast<int>(size), now);
  });
  if (n % size > 0) state = body(e_.I64(full * size), static_cast<int>(n % size), state);
  return state;
}

void AttentionTiles::ForTiles(int64_t n, llvm::function_ref<void(Value*, int)> body) {
  FoldTiles(n, {}, [&](Value* first, int size, const Values&) {
    body(first, size);
    return Values{};
  });
}

AttentionTiles::Value* AttentionTiles::Score(Value* product, Value* mask, Value* key, Value* query,
                                             int v, int64_t valid) {
  Value* score = product;
  if (spec_.has_mask) {
    int64_t row = spec_.mask.strides[2];
    Value* from = e_.At(e_.At(mask, DType::kF32, key, spec_.mask.strides[3]), DType::kF32,
                        int64_t{v} * width_ * row);
    int lanes = row == 0 ? width_ : ValidOf(valid, v);
    Value* added = e_.Load(from, DType::kF32, row, width_, lanes);
    score = e_.MultiplyAdd(added, e_.Splat(std::numbers::log2e, width_), score);
  }
  if (spec_.causal) {
    llvm::Type* type = e_.Int(width_);
    std::vector<llvm::Constant*> iota;
    for (int i = 0; i < width_; ++i) iota.push_back(e_.b.getInt32(v * width_ + i));
    Value* lane_query =
        e_.b.CreateAdd(e_.b.CreateVectorSplat(width_, e_.b.CreateTrunc(query, e_.b.getInt32Ty())),
                       llvm::ConstantVector::get(iota));
    Value* lane_key = e_.b.CreateVectorSplat(width_, e_.b.CreateTrunc(key, type->getScalarType()));
    score = e_.b.CreateSelect(e_.b.CreateICmpSGE(lane_query, lane_key), score,
                              e_.Splat(-std::numeric_limits<double>::infinity(), width_));
  }
  return score;
}

AttentionTiles::Value* AttentionTiles::Exp2(Value* x) {
  // 2^x = 2^f * 2^n: a polynomial for |f| <= 1/2 (relative error 1.5e-7), and a power made of
  // bits. Added to 3 * 2^22 + 127, x is rounded to an integer, whose low bits are the exponent of
  // 2^n; at n = -127 that power is 0.
  static constexpr double kCoefficients[] = {1.3276471979e-3, 9.6755413342e-3, 5.5507132735e-2,
                                             2.4022119724e-1, 6.9314696706e-1, 1};
  Value* least = e_.Splat(-127, width_);
  x = e_.b.CreateSelect(e_.b.CreateFCmpOGT(least, x), least, x);  // NaN stays
  Value* magic = e_.Splat(0x1.8p23 + 127, width_);
  Value* shifted = e_.b.CreateFAdd(x, magic);
  Value* f = e_.b.CreateFSub(x, e_.b.CreateFSub(shifted, magic));
  Value* p = e_.Splat(kCoefficients[0], width_);
  for (size_t i = 1; i < std::size(kCoefficients); ++i) {
    p = e_.MultiplyAdd(p, f, e_.Splat(kCoefficients[i], width_));
  }
  Value* power = e_.b.CreateShl(e_.b.CreateBitCast(shifted, e_.Int(width_)), 23);
  return e_.b.CreateFMul(p, e_.b.CreateBitCast(power, x->getType()));
}

namespace {

class AttentionEmitter : AttentionTiles {
 public:
  AttentionEmitter(Emitter& e, const AttentionSpec& spec)
      : AttentionTiles(e, spec),
        one_block_(spec.keys <= KeyBlock()),
        blocks_(spec.queries / lanes_),
        groups_(Groups()) {
    CheckScratch(spec.head_dim + spec.value_dim + KeyBlock() + 2);
    queries_ = e.Scratch(groups_ * spec.head_dim * lanes_);
    weights_ = e.Scratch(std::max<int64_t>(KeyBlock(), 1) * lanes_);
    sums_ = e.Scratch(groups_ * spec.value_dim * lanes_);
    states_ = e.Scratch(groups_ * 2 * lanes_);
    if (groups_ > 1) {
      packed_keys_ = e.Scratch(KeyBlock() * PackedRow(spec.head_dim));
      packed_values_ = e.Scratch(KeyBlock() * PackedRow(spec.value_dim));
    }
  }

  void Emit() {
    // A unit is up to groups_ groups of queries, or the rest that is no whole group.
    int64_t whole = (blocks_ + groups_ - 1) / groups_, rest = spec_.queries % lanes_;
    int64_t units = whole + (rest > 0);
    auto [first, last] = e_.Units(spec_.batch * spec_.heads * units, Chunks(KernelSpec(spec_)));
    e_.For(first, last, 1, [&](Value* unit) {
      Values index = e_.Unflatten(unit, std::vector<int64_t>{spec_.batch, spec_.heads, units});
      auto emit_whole = [&] {
        Value* from = e_.Mul(index[2], groups_);
        Value* count = blocks_ % groups_ == 0
                           ? e_.I64(groups_)
                           : e_.Min(e_.I64(groups_), e_.b.CreateSub(e_.I64(blocks_), from));
        EmitQueries(index[0], index[1], e_.Mul(from, lanes_), count, lanes_);
      };
      auto emit_rest = [&] {
        EmitQueries(index[0], index[1], e_.I64(blocks_ * lanes_), e_.I64(1), rest);
      };
      if (rest == 0) return emit_whole();
      if (whole == 0) return emit_rest();
      e_.If(e_.b.CreateICmpSLT(index[2], e_.I64(whole)), emit_whole);
      e_.If(e_.b.CreateICmpEQ(index[2], e_.I64(whole)), emit_rest);
    });
  }

 private:
  // Groups of queries that meet a block of keys while it is in the cache. More than one only where
  // the keys and values of a head are too large for the cache next to the core, as many as leave
  // work for all threads.
  int64_t Groups() const {
    constexpr int64_t kCacheBytes = 128 * 1024, kMost = 8, kUnits = 64;
    // Two groups of a wide head (an autoencoder's single one) fill half of a level-2 cache, which
    // costs less than reading all keys and values for each group.
    constexpr int64_t kWideBytes = 288 * 1024;
    int64_t depth = spec_.head_dim + spec_.value_dim;
    if (one_block_ || 4 * spec_.keys * depth <= kCacheBytes) return 1;
    int64_t fit = std::max(kCacheBytes / (4 * lanes_ * depth),
                           std::min<int64_t>(2, kWideBytes / (4 * lanes_ * depth)));
    int64_t groups = std::min({kMost, fit, spec_.batch * spec_.heads * blocks_ / kUnits});
    return std::max<int64_t>(1, groups);
  }

  // `count` groups of `valid` queries each, from number `query` on.
  void EmitQueries(Value* batch, Value* head, Value* query, Value* count, int64_t valid) {
    key_ = Head(spec_.k, batch, head);
    value_ = Head(spec_.v, batch, head);
    valid_ = valid;
    auto for_groups = [&](llvm::function_ref<void()> body) {
      e_.For(e_.I64(0), count, 1, [&](Value* group) {
        query_ = e_.Add(query, e_.Mul(group, lanes_));
        mask_ = spec_.has_mask ? Rows(spec_.mask, batch, head) : nullptr;
        group_queries_ = e_.At(queries_, DType::kF32, group, spec_.head_dim * lanes_);
        group_sums_ = e_.At(sums_, DType::kF32, group, spec_.value_dim * lanes_);
        group_state_ = e_.At(states_, DType::kF32, group, 2 * lanes_);
        body();
      });
    };
    if (one_block_) {
      for_groups([&] {
        Begin(batch, head);
        if (spec_.keys > 0) EmitBlock(BlockAt(e_.I64(0), spec_.keys));
        Finish(batch, head);
      });
      return;
    }
    for_groups([&] { Begin(batch, head); });
    auto block = [&](Value* first, int64_t keys) {
      Block b = BlockAt(first, keys);
      // Rows far apart would fall on few sets of the cache.
      if (groups_ > 1 && valid == lanes_) b = Pack(b);
      for_groups([&] {
        if (!spec_.causal) return EmitBlock(b);
        // Keys after the last query are invisible.
        Value* last = e_.Add(query_, e_.I64(valid_ - 1));
        e_.If(e_.b.CreateICmpSLE(first, last), [&] { EmitBlock(b); });
      });
    };
    const int64_t keys = KeyBlock(), full = spec_.keys / keys, rest = spec_.keys % keys;
    Value* seen = e_.I64(full);
    if (spec_.causal) {
      Value* after = e_.Add(query, e_.Add(e_.Mul(count, lanes_), e_.I64(valid - lanes_)));
      seen = e_.Min(seen, e_.b.CreateUDiv(e_.Add(after, e_.I64(keys - 1)), e_.I64(keys)));
    }
    e_.For(e_.I64(0), seen, 1, [&](Value* number) { block(e_.Mul(number, keys), keys); });
    if (rest > 0) block(e_.I64(full * keys), rest);
    for_groups([&] { Finish(batch, head); });
  }

  // The rows of an operand that belong to the group's queries.
  Value* Rows(const Operand& operand, Value* batch, Value* head) {
    return e_.At(Head(operand, batch, head), operand.dtype, query_, operand.strides[2]);
  }

  void Begin(Value* batch, Value* head) {
    LoadTransposed(Rows(spec_.q, batch, head), spec_.q.strides[2], spec_.q.strides[3],
                   spec_.head_dim, valid_, spec_.scale * std::numbers::log2e, group_queries_);
    // Starting from the lowest finite number, keys masked by -inf vanish also if there are no
    // others.
    Value *lowest = e_.Splat(std::numeric_limits<float>::lowest(), width_), *zero = Zeros(1)[0];
    for (int v = 0; v < vectors_; ++v) {
      SetVector(lowest, group_state_, 0, v);
      SetVector(zero, group_state_, 1, v);
    }
    if (one_block_ && spec_.keys > 0) return;  // the block's sums are all
    e_.For(spec_.value_dim, [&](Value* d) {
      for (int v = 0; v < vectors_; ++v) SetVector(zero, Row(group_sums_, d), 0, v);
    });
  }

  void Finish(Value* batch, Value* head) {
    Values factors;
    Value* lse = Rows(spec_.lse, batch, head);
    scalar::Recorder recorder;
    ScalarProgram logarithm = recorder.Finish(1, scalar::Logarithm(recorder.Input(0)));
    for (int v = 0; v < vectors_; ++v) {
      Value *top = Vector(group_state_, 0, v), *sum = Vector(group_state_, 1, v);
      // The sum is at least 1, or 0 where all keys are masked.
      Value* least = e_.Splat(1e-30, width_);
      Value* divisor = e_.b.CreateSelect(e_.b.CreateFCmpOLT(sum, least), least, sum);
      factors.push_back(e_.b.CreateFDiv(e_.Splat(1, width_), divisor));
      Value* result = e_.Program(logarithm, Values{sum}, width_)[0];
      result = e_.b.CreateFAdd(e_.b.CreateFMul(top, e_.Splat(std::numbers::ln2, width_)), result);
      int64_t stride = spec_.lse.strides[2];
      e_.Store(result, e_.At(lse, DType::kF32, int64_t{v} * width_ * stride), DType::kF32, stride,
               width_, ValidOf(valid_, v));
    }
    StoreTransposed(group_sums_, spec_.value_dim, valid_, factors, Rows(spec_.out, batch, head),
                    spec_.out.strides[2], spec_.out.strides[3]);
  }

  // Keys [first, first + count) and their values.
  struct Block {
    Value* first;
    int64_t count;
    Value* key;
    int64_t key_row, key_column;
    Value* value;
    int64_t value_row, value_column;
  };

  Block BlockAt(Value* first, int64_t count) {
    const auto &k = spec_.k.strides, &v = spec_.v.strides;
    return {first, count, e_.At(key_, DType::kF32, first, k[2]),
            k[2],  k[3],  e_.At(value_, DType::kF32, first, v[2]),
            v[2],  v[3]};
  }

  // Rows of a packed block, a little apart if they would fall on few sets of the cache.
  static int64_t PackedRow(int64_t width) { return width % 128 == 0 ? width + 16 : width; }

  // The same keys and values, row after row.
  Block Pack(const Block& b) {
    auto copy = [&](Value* from, int64_t row, int64_t column, Value* to, int64_t width) {
      e_.For(b.count, [&](Value* j) {
        for (int64_t d = 0; d < width; d += width_) {
          int valid = static_cast<int>(std::min<int64_t>(width_, width - d));
          Value* source = e_.At(e_.At(from, DType::kF32, j, row), DType::kF32, d * column);
          e_.Store(e_.Load(source, DType::kF32, column, width_, valid),
                   e_.At(e_.At(to, DType::kF32, j, PackedRow(width)), DType::kF32, d), DType::kF32,
                   1, width_, valid);
        }
      });
    };
    copy(b.key, b.key_row, b.key_column, packed_keys_, spec_.head_dim);
    copy(b.value, b.value_row, b.value_column, packed_values_, spec_.value_dim);
    return {b.first,
            b.count,
            packed_keys_,
            PackedRow(spec_.head_dim),
            1,
            packed_values_,
            PackedRow(spec_.value_dim),
            1};
  }

  // Updates maximum, sum, and the sums of the values.
  void EmitBlock(const Block& b) {
    const int64_t count = b.count;
    Values old_top;
    for (int v = 0; v < vectors_; ++v) old_top.push_back(Vector(group_state_, 0, v));
    Values top = FoldTiles(count, old_top, [&](Value* j, int rows, const Values& now) {
      Values after = now;
      Broadcast a{e_.At(b.key, DType::kF32, j, b.key_row), b.key_row, b.key_column};
      Values scores =
          Tile(rows, spec_.head_dim, a, {group_queries_, lanes_, vectors_}, Zeros(rows));
      for (int r = 0; r < rows; ++r) {
        Value* number = e_.Add(e_.Add(b.first, j), e_.I64(r));
        for (int v = 0; v < vectors_; ++v) {
          Value* score = Score(scores[r * vectors_ + v], mask_, number, query_, v, valid_);
          after[v] = e_.b.CreateSelect(e_.b.CreateFCmpOGT(after[v], score), after[v], score);
          SetVector(score, Row(weights_, j), r, v);
        }
      }
      return after;
    });
    // The sums of a block are added to those before it when they are complete: two short chains of
    // roundings instead of a long one.
    Values sum = e_.Fold(count, Repeat(0), [&](Value* j, const Values& now) {
      Values after = now;
      for (int v = 0; v < vectors_; ++v) {
        Value* score = Vector(Row(weights_, j), 0, v);
        Value* weight = Exp2(e_.b.CreateFSub(score, top[v]));
        SetVector(weight, Row(weights_, j), 0, v);
        after[v] = e_.b.CreateFAdd(after[v], weight);
      }
      return after;
    });
    Values scale;
    for (int v = 0; v < vectors_; ++v) {
      if (!one_block_) {
        scale.push_back(Exp2(e_.b.CreateFSub(old_top[v], top[v])));
        sum[v] = e_.MultiplyAdd(Vector(group_state_, 1, v), scale[v], sum[v]);
      }
      SetVector(top[v], group_state_, 0, v);
      SetVector(sum[v], group_state_, 1, v);
    }
    ForTiles(spec_.value_dim, [&](Value* d, int rows) {
      Broadcast a{e_.At(b.value, DType::kF32, d, b.value_column), b.value_column, b.value_row};
      Values sums = Tile(rows, count, a, {weights_, lanes_, vectors_}, Zeros(rows));
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors_; ++v) {
          Value* one = sums[r * vectors_ + v];
          if (!one_block_) one = e_.MultiplyAdd(Vector(Row(group_sums_, d), r, v), scale[v], one);
          SetVector(one, Row(group_sums_, d), r, v);
        }
      }
    });
  }

  Values Zeros(int rows) { return Values(rows * vectors_, e_.Splat(0.0, width_)); }

  const bool one_block_;
  const int64_t blocks_, groups_;                // whole groups of queries; groups of one unit
  Value *queries_, *weights_, *sums_, *states_;  // scratch; a state: maximum, sum
  Value *packed_keys_ = nullptr, *packed_values_ = nullptr;
  // Of the group at hand.
  Value *key_ = nullptr, *value_ = nullptr, *mask_ = nullptr, *query_ = nullptr;
  Value *group_queries_ = nullptr, *group_sums_ = nullptr, *group_state_ = nullptr;
  int64_t valid_ = 0;
};

}  // namespace

void EmitAttention(Emitter& e, const AttentionSpec& spec) { AttentionEmitter(e, spec).Emit(); }

}  // namespace calotype::jit
