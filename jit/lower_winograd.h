// Winograd's convolution F(4x4, 3x3): 16 pixels of a 3x3 convolution from 36 products for each pair
// of channels instead of 144 (Lavin & Gray 2015, arXiv:1509.09308), with the interpolation points
// 0, +-sqrt(1/2), +-sqrt(2), infinity, which halve the rounding error of the usual ones (Barabasz
// et al. 2018, arXiv:1803.10986). Three ops that only exist inside the lowering, around a batched
// matrix product; their formulas are scalar programs over one tile.
#pragma once

#include "core/program.h"
#include "graph/graph.h"

namespace calotype::jit {

// x [B, C, 4 TH + 2, 4 TW + 2] -> [36, B, TH, TW, C]: the transformed 6x6 patches.
extern const Op kWinogradInputOp;
// w [O, C, 3, 3] -> [36, C, O]; attribute "correlate" 1: [36, O, C], the kernel turned by 180
// degrees.
extern const Op kWinogradWeightOp;
// m [36, B, TH, TW, O] -> [B, O, 4 TH, 4 TW].
extern const Op kWinogradOutputOp;

// 36 -> 36 values, 9 -> 36, 36 -> 16, row-major patches and tiles.
const ScalarProgram& WinogradInputProgram();
const ScalarProgram& WinogradWeightProgram();
const ScalarProgram& WinogradOutputProgram();

// True for a convolution, or the gradient of its input, that can be computed so (stride 1, sides
// multiples of 4) and gains by it (many channels and pixels).
bool WinogradFits(const ComputationGraph& graph, const ComputationNode& node);
// Bytes of the transformed kernels, four times those of the kernels.
int64_t WinogradBytes(const ComputationGraph& graph, const ComputationNode& node);
// The result from x, already padded, and w; `correlate` as for the weight.
Value WinogradConvolution(Value x, Value w, bool correlate);

}  // namespace calotype::jit
