// ContractionSpec: register tiles of accumulators over all of the sum, then the epilogue in
// registers. In each step of the sum the tile loads every element of a and b that it needs once
// (broadcast where the operand does not move along the lanes) and multiplies them pairwise into the
// accumulators. If the sum is long, all tiles of a unit advance by one block of it at a time, so
// that what they share stays in cache, and the accumulators wait on the stack.
#include <algorithm>
#include <map>
#include <set>

#include "core/error.h"
#include "jit/emit.h"

namespace calotype::jit {

namespace {

using Value = llvm::Value;
using Values = std::vector<Value*>;

class ContractionEmitter {
 public:
  ContractionEmitter(Emitter& e, const ContractionSpec& spec)
      : e_(e), spec_(spec), plan_(PlanContraction(spec, e.target)), width_(e.target.vector_width) {
    operands_ = {&spec.a, &spec.b};
    for (const Operand& o : spec.epilogue.operands) operands_.push_back(&o);
    for (const Operand& o : spec.epilogue.outputs) operands_.push_back(&o);
  }

  void Emit() {
    auto [first, last] = e_.Units(plan_.Units(), Chunks(KernelSpec(spec_)));
    e_.For(first, last, 1, [&](Value* unit) { EmitUnit(unit); });
  }

 private:
  // What one tile covers of each output dimension, less than plan_.tile at the border.
  using Sizes = std::vector<int64_t>;

  Values Advanced(Values pointers, const Dim& dim, Value* index, int64_t scale = 1) {
    for (size_t o = 0; o < dim.strides.size(); ++o) {
      pointers[o] = e_.At(pointers[o], operands_[o]->dtype, index, dim.strides[o] * scale);
    }
    return pointers;
  }

  void EmitUnit(Value* unit) {
    std::vector<int64_t> extents;
    for (int d : plan_.outer) extents.push_back(plan_.Tiles(d));
    if (plan_.block > 0) extents.push_back(plan_.Blocks());
    for (int d : plan_.panels) extents.push_back(plan_.Tiles(d));
    Values index = e_.Unflatten(unit, extents);
    size_t next = 0;
    std::vector<std::pair<int, Value*>> bound;
    for (int d : plan_.outer) bound.emplace_back(d, index[next++]);
    Value* block = plan_.block > 0 ? index[next++] : nullptr;
    for (int d : plan_.panels) bound.emplace_back(d, index[next++]);
    Values pointers;
    for (const Operand* operand : operands_) pointers.push_back(e_.Base(*operand));
    EmitBound(bound, 0, block, pointers, Sizes(plan_.out.size(), 1));
  }

  // Dimensions whose tile number comes from the unit.
  void EmitBound(const std::vector<std::pair<int, Value*>>& bound, size_t level, Value* block,
                 const Values& pointers, Sizes sizes) {
    if (level == bound.size()) return EmitTiles(block, pointers, sizes);
    const int d = bound[level].first;
    Value* number = bound[level].second;
    const Dim& dim = plan_.out[d];
    int64_t full = dim.extent / plan_.tile[d], rest = dim.extent % plan_.tile[d];
    auto emit = [&](int64_t size) {
      sizes[d] = size;
      EmitBound(bound, level + 1, block, Advanced(pointers, dim, number, plan_.tile[d]), sizes);
    };
    if (rest == 0) return emit(plan_.tile[d]);
    if (full == 0) return emit(rest);
    e_.If(e_.b.CreateICmpSLT(number, e_.I64(full)), [&] { emit(plan_.tile[d]); });
    e_.If(e_.b.CreateICmpEQ(number, e_.I64(full)), [&] { emit(rest); });
  }

  using TileBody =
      llvm::function_ref<void(const Values& pointers, const Sizes& sizes, Value* slot)>;

  // The tiles of one unit.
  void EmitTiles(Value* block, const Values& pointers, const Sizes& sizes) {
    if (plan_.sum_blocks == 0) {
      return EmitInner(0, block, pointers, sizes, nullptr,
                       [&](const Values& here, const Sizes& tile, Value*) {
                         std::vector<Element> elements = Elements(tile);
                         PrefetchEpilogue(here, elements);
                         Values sums(elements.size(), e_.Splat(0.0, width_));
                         sums = EmitSum(0, here[0], here[1], sums, elements);
                         Finish(here, sums, elements, tile);
                       });
    }
    slot_floats_ = 1;
    for (int64_t size : plan_.tile) slot_floats_ *= size;
    int64_t floats = slot_floats_ * plan_.TilesInUnit();
    if (!waiting_) waiting_ = e_.Scratch(floats);
    e_.For(floats / width_, [&](Value* i) {
      e_.Store(e_.Splat(0.0, width_), e_.At(waiting_, DType::kF32, i, width_), DType::kF32, 1,
               width_, width_);
    });
    EmitSumBlocks(0, pointers, [&](const Values& moved) {
      EmitInner(0, block, moved, sizes, waiting_,
                [&](const Values& here, const Sizes& tile, Value* slot) {
                  std::vector<Element> elements = Elements(tile);
                  Values sums = Waiting(slot, elements.size());
                  sums = EmitSum(plan_.sum_blocks, here[0], here[1], sums, elements);
                  for (size_t i = 0; i < sums.size(); ++i) {
                    Value* to = e_.At(slot, DType::kF32, static_cast<int64_t>(i) * width_);
                    e_.Store(sums[i], to, DType::kF32, 1, width_, width_);
                  }
                });
    });
    EmitInner(0, block, pointers, sizes, waiting_,
              [&](const Values& here, const Sizes& tile, Value* slot) {
                std::vector<Element> elements = Elements(tile);
                Finish(here, Waiting(slot, elements.size()), elements, tile);
              });
  }

  Values Waiting(Value* slot, size_t count) {
    Values sums;
    for (size_t i = 0; i < count; ++i) {
      Value* from = e_.At(slot, DType::kF32, static_cast<int64_t>(i) * width_);
      sums.push_back(e_.Load(from, DType::kF32, 1, width_, width_));
    }
    return sums;
  }

  void EmitSumBlocks(int level, const Values& pointers,
                     llvm::function_ref<void(const Values&)> body) {
    if (level == plan_.sum_blocks) return body(pointers);
    e_.For(plan_.sum[level].extent, [&](Value* index) {
      EmitSumBlocks(level + 1, Advanced(pointers, plan_.sum[level], index), body);
    });
  }

  // Dimensions that run inside the unit. `slot` moves with the number of the tile.
  void EmitInner(size_t level, Value* block, const Values& pointers, Sizes sizes, Value* slot,
                 TileBody body) {
    if (level == plan_.inner.size()) return body(pointers, sizes, slot);
    int d = plan_.inner[level];
    const Dim& dim = plan_.out[d];
    int64_t full = dim.extent / plan_.tile[d], rest = dim.extent % plan_.tile[d];
    Value *first = e_.I64(0), *last = e_.I64(full);
    Value* has_rest = e_.b.getTrue();
    if (level == 0 && block) {
      first = e_.Mul(block, plan_.block);
      last = e_.Min(last, e_.Add(first, e_.I64(plan_.block)));
      has_rest = e_.b.CreateICmpEQ(block, e_.I64(plan_.Blocks() - 1));
    }
    int64_t slots = slot_floats_;
    for (size_t l = level + 1; l < plan_.inner.size(); ++l) slots *= plan_.Tiles(plan_.inner[l]);
    auto emit = [&](Value* number, int64_t size) {
      Sizes now = sizes;
      now[d] = size;
      Value* here = nullptr;
      if (slot) here = e_.At(slot, DType::kF32, e_.b.CreateSub(number, first), slots);
      EmitInner(level + 1, block, Advanced(pointers, dim, number, plan_.tile[d]), now, here, body);
    };
    if (full > 0) e_.For(first, last, 1, [&](Value* number) { emit(number, plan_.tile[d]); });
    if (rest > 0) e_.If(has_rest, [&] { emit(e_.I64(full), rest); });
  }

  // One accumulator: its place in the tile, and where its elements of a and b are.
  struct Element {
    std::vector<int64_t> index;  // of each output dimension, relative to the tile
    int64_t offset[2];           // of a and b, in elements
    int valid;                   // lanes in use
  };

  std::vector<Element> Elements(const Sizes& sizes) const {
    std::vector<Element> elements;
    std::vector<int64_t> steps(sizes.size(), 1);
    if (plan_.lane >= 0) steps[plan_.lane] = width_;
    std::vector<int64_t> index(sizes.size(), 0);
    for (;;) {
      Element element{index, {0, 0}, width_};
      for (size_t d = 0; d < sizes.size(); ++d) {
        for (int o : {0, 1}) element.offset[o] += index[d] * plan_.out[d].strides[o];
      }
      if (plan_.lane >= 0) {
        int64_t left = sizes[plan_.lane] - index[plan_.lane];
        element.valid = static_cast<int>(std::min<int64_t>(left, width_));
      }
      elements.push_back(element);
      size_t d = sizes.size();
      while (d > 0 && (index[d - 1] += steps[d - 1]) >= sizes[d - 1]) index[--d] = 0;
      if (d == 0) return elements;
    }
  }

  void Finish(const Values& pointers, Values sums, const std::vector<Element>& elements,
              const Sizes& sizes) {
    if (plan_.lane < 0) {
      for (Value*& sum : sums) {
        sum = e_.Horizontal(sum, width_, [&](Value* x, Value* y) { return e_.b.CreateFAdd(x, y); });
      }
    }
    EmitEpilogue(pointers, sums, elements, sizes);
  }

  Values EmitSum(size_t level, Value* a, Value* b, const Values& sums,
                 const std::vector<Element>& elements) {
    const Dim& dim = plan_.sum[level];
    auto at = [&](Value* index, int64_t scale) {
      return std::pair(e_.At(a, spec_.a.dtype, index, dim.strides[0] * scale),
                       e_.At(b, spec_.b.dtype, index, dim.strides[1] * scale));
    };
    if (level + 1 < plan_.sum.size()) {
      return e_.Fold(dim.extent, sums, [&](Value* index, const Values& now) {
        auto [x, y] = at(index, 1);
        return EmitSum(level + 1, x, y, now, elements);
      });
    }
    int64_t width = plan_.lane < 0 ? width_ : 1;  // summed elements of one step
    int64_t steps = dim.extent / width, rest = dim.extent % width;
    int64_t unroll = steps <= 4 ? std::max<int64_t>(steps, 1) : elements.size() <= 8 ? 4 : 1;
    Values now = e_.Fold(steps / unroll, sums, [&](Value* index, const Values& before) {
      Values after = before;
      auto [x, y] = at(index, unroll * width);
      for (int64_t u = 0; u < unroll; ++u) {
        Step(e_.At(x, spec_.a.dtype, u * width * dim.strides[0]),
             e_.At(y, spec_.b.dtype, u * width * dim.strides[1]), after, elements, width_);
      }
      return after;
    });
    for (int64_t s = steps / unroll * unroll; s < steps; ++s) {
      auto [x, y] = at(e_.I64(s), width);
      Step(x, y, now, elements, width_);
    }
    if (rest > 0) {
      auto [x, y] = at(e_.I64(steps), width);
      Step(x, y, now, elements, static_cast<int>(rest));
    }
    return now;
  }

  // sums += a * b for one step of the sum. `valid`: lanes of the step if they lie along the sum.
  void Step(Value* a, Value* b, Values& sums, const std::vector<Element>& elements, int valid) {
    Value* base[] = {a, b};
    DType dtype[] = {spec_.a.dtype, spec_.b.dtype};
    std::map<int64_t, Value*> loaded[2];
    const Dim& along = plan_.lane < 0 ? plan_.sum.back() : plan_.out[plan_.lane];
    auto load = [&](int o, const Element& element) {
      Value*& value = loaded[o][element.offset[o]];
      if (!value) {
        int64_t stride = along.strides[o];
        int lanes = plan_.lane < 0 ? valid : stride == 0 ? width_ : element.valid;
        value =
            e_.Load(e_.At(base[o], dtype[o], element.offset[o]), dtype[o], stride, width_, lanes);
      }
      return value;
    };
    // The operand with fewer elements stays in registers while those of the other pass by.
    std::set<int64_t> offsets[2];
    for (const Element& element : elements) {
      for (int o : {0, 1}) offsets[o].insert(element.offset[o]);
    }
    int passing = offsets[0].size() > offsets[1].size() ? 0 : 1;
    std::vector<size_t> order(elements.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) {
      return elements[i].offset[passing] < elements[j].offset[passing];
    });
    for (size_t i : order) {
      Value* x = load(0, elements[i]);
      sums[i] = e_.MultiplyAdd(x, load(1, elements[i]), sums[i]);
    }
  }

  int64_t LaneStride(size_t o) const {
    return plan_.lane < 0 ? 0 : plan_.out[plan_.lane].strides[o];
  }
  Value* LoadOperand(const Values& pointers, size_t o, int64_t offset, int valid) {
    DType dtype = operands_[o]->dtype;
    int width = plan_.lane < 0 ? 1 : width_, lanes = LaneStride(o) == 0 ? width : valid;
    return e_.Load(e_.At(pointers[o], dtype, offset), dtype, LaneStride(o), width, lanes);
  }
  void StoreResults(const Values& pointers, const Values& in,
                    llvm::function_ref<int64_t(size_t)> offset, int valid) {
    int width = plan_.lane < 0 ? 1 : width_;
    Values out = e_.Program(spec_.epilogue.program, in, width);
    size_t o = operands_.size() - out.size();
    for (Value* result : out) {
      DType dtype = operands_[o]->dtype;
      e_.Store(result, e_.At(pointers[o], dtype, offset(o)), dtype, LaneStride(o), width, valid);
      ++o;
    }
  }

  // What the epilogue reads and writes for this tile alone comes into the cache during the sum:
  // rows far apart, which the processor does not foresee.
  void PrefetchEpilogue(const Values& pointers, const std::vector<Element>& elements) {
    constexpr int64_t kLine = 16;  // floats
    if (plan_.lane < 0) return;
    const size_t first_output = operands_.size() - spec_.epilogue.outputs.size();
    for (size_t o = 2; o < operands_.size(); ++o) {
      if (LaneStride(o) != 1) continue;
      std::set<int64_t> lines;
      int64_t highest_row = 0;
      for (const Element& element : elements) {
        int64_t row = 0;
        for (size_t d = 0; d < element.index.size(); ++d) {
          if (static_cast<int>(d) != plan_.lane) row += element.index[d] * plan_.out[d].strides[o];
        }
        highest_row = std::max(highest_row, std::abs(row));
        lines.insert(row + element.index[plan_.lane] / kLine * kLine);
      }
      if (highest_row == 0) continue;  // a bias, which stays in the cache
      for (int64_t line : lines) {
        e_.Prefetch(e_.At(pointers[o], operands_[o]->dtype, line), o >= first_output);
      }
    }
  }

  void EmitEpilogue(const Values& pointers, const Values& sums,
                    const std::vector<Element>& elements, const Sizes& sizes) {
    // Code for each accumulator of a tile pays for short programs; long ones would fill the
    // instruction cache and spill the accumulators one by one.
    size_t instructions = spec_.epilogue.program.code.size();
    for (size_t o = 2; o < operands_.size(); ++o) {
      instructions += LaneStride(o) == 0 || LaneStride(o) == 1 ? 1 : 2 * width_;
    }
    if (instructions * elements.size() > 200) {
      return EmitEpilogueLoop(pointers, sums, elements, sizes);
    }
    std::map<std::pair<size_t, int64_t>, Value*> loaded;
    for (size_t i = 0; i < elements.size(); ++i) {
      auto offset = [&](size_t o) {
        int64_t offset = 0;
        for (size_t d = 0; d < sizes.size(); ++d) {
          offset += elements[i].index[d] * plan_.out[d].strides[o];
        }
        return offset;
      };
      int valid = plan_.lane < 0 ? 1 : elements[i].valid;
      Values in = {sums[i]};
      for (size_t o = 2; o < 2 + spec_.epilogue.operands.size(); ++o) {
        // What is the same for several rows (a bias) is loaded once.
        Value*& value = loaded[{o, offset(o)}];
        if (!value) value = LoadOperand(pointers, o, offset(o), valid);
        in.push_back(value);
      }
      StoreResults(pointers, in, offset, valid);
    }
  }

  // The accumulators go to the stack, and a loop over the rows of the tile finishes them.
  void EmitEpilogueLoop(const Values& pointers, const Values& sums,
                        const std::vector<Element>& elements, const Sizes& sizes) {
    int width = plan_.lane < 0 ? 1 : width_;
    if (!room_) room_ = e_.Scratch(kMostElements * width_);
    Check<InternalError>(static_cast<int>(elements.size()) <= kMostElements,
                         "contraction kernel: a tile of {} vectors", elements.size());
    for (size_t i = 0; i < elements.size(); ++i) {
      Value* to = e_.At(room_, DType::kF32, static_cast<int64_t>(i) * width);
      e_.Store(sums[i], to, DType::kF32, 1, width, width);
    }
    // The order of the elements: the last dimension runs fastest.
    std::vector<int> rows;
    std::vector<int64_t> slots(sizes.size());
    int64_t slot = 1, lane_slot = 0;
    int vectors = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      slots[d] = slot;
      bool lane = static_cast<int>(d) == plan_.lane;
      int64_t count = lane ? (sizes[d] + width_ - 1) / width_ : sizes[d];
      slot *= count;
      if (lane) {
        vectors = static_cast<int>(count);
        lane_slot = slots[d];
      } else if (count > 1) {
        rows.insert(rows.begin(), static_cast<int>(d));
      }
    }
    auto valid = [&](int v) { return plan_.lane < 0 ? 1 : elements[v * lane_slot].valid; };
    auto offset = [&](size_t o, int v) { return LaneStride(o) * v * width_; };
    size_t operands = spec_.epilogue.operands.size();
    std::vector<Values> loaded(vectors, Values(operands, nullptr));
    for (int v = 0; v < vectors; ++v) {
      for (size_t o = 2; o < 2 + operands; ++o) {
        bool fixed = true;
        for (int d : rows) fixed &= plan_.out[d].strides[o] == 0;
        if (fixed) loaded[v][o - 2] = LoadOperand(pointers, o, offset(o, v), valid(v));
      }
    }
    EmitRows(
        rows, 0, pointers, room_, sizes,
        [&](const Values& here, Value* slot_pointer) {
          for (int v = 0; v < vectors; ++v) {
            Value* from =
                e_.At(slot_pointer, DType::kF32, slots.empty() ? 0 : v * lane_slot * width);
            Values in = {e_.Load(from, DType::kF32, 1, width, width)};
            for (size_t o = 2; o < 2 + operands; ++o) {
              Value* value = loaded[v][o - 2];
              in.push_back(value ? value : LoadOperand(here, o, offset(o, v), valid(v)));
            }
            StoreResults(
                here, in, [&](size_t o) { return offset(o, v); }, valid(v));
          }
        },
        slots, width);
  }

  void EmitRows(const std::vector<int>& rows, size_t level, const Values& pointers, Value* slot,
                const Sizes& sizes, llvm::function_ref<void(const Values&, Value*)> body,
                const std::vector<int64_t>& slots, int width) {
    if (level == rows.size()) return body(pointers, slot);
    int d = rows[level];
    e_.For(sizes[d], [&](Value* index) {
      EmitRows(rows, level + 1, Advanced(pointers, plan_.out[d], index),
               e_.At(slot, DType::kF32, index, slots[d] * width), sizes, body, slots, width);
    });
  }

  Emitter& e_;
  const ContractionSpec& spec_;
  ContractionPlan plan_;
  int width_;
  std::vector<const Operand*> operands_;  // a, b, epilogue operands, outputs
  static constexpr int kMostElements = 32;
  Value* room_ = nullptr;     // scratch for the accumulators of one tile
  Value* waiting_ = nullptr;  // and of all tiles of a unit, if the sum is cut
  int64_t slot_floats_ = 0;   // of one tile in it
};

}  // namespace

void EmitContraction(Emitter& e, const ContractionSpec& spec) {
  ContractionEmitter(e, spec).Emit();
}

}  // namespace calotype::jit
