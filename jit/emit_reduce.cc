// ReduceSpec: sums and maxima. The vector lanes lie along an output dimension (column reduction: no
// horizontal step), along a reduced one (row reduction: the lanes are combined in a fixed tree at
// the end), or along one of each joined (the channels of groups), whichever takes fewer
// instructions. Several accumulators run side by side, and long sums are cut into blocks whose
// results are added, so that rounding errors grow slowly.
#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "jit/emit.h"

namespace calotype::jit {

namespace {

using Value = llvm::Value;
using Values = std::vector<Value*>;

class ReduceEmitter {
 public:
  ReduceEmitter(Emitter& e, const ReduceSpec& spec)
      : e_(e), spec_(spec), width_(e.target.vector_width) {
    Arrange();
    ChooseLanes();
  }

  void Emit() {
    int64_t chunks = e_.ChunksOf(spec_);
    int64_t units = 1;
    if (chunks > 1) {
      for (int d = 0; d < static_cast<int>(out_.size()) && units < 4 * chunks; ++d) {
        if (d == lane_) continue;
        unit_dims_.push_back(d);
        units *= out_[d].extent;
      }
      if (units < 2 * chunks && lane_ >= 0) {
        split_panels_ = true;
        units *= Panels();
      }
    }
    auto [first, last] = e_.Units(units, chunks);
    e_.For(first, last, 1, [&](Value* unit) { EmitUnit(unit); });
  }

 private:
  static constexpr int kMostVectors = 4;
  static constexpr int64_t kBlock = 128;  // turns of the innermost loop between partial results

  size_t inputs() const { return spec_.inputs.size(); }
  size_t operands() const {
    return inputs() + spec_.epilogue.operands.size() + spec_.epilogue.outputs.size();
  }
  const Operand& operand(size_t o) const {
    if (o < inputs()) return spec_.inputs[o];
    o -= inputs();
    size_t extra = spec_.epilogue.operands.size();
    return o < extra ? spec_.epilogue.operands[o] : spec_.epilogue.outputs[o - extra];
  }

  void Arrange() {
    size_t first_output = inputs() + spec_.epilogue.operands.size();
    size_t outer = spec_.extents.size();
    for (size_t d = 0; d < outer; ++d) {
      Dim dim{spec_.extents[d], {}};
      for (size_t o = 0; o < operands(); ++o) dim.strides.push_back(operand(o).strides[d]);
      out_.push_back(std::move(dim));
    }
    for (size_t d = 0; d < spec_.reduced.size(); ++d) {
      Dim dim{spec_.reduced[d], {}};
      for (size_t o = 0; o < inputs(); ++o) dim.strides.push_back(operand(o).strides[outer + d]);
      reduced_.push_back(std::move(dim));
    }
    std::erase_if(out_, [](const Dim& d) { return d.extent == 1; });
    std::erase_if(reduced_, [](const Dim& d) { return d.extent == 1; });
    std::stable_sort(out_.begin(), out_.end(), [&](const Dim& x, const Dim& y) {
      return std::abs(x.strides[first_output]) > std::abs(y.strides[first_output]);
    });
    auto largest = [](const Dim& d) {
      int64_t stride = 0;
      for (int64_t s : d.strides) stride = std::max(stride, std::abs(s));
      return stride;
    };
    std::stable_sort(reduced_.begin(), reduced_.end(),
                     [&](const Dim& x, const Dim& y) { return largest(x) > largest(y); });
    MergeDims(out_);
    MergeDims(reduced_);
    if (reduced_.empty()) reduced_.push_back({1, std::vector<int64_t>(inputs(), 0)});
  }

  double LoadCost(const Dim& dim) const {
    double cost = 1 + 0.5 * static_cast<double>(spec_.program.code.size());
    for (size_t o = 0; o < inputs(); ++o) {
      cost += dim.strides[o] == 0 || dim.strides[o] == 1 ? 1 : 1.3 * width_;
    }
    return cost;
  }

  void ChooseLanes() {
    double out = 1, reduced = 1;
    for (const Dim& d : out_) out *= static_cast<double>(d.extent);
    for (const Dim& d : reduced_) reduced *= static_cast<double>(d.extent);
    double best = 0;
    int reduced_lane = -1;
    for (size_t d = 0; d < reduced_.size(); ++d) {
      double extent = static_cast<double>(std::max<int64_t>(reduced_[d].extent, 1));
      const int64_t whole = (reduced_[d].extent + width_ - 1) / width_;
      double vectors = static_cast<double>(whole);
      double cost = out * (reduced / extent * vectors * LoadCost(reduced_[d]) + 3.0 * width_);
      if (reduced_lane < 0 || cost < best) {
        best = cost;
        reduced_lane = static_cast<int>(d);
      }
    }
    for (int d = static_cast<int>(out_.size()) - 1; d >= 0; --d) {
      double extent = static_cast<double>(out_[d].extent);
      const int64_t whole = (out_[d].extent + width_ - 1) / width_;
      double vectors = static_cast<double>(whole);
      double cost = out / extent * vectors * (reduced * LoadCost(out_[d]) + 2);
      if (cost < best) {
        best = cost;
        lane_ = d;
      }
    }
    if (lane_ >= 0) {
      int64_t vectors = (out_[lane_].extent + width_ - 1) / width_;
      vectors_ = static_cast<int>(std::min<int64_t>(vectors, kMostVectors));
    }
    if (JoinLanes(best, out * reduced)) return;
    if (lane_ < 0) {
      std::rotate(reduced_.begin() + reduced_lane, reduced_.begin() + reduced_lane + 1,
                  reduced_.end());
    }
  }

  // Joins a reduced dimension, as the inner one, with an output dimension in the lanes if that
  // costs less than `best`.
  bool JoinLanes(double best, double elements) {
    int best_out = -1, best_reduced = -1;
    for (int p = 0; p < static_cast<int>(out_.size()); ++p) {
      for (int q = 0; q < static_cast<int>(reduced_.size()); ++q) {
        int64_t group = reduced_[q].extent, extent = out_[p].extent * group;
        if (group < 2 || extent == 0) continue;
        int64_t vectors = (extent + width_ - 1) / width_;
        int64_t period = std::min(std::lcm(group, int64_t{width_}) / width_, vectors);
        if (period > 8) continue;
        double load = 1 + 0.5 * static_cast<double>(spec_.program.code.size());
        bool contiguous = false;
        for (size_t o = 0; o < inputs(); ++o) {
          int64_t outer = out_[p].strides[o], inner = reduced_[q].strides[o];
          bool even = outer == inner * group;
          contiguous |= even && inner == 1;
          bool spreads =
              (inner == 0 && outer == 1) || (outer == 0 && inner == 1 && group <= width_);
          load += even && inner <= 1 ? 1 : !even && spreads ? 2 : 1.3 * width_;
        }
        if (!contiguous) continue;
        double rest = elements / static_cast<double>(extent);
        double cost = rest * static_cast<double>(vectors) * load;
        for (int d = 0; d < static_cast<int>(out_.size()); ++d) {
          if (d != p) rest /= static_cast<double>(out_[d].extent);
        }
        // Adding up the lanes of each group at the end.
        cost += elements / std::max(rest, 1.0) * 2;
        if (cost >= 0.9 * best) continue;
        best = cost;
        best_out = p;
        best_reduced = q;
        vectors_ = static_cast<int>(period);
      }
    }
    if (best_out < 0) return false;
    lane_ = best_out;
    joined_ = reduced_[best_reduced];
    reduced_.erase(reduced_.begin() + best_reduced);
    if (reduced_.empty()) reduced_.push_back({1, std::vector<int64_t>(inputs(), 0)});
    room_ = e_.Scratch(int64_t{vectors_} * width_);
    return true;
  }

  bool Joined() const { return joined_.extent > 1; }
  // How many outputs along the lanes one tile computes.
  int64_t PanelWidth() const {
    int64_t lanes = int64_t{vectors_} * width_;
    return Joined() ? std::max<int64_t>(lanes / joined_.extent, 1) : lanes;
  }
  int64_t Panels() const { return (out_[lane_].extent + PanelWidth() - 1) / PanelWidth(); }

  void EmitUnit(Value* unit) {
    std::vector<int64_t> extents;
    for (int d : unit_dims_) extents.push_back(out_[d].extent);
    if (split_panels_) extents.push_back(Panels());
    Values index = e_.Unflatten(unit, extents);
    Values pointers;
    for (size_t o = 0; o < operands(); ++o) pointers.push_back(e_.Base(operand(o)));
    for (size_t i = 0; i < unit_dims_.size(); ++i) {
      pointers = Advanced(pointers, out_[unit_dims_[i]], index[i]);
    }
    std::vector<int> rest;
    for (int d = 0; d < static_cast<int>(out_.size()); ++d) {
      bool taken = std::count(unit_dims_.begin(), unit_dims_.end(), d) > 0;
      if (d != lane_ && !taken) rest.push_back(d);
    }
    Nest(rest, 0, pointers, split_panels_ ? index.back() : nullptr);
  }

  Values Advanced(Values pointers, const Dim& dim, Value* index) {
    for (size_t o = 0; o < dim.strides.size(); ++o) {
      pointers[o] = e_.At(pointers[o], operand(o).dtype, index, dim.strides[o]);
    }
    return pointers;
  }

  void Nest(const std::vector<int>& rest, size_t level, const Values& pointers, Value* panel) {
    if (level < rest.size()) {
      const Dim& dim = out_[rest[level]];
      e_.For(dim.extent,
             [&](Value* index) { Nest(rest, level + 1, Advanced(pointers, dim, index), panel); });
      return;
    }
    if (lane_ < 0) {
      EmitTile(pointers, 1, width_);
      return;
    }
    int64_t full = out_[lane_].extent / PanelWidth();
    int64_t rest_lanes = out_[lane_].extent - full * PanelWidth();
    auto at = [&](Value* number) {
      return Advanced(pointers, out_[lane_], e_.Mul(number, PanelWidth()));
    };
    auto emit = [&](Value* number, int64_t outputs) {
      int64_t lanes = Joined() ? outputs * joined_.extent : outputs;
      int vectors = static_cast<int>((lanes + width_ - 1) / width_);
      EmitTile(at(number), vectors, static_cast<int>(lanes - (vectors - 1) * int64_t{width_}));
    };
    auto emit_tail = [&] { emit(e_.I64(full), rest_lanes); };
    if (panel) {
      if (full > 0) {
        e_.If(e_.b.CreateICmpSLT(panel, e_.I64(full)), [&] { emit(panel, PanelWidth()); });
      }
      if (rest_lanes > 0) e_.If(e_.b.CreateICmpEQ(panel, e_.I64(full)), emit_tail);
    } else {
      e_.For(full, [&](Value* number) { emit(number, PanelWidth()); });
      if (rest_lanes > 0) emit_tail();
    }
  }

  Value* Identity() {
    return e_.Splat(spec_.kind == ReduceSpec::kSum ? 0.0 : -std::numeric_limits<double>::infinity(),
                    width_);
  }
  Value* Combine(Value* x, Value* y) {
    return spec_.kind == ReduceSpec::kSum ? e_.b.CreateFAdd(x, y) : e_.Maximum(x, y);
  }
  Values Combine(const Values& x, const Values& y) {
    Values result;
    for (size_t i = 0; i < x.size(); ++i) result.push_back(Combine(x[i], y[i]));
    return result;
  }

  // One tile: `vectors` vectors of outputs, the last with `valid` lanes; or one output (row
  // reduction).
  void EmitTile(const Values& pointers, int vectors, int valid) {
    int side_by_side = std::max(1, kMostVectors / vectors);
    Values accumulators(vectors * side_by_side, Identity());
    accumulators = ReduceNest(0, pointers, accumulators, vectors, valid);
    while (static_cast<int>(accumulators.size()) > vectors) {
      size_t half = accumulators.size() / 2;
      Values low(accumulators.begin(), accumulators.begin() + half);
      Values high(accumulators.begin() + half, accumulators.end());
      accumulators = Combine(low, high);
    }
    if (Joined()) return EmitGroups(pointers, accumulators, vectors, valid);
    bool rows = lane_ < 0;
    for (int v = 0; v < vectors; ++v) {
      Value* result = accumulators[v];
      if (rows) {
        result = e_.Horizontal(result, width_, [&](Value* x, Value* y) { return Combine(x, y); });
      }
      EmitEpilogue(pointers, result, v, v + 1 == vectors ? valid : width_);
    }
  }

  // Adds up the lanes of each group.
  void EmitGroups(const Values& pointers, const Values& accumulators, int vectors, int valid) {
    for (int v = 0; v < vectors; ++v) {
      Value* to = e_.At(room_, DType::kF32, int64_t{v} * width_);
      e_.Store(accumulators[v], to, DType::kF32, 1, width_, width_);
    }
    int64_t group = joined_.extent, outputs = ((vectors - 1) * int64_t{width_} + valid) / group;
    for (int64_t first = 0; first < outputs; first += width_) {
      int lanes = static_cast<int>(std::min<int64_t>(outputs - first, width_));
      auto load = [&](int64_t q) {
        return e_.Load(e_.At(room_, DType::kF32, first * group + q), DType::kF32, group, width_,
                       lanes);
      };
      Value* result = load(0);
      for (int64_t q = 1; q < group; ++q) result = Combine(result, load(q));
      EmitEpilogue(pointers, result, static_cast<int>(first / width_), lanes);
    }
  }

  void EmitEpilogue(const Values& pointers, Value* result, int vector, int valid) {
    bool rows = lane_ < 0;
    int width = rows ? 1 : width_;
    auto stride = [&](size_t o) { return rows ? 0 : out_[lane_].strides[o]; };
    auto at = [&](size_t o) {
      return e_.At(pointers[o], operand(o).dtype, stride(o) * vector * width_);
    };
    Values in = {result};
    size_t o = inputs();
    for (size_t i = 0; i < spec_.epilogue.operands.size(); ++i, ++o) {
      in.push_back(e_.Load(at(o), operand(o).dtype, stride(o), width, rows ? 1 : valid));
    }
    Values out = e_.Program(spec_.epilogue.program, in, width);
    for (size_t r = 0; r < out.size(); ++r, ++o) {
      e_.Store(out[r], at(o), operand(o).dtype, stride(o), width, rows ? 1 : valid);
    }
  }

  Values ReduceNest(size_t level, const Values& pointers, const Values& accumulators, int vectors,
                    int valid) {
    const Dim& dim = reduced_[level];
    if (level + 1 < reduced_.size()) {
      bool fresh = reduced_[level + 1].extent >= 16;
      return e_.Fold(dim.extent, accumulators, [&](Value* index, const Values& sum) {
        Values inner = ReduceNest(level + 1, Advanced(pointers, dim, index),
                                  fresh ? Values(sum.size(), Identity()) : sum, vectors, valid);
        return fresh ? Combine(sum, inner) : inner;
      });
    }
    int64_t step = lane_ < 0 ? width_ : 1;
    int64_t turns = dim.extent / step, blocks = turns > 2 * kBlock ? turns / kBlock : 0;
    Values sum = e_.Fold(blocks, accumulators, [&](Value* block, const Values& before) {
      Values fresh(before.size(), Identity());
      return Combine(before, Inner(Advanced(pointers, dim, e_.Mul(block, kBlock * step)), kBlock,
                                   fresh, vectors, valid));
    });
    Values rest = Advanced(pointers, dim, e_.I64(blocks * kBlock * step));
    sum = Inner(rest, turns - blocks * kBlock, sum, vectors, valid);
    if (int64_t lanes = dim.extent - turns * step; lanes > 0) {
      Values tail = Advanced(pointers, dim, e_.I64(turns * step));
      sum[0] = Combine(sum[0], Element(tail, 0, dim.strides, static_cast<int>(lanes)));
    }
    return sum;
  }

  // `turns` turns of the innermost loop; the accumulators of several turns run side by side.
  Values Inner(const Values& pointers, int64_t turns, const Values& accumulators, int vectors,
               int valid) {
    const Dim& dim = reduced_.back();
    int64_t step = lane_ < 0 ? width_ : 1;
    int side_by_side = static_cast<int>(accumulators.size()) / vectors;
    auto turn = [&](const Values& here, Values& sum, int j) {
      for (int v = 0; v < vectors; ++v) {
        Value*& accumulator = sum[j * vectors + v];
        Value* element =
            lane_ < 0 ? Element(here, 0, dim.strides, width_)
                      : Element(here, v, out_[lane_].strides, v + 1 == vectors ? valid : width_);
        accumulator = Combine(accumulator, element);
      }
    };
    Values sum =
        e_.Fold(turns / side_by_side, accumulators, [&](Value* index, const Values& before) {
          Values now = before;
          Values base = Advanced(pointers, dim, e_.Mul(index, step * side_by_side));
          for (int j = 0; j < side_by_side; ++j)
            turn(Advanced(base, dim, e_.I64(step * j)), now, j);
          return now;
        });
    for (int64_t i = turns / side_by_side * side_by_side; i < turns; ++i) {
      turn(Advanced(pointers, dim, e_.I64(i * step)), sum, static_cast<int>(i % side_by_side));
    }
    return sum;
  }

  // program(inputs) of vector number `vector`; of a row reduction, lanes past `valid` are neutral.
  Value* Element(const Values& pointers, int vector, const std::vector<int64_t>& strides,
                 int valid) {
    Values in;
    for (size_t o = 0; o < inputs(); ++o) {
      DType dtype = operand(o).dtype;
      int64_t first = int64_t{vector} * width_, stride = strides[o];
      if (Joined()) {
        stride = joined_.strides[o];
        if (strides[o] != stride * joined_.extent) {
          in.push_back(e_.Spread(pointers[o], dtype, strides[o], stride, joined_.extent, first,
                                 width_, valid));
          continue;
        }
      }
      in.push_back(
          e_.Load(e_.At(pointers[o], dtype, stride * first), dtype, stride, width_, valid));
    }
    Value* result = e_.Program(spec_.program, in, width_)[0];
    if (lane_ >= 0 || valid == width_) return result;
    std::vector<int> lanes(width_);
    for (int i = 0; i < width_; ++i) lanes[i] = i < valid ? i : width_ + i;
    return e_.b.CreateShuffleVector(result, Identity(), lanes);
  }

  Emitter& e_;
  const ReduceSpec& spec_;
  int width_;
  std::vector<Dim> out_;      // strides: inputs, epilogue operands, outputs
  std::vector<Dim> reduced_;  // strides: inputs; the last is the innermost loop
  int lane_ = -1;             // the output dimension in the lanes; -1: the last of reduced_
  Dim joined_;                // the reduced dimension joined with it, if its extent is not 1
  Value* room_ = nullptr;     // scratch for the lanes of groups
  int vectors_ = 1;
  std::vector<int> unit_dims_;
  bool split_panels_ = false;
};

}  // namespace

void EmitReduce(Emitter& e, const ReduceSpec& spec) {
  for (const Operand& operand : spec.inputs) {
    Check<InternalError>(operand.strides.size() == spec.extents.size() + spec.reduced.size(),
                         "reduction kernel: {} strides for {} extents and {} reduced ones",
                         operand.strides.size(), spec.extents.size(), spec.reduced.size());
  }
  for (const auto* operands : {&spec.epilogue.operands, &spec.epilogue.outputs}) {
    for (const Operand& operand : *operands) {
      Check<InternalError>(operand.strides.size() == spec.extents.size(),
                           "reduction kernel: epilogue operand with {} strides for {} extents",
                           operand.strides.size(), spec.extents.size());
    }
  }
  ReduceEmitter(e, spec).Emit();
}

}  // namespace calotype::jit
