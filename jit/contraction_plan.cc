#include "jit/contraction_plan.h"

#include <algorithm>
#include <cstdlib>

#include "core/error.h"

namespace calotype::jit {

void MergeDims(std::vector<Dim>& dims) {
  std::erase_if(dims, [](const Dim& d) { return d.extent == 1; });
  for (size_t i = 0; i + 1 < dims.size();) {
    Dim& outer = dims[i];
    const Dim& inner = dims[i + 1];
    bool fits = true;
    for (size_t o = 0; o < outer.strides.size(); ++o) {
      fits &= outer.strides[o] == inner.strides[o] * inner.extent;
    }
    if (!fits) {
      ++i;
      continue;
    }
    outer.extent *= inner.extent;
    outer.strides = inner.strides;
    dims.erase(dims.begin() + static_cast<int64_t>(i) + 1);
    if (i > 0) --i;
  }
}

int64_t ContractionPlan::Units() const {
  int64_t units = Blocks();
  for (int d : outer) units *= Tiles(d);
  for (int d : panels) units *= Tiles(d);
  return units;
}

int64_t ContractionPlan::TilesInUnit() const {
  int64_t tiles = 1;
  for (size_t i = 0; i < inner.size(); ++i) {
    tiles *= i == 0 && block > 0 ? block : Tiles(inner[i]);
  }
  return tiles;
}

namespace {

constexpr int kMostRows = 14, kMostVectors = 6;
// Of the broadcast operand in one unit: a part of a level-2 cache, which all panels pass by; but
// more if the panels come from memory each time.
constexpr int64_t kBlockFloats = 48 * 1024, kLargeBlockFloats = 384 * 1024;
constexpr int64_t kManyPanelFloats = 1024 * 1024;
constexpr int64_t kPanelFloats = 48 * 1024;    // of the other operand in one tile; more is cut
constexpr int64_t kSumBlockFloats = 8 * 1024;  // of it in one block of a cut sum: a level-1 cache
constexpr int64_t kUnits = 128;                // of a kernel with many chunks, at least
constexpr int64_t kWaitingFloats = 16 * 1024;  // accumulators of a unit between those blocks

void Arrange(const ContractionSpec& spec, ContractionPlan& plan) {
  size_t m = spec.m.size(), k = spec.k.size();
  const Epilogue& epilogue = spec.epilogue;
  Check<InternalError>(spec.a.strides.size() == m + k && spec.b.strides.size() == m + k + 1,
                       "contraction kernel: {} and {} strides for {} + {} dimensions",
                       spec.a.strides.size(), spec.b.strides.size(), m, k);
  for (size_t d = 0; d <= m; ++d) {
    Dim dim;
    dim.extent = d < m ? spec.m[d] : spec.n;
    dim.strides = {d < m ? spec.a.strides[d] : 0, spec.b.strides[d < m ? d : m + k]};
    for (const auto* operands : {&epilogue.operands, &epilogue.outputs}) {
      for (const Operand& operand : *operands) {
        Check<InternalError>(
            operand.strides.size() == m + 1,
            "contraction kernel: epilogue operand with {} strides for {} dimensions",
            operand.strides.size(), m + 1);
        dim.strides.push_back(operand.strides[d]);
      }
    }
    plan.out.push_back(std::move(dim));
  }
  for (size_t d = 0; d < k; ++d) {
    plan.sum.push_back({spec.k[d], {spec.a.strides[m + d], spec.b.strides[m + d]}});
  }
  size_t output = 2 + epilogue.operands.size();
  std::erase_if(plan.out, [](const Dim& d) { return d.extent == 1; });
  std::stable_sort(plan.out.begin(), plan.out.end(), [&](const Dim& x, const Dim& y) {
    return std::abs(x.strides[output]) > std::abs(y.strides[output]);
  });
  std::erase_if(plan.sum, [](const Dim& d) { return d.extent == 1; });
  std::stable_sort(plan.sum.begin(), plan.sum.end(), [](const Dim& x, const Dim& y) {
    return std::abs(x.strides[0]) + std::abs(x.strides[1]) >
           std::abs(y.strides[0]) + std::abs(y.strides[1]);
  });
  MergeDims(plan.out);
  MergeDims(plan.sum);
  if (plan.sum.empty()) plan.sum.push_back({1, {0, 0}});
}

// Estimates the time of a choice of lanes and tile in units of one vector multiply-add.
class CostModel {
 public:
  CostModel(const ContractionSpec& spec, const ContractionPlan& plan, const Target& target)
      : spec_(spec), plan_(plan), target_(target), width_(target.vector_width) {
    for (const Dim& d : plan.sum) depth_ *= static_cast<double>(d.extent);
  }

  int RegisterLimit() const {
    return target_.vector_registers - (target_.vector_registers > 16 ? 2 : 1);
  }

  struct Rows {
    int dim1 = -1, dim2 = -1;
    int64_t size1 = 1, size2 = 1;
  };

  // How many different loads of operand o (0: a, 1: b) one step of the sum needs.
  int64_t Loads(int o, int lane, int64_t vectors, const Rows& rows) const {
    int64_t loads = lane >= 0 && plan_.out[lane].strides[o] != 0 ? vectors : 1;
    if (rows.dim1 >= 0 && plan_.out[rows.dim1].strides[o] != 0) loads *= rows.size1;
    if (rows.dim2 >= 0 && plan_.out[rows.dim2].strides[o] != 0) loads *= rows.size2;
    return loads;
  }
  bool Fits(int lane, int64_t vectors, const Rows& rows) const {
    int64_t held = std::min(Loads(0, lane, vectors, rows), Loads(1, lane, vectors, rows));
    int64_t live = vectors * rows.size1 * rows.size2 + held + (target_.fma ? 1 : 2);
    return live <= RegisterLimit();
  }

  double Cost(int lane, int sum_lane, int64_t vectors, const Rows& rows) const {
    double total = 0;
    int instances = 0;
    auto parts = [](int64_t extent, int64_t size) {
      return std::vector<std::pair<int64_t, int64_t>>{{extent / size, size}, {1, extent % size}};
    };
    int64_t lane_vectors = lane < 0 ? 1 : (plan_.out[lane].extent + width_ - 1) / width_;
    int64_t extent1 = rows.dim1 < 0 ? 1 : plan_.out[rows.dim1].extent;
    int64_t extent2 = rows.dim2 < 0 ? 1 : plan_.out[rows.dim2].extent;
    for (auto [count0, size0] : parts(lane_vectors, vectors)) {
      for (auto [count1, size1] : parts(extent1, rows.size1)) {
        for (auto [count2, size2] : parts(extent2, rows.size2)) {
          int64_t count = count0 * count1 * count2;
          if (count == 0 || size0 * size1 * size2 == 0) continue;
          ++instances;
          total += static_cast<double>(count) *
                   TileCost(lane, sum_lane, size0, {rows.dim1, rows.dim2, size1, size2});
        }
      }
    }
    for (int d = 0; d < static_cast<int>(plan_.out.size()); ++d) {
      if (d != lane && d != rows.dim1 && d != rows.dim2) {
        total *= static_cast<double>(plan_.out[d].extent);
      }
    }
    return total * (1 + 0.01 * instances);  // code is not free
  }

 private:
  double TileCost(int lane, int sum_lane, int64_t vectors, const Rows& rows) const {
    double elements = static_cast<double>(vectors * rows.size1 * rows.size2);
    const Dim& along = lane >= 0 ? plan_.out[lane] : plan_.sum[sum_lane];
    double loads = 0, traffic = 0;
    for (int o : {0, 1}) {
      int64_t stride = along.strides[o];
      double count = static_cast<double>(Loads(o, lane, vectors, rows));
      loads += count * (stride == 0 || stride == 1 ? 1.0 : 1.3 * width_);
      // A vector is a cache line that often comes from L2; a broadcast reads a part of one. Rows of
      // vectors (several panels at once) are streams that compete for the same cache sets.
      traffic += stride == 0 ? 0.05 * count : 0.25 * count;
      if (stride != 0) traffic += 0.5 * (count / static_cast<double>(lane < 0 ? 1 : vectors) - 1);
    }
    // Eight independent chains hide the latency of a multiply-add.
    double step = std::max({elements, loads, 8.0}) + traffic;
    // Without fused multiply-add (SSE) decoding limits: product, sum and a copy for each element,
    // two instructions for each broadcast.
    if (!target_.fma) step = 1.5 * elements + loads + traffic;
    double steps = depth_;
    if (lane < 0) {
      double extent = static_cast<double>(std::max<int64_t>(along.extent, 1));
      int64_t vectors = (along.extent + width_ - 1) / width_;
      steps *= static_cast<double>(vectors) / extent;
    }
    double epilogue = 1 + 0.5 * static_cast<double>(spec_.epilogue.program.code.size());
    size_t operands = plan_.out.empty() ? 0 : plan_.out[0].strides.size();
    for (size_t o = 2; o < operands; ++o) {
      bool easy = lane < 0 || along.strides[o] == 0 || along.strides[o] == 1;
      epilogue += easy ? 1.0 : 2.0 * width_;
    }
    if (lane < 0) epilogue += 12;
    return steps * step + 30 + elements * epilogue;
  }

  const ContractionSpec& spec_;
  const ContractionPlan& plan_;
  const Target& target_;
  int width_;
  double depth_ = 1;
};

void ChooseTile(const ContractionSpec& spec, const Target& target, ContractionPlan& plan) {
  CostModel model(spec, plan, target);
  int dims = static_cast<int>(plan.out.size());
  double best = -1;
  int best_lane = -1, best_sum_lane = 0;
  int64_t best_vectors = 1;
  CostModel::Rows best_rows;
  auto consider = [&](int lane, int sum_lane, int64_t vectors, const CostModel::Rows& rows) {
    double cost = model.Cost(lane, sum_lane, vectors, rows);
    if (best >= 0 && cost >= best) return;
    best = cost;
    best_lane = lane;
    best_sum_lane = sum_lane;
    best_vectors = vectors;
    best_rows = rows;
  };
  auto with_rows = [&](int lane, int sum_lane, int64_t vectors) {
    if (!model.Fits(lane, vectors, {})) return;
    consider(lane, sum_lane, vectors, {});
    for (int d1 = dims - 1; d1 >= 0; --d1) {
      if (d1 == lane) continue;
      for (int64_t t1 = std::min<int64_t>(plan.out[d1].extent, kMostRows); t1 > 1; --t1) {
        CostModel::Rows rows{d1, -1, t1, 1};
        if (!model.Fits(lane, vectors, rows)) continue;
        consider(lane, sum_lane, vectors, rows);
        for (int d2 = d1 - 1; d2 >= 0; --d2) {
          if (d2 == lane) continue;
          for (int64_t t2 = std::min<int64_t>(plan.out[d2].extent, kMostRows); t2 > 1; --t2) {
            rows.dim2 = d2;
            rows.size2 = t2;
            if (model.Fits(lane, vectors, rows)) consider(lane, sum_lane, vectors, rows);
          }
        }
      }
    }
  };
  for (int lane = dims - 1; lane >= 0; --lane) {
    int64_t most = (plan.out[lane].extent + target.vector_width - 1) / target.vector_width;
    for (int64_t v = 1; v <= std::min<int64_t>(most, kMostVectors); ++v) with_rows(lane, 0, v);
  }
  for (int k = static_cast<int>(plan.sum.size()) - 1; k >= 0; --k) with_rows(-1, k, 1);

  plan.lane = best_lane;
  plan.vectors = static_cast<int>(best_vectors);
  plan.tile.assign(dims, 1);
  if (best_rows.dim1 >= 0) plan.tile[best_rows.dim1] = best_rows.size1;
  if (best_rows.dim2 >= 0) plan.tile[best_rows.dim2] = best_rows.size2;
  if (best_lane >= 0) {
    plan.tile[best_lane] = best_vectors * target.vector_width;
  } else {
    std::rotate(plan.sum.begin() + best_sum_lane, plan.sum.begin() + best_sum_lane + 1,
                plan.sum.end());
  }
}

// Roughly how many floats a nest of (extent, stride) touches, in whole cache lines.
int64_t Footprint(std::vector<std::pair<int64_t, int64_t>> nest) {
  for (auto& [extent, stride] : nest) stride = std::abs(stride);
  std::sort(nest.begin(), nest.end(), [](auto& x, auto& y) { return x.second < y.second; });
  // Equal strides, such as of kernel and picture columns, overlap.
  for (size_t i = 0; i + 1 < nest.size();) {
    if (nest[i].second != nest[i + 1].second) {
      ++i;
      continue;
    }
    nest[i].first += nest[i + 1].first - 1;
    nest.erase(nest.begin() + static_cast<int64_t>(i) + 1);
  }
  int64_t run = 1, pieces = 1;
  for (auto [extent, stride] : nest) {
    if (stride == 0 || extent <= 1) continue;
    if (stride <= run) {
      run += (extent - 1) * stride;
    } else {
      pieces *= extent;
    }
  }
  return pieces * std::max<int64_t>(run, 16);
}

// Order of the tiles: a panel of the operand that lies in the lanes stays in cache while the tiles
// of a block of the other operand pass by; the block stays while the next panels pass by.
class Order {
 public:
  Order(int64_t chunks, int schedule, ContractionPlan& plan) : plan_(plan) {
    streamed_ = plan.lane < 0 || plan.out[plan.lane].strides[1] != 0 ? 1 : 0;
    for (int d = 0; d < static_cast<int>(plan.out.size()); ++d) {
      const Dim& dim = plan.out[d];
      bool panel = dim.strides[streamed_] != 0;
      if (d == plan.lane || (panel && (plan.tile[d] > 1 || dim.strides[1 - streamed_] == 0))) {
        plan.panels.push_back(d);
      } else if (panel) {
        plan.outer.push_back(d);
      } else {
        free_.push_back(d);
      }
    }
    for (const auto* dims : {&plan.outer, &plan.panels, &free_}) {
      for (int d : *dims) units_ *= std::max<int64_t>(plan.Tiles(d), 1);
    }
    int64_t panel_floats = 1;
    for (int d : plan.panels) {
      panels_ *= plan.Tiles(d);
      panel_floats *= plan.out[d].extent;
    }
    for (const Dim& d : plan.sum) panel_floats *= d.extent;
    block_floats_ = panel_floats > kManyPanelFloats ? kLargeBlockFloats : kBlockFloats;
    if (schedule == kSmallBlocks) block_floats_ /= 4;
    if (schedule == kLargeBlocks) block_floats_ *= 4;
    // Enough for even shares of many threads; more would tear tiles apart that share a panel.
    enough_ = chunks == 1 ? 1 : std::min<int64_t>(4 * chunks, kUnits);
    if (schedule != kWholeSum) CutSum();
    for (size_t k = plan.sum_blocks; k < plan.sum.size(); ++k) {
      nest_.emplace_back(plan.sum[k].extent, plan.sum[k].strides[1 - streamed_]);
    }
    FillUnit();
    plan.outer.insert(plan.outer.end(), free_.begin(), free_.end());
  }

 private:
  // Cuts the sum if the panel of one tile would not stay in cache while other tiles pass by.
  void CutSum() {
    std::vector<Dim>& sum = plan_.sum;
    int64_t depth = 1, lanes = plan_.lane < 0 ? 1 : plan_.tile[plan_.lane];
    for (const Dim& d : sum) depth *= d.extent;
    if (plan_.lane < 0 || depth * lanes <= kPanelFloats || free_.empty()) return;
    int64_t most = std::max<int64_t>(kSumBlockFloats / lanes, 64), block = 1;
    int k = static_cast<int>(sum.size());
    while (k > 0 && block * sum[k - 1].extent <= most) block *= sum[--k].extent;
    if (k == 0) return;
    int64_t part = std::min(most / block, sum[k - 1].extent);
    while (sum[k - 1].extent % part != 0) --part;
    if (block * part < 64) return;  // no even blocks of a useful size
    if (part > 1) {
      Dim outer = sum[k - 1];
      outer.extent /= part;
      for (int64_t& stride : outer.strides) stride *= part;
      sum[k - 1].extent = part;
      sum.insert(sum.begin() + k - 1, outer);
    }
    plan_.sum_blocks = k;
    // Tiles share what they read only within a unit, so units are few; the tiles wait in memory.
    enough_ = std::min<int64_t>(enough_, 8);
  }

  int64_t With(int d, int64_t extent) const {
    auto nest = nest_;
    nest.emplace_back(extent, plan_.out[d].strides[1 - streamed_]);
    return Footprint(nest);
  }
  int64_t TileFloats() const {
    int64_t floats = 1;
    for (int64_t size : plan_.tile) floats *= size;
    return floats;
  }

  // Dimensions join the block while it stays small and units stay many: from the innermost
  // outwards, or, with a cut sum, first those that read least besides what is there.
  void FillUnit() {
    int64_t tiles_in_unit = 1;
    while (!free_.empty()) {
      std::vector<int> order(free_.rbegin(), free_.rend());
      if (plan_.sum_blocks > 0) {
        auto growth = [&](int d) {
          return static_cast<double>(With(d, plan_.out[d].extent)) /
                 static_cast<double>(std::max<int64_t>(plan_.Tiles(d), 1));
        };
        std::stable_sort(order.begin(), order.end(),
                         [&](int x, int y) { return growth(x) < growth(y); });
      } else {
        order.resize(1);
      }
      // The first that fits as a whole, else a part of the first that fits at all.
      int chosen = -1;
      int64_t part = 1;
      for (int d : order) {
        int64_t most = MostTiles(d, tiles_in_unit);
        if (most == plan_.Tiles(d)) {
          chosen = d;
          part = most;
          break;
        }
        if (chosen < 0 && most > 1) {
          chosen = d;
          part = most;
        }
      }
      if (chosen < 0) break;
      plan_.inner.insert(plan_.inner.begin(), chosen);
      std::erase(free_, chosen);
      int64_t tiles = plan_.Tiles(chosen);
      if (part < tiles) {
        plan_.block = part;
        break;
      }
      nest_.emplace_back(plan_.out[chosen].extent, plan_.out[chosen].strides[1 - streamed_]);
      units_ /= std::max<int64_t>(tiles, 1);
      tiles_in_unit *= tiles;
    }
  }

  // How many tiles of dimension d may join the unit.
  int64_t MostTiles(int d, int64_t tiles_in_unit) const {
    int64_t tiles = plan_.Tiles(d), most = std::min(tiles, units_ / enough_);
    if (plan_.sum_blocks > 0) {
      most = std::min(most, kWaitingFloats / (TileFloats() * std::max<int64_t>(tiles_in_unit, 1)));
    }
    auto small = [&](int64_t count) {
      int64_t extent = std::min(count * plan_.tile[d], plan_.out[d].extent);
      return panels_ == 1 || With(d, extent) <= block_floats_;
    };
    while (most > 1 && !small(most)) most = most * 3 / 4;
    return most;
  }

  ContractionPlan& plan_;
  int streamed_ = 1;  // the operand that lies in the lanes
  int64_t units_ = 1, panels_ = 1, enough_ = 1, block_floats_ = kBlockFloats;
  std::vector<int> free_;                          // dimensions that it does not move along
  std::vector<std::pair<int64_t, int64_t>> nest_;  // what a unit reads of the other operand
};

}  // namespace

int64_t PanelWidth(int64_t columns, const Target& target) {
  for (int vectors : {2, 3, 4, 5}) {
    int64_t width = static_cast<int64_t>(vectors) * target.vector_width;
    if (columns > width && columns % width == 0) return width;
  }
  return 0;
}

ContractionPlan PlanContraction(const ContractionSpec& spec, const Target& target) {
  ContractionPlan plan;
  Arrange(spec, plan);
  ChooseTile(spec, target, plan);
  Order order(std::max<int64_t>(Chunks(KernelSpec(spec)), 1), spec.schedule, plan);
  return plan;
}

}  // namespace calotype::jit
