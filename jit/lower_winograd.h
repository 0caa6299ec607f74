// Winograd's convolutions F(4x4, 3x3) and F(2x2, 3x3): 16 pixels of a 3x3 convolution from 36
// products for each pair of channels instead of 144, or 4 pixels from 16 instead of 36 (Lavin &
// Gray 2015, arXiv:1509.09308). The larger uses the interpolation points 0, +-sqrt(1/2), +-sqrt(2),
// infinity, which halve the rounding error of the usual ones (Barabasz et al. 2018,
// arXiv:1803.10986), the smaller 0, +-1, infinity. Three ops that only exist inside the lowering,
// around a batched matrix product; their formulas are scalar programs over one tile. In their
// shapes T = 4 or 2 is the attribute "tile", P = (T + 2)^2 the number of products.
#pragma once

#include <cstdint>
#include <map>

#include "core/program.h"
#include "graph/graph.h"

namespace calotype::jit {

// x [B, C, T TH + 2, T TW + 2] -> [P, B, TH, TW, C]: the transformed patches.
extern const Op kWinogradInputOp;
// w [O, C, 3, 3] -> [P, C, O]; attribute "correlate" 1: [P, O, C], the kernel turned by 180
// degrees.
extern const Op kWinogradWeightOp;
// m [P, B, TH, TW, O] -> [B, O, T TH, T TW].
extern const Op kWinogradOutputOp;

// P -> P values, 9 -> P, P -> T^2, row-major patches and tiles.
const ScalarProgram& WinogradInputProgram(int tile);
const ScalarProgram& WinogradWeightProgram(int tile);
const ScalarProgram& WinogradOutputProgram(int tile);

class Tuner;

// The tile, 4 or 2, for each node of the graph that is to be computed so; its transformed kernels,
// P / 9 times the kernels, take at most `bytes` altogether. Those convolutions, and gradients of
// their inputs, are chosen that a cost model, or the tuner's measurements, say to gain most for the
// memory.
std::map<int32_t, int> ChooseWinograd(const ComputationGraph& graph, int64_t bytes,
                                      Tuner* tuner = nullptr);
// The tile for each node that can be computed so; none for a tile of 1.
std::map<int32_t, int> ForceWinograd(const ComputationGraph& graph, int tile);
// The result from x, already padded, and w; `correlate` as for the weight.
Value WinogradConvolution(Value x, Value w, bool correlate, int tile);

}  // namespace calotype::jit
