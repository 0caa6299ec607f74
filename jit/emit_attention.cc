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
  rows_ = e.target.vector_registers >= 32 ? 8 : 4;
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

void AttentionTiles::ForQueries(llvm::function_ref<void(Value*, Value*, Value*, int64_t)> body) {
  int64_t full = spec_.queries / lanes_, rest = spec_.queries % lanes_;
  int64_t blocks = full + (rest > 0);
  auto [first, last] = e_.Units(spec_.batch * spec_.heads * blocks, Chunks(KernelSpec(spec_)));
  e_.For(first, last, 1, [&](Value* unit) {
    Values index = e_.Unflatten(unit, std::vector<int64_t>{spec_.batch, spec_.heads, blocks});
    Value* query = e_.Mul(index[2], lanes_);
    if (full > 0 && rest > 0) {
      e_.If(e_.b.CreateICmpSLT(index[2], e_.I64(full)),
            [&] { body(index[0], index[1], query, lanes_); });
      e_.If(e_.b.CreateICmpEQ(index[2], e_.I64(full)),
            [&] { body(index[0], index[1], query, rest); });
    } else {
      body(index[0], index[1], query, full > 0 ? lanes_ : rest);
    }
  });
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
  // Cephes' polynomial for 2^f, |f| <= 1/2 (Moshier); the exponent is added to the bits.
  static constexpr double kCoefficients[] = {1.535336188319500e-4,
                                             1.339887440266574e-3,
                                             9.618437357674640e-3,
                                             5.550332471162809e-2,
                                             2.402264791363012e-1,
                                             6.931472028550421e-1,
                                             1.0};
  llvm::Type* bits = e_.Int(width_);
  Value* whole = e_.Round(x);
  Value* f = e_.b.CreateFSub(x, whole);
  Value* p = e_.Splat(kCoefficients[0], width_);
  for (size_t i = 1; i < std::size(kCoefficients); ++i) {
    p = e_.MultiplyAdd(p, f, e_.Splat(kCoefficients[i], width_));
  }
  Value* exponent = e_.b.CreateFreeze(e_.b.CreateFPToSI(whole, bits));
  exponent = e_.b.CreateShl(exponent, llvm::ConstantInt::get(bits, 23));
  Value* result =
      e_.b.CreateBitCast(e_.b.CreateAdd(e_.b.CreateBitCast(p, bits), exponent), x->getType());
  Value* small = e_.b.CreateFCmpOLT(x, e_.Splat(-126, width_));
  result = e_.b.CreateSelect(small, e_.Splat(0.0, width_), result);
  return e_.b.CreateSelect(e_.b.CreateFCmpUNO(x, x), x, result);
}

namespace {

class AttentionEmitter : AttentionTiles {
 public:
  AttentionEmitter(Emitter& e, const AttentionSpec& spec) : AttentionTiles(e, spec) {
    CheckScratch(spec.head_dim + spec.value_dim + KeyBlock());
    queries_ = e.Scratch(spec.head_dim * lanes_);
    weights_ = e.Scratch(std::max<int64_t>(KeyBlock(), 1) * lanes_);
    sums_ = e.Scratch(spec.value_dim * lanes_);
  }

  void Emit() {
    ForQueries([&](Value* batch, Value* head, Value* query, int64_t valid) {
      EmitQueries(batch, head, query, valid);
    });
  }

 private:
  void EmitQueries(Value* batch, Value* head, Value* query, int64_t valid) {
    auto rows = [&](const Operand& operand) {
      return e_.At(Head(operand, batch, head), operand.dtype, query, operand.strides[2]);
    };
    key_ = Head(spec_.k, batch, head);
    value_ = Head(spec_.v, batch, head);
    mask_ = spec_.has_mask ? rows(spec_.mask) : nullptr;
    query_ = query;
    valid_ = valid;
    LoadTransposed(rows(spec_.q), spec_.q.strides[2], spec_.q.strides[3], spec_.head_dim, valid,
                   spec_.scale * std::numbers::log2e, queries_);
    bool one_block = spec_.keys <= KeyBlock();
    if (!one_block) {
      e_.For(spec_.value_dim, [&](Value* d) {
        for (int v = 0; v < vectors_; ++v) SetVector(e_.Splat(0.0, width_), Row(sums_, d), 0, v);
      });
    }
    // Starting from the lowest finite number, keys masked by -inf vanish also if there are no
    // others.
    Values state = Repeat(std::numeric_limits<float>::lowest());
    Values total = Repeat(0);
    state.insert(state.end(), total.begin(), total.end());

    int64_t block = std::max<int64_t>(KeyBlock(), 1);
    int64_t full = spec_.keys / block, rest = spec_.keys % block;
    Value* blocks = e_.I64(full);
    Value* has_rest = e_.I64(full + 1);
    if (spec_.causal) {
      // Blocks that begin after the last query are invisible.
      Value* seen = e_.Add(query, e_.I64(valid + block - 1));
      seen = e_.b.CreateUDiv(seen, e_.I64(block));
      has_rest = e_.Min(has_rest, seen);
      blocks = e_.Min(blocks, seen);
    }
    state = e_.Fold(e_.I64(0), blocks, 1, state, [&](Value* number, const Values& now) {
      return EmitBlock(e_.Mul(number, block), block, now, one_block);
    });
    if (rest > 0) {
      state = e_.Fold(e_.I64(full), has_rest, 1, state, [&](Value*, const Values& now) {
        return EmitBlock(e_.I64(full * block), rest, now, one_block);
      });
    }

    Values factors;
    Value* lse = rows(spec_.lse);
    scalar::Recorder recorder;
    ScalarProgram logarithm = recorder.Finish(1, scalar::Logarithm(recorder.Input(0)));
    for (int v = 0; v < vectors_; ++v) {
      Value *top = state[v], *sum = state[vectors_ + v];
      // The sum is at least 1, or 0 where all keys are masked.
      Value* least = e_.Splat(1e-30, width_);
      Value* divisor = e_.b.CreateSelect(e_.b.CreateFCmpOLT(sum, least), least, sum);
      factors.push_back(e_.b.CreateFDiv(e_.Splat(1, width_), divisor));
      Value* result = e_.Program(logarithm, Values{sum}, width_)[0];
      result = e_.b.CreateFAdd(e_.b.CreateFMul(top, e_.Splat(std::numbers::ln2, width_)), result);
      int64_t stride = spec_.lse.strides[2];
      e_.Store(result, e_.At(lse, DType::kF32, int64_t{v} * width_ * stride), DType::kF32, stride,
               width_, ValidOf(valid, v));
    }
    StoreTransposed(sums_, spec_.value_dim, valid, factors, rows(spec_.out), spec_.out.strides[2],
                    spec_.out.strides[3]);
  }

  // Keys [first, first + count): updates maximum and sum, and the sums of the values.
  Values EmitBlock(Value* first, int64_t count, const Values& state, bool one_block) {
    Values old_top(state.begin(), state.begin() + vectors_);
    Values total(state.begin() + vectors_, state.end());
    Value* key = e_.At(key_, DType::kF32, first, spec_.k.strides[2]);
    Value* value = e_.At(value_, DType::kF32, first, spec_.v.strides[2]);
    Values top = FoldTiles(count, old_top, [&](Value* j, int rows, const Values& now) {
      Values after = now;
      Broadcast a{e_.At(key, DType::kF32, j, spec_.k.strides[2]), spec_.k.strides[2],
                  spec_.k.strides[3]};
      Values scores = Tile(rows, spec_.head_dim, a, {queries_, lanes_, vectors_}, Zeros(rows));
      for (int r = 0; r < rows; ++r) {
        Value* number = e_.Add(e_.Add(first, j), e_.I64(r));
        for (int v = 0; v < vectors_; ++v) {
          Value* score = Score(scores[r * vectors_ + v], mask_, number, query_, v, valid_);
          after[v] = e_.b.CreateSelect(e_.b.CreateFCmpOGT(after[v], score), after[v], score);
          SetVector(score, Row(weights_, j), r, v);
        }
      }
      return after;
    });
    Values scale;
    for (int v = 0; v < vectors_; ++v) {
      scale.push_back(Exp2(e_.b.CreateFSub(old_top[v], top[v])));
      total[v] = e_.b.CreateFMul(total[v], scale[v]);
    }
    total = e_.Fold(count, total, [&](Value* j, const Values& now) {
      Values after = now;
      for (int v = 0; v < vectors_; ++v) {
        Value* score = Vector(Row(weights_, j), 0, v);
        Value* weight = Exp2(e_.b.CreateFSub(score, top[v]));
        SetVector(weight, Row(weights_, j), 0, v);
        after[v] = e_.b.CreateFAdd(after[v], weight);
      }
      return after;
    });
    ForTiles(spec_.value_dim, [&](Value* d, int rows) {
      Values sums = Zeros(rows);
      if (!one_block) {
        for (int r = 0; r < rows; ++r) {
          for (int v = 0; v < vectors_; ++v) {
            sums[r * vectors_ + v] = e_.b.CreateFMul(Vector(Row(sums_, d), r, v), scale[v]);
          }
        }
      }
      Broadcast a{e_.At(value, DType::kF32, d, spec_.v.strides[3]), spec_.v.strides[3],
                  spec_.v.strides[2]};
      sums = Tile(rows, count, a, {weights_, lanes_, vectors_}, sums);
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors_; ++v) SetVector(sums[r * vectors_ + v], Row(sums_, d), r, v);
      }
    });
    Values result = top;
    result.insert(result.end(), total.begin(), total.end());
    return result;
  }

  Values Zeros(int rows) { return Values(rows * vectors_, e_.Splat(0.0, width_)); }

  Value *queries_, *weights_, *sums_;  // scratch
  Value *key_ = nullptr, *value_ = nullptr, *mask_ = nullptr, *query_ = nullptr;
  int64_t valid_ = 0;
};

}  // namespace

void EmitAttention(Emitter& e, const AttentionSpec& spec) { AttentionEmitter(e, spec).Emit(); }

}  // namespace calotype::jit
