// LoopSpec: elementwise chains, copies, packing and transposes. The dimensions are reordered so
// that the first output is written in the order of its memory; one dimension lies in the vector
// lanes. Where an operand is contiguous along another dimension than the lanes, square blocks are
// transposed in registers instead of gathering element by element. Where the innermost dimension is
// short (the channels of a group, a short row), the lanes run through it and the next one together:
// an operand that repeats along either (the mean of a group) is loaded once and its values are
// spread to their lanes.
#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "jit/emit.h"

namespace calotype::jit {

namespace {

using Value = llvm::Value;
using Values = std::vector<Value*>;

class LoopEmitter {
 public:
  LoopEmitter(Emitter& e, const LoopSpec& spec)
      : e_(e), spec_(spec), width_(e.target.vector_width) {
    Arrange();
    step_ = width_;
    grouped_.assign(operands(), {});
    ChooseLanes();
  }

  void Emit() {
    int64_t chunks = e_.ChunksOf(spec_);
    ChooseUnits(chunks);
    auto [first, last] = e_.Units(units_, chunks);
    if (units_ == 1) {
      e_.If(e_.b.CreateICmpSLT(first, last), [&] { EmitUnit(e_.I64(0)); });
    } else {
      e_.For(first, last, 1, [&](Value* unit) { EmitUnit(unit); });
    }
  }

 private:
  size_t inputs() const { return spec_.inputs.size(); }
  size_t operands() const { return inputs() + spec_.outputs.size(); }
  const Operand& operand(size_t o) const {
    return o < inputs() ? spec_.inputs[o] : spec_.outputs[o - inputs()];
  }
  int64_t Stride(size_t o, int dim) const { return dims_[dim].strides[o]; }

  void Arrange() {
    for (size_t d = 0; d < spec_.extents.size(); ++d) {
      Dim dim{spec_.extents[d], {}};
      for (size_t o = 0; o < operands(); ++o) dim.strides.push_back(operand(o).strides[d]);
      dims_.push_back(std::move(dim));
    }
    std::erase_if(dims_, [](const Dim& d) { return d.extent == 1; });
    std::stable_sort(dims_.begin(), dims_.end(), [&](const Dim& x, const Dim& y) {
      return std::abs(x.strides[inputs()]) > std::abs(y.strides[inputs()]);
    });
    MergeDims(dims_);
    if (dims_.empty()) dims_.push_back({1, std::vector<int64_t>(operands(), 1)});
  }

  // The dimension in the lanes with the fewest instructions, gathers counted; ties go to the one
  // that the first output walks fastest.
  void ChooseLanes() {
    double best = 0;
    int count = static_cast<int>(dims_.size());
    double arithmetic = 1 + 0.5 * static_cast<double>(spec_.program.code.size());
    for (int lane = count - 1; lane >= 0; --lane) {
      double vectors = 1;
      for (int d = 0; d < count; ++d) {
        int64_t extent = dims_[d].extent;
        vectors *= static_cast<double>(d == lane ? (extent + width_ - 1) / width_ : extent);
      }
      int rows = -1;
      double memory = MemoryCost(lane, rows);
      double cost = vectors * (arithmetic + memory);
      for (int q = 0; q < count; ++q) {
        if (q == lane || !Transposes(lane, q)) continue;
        double blocked = vectors * (arithmetic + MemoryCost(lane, q));
        if (blocked < cost) {
          cost = blocked;
          rows = q;
        }
      }
      if (lane == count - 1 || cost < best * 0.999) {
        best = cost;
        lane_ = lane;
        rows_ = rows;
      }
    }
    JoinLanes(best, arithmetic);
  }

  // Merges the last two dimensions into the lanes if that costs less than `best`.
  void JoinLanes(double best, double arithmetic) {
    if (dims_.size() < 2) return;
    const Dim &outer = dims_[dims_.size() - 2], &inner = dims_.back();
    int64_t group = inner.extent, extent = outer.extent * group;
    if (extent == 0) return;
    // After this many vectors the pattern of the groups repeats.
    int64_t period = std::lcm(group, int64_t{width_}) / width_;
    period = std::min(period, (extent + width_ - 1) / width_);
    if (period * static_cast<int64_t>(spec_.program.code.size() + 4) > 256) return;
    std::vector<Grouped> grouped(operands());
    Dim joined{extent, inner.strides};
    double memory = 0;
    for (size_t o = 0; o < operands(); ++o) {
      int64_t p = outer.strides[o], q = inner.strides[o];
      if (p == q * group) {
        memory += q == 0 ? 0 : q == 1 ? 1 : 1.3 * width_;
        continue;
      }
      if (o >= inputs()) return;
      grouped[o] = {true, p, q};
      bool spreads = (q == 0 && p == 1) || (p == 0 && q == 1 && group <= width_);
      memory += spreads ? 2 : 1.3 * width_;
    }
    const int64_t whole = (extent + width_ - 1) / width_;
    double vectors = static_cast<double>(whole);
    for (size_t d = 0; d + 2 < dims_.size(); ++d) vectors *= static_cast<double>(dims_[d].extent);
    if (vectors * (arithmetic + memory) >= 0.9 * best) return;
    dims_.pop_back();
    dims_.back() = joined;
    grouped_ = grouped;
    group_ = group;
    lane_ = static_cast<int>(dims_.size()) - 1;
    rows_ = -1;
    step_ = period * width_;
  }

  bool Transposes(int lane, int rows) const {
    // One block needs all its rows in registers or unrolled code.
    if (dims_[lane].extent < width_ || dims_[rows].extent < width_) return false;
    if (spec_.program.code.size() * static_cast<size_t>(width_) > 512) return false;
    for (size_t o = 0; o < operands(); ++o) {
      if (IsTransposed(o, lane, rows)) return true;
    }
    return false;
  }
  bool IsTransposed(size_t o, int lane, int rows) const {
    return rows >= 0 && Stride(o, lane) != 0 && Stride(o, lane) != 1 && Stride(o, rows) == 1 &&
           operand(o).dtype == DType::kF32;
  }
  double MemoryCost(int lane, int rows) const {
    double cost = 0;
    for (size_t o = 0; o < operands(); ++o) {
      int64_t stride = Stride(o, lane);
      if (stride == 0) continue;
      cost += stride == 1 ? 1 : IsTransposed(o, lane, rows) ? 6 : 1.3 * width_;
    }
    return cost;
  }

  // Units are the outer dimensions, and pieces of a long inner one if those are too few.
  void ChooseUnits(int64_t chunks) {
    units_ = 1;
    if (chunks == 1) return;
    for (int d = 0; d < static_cast<int>(dims_.size()); ++d) {
      if (d == lane_ || d == rows_) continue;
      if (units_ >= 4 * chunks) break;
      unit_dims_.push_back(d);
      units_ *= dims_[d].extent;
    }
    if (units_ >= 2 * chunks) return;
    split_ = rows_ >= 0 && dims_[rows_].extent > dims_[lane_].extent ? rows_ : lane_;
    int64_t extent = dims_[split_].extent, step = Step(split_);
    int64_t pieces = std::min((4 * chunks + units_ - 1) / units_, (extent + step - 1) / step);
    piece_ = ((extent + pieces - 1) / pieces + step - 1) / step;
    pieces_ = (extent + piece_ * step - 1) / (piece_ * step);
    units_ *= pieces_;
  }

  // Elements of a dimension that one turn of its loop handles.
  int64_t Step(int dim) const { return dim == lane_ ? step_ : dim == rows_ ? width_ : 1; }

  void EmitUnit(Value* unit) {
    std::vector<int64_t> extents;
    for (int d : unit_dims_) extents.push_back(dims_[d].extent);
    if (split_ >= 0) extents.push_back(pieces_);
    Values index = e_.Unflatten(unit, extents);
    Values pointers;
    for (size_t o = 0; o < operands(); ++o) pointers.push_back(e_.Base(operand(o)));
    for (size_t i = 0; i < unit_dims_.size(); ++i) Advance(pointers, unit_dims_[i], index[i]);
    if (split_ >= 0) {
      first_turn_ = e_.Mul(index.back(), piece_);
      last_turn_ = e_.Add(first_turn_, e_.I64(piece_));
      has_tail_ = e_.b.CreateICmpEQ(index.back(), e_.I64(pieces_ - 1));
    }
    std::vector<int> rest;
    for (int d = 0; d < static_cast<int>(dims_.size()); ++d) {
      bool taken = std::count(unit_dims_.begin(), unit_dims_.end(), d) > 0;
      if (d != lane_ && d != rows_ && !taken) rest.push_back(d);
    }
    Nest(rest, 0, pointers);
  }

  void Advance(Values& pointers, int dim, Value* index) {
    for (size_t o = 0; o < operands(); ++o) {
      pointers[o] = e_.At(pointers[o], operand(o).dtype, index, Stride(o, dim));
    }
  }
  Values Advanced(const Values& pointers, int dim, Value* index) {
    Values result = pointers;
    Advance(result, dim, index);
    return result;
  }

  void Nest(const std::vector<int>& rest, size_t level, const Values& pointers) {
    if (level < rest.size()) {
      e_.For(dims_[rest[level]].extent,
             [&](Value* index) { Nest(rest, level + 1, Advanced(pointers, rest[level], index)); });
    } else if (rows_ >= 0) {
      EmitBlocks(pointers);
    } else {
      EmitRow(pointers);
    }
  }

  // Calls full(turn) for each turn of `dim` that handles a whole step and tail(turn, elements) for
  // the rest.
  void OverDim(int dim, llvm::function_ref<void(Value*)> full,
               llvm::function_ref<void(Value*, int64_t)> tail) {
    int64_t turns = dims_[dim].extent / Step(dim), rest = dims_[dim].extent % Step(dim);
    bool split = dim == split_;
    if (turns > 0) {
      e_.For(split ? first_turn_ : e_.I64(0),
             split ? e_.Min(last_turn_, e_.I64(turns)) : e_.I64(turns), 1, full);
    }
    if (rest > 0) e_.If(split ? has_tail_ : e_.b.getTrue(), [&] { tail(e_.I64(turns), rest); });
  }

  // The pointers of turn `turn` of `dim`.
  Values AtTurn(Values pointers, int dim, Value* turn) {
    for (size_t o = 0; o < operands(); ++o) {
      bool grouped = dim == lane_ && grouped_[o].on;
      int64_t stride = grouped ? grouped_[o].outer * step_ / std::max<int64_t>(group_, 1)
                               : Stride(o, dim) * Step(dim);
      pointers[o] = e_.At(pointers[o], operand(o).dtype, turn, stride);
    }
    return pointers;
  }

  // Operands that do not move along the lanes are loaded once for the row.
  Values Repeated(const Values& pointers) {
    Values loaded(inputs(), nullptr);
    for (size_t o = 0; o < inputs(); ++o) {
      if (!grouped_[o].on && Stride(o, lane_) == 0) {
        loaded[o] = e_.Load(pointers[o], operand(o).dtype, 0, width_, width_);
      }
    }
    return loaded;
  }

  void EmitRow(const Values& pointers) {
    Values repeated = Repeated(pointers);
    OverDim(
        lane_, [&](Value* turn) { EmitStep(AtTurn(pointers, lane_, turn), repeated, step_); },
        [&](Value* turn, int64_t elements) {
          EmitStep(AtTurn(pointers, lane_, turn), repeated, elements);
        });
  }

  // The vectors of one turn along the lanes.
  void EmitStep(const Values& pointers, const Values& repeated, int64_t elements) {
    for (int64_t first = 0; first < elements; first += width_) {
      int valid = static_cast<int>(std::min<int64_t>(elements - first, width_));
      Values loaded = repeated;
      for (size_t o = 0; o < inputs(); ++o) {
        if (loaded[o]) continue;
        DType dtype = operand(o).dtype;
        if (grouped_[o].on) {
          loaded[o] = e_.Spread(pointers[o], dtype, grouped_[o].outer, grouped_[o].inner, group_,
                                first, width_, valid);
        } else {
          int64_t stride = Stride(o, lane_);
          loaded[o] =
              e_.Load(e_.At(pointers[o], dtype, first * stride), dtype, stride, width_, valid);
        }
      }
      Values results = e_.Program(spec_.program, loaded, width_);
      for (size_t r = 0; r < results.size(); ++r) {
        size_t o = inputs() + r;
        int64_t stride = Stride(o, lane_);
        DType dtype = operand(o).dtype;
        e_.Store(results[r], e_.At(pointers[o], dtype, first * stride), dtype, stride, width_,
                 valid);
      }
    }
  }

  void EmitBlocks(const Values& pointers) {
    OverDim(
        rows_,
        [&](Value* turn) {
          Values base = AtTurn(pointers, rows_, turn);
          OverDim(
              lane_, [&](Value* x) { EmitBlock(AtTurn(base, lane_, x)); },
              [&](Value* x, int64_t elements) {
                Values strip = AtTurn(base, lane_, x);
                e_.For(width_, [&](Value* row) {
                  Values here = Advanced(strip, rows_, row);
                  EmitStep(here, Repeated(here), elements);
                });
              });
        },
        [&](Value* turn, int64_t rows) {
          Values base = AtTurn(pointers, rows_, turn);
          e_.For(rows, [&](Value* row) { EmitRow(Advanced(base, rows_, row)); });
        });
  }

  // width x width elements: one vector along the lanes for each row.
  void EmitBlock(const Values& pointers) {
    std::vector<Values> loaded(inputs());
    for (size_t o = 0; o < inputs(); ++o) {
      bool transposed = IsTransposed(o, lane_, rows_);
      int64_t step = Stride(o, transposed ? lane_ : rows_);
      int64_t along = transposed ? 1 : Stride(o, lane_);
      for (int row = 0; row < width_; ++row) {
        if (row > 0 && step == 0) {
          loaded[o].push_back(loaded[o][0]);
          continue;
        }
        Value* pointer = e_.At(pointers[o], operand(o).dtype, row * step);
        loaded[o].push_back(e_.Load(pointer, operand(o).dtype, along, width_, width_));
      }
      if (transposed) loaded[o] = e_.Transpose(loaded[o]);
    }
    std::vector<Values> results(spec_.outputs.size());
    for (int row = 0; row < width_; ++row) {
      Values in(inputs());
      for (size_t o = 0; o < inputs(); ++o) in[o] = loaded[o][row];
      Values out = e_.Program(spec_.program, in, width_);
      for (size_t r = 0; r < out.size(); ++r) results[r].push_back(out[r]);
    }
    for (size_t r = 0; r < results.size(); ++r) {
      size_t o = inputs() + r;
      bool transposed = IsTransposed(o, lane_, rows_);
      int64_t step = Stride(o, transposed ? lane_ : rows_);
      int64_t along = transposed ? 1 : Stride(o, lane_);
      Values rows = transposed ? e_.Transpose(results[r]) : results[r];
      for (int row = 0; row < width_; ++row) {
        Value* pointer = e_.At(pointers[o], operand(o).dtype, row * step);
        e_.Store(rows[row], pointer, operand(o).dtype, along, width_, width_);
      }
    }
  }

  Emitter& e_;
  const LoopSpec& spec_;
  int width_;
  std::vector<Dim> dims_;  // strides: inputs..., outputs...
  int lane_ = -1, rows_ = -1;
  std::vector<int> unit_dims_;
  struct Grouped {
    bool on = false;
    int64_t outer = 0, inner = 0;
  };
  std::vector<Grouped> grouped_;  // operands that the joined lanes do not walk evenly
  int64_t group_ = 0;             // extent of the inner one of two joined dimensions
  int64_t step_ = 1;              // elements along the lanes in one turn
  int split_ = -1;                // the dimension that is cut into pieces of `piece_` turns
  int64_t units_ = 1, piece_ = 0, pieces_ = 1;
  Value *first_turn_ = nullptr, *last_turn_ = nullptr, *has_tail_ = nullptr;
};

// Integers keep all their bits in a copy: no detour through f32.
bool IsIntegerCopy(const LoopSpec& spec) {
  return spec.inputs.size() == 1 && spec.outputs.size() == 1 && spec.program.results.size() == 1 &&
         spec.program.code[spec.program.results[0]].op == Primitive::kInput &&
         spec.inputs[0].dtype != DType::kF32 && spec.inputs[0].dtype == spec.outputs[0].dtype;
}

void EmitIntegerCopy(Emitter& e, const LoopSpec& spec) {
  int64_t chunks = e.ChunksOf(spec);
  int64_t units = Product(spec.extents);
  auto [first, last] = e.Units(units, chunks);
  const Operand &from = spec.inputs[0], &to = spec.outputs[0];
  llvm::Type* type = from.dtype == DType::kI32 ? e.b.getInt32Ty() : e.b.getInt64Ty();
  e.For(first, last, 1, [&](Value* unit) {
    Values index = e.Unflatten(unit, spec.extents);
    Value *source = e.Base(from), *target = e.Base(to);
    for (size_t d = 0; d < index.size(); ++d) {
      source = e.At(source, from.dtype, index[d], from.strides[d]);
      target = e.At(target, to.dtype, index[d], to.strides[d]);
    }
    e.b.CreateStore(e.b.CreateLoad(type, source), target);
  });
}

}  // namespace

void EmitLoop(Emitter& e, const LoopSpec& spec) {
  for (const auto* operands : {&spec.inputs, &spec.outputs}) {
    for (const Operand& operand : *operands) {
      Check<InternalError>(operand.strides.size() == spec.extents.size(),
                           "loop kernel: {} strides for {} extents", operand.strides.size(),
                           spec.extents.size());
    }
  }
  if (IsIntegerCopy(spec)) return EmitIntegerCopy(e, spec);
  LoopEmitter(e, spec).Emit();
}

}  // namespace calotype::jit
