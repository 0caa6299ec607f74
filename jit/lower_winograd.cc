#include "jit/lower_winograd.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>

#include "core/scalar.h"
#include "graph/functions.h"
#include "jit/contraction_plan.h"
#include "jit/lower_internal.h"
#include "jit/lower_ops.h"
#include "jit/tune.h"

namespace calotype::jit {

namespace {

using scalar::Recorder;
using scalar::Sym;

// The cost model, in nanoseconds of one thread, as measured at 3.7 GHz (the ratios matter): a
// multiply-add (118 GFLOP/s), a byte of the kernels read from memory (16 GB/s), a number that a
// transform of pixels or kernels writes (0.12 in cache, 0.55 beyond), and two more steps.
constexpr double kProduct = 0.017, kKernelByte = 0.06, kTransform = 0.3, kSteps = 5000;

int64_t Patch(int64_t tile) { return tile + 2; }
int64_t Points(int64_t tile) { return Patch(tile) * Patch(tile); }

Sym Times(double c, Sym x) { return Constant(x, c) * x; }

// One-dimensional transforms.
std::array<Sym, 6> InputLine(const std::array<Sym, 6>& d) {
  Sym p = d[4] - Times(2, d[2]), q = Times(M_SQRT1_2, d[3] - Times(2, d[1]));
  Sym r = d[4] - Times(0.5, d[2]), s = Times(M_SQRT2, d[3] - Times(0.5, d[1]));
  return {d[0] - Times(2.5, d[2]) + d[4], p + q, p - q, r + s, r - s,
          d[1] - Times(2.5, d[3]) + d[5]};
}

std::array<Sym, 6> WeightLine(const std::array<Sym, 3>& g) {
  Sym p = Times(-2.0 / 3, g[0]) - Times(1.0 / 3, g[2]), q = Times(-2.0 / 3 * M_SQRT1_2, g[1]);
  Sym r = Times(1.0 / 6, g[0]) + Times(1.0 / 3, g[2]), s = Times(M_SQRT2 / 6, g[1]);
  return {g[0], p + q, p - q, r + s, r - s, g[2]};
}

std::array<Sym, 4> OutputLine(const std::array<Sym, 6>& m) {
  Sym p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
  return {m[0] + p + r, Times(M_SQRT1_2, q) + Times(M_SQRT2, s), Times(0.5, p) + Times(2, r),
          Times(M_SQRT1_2 / 2, q) + Times(2 * M_SQRT2, s) + m[5]};
}

std::array<Sym, 4> InputLine2(const std::array<Sym, 4>& d) {
  return {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]};
}

std::array<Sym, 4> WeightLine2(const std::array<Sym, 3>& g) {
  Sym p = Times(0.5, g[0] + g[2]), q = Times(0.5, g[1]);
  return {g[0], p + q, p - q, g[2]};
}

std::array<Sym, 2> OutputLine2(const std::array<Sym, 4>& m) {
  return {m[0] + m[1] + m[2], m[1] - m[2] - m[3]};
}

// `line` along the columns of an n x n patch, then along the rows of the result.
template <size_t n, size_t k>
ScalarProgram Both(std::array<Sym, k> (*line)(const std::array<Sym, n>&)) {
  Recorder recorder;
  std::array<std::array<Sym, n>, k> half;  // k rows of n columns
  for (size_t j = 0; j < n; ++j) {
    std::array<Sym, n> column;
    for (size_t i = 0; i < n; ++i) column[i] = recorder.Input(static_cast<int>(i * n + j));
    std::array<Sym, k> transformed = line(column);
    for (size_t i = 0; i < k; ++i) half[i][j] = transformed[i];
  }
  std::vector<int32_t> results;
  Sym last;
  for (size_t i = 0; i < k; ++i) {
    for (Sym value : line(half[i])) {
      results.push_back(value.id);
      last = value;
    }
  }
  ScalarProgram program = recorder.Finish(static_cast<int>(n * n), last);
  program.results = results;
  return program;
}

// ---------------------------------------------------------- what check mode interprets

std::vector<TensorType> InferInput(const InferContext& context) {
  const Shape& x = context.inputs[0].shape;
  int64_t tile = context.attrs.Int("tile");
  return {{DType::kF32, {Points(tile), x[0], (x[2] - 2) / tile, (x[3] - 2) / tile, x[1]}}};
}

std::vector<TensorType> InferWeight(const InferContext& context) {
  const Shape& w = context.inputs[0].shape;
  bool correlate = context.attrs.Int("correlate") != 0;
  return {{DType::kF32,
           {Points(context.attrs.Int("tile")), w[correlate ? 0 : 1], w[correlate ? 1 : 0]}}};
}

std::vector<TensorType> InferOutput(const InferContext& context) {
  const Shape& m = context.inputs[0].shape;
  int64_t tile = context.attrs.Int("tile");
  return {{DType::kF32, {m[1], m[4], tile * m[2], tile * m[3]}}};
}

void RunInput(const RunContext& context) {
  const int tile = static_cast<int>(context.attrs.Int("tile"));
  const int64_t patch = Patch(tile), points = Points(tile);
  const Shape &x = context.inputs[0].shape(), &y = context.outputs[0].shape();
  auto xs = x.Strides(), ys = y.Strides();
  float in[36], out[36];
  for (int64_t b = 0; b < y[1]; ++b)
    for (int64_t i = 0; i < y[2]; ++i)
      for (int64_t j = 0; j < y[3]; ++j)
        for (int64_t c = 0; c < y[4]; ++c) {
          const float* from =
              context.inputs[0].data() + b * xs[0] + c * xs[1] + tile * i * xs[2] + tile * j;
          float* to = context.outputs[0].data() + b * ys[1] + i * ys[2] + j * ys[3] + c;
          for (int64_t p = 0; p < points; ++p) in[p] = from[p / patch * xs[2] + p % patch];
          WinogradInputProgram(tile).Evaluate(in, out);
          for (int64_t p = 0; p < points; ++p) to[p * ys[0]] = out[p];
        }
}

void RunWeight(const RunContext& context) {
  const int tile = static_cast<int>(context.attrs.Int("tile"));
  const Shape& w = context.inputs[0].shape();
  bool correlate = context.attrs.Int("correlate") != 0;
  float in[9], out[36];
  for (int64_t o = 0; o < w[0]; ++o)
    for (int64_t c = 0; c < w[1]; ++c) {
      const float* from = context.inputs[0].data() + (o * w[1] + c) * 9;
      for (int p = 0; p < 9; ++p) in[p] = from[correlate ? 8 - p : p];
      WinogradWeightProgram(tile).Evaluate(in, out);
      float* to = context.outputs[0].data() + (correlate ? o * w[1] + c : c * w[0] + o);
      for (int64_t p = 0; p < Points(tile); ++p) to[p * w[0] * w[1]] = out[p];
    }
}

void RunOutput(const RunContext& context) {
  const int tile = static_cast<int>(context.attrs.Int("tile"));
  const Shape &m = context.inputs[0].shape(), &y = context.outputs[0].shape();
  auto ms = m.Strides(), ys = y.Strides();
  float in[36], out[16];
  for (int64_t b = 0; b < m[1]; ++b)
    for (int64_t i = 0; i < m[2]; ++i)
      for (int64_t j = 0; j < m[3]; ++j)
        for (int64_t o = 0; o < m[4]; ++o) {
          const float* from = context.inputs[0].data() + b * ms[1] + i * ms[2] + j * ms[3] + o;
          float* to =
              context.outputs[0].data() + b * ys[0] + o * ys[1] + tile * i * ys[2] + tile * j;
          for (int64_t p = 0; p < Points(tile); ++p) in[p] = from[p * ms[0]];
          WinogradOutputProgram(tile).Evaluate(in, out);
          for (int p = 0; p < tile * tile; ++p) to[p / tile * ys[2] + p % tile] = out[p];
        }
}

Op MakeOp(std::string_view name, std::string_view doc,
          std::vector<TensorType> (*infer)(const InferContext&), void (*run)(const RunContext&)) {
  return {.name = name,
          .kind = OpKind::kCall,
          .min_arity = 1,
          .max_arity = 1,
          .doc = doc,
          .source = "Lavin & Gray 2015, arXiv:1509.09308",
          .infer = infer,
          .run = run};
}

}  // namespace

const Op kWinogradInputOp = MakeOp("WinogradInput", "transformed patches", InferInput, RunInput);
const Op kWinogradWeightOp =
    MakeOp("WinogradWeight", "transformed 3x3 kernels", InferWeight, RunWeight);
const Op kWinogradOutputOp =
    MakeOp("WinogradOutput", "tiles of the result", InferOutput, RunOutput);

const ScalarProgram& WinogradInputProgram(int tile) {
  static const ScalarProgram four = Both<6, 6>(InputLine), two = Both<4, 4>(InputLine2);
  return tile == 4 ? four : two;
}
const ScalarProgram& WinogradWeightProgram(int tile) {
  static const ScalarProgram four = Both<3, 6>(WeightLine), two = Both<3, 4>(WeightLine2);
  return tile == 4 ? four : two;
}
const ScalarProgram& WinogradOutputProgram(int tile) {
  static const ScalarProgram four = Both<6, 4>(OutputLine), two = Both<4, 2>(OutputLine2);
  return tile == 4 ? four : two;
}

// --------------------------------------------------------------------------------- the choice

namespace {

// A rough time of one thread in nanoseconds, and the memory of the transformed kernels.
struct Candidate {
  int32_t node;
  int tile;  // 1: the direct sum
  double nanoseconds;
  int64_t bytes;
};

Candidate Estimate(int32_t number, const ComputationNode& node, const Shape& w, int tile,
                   bool updated) {
  const Shape& y = node.types[0].shape;
  auto real = [](int64_t n) { return static_cast<double>(n); };
  const double pairs = real(w[0] * w[1]), channels = real(w[0] + w[1]);
  const double pixels = real(y[0] * y[2] * y[3]);
  const double products = tile == 1 ? 9 : real(Points(tile));
  const double tiles = pixels / real(int64_t{tile} * tile);
  const int64_t bytes =
      CheckedMul(CheckedMul(w[0], w[1], "winograd"), tile == 1 ? 36 : 4 * Points(tile), "winograd");
  // Kernels that are too large for a cache come from memory, slower than they are used if there are
  // few pixels.
  const double rows = std::min(tiles, 8.0);
  const double compute = tiles * products * pairs * kProduct * (8 / rows);
  const double stream = static_cast<double>(bytes) * kKernelByte;
  double transforms = updated ? pairs * products * kTransform : 0;  // of the kernel
  if (tile > 1) transforms += tiles * products * channels * kTransform + kSteps;
  return {number, tile, std::max(compute, stream) + transforms, tile == 1 ? 0 : bytes};
}

// A convolution with 3x3 kernels, or a gradient of its input, that Winograd's may compute.
bool Allows(const ComputationGraph& graph, const ComputationNode& node) {
  if (node.op != &kConv2dOp && node.op != &kConv2dInputGradientOp) return false;
  const Shape& w = graph.type(node.inputs[1]).shape;
  return node.attrs.Int("stride") == 1 && w[2] == 3 && w[3] == 3 &&
         node.types[0].shape.elements() > 0;
}

bool Divides(const ComputationNode& node, int tile) {
  const Shape& y = node.types[0].shape;
  return y[2] % tile == 0 && y[3] % tile == 0;
}

// Replaces the estimates of all three by measurements.
void Measure(const ComputationNode& node, const Shape& w, Tuner& tuner,
             std::span<Candidate> candidates) {
  const bool gradient = node.op == &kConv2dInputGradientOp;
  const Shape& y = node.types[0].shape;
  const int64_t in = w[gradient ? 0 : 1], out = w[gradient ? 1 : 0];
  Tuner::Times times = tuner.TimesOf({y[0], in, y[2], y[3]}, {out, in, 3, 3});
  for (Candidate& candidate : candidates) {
    candidate.nanoseconds = 1e6 * (candidate.tile == 1   ? times.direct
                                   : candidate.tile == 2 ? times.two
                                                         : times.four);
  }
}

}  // namespace

std::map<int32_t, int> ForceWinograd(const ComputationGraph& graph, int tile) {
  std::map<int32_t, int> tiles;
  for (int32_t i = 0; tile > 1 && i < static_cast<int32_t>(graph.nodes().size()); ++i) {
    const ComputationNode& node = graph.node(i);
    if (Allows(graph, node) && Divides(node, tile)) tiles[i] = tile;
  }
  return tiles;
}

std::map<int32_t, int> ChooseWinograd(const ComputationGraph& graph, int64_t bytes, Tuner* tuner) {
  std::map<int32_t, Candidate> now;
  std::vector<Candidate> candidates;
  std::set<int32_t> targets;
  for (const GraphUpdate& update : graph.updates()) targets.insert(update.target.node);
  for (int32_t i = 0; i < static_cast<int32_t>(graph.nodes().size()); ++i) {
    const ComputationNode& node = graph.node(i);
    if (!Allows(graph, node)) continue;
    const Shape& w = graph.type(node.inputs[1]).shape;
    const bool updated = targets.count(node.inputs[1].node) > 0;
    std::vector<Candidate> all = {Estimate(i, node, w, 1, updated)};
    for (int tile : {4, 2}) {
      if (Divides(node, tile)) all.push_back(Estimate(i, node, w, tile, updated));
    }
    if (tuner && bytes > 0 && !updated && all.size() == 3) Measure(node, w, *tuner, all);
    for (size_t c = 1; c < all.size(); ++c) {
      if (all[c].nanoseconds < all[0].nanoseconds) candidates.push_back(all[c]);
    }
    now[i] = all[0];
  }
  // Of all changes that still fit the one that saves most time for its memory.
  std::map<int32_t, int> chosen;
  for (;;) {
    const Candidate* best = nullptr;
    double most = 0;
    for (const Candidate& candidate : candidates) {
      const Candidate& current = now[candidate.node];
      int64_t more = candidate.bytes - current.bytes;
      double saved = current.nanoseconds - candidate.nanoseconds;
      if (more > bytes || saved <= 0) continue;
      double gain = more <= 0 ? HUGE_VAL : saved / static_cast<double>(more);
      if (gain > most) {
        most = gain;
        best = &candidate;
      }
    }
    if (best == nullptr) return chosen;
    bytes -= best->bytes - now[best->node].bytes;
    now[best->node] = *best;
    chosen[best->node] = best->tile;
  }
}

Value WinogradConvolution(Value x, Value w, bool correlate, int tile) {
  const int64_t height = x.dim(2) - 2, width = x.dim(3) - 2, pixels = x.dim(0) * height * width;
  const int64_t in = x.dim(1), out = w.dim(correlate ? 1 : 0);
  ComputationGraph& graph = *x.graph;
  const int64_t t = tile, points = Points(tile);
  Value v = graph.EmitOne(kWinogradInputOp, {x}, {{"tile", t}});
  Value u = graph.EmitOne(kWinogradWeightOp, {w}, {{"correlate", int64_t{correlate}}, {"tile", t}});
  Value m = MatMul(Reshape(v, {points, pixels / (t * t), in}), u);
  m = Reshape(m, {points, x.dim(0), height / t, width / t, out});
  return graph.EmitOne(kWinogradOutputOp, {m}, {{"tile", t}});
}

// --------------------------------------------------------------------------------- lowering

namespace {

LoopOperand At(const View& view, const AtomAxes& axes, int64_t offset) {
  LoopOperand operand{view, axes};
  operand.view.offset += offset;
  return operand;
}

int64_t StrideOf(const Axis& axis) { return axis.empty() ? 0 : axis.back().stride; }

}  // namespace

// A place for [P, tiles..., channels] with all products of a tile side by side.
void Lowering::PlacePoints(int node, const std::string& label) {
  const Shape& shape = graph_.node(node).types[0].shape;
  const int last = shape.rank() - 1;
  View place{-1, DType::kF32, 0, std::vector<Axis>(shape.rank())};
  place.axes[0] = Simplify({{shape[0], shape[last]}});
  place.axes[last] = Simplify({{shape[last], 1}});
  // A little more, so that the rows of a register tile lie in different sets of the cache.
  int64_t stride = shape[0] * shape[last] + 16;
  for (int axis = last - 1; axis > 0; --axis) {
    place.axes[axis] = Simplify({{shape[axis], stride}});
    stride *= shape[axis];
  }
  Location({node, 0}) = NewArena(place, DType::kF32, stride, label);
}

void Lowering::LowerWinogradInput(int node, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  const Shape& shape = graph_.node(node).types[0].shape;
  const int tile_size = static_cast<int>(graph_.node(node).attrs.Int("tile"));
  View x = SinglePieces(graph_.node(node).inputs[0], {2, 3});
  PlacePoints(node, label);
  for (int user = node + 1; user < static_cast<int>(graph_.nodes().size()); ++user) {
    const ComputationNode& product = graph_.node(user);
    if (product.op != &kMatMulOp || groups_.TraceOf(product.inputs[0]).root.node != node) continue;
    PlacePoints(user, LabelOf(user));
  }
  View v = *Location({node, 0});
  const int64_t row = StrideOf(x.axes[2]), column = StrideOf(x.axes[3]),
                point = StrideOf(v.axes[0]);
  View patch = x, tile = v;
  patch.axes = {x.axes[0], Simplify({{shape[2], tile_size * row}}),
                Simplify({{shape[3], tile_size * column}}), x.axes[1]};
  tile.axes.erase(tile.axes.begin());
  AtomAxes axes = atoms.NewAxes({shape[1], shape[2], shape[3], shape[4]});
  Check<InternalError>(atoms.Fit(axes, tile), "{}: no place", label);
  if (!atoms.Fit(axes, patch)) Fail<InternalError>("{}: {} cannot be walked", label, x.ToString());

  ProgramBuilder builder(atoms, 0);
  std::vector<int> patch_numbers;
  std::vector<LoopOperand> places;
  const int64_t patch_size = Patch(tile_size);
  for (int64_t p = 0; p < Points(tile_size); ++p) {
    patch_numbers.push_back(
        builder.Operand(At(patch, axes, p / patch_size * row + p % patch_size * column)));
    places.push_back(At(tile, axes, p * point));
  }
  std::vector<int32_t> results = builder.AppendAll(WinogradInputProgram(tile_size), patch_numbers);
  AddLoop(builder.operands(), builder.Finish(results), places, label);
}

void Lowering::LowerWinogradWeight(int node, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  const ComputationNode& n = graph_.node(node);
  const bool correlate = n.attrs.Int("correlate") != 0;
  const int tile_size = static_cast<int>(n.attrs.Int("tile"));
  View w = SinglePieces(n.inputs[0], {2, 3});
  const Shape& shape = n.types[0].shape;
  View u = RowMajor(-1, DType::kF32, shape);
  if (int64_t width = PanelWidth(shape[2], HostTarget()); width > 0) {  // as in MakeVector
    u.axes[1] = Simplify({{shape[1], width}});
    u.axes[2] = {{shape[2] / width, shape[1] * width}, {width, 1}};
  }
  u = NewArena(u, DType::kF32, shape.elements(), label);
  Location({node, 0}) = u;
  const int64_t row = StrideOf(w.axes[2]), column = StrideOf(w.axes[3]),
                point = StrideOf(u.axes[0]);
  View kernel = w, place = u;
  kernel.axes = {w.axes[0], w.axes[1]};
  place.axes = {u.axes[correlate ? 1 : 2], u.axes[correlate ? 2 : 1]};
  AtomAxes axes = atoms.NewAxes({w.size(0), w.size(1)});
  Check<InternalError>(atoms.Fit(axes, place) && atoms.Fit(axes, kernel), "{}: {} cannot be walked",
                       label, w.ToString());
  ProgramBuilder builder(atoms, 0);
  std::vector<int> numbers;
  for (int p = 0; p < 9; ++p) {
    int from = correlate ? 8 - p : p;
    numbers.push_back(builder.Operand(At(kernel, axes, from / 3 * row + from % 3 * column)));
  }
  std::vector<LoopOperand> places;
  for (int64_t p = 0; p < Points(tile_size); ++p) places.push_back(At(place, axes, p * point));
  std::vector<int32_t> results = builder.AppendAll(WinogradWeightProgram(tile_size), numbers);
  AddLoop(builder.operands(), builder.Finish(results), places, label);
  ++program_.conversions;
  --program_.regions;
}

// A loop over tiles; the 16 pixels of a tile are written out, each with its own copy of the
// epilogue.
void Lowering::LowerWinogradOutput(Group& group, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  std::vector<RegionOutput> outputs = Outputs(group);
  RegionEpilogue epilogue = EvaluateEpilogue(group, outputs);

  const AtomAxes& y =
      group.axes.at(group.anchor);  // rows and columns are (tile, pixel of the tile)
  const ComputationNode& node = graph_.node(group.anchor);
  const int tile_size = static_cast<int>(node.attrs.Int("tile"));
  View m = SinglePieces(node.inputs[0], {0});
  const int64_t point = StrideOf(m.axes[0]);
  m.axes.erase(m.axes.begin());
  AtomAxes tiles = {y[0], {}, {}, y[1]};
  AtomAxis pixel_rows, pixel_columns;
  auto part = [&](const AtomAxis& axis, AtomAxis& tile, AtomAxis& inside) {
    if (axis.size() > 1) tile = {axis[0]};
    inside = {axis.back()};
  };
  part(y[2], tiles[1], pixel_rows);
  part(y[3], tiles[2], pixel_columns);
  Check<InternalError>(atoms.Fit(tiles, m), "{}: {} cannot be walked", label, m.ToString());
  AtomAxis space;
  for (int axis : {0, 2, 3, 1}) {
    for (int atom : atoms.Leaves(y[axis])) space.push_back(atom);
  }
  Turned turned;
  if (!space.empty() && WorthTurning(space, atoms.extent(space.back()))) {
    turned = TurnColumns(space, epilogue, outputs, label);
  }

  // The loops of the first output without those inside a tile.
  pixel_rows = atoms.Leaves(pixel_rows);
  pixel_columns = atoms.Leaves(pixel_columns);
  AtomAxis loops;
  for (int atom : LeavesByStride(outputs[0].place)) {
    bool inside = std::count(pixel_rows.begin(), pixel_rows.end(), atom) > 0 ||
                  std::count(pixel_columns.begin(), pixel_columns.end(), atom) > 0;
    if (!inside) loops.push_back(atom);
  }
  // An operand at pixel (i, j) of the tile, along `loops`.
  auto at_pixel = [&](const LoopOperand& operand, int i, int j) {
    AtomAxis all = loops;
    all.insert(all.end(), pixel_rows.begin(), pixel_rows.end());
    all.insert(all.end(), pixel_columns.begin(), pixel_columns.end());
    std::vector<int64_t> strides = StridesAlong(operand, all);
    LoopOperand result;
    result.view.buffer = operand.view.buffer;
    result.view.dtype = operand.view.dtype;
    result.view.offset = operand.view.offset;
    for (size_t l = 0; l < loops.size(); ++l) {
      result.view.axes.push_back({{atoms.extent(loops[l]), strides[l]}});
      result.axes.push_back({loops[l]});
    }
    size_t next = loops.size() + pixel_rows.size() + pixel_columns.size();
    auto shift = [&](const AtomAxis& leaves, int64_t index) {
      for (size_t l = leaves.size(); l-- > 0;) {
        result.view.offset += index % atoms.extent(leaves[l]) * strides[--next];
        index /= atoms.extent(leaves[l]);
      }
    };
    shift(pixel_columns, j);
    shift(pixel_rows, i);
    return result;
  };

  ProgramBuilder builder(atoms, 0);
  std::vector<int> points;
  for (int64_t p = 0; p < Points(tile_size); ++p) {
    points.push_back(builder.Operand(At(m, tiles, p * point)));
  }
  std::vector<int32_t> values = builder.AppendAll(WinogradOutputProgram(tile_size), points),
                       results;
  std::vector<LoopOperand> places;
  for (int i = 0; i < tile_size; ++i) {
    for (int j = 0; j < tile_size; ++j) {
      std::vector<int> arguments = {values[i * tile_size + j]};
      for (const LoopOperand& operand : epilogue.operands) {
        arguments.push_back(builder.Operand(at_pixel(operand, i, j)));
      }
      for (int32_t result : builder.AppendAll(epilogue.program, arguments)) {
        results.push_back(result);
      }
      for (const RegionOutput& output : outputs) places.push_back(at_pixel(output.place, i, j));
    }
  }
  AddLoop(builder.operands(), builder.Finish(results), places, label);
  TurnBack(turned, outputs, label);
  FinishOutputs(outputs, label);
}

}  // namespace calotype::jit
