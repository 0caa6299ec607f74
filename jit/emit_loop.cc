// LoopSpec: elementwise chains, copies, packing and transposes. The dimensions are reordered so
// that the first output is written in the order of its memory; one dimension lies in the vector
// lanes. Where an operand is contiguous along another dimension than the lanes, square blocks are
// transposed in registers instead of gathering element by element.
#include <algorithm>

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
    ChooseLanes();
  }

  void Emit() {
    int64_t chunks = Chunks(KernelSpec(spec_));
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
    int64_t extent = dims_[split_].extent;
    int64_t pieces = std::min((4 * chunks + units_ - 1) / units_, (extent + width_ - 1) / width_);
    piece_ = ((extent + pieces - 1) / pieces + width_ - 1) / width_ * width_;
    pieces_ = (extent + piece_ - 1) / piece_;
    units_ *= pieces_;
  }

  void EmitUnit(Value* unit) {
    size_t count = dims_.size();
    low_.assign(count, e_.I64(0));
    high_.resize(count);
    for (size_t d = 0; d < count; ++d) high_[d] = e_.I64(dims_[d].extent);
    std::vector<int64_t> extents;
    for (int d : unit_dims_) extents.push_back(dims_[d].extent);
    if (split_ >= 0) extents.push_back(pieces_);
    Values index = e_.Unflatten(unit, extents);
    Values pointers;
    for (size_t o = 0; o < operands(); ++o) pointers.push_back(e_.Base(operand(o)));
    for (size_t i = 0; i < unit_dims_.size(); ++i) Advance(pointers, unit_dims_[i], index[i]);
    if (split_ >= 0) {
      low_[split_] = e_.Mul(index.back(), piece_);
      high_[split_] = e_.Min(e_.Add(low_[split_], e_.I64(piece_)), high_[split_]);
    }
    std::vector<int> rest;
    for (int d = 0; d < static_cast<int>(count); ++d) {
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

  // Calls full(position) for whole vectors of `dim` and tail(position, lanes) for the rest.
  void OverDim(int dim, llvm::function_ref<void(Value*)> full,
               llvm::function_ref<void(Value*, int)> tail) {
    int64_t extent = dims_[dim].extent, whole = extent / width_ * width_;
    Value* last = e_.I64(whole);
    if (dim == split_) last = e_.Min(last, high_[dim]);
    if (whole > 0) e_.For(low_[dim], last, width_, full);
    if (whole < extent) {
      e_.If(e_.b.CreateICmpEQ(high_[dim], e_.I64(extent)),
            [&] { tail(e_.I64(whole), static_cast<int>(extent - whole)); });
    }
  }

  // Operands that do not move along the lanes are loaded once for the row.
  Values Repeated(const Values& pointers) {
    Values loaded(inputs(), nullptr);
    for (size_t o = 0; o < inputs(); ++o) {
      if (Stride(o, lane_) == 0) {
        loaded[o] = e_.Load(pointers[o], operand(o).dtype, 0, width_, width_);
      }
    }
    return loaded;
  }

  void EmitRow(const Values& pointers) {
    Values repeated = Repeated(pointers);
    OverDim(
        lane_, [&](Value* x) { EmitVector(Advanced(pointers, lane_, x), repeated, width_); },
        [&](Value* x, int valid) { EmitVector(Advanced(pointers, lane_, x), repeated, valid); });
  }

  void EmitVector(const Values& pointers, const Values& repeated, int valid) {
    Values loaded = repeated;
    for (size_t o = 0; o < inputs(); ++o) {
      if (!loaded[o]) {
        loaded[o] = e_.Load(pointers[o], operand(o).dtype, Stride(o, lane_), width_, valid);
      }
    }
    Values results = e_.Program(spec_.program, loaded, width_);
    for (size_t r = 0; r < results.size(); ++r) {
      size_t o = inputs() + r;
      e_.Store(results[r], pointers[o], operand(o).dtype, Stride(o, lane_), width_, valid);
    }
  }

  void EmitBlocks(const Values& pointers) {
    OverDim(
        rows_,
        [&](Value* y) {
          Values base = Advanced(pointers, rows_, y);
          OverDim(
              lane_, [&](Value* x) { EmitBlock(Advanced(base, lane_, x)); },
              [&](Value* x, int valid) {
                Values strip = Advanced(base, lane_, x);
                e_.For(width_, [&](Value* row) {
                  Values here = Advanced(strip, rows_, row);
                  EmitVector(here, Repeated(here), valid);
                });
              });
        },
        [&](Value* y, int rows) {
          Values base = Advanced(pointers, rows_, y);
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
  int split_ = -1;
  int64_t units_ = 1, piece_ = 0, pieces_ = 1;
  Values low_, high_;
};

// Integers keep all their bits in a copy: no detour through f32.
bool IsIntegerCopy(const LoopSpec& spec) {
  return spec.inputs.size() == 1 && spec.outputs.size() == 1 && spec.program.results.size() == 1 &&
         spec.program.code[spec.program.results[0]].op == Primitive::kInput &&
         spec.inputs[0].dtype != DType::kF32 && spec.inputs[0].dtype == spec.outputs[0].dtype;
}

void EmitIntegerCopy(Emitter& e, const LoopSpec& spec) {
  int64_t chunks = Chunks(KernelSpec(spec));
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
