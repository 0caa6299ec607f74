// How a contraction is cut into register tiles: which dimension lies in the vector lanes, which one
// or two others form the rows of a tile, and in which order the tiles are computed. Chosen by a
// cost model over the constant extents and strides; knows nothing of LLVM.
#pragma once

#include <cstdint>
#include <vector>

#include "jit/kernel.h"
#include "jit/target.h"

namespace calotype::jit {

// One loop dimension and the element strides of each operand along it.
struct Dim {
  int64_t extent = 1;
  std::vector<int64_t> strides;
};

// Removes dimensions of extent 1 and merges neighbours that every operand walks as one.
void MergeDims(std::vector<Dim>& dims);

struct ContractionPlan {
  std::vector<Dim> out;  // output dimensions; strides: a, b, epilogue operands, outputs
  std::vector<Dim> sum;  // summed dimensions; strides: a, b; the last is the innermost loop
  // The output dimension in the vector lanes; -1: the lanes lie along sum.back() and are added up
  // at the end.
  int lane = -1;
  // For each output dimension how many of its indices one tile covers: vectors * width for the
  // lanes.
  std::vector<int64_t> tile;
  int vectors = 1;  // of a tile along the lanes
  // Output dimensions in loop order. The tiles of `outer`, the blocks of `block` tiles of inner[0],
  // and the tiles of `panels` number the units of work; inside a unit run the tiles of the block
  // and of the rest of `inner`.
  std::vector<int> outer, panels, inner;
  int64_t block = 0;  // tiles of inner[0] in one unit; 0: all
  // If positive, a long sum is cut into blocks: the first so many dimensions of `sum` are loops
  // around the tiles of a unit, whose accumulators wait in memory meanwhile.
  int sum_blocks = 0;

  int64_t Tiles(int dim) const { return (out[dim].extent + tile[dim] - 1) / tile[dim]; }
  int64_t Blocks() const { return block == 0 ? 1 : (Tiles(inner[0]) + block - 1) / block; }
  int64_t Units() const;
  int64_t TilesInUnit() const;
};

// How many columns of a packed operand b should lie side by side, those of a tile: a divisor of
// `columns`. 0 if no width suits: then all of them.
int64_t PanelWidth(int64_t columns, const Target& target);

// Orders of the tiles that ContractionSpec::schedule chooses from: 0 is the cost model's.
enum Schedule : uint8_t {
  kEstimated,
  kWholeSum,     // no sum is cut into blocks
  kSmallBlocks,  // a quarter of the broadcast operand in one unit of work
  kLargeBlocks,  // four times as much
  kSchedules,
};

ContractionPlan PlanContraction(const ContractionSpec& spec, const Target& target);

}  // namespace calotype::jit
