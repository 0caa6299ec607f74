// Building blocks of the attention kernels: blocks of queries lie in the vector lanes, so softmax
// is arithmetic on vectors without horizontal steps, and keys and values are only ever broadcast
// from their natural layout.
#pragma once

#include "jit/emit.h"

namespace calotype::jit {

class AttentionTiles {
 protected:
  using Value = llvm::Value;
  using Values = std::vector<Value*>;

  AttentionTiles(Emitter& e, const AttentionSpec& spec);

  // Pieces of the keys that are scored at a time: all of a short row, or blocks of 64.
  int64_t KeyBlock() const { return spec_.keys <= 128 ? spec_.keys : 64; }
  Value* Head(const Operand& operand, Value* batch, Value* head);

  // scratch[d * lanes_ + lane] = factor * x[lane * row + d * column] for d < count; lanes past
  // `valid` are 0. And back: x[...] = factor[v] * scratch[...] for the valid lanes.
  void LoadTransposed(Value* x, int64_t row, int64_t column, int64_t count, int64_t valid,
                      double factor, Value* scratch);
  void StoreTransposed(Value* scratch, int64_t count, int64_t valid, const Values& factors,
                       Value* x, int64_t row, int64_t column);

  // sums[r * vectors + v] += sum over steps of a[r * row + s * step] * b[s * step + v * width +
  // lane].
  struct Broadcast {
    Value* pointer;
    int64_t row, step;
  };
  struct Lanes {
    Value* pointer;
    int64_t step;
    int vectors;
    int64_t stride = 1, valid = -1;  // valid lanes of all vectors; -1: all
  };
  Values Tile(int rows, int64_t steps, const Broadcast& a, const Lanes& b, Values sums);
  // Cuts [0, n) into tiles of at most rows_ and calls body(first, size) for each.
  void ForTiles(int64_t n, llvm::function_ref<void(Value* first, int size)> body);
  Values FoldTiles(int64_t n, Values state,
                   llvm::function_ref<Values(Value* first, int size, const Values& state)> body);

  Value* Vector(Value* scratch, int64_t row, int v) {
    return e_.b.CreateAlignedLoad(e_.Float(width_), Slot(scratch, row, v), align_);
  }
  void SetVector(Value* value, Value* scratch, int64_t row, int v) {
    e_.b.CreateAlignedStore(value, Slot(scratch, row, v), align_);
  }
  Value* Slot(Value* scratch, int64_t row, int v) {
    return e_.At(scratch, DType::kF32, row * lanes_ + v * width_);
  }
  Value* Row(Value* scratch, Value* row) { return e_.At(scratch, DType::kF32, row, lanes_); }
  int ValidOf(int64_t valid, int v) const {
    return static_cast<int>(std::clamp<int64_t>(valid - int64_t{v} * width_, 0, width_));
  }

  // The score of a query in the lanes and key number `key`, in units of log2: what the product gave
  // plus mask, or -inf for the future. `mask` points to element (first query, key 0).
  Value* Score(Value* product, Value* mask, Value* key, Value* query, int v, int64_t valid);
  Value* Exp2(Value* x);  // 2^x for x <= 126, 0 below -127
  Values Repeat(double value) { return Values(vectors_, e_.Splat(value, width_)); }
  void CheckScratch(int64_t rows) const;

  Emitter& e_;
  const AttentionSpec& spec_;
  int width_, vectors_, rows_;
  int64_t lanes_;  // queries of one group
  llvm::Align align_;
};

}  // namespace calotype::jit
