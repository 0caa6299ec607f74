// AttentionGradientSpec: for each head, blocks of queries against blocks of keys, probabilities
// recomputed from lse. One part of the queries of one head is one unit of work, so that the sums of
// dk and dv run in a fixed order; they grow in the outputs themselves.
#include <algorithm>
#include <limits>
#include <numbers>

#include "core/error.h"
#include "jit/emit_attention.h"

namespace calotype::jit {

namespace {

class AttentionGradientEmitter : AttentionTiles {
 public:
  AttentionGradientEmitter(Emitter& e, const AttentionGradientSpec& spec)
      : AttentionTiles(e, spec.forward), spec_g_(spec) {
    for (const Operand* operand : {&spec.dout, &spec.dq, &spec.dk, &spec.dv}) {
      Check<InternalError>(operand->strides.size() == 4,
                           "attention gradient kernel: {} strides instead of 4",
                           operand->strides.size());
    }
    bool shared_k = spec.dk.strides[0] == 0, shared_v = spec.dv.strides[0] == 0;
    // Keys shared by the batch collect the gradients of all of it, one after the other.
    shared_ = spec_.batch > 1 && (shared_k || shared_v);
    Check<UnsupportedError>(
        !shared_ || (shared_k && shared_v),
        "attention gradient: k and v must both or neither be shared by the batch");
    Check<InternalError>(spec.part >= 0 && spec.part % 64 == 0,
                         "attention gradient kernel: parts of {} queries", spec.part);
    CheckScratch(2 * spec_.head_dim + spec_.value_dim + 2 * KeyBlock() + 2);
    queries_ = e.Scratch(spec_.head_dim * lanes_);
    dqueries_ = e.Scratch(spec_.head_dim * lanes_);
    douts_ = e.Scratch(spec_.value_dim * lanes_);
    weights_ = e.Scratch(KeyBlock() * lanes_);
    dscores_ = e.Scratch(KeyBlock() * lanes_);
  }

  void Emit() {
    int64_t batches = shared_ ? 1 : spec_.batch;
    const int64_t parts = spec_g_.Parts();
    auto [first, last] = e_.Units(batches * spec_.heads * parts, Chunks(KernelSpec(spec_g_)));
    e_.For(first, last, 1, [&](Value* unit) {
      Values index = e_.Unflatten(unit, std::vector<int64_t>{batches, spec_.heads, parts});
      part_ = index[2];
      Zero(PartHead(spec_g_.dk, index[0], index[1]), spec_g_.dk, spec_.head_dim);
      Zero(PartHead(spec_g_.dv, index[0], index[1]), spec_g_.dv, spec_.value_dim);
      if (shared_) {
        e_.For(spec_.batch, [&](Value* batch) { EmitHead(batch, index[1]); });
      } else {
        EmitHead(index[0], index[1]);
      }
    });
  }

 private:
  void Zero(Value* pointer, const Operand& operand, int64_t columns) {
    int64_t column = operand.strides[3];
    e_.For(spec_.keys, [&](Value* j) {
      Value* row = e_.At(pointer, DType::kF32, j, operand.strides[2]);
      auto store = [&](Value* d, int valid) {
        e_.Store(e_.Splat(0.0, width_), e_.At(row, DType::kF32, d, column), DType::kF32, column,
                 width_, valid);
      };
      int64_t whole = columns / width_ * width_;
      e_.For(e_.I64(0), e_.I64(whole), width_, [&](Value* d) { store(d, width_); });
      if (whole < columns) store(e_.I64(whole), static_cast<int>(columns - whole));
    });
  }

  // The part's own dk or dv.
  Value* PartHead(const Operand& operand, Value* batch, Value* head) {
    int64_t step = &operand == &spec_g_.dk ? spec_g_.dk_step : spec_g_.dv_step;
    return e_.At(Head(operand, batch, head), DType::kF32, part_, step);
  }

  void EmitHead(Value* batch, Value* head) {
    const int64_t full = spec_.queries / lanes_, rest = spec_.queries % lanes_;
    const int64_t parts = spec_g_.Parts(), blocks = parts > 1 ? spec_g_.part / lanes_ : full;
    Value* first = e_.Mul(part_, blocks);
    Value* last = e_.Min(e_.Add(first, e_.I64(blocks)), e_.I64(full));
    e_.For(first, last, 1,
           [&](Value* number) { EmitQueries(batch, head, e_.Mul(number, lanes_), lanes_); });
    if (rest == 0) return;
    e_.If(e_.b.CreateICmpEQ(part_, e_.I64(parts - 1)),
          [&] { EmitQueries(batch, head, e_.I64(full * lanes_), rest); });
  }

  void EmitQueries(Value* batch, Value* head, Value* query, int64_t valid) {
    auto rows = [&](const Operand& operand) {
      return e_.At(Head(operand, batch, head), operand.dtype, query, operand.strides[2]);
    };
    batch_ = batch;
    head_ = head;
    query_ = query;
    valid_ = valid;
    mask_ = spec_.has_mask ? rows(spec_.mask) : nullptr;
    query_rows_ = rows(spec_.q);
    dout_rows_ = rows(spec_g_.dout);
    const Operand &dout = spec_g_.dout, &out = spec_.out;
    LoadTransposed(query_rows_, spec_.q.strides[2], spec_.q.strides[3], spec_.head_dim, valid,
                   spec_.scale * std::numbers::log2e, queries_);
    LoadTransposed(dout_rows_, dout.strides[2], dout.strides[3], spec_.value_dim, valid, 1, douts_);
    // delta = sum of out dout
    Value* out_rows = rows(out);
    delta_ = e_.Fold(spec_.value_dim, Repeat(0), [&](Value* d, const Values& before) {
      Values after = before;
      for (int v = 0; v < vectors_; ++v) {
        Value* from = e_.At(e_.At(out_rows, DType::kF32, d, out.strides[3]), DType::kF32,
                            int64_t{v} * width_ * out.strides[2]);
        Value* o = e_.Load(from, DType::kF32, out.strides[2], width_, ValidOf(valid, v));
        after[v] = e_.MultiplyAdd(o, Vector(Row(douts_, d), 0, v), after[v]);
      }
      return after;
    });
    Value* lse_rows = rows(spec_.lse);
    lse_.clear();
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    for (int v = 0; v < vectors_; ++v) {
      int64_t stride = spec_.lse.strides[2];
      Value* from = e_.At(lse_rows, DType::kF32, int64_t{v} * width_ * stride);
      Value* lse = e_.Load(from, DType::kF32, stride, width_, ValidOf(valid, v));
      // A query without visible keys has lse = -inf and weights of 0.
      Value* none = e_.b.CreateFCmpOEQ(lse, e_.Splat(-kInfinity, width_));
      lse = e_.b.CreateSelect(none, e_.Splat(kInfinity, width_), lse);
      lse_.push_back(e_.b.CreateFMul(lse, e_.Splat(std::numbers::log2e, width_)));
    }
    e_.For(spec_.head_dim, [&](Value* d) {
      for (int v = 0; v < vectors_; ++v) SetVector(e_.Splat(0.0, width_), Row(dqueries_, d), 0, v);
    });

    int64_t block = KeyBlock(), whole = spec_.keys / block, rest = spec_.keys % block;
    Value* blocks = e_.I64(whole);
    Value* has_rest = e_.I64(whole + 1);
    if (spec_.causal) {
      Value* seen = e_.b.CreateUDiv(e_.Add(query, e_.I64(valid + block - 1)), e_.I64(block));
      has_rest = e_.Min(has_rest, seen);
      blocks = e_.Min(blocks, seen);
    }
    e_.For(e_.I64(0), blocks, 1, [&](Value* number) { EmitBlock(e_.Mul(number, block), block); });
    if (rest > 0) {
      e_.For(e_.I64(whole), has_rest, 1, [&](Value*) { EmitBlock(e_.I64(whole * block), rest); });
    }
    StoreTransposed(dqueries_, spec_.head_dim, valid, Repeat(1), rows(spec_g_.dq),
                    spec_g_.dq.strides[2], spec_g_.dq.strides[3]);
  }

  Values Zeros(int count) { return Values(count, e_.Splat(0.0, width_)); }

  // Keys [first, first + count).
  void EmitBlock(Value* first, int64_t count) {
    auto rows = [&](const Operand& operand) {
      return e_.At(Head(operand, batch_, head_), DType::kF32, first, operand.strides[2]);
    };
    Value *key = rows(spec_.k), *value = rows(spec_.v);
    int64_t key_row = spec_.k.strides[2], key_column = spec_.k.strides[3];
    int64_t value_row = spec_.v.strides[2], value_column = spec_.v.strides[3];
    ForTiles(count, [&](Value* j, int size) {
      Broadcast k{e_.At(key, DType::kF32, j, key_row), key_row, key_column};
      Values scores =
          Tile(size, spec_.head_dim, k, {queries_, lanes_, vectors_}, Zeros(size * vectors_));
      for (int r = 0; r < size; ++r) {
        Value* number = e_.Add(e_.Add(first, j), e_.I64(r));
        for (int v = 0; v < vectors_; ++v) {
          Value* score = Score(scores[r * vectors_ + v], mask_, number, query_, v, valid_);
          SetVector(Exp2(e_.b.CreateFSub(score, lse_[v])), Row(weights_, j), r, v);
        }
      }
    });
    ForTiles(count, [&](Value* j, int size) {
      Broadcast a{e_.At(value, DType::kF32, j, value_row), value_row, value_column};
      Values dweights =
          Tile(size, spec_.value_dim, a, {douts_, lanes_, vectors_}, Zeros(size * vectors_));
      for (int r = 0; r < size; ++r) {
        for (int v = 0; v < vectors_; ++v) {
          Value* weight = Vector(Row(weights_, j), r, v);
          Value* dscore = e_.b.CreateFSub(dweights[r * vectors_ + v], delta_[v]);
          dscore = e_.b.CreateFMul(weight, dscore);
          dscore = e_.b.CreateFMul(dscore, e_.Splat(spec_.scale, width_));
          SetVector(dscore, Row(dscores_, j), r, v);
        }
      }
    });
    // dq[d] += sum over keys of k[j, d] ds[j]
    ForTiles(spec_.head_dim, [&](Value* d, int size) {
      Values sums;
      for (int r = 0; r < size; ++r) {
        for (int v = 0; v < vectors_; ++v) sums.push_back(Vector(Row(dqueries_, d), r, v));
      }
      Broadcast a{e_.At(key, DType::kF32, d, key_column), key_column, key_row};
      sums = Tile(size, count, a, {dscores_, lanes_, vectors_}, sums);
      for (int r = 0; r < size; ++r) {
        for (int v = 0; v < vectors_; ++v)
          SetVector(sums[r * vectors_ + v], Row(dqueries_, d), r, v);
      }
    });
    auto part_rows = [&](const Operand& operand) {
      return e_.At(PartHead(operand, batch_, head_), DType::kF32, first, operand.strides[2]);
    };
    AddOuter(count, dscores_, query_rows_, spec_.q, spec_.head_dim, part_rows(spec_g_.dk),
             spec_g_.dk);
    AddOuter(count, weights_, dout_rows_, spec_g_.dout, spec_.value_dim, part_rows(spec_g_.dv),
             spec_g_.dv);
  }

  // target[j, d] += sum over the valid queries i of scratch[j, i] * x[i, d]: lanes along d.
  void AddOuter(int64_t count, Value* scratch, Value* x, const Operand& x_operand, int64_t columns,
                Value* target, const Operand& to) {
    int64_t most = int64_t{2} * width_;
    auto panel = [&](Value* d, int64_t valid) {
      int vectors = static_cast<int>((valid + width_ - 1) / width_);
      ForTiles(count, [&](Value* j, int size) {
        Broadcast a{Row(scratch, j), lanes_, 1};
        Lanes b{e_.At(x, DType::kF32, d, x_operand.strides[3]), x_operand.strides[2], vectors,
                x_operand.strides[3], valid};
        Values sums = Tile(size, valid_, a, b, Zeros(size * vectors));
        for (int r = 0; r < size; ++r) {
          Value* row =
              e_.At(e_.At(target, DType::kF32, j, to.strides[2]), DType::kF32, r * to.strides[2]);
          row = e_.At(row, DType::kF32, d, to.strides[3]);
          for (int v = 0; v < vectors; ++v) {
            int lanes = ValidOf(valid, v);
            Value* place = e_.At(row, DType::kF32, int64_t{v} * width_ * to.strides[3]);
            Value* before = e_.Load(place, DType::kF32, to.strides[3], width_, lanes);
            e_.Store(e_.b.CreateFAdd(before, sums[r * vectors + v]), place, DType::kF32,
                     to.strides[3], width_, lanes);
          }
        }
      });
    };
    int64_t whole = columns / most * most;
    e_.For(e_.I64(0), e_.I64(whole), most, [&](Value* d) { panel(d, most); });
    if (whole < columns) panel(e_.I64(whole), columns - whole);
  }

  const AttentionGradientSpec& spec_g_;
  bool shared_ = false;
  Value *queries_, *dqueries_, *douts_, *weights_, *dscores_;  // scratch
  Value *part_ = nullptr, *batch_ = nullptr, *head_ = nullptr, *query_ = nullptr, *mask_ = nullptr;
  Value *query_rows_ = nullptr, *dout_rows_ = nullptr;
  Values delta_, lse_;
  int64_t valid_ = 0;
};

}  // namespace

void EmitAttentionGradient(Emitter& e, const AttentionGradientSpec& spec) {
  AttentionGradientEmitter(e, spec).Emit();
}

}  // namespace calotype::jit
