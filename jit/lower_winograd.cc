#include "jit/lower_winograd.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/scalar.h"
#include "graph/functions.h"
#include "jit/lower_internal.h"
#include "jit/lower_ops.h"

namespace calotype::jit {

namespace {

using scalar::Recorder;
using scalar::Sym;

constexpr int kPatch = 6, kTile = 4, kPoints = kPatch * kPatch;

Sym Times(double c, Sym x) { return Constant(x, c) * x; }

// One-dimensional transforms; a = sqrt(1/2), b = sqrt(2).
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
  return {{DType::kF32, {kPoints, x[0], (x[2] - 2) / kTile, (x[3] - 2) / kTile, x[1]}}};
}

std::vector<TensorType> InferWeight(const InferContext& context) {
  const Shape& w = context.inputs[0].shape;
  bool correlate = context.attrs.Int("correlate") != 0;
  return {{DType::kF32, {kPoints, w[correlate ? 0 : 1], w[correlate ? 1 : 0]}}};
}

std::vector<TensorType> InferOutput(const InferContext& context) {
  const Shape& m = context.inputs[0].shape;
  return {{DType::kF32, {m[1], m[4], kTile * m[2], kTile * m[3]}}};
}

void RunInput(const RunContext& context) {
  const Shape &x = context.inputs[0].shape(), &y = context.outputs[0].shape();
  auto xs = x.Strides(), ys = y.Strides();
  float in[kPoints], out[kPoints];
  for (int64_t b = 0; b < y[1]; ++b)
    for (int64_t i = 0; i < y[2]; ++i)
      for (int64_t j = 0; j < y[3]; ++j)
        for (int64_t c = 0; c < y[4]; ++c) {
          const float* from =
              context.inputs[0].data() + b * xs[0] + c * xs[1] + kTile * i * xs[2] + kTile * j;
          float* to = context.outputs[0].data() + b * ys[1] + i * ys[2] + j * ys[3] + c;
          for (int p = 0; p < kPoints; ++p) in[p] = from[p / kPatch * xs[2] + p % kPatch];
          WinogradInputProgram().Evaluate(in, out);
          for (int p = 0; p < kPoints; ++p) to[p * ys[0]] = out[p];
        }
}

void RunWeight(const RunContext& context) {
  const Shape& w = context.inputs[0].shape();
  bool correlate = context.attrs.Int("correlate") != 0;
  float in[9], out[kPoints];
  for (int64_t o = 0; o < w[0]; ++o)
    for (int64_t c = 0; c < w[1]; ++c) {
      const float* from = context.inputs[0].data() + (o * w[1] + c) * 9;
      for (int p = 0; p < 9; ++p) in[p] = from[correlate ? 8 - p : p];
      WinogradWeightProgram().Evaluate(in, out);
      float* to = context.outputs[0].data() + (correlate ? o * w[1] + c : c * w[0] + o);
      for (int p = 0; p < kPoints; ++p) to[p * w[0] * w[1]] = out[p];
    }
}

void RunOutput(const RunContext& context) {
  const Shape &m = context.inputs[0].shape(), &y = context.outputs[0].shape();
  auto ms = m.Strides(), ys = y.Strides();
  float in[kPoints], out[kTile * kTile];
  for (int64_t b = 0; b < m[1]; ++b)
    for (int64_t i = 0; i < m[2]; ++i)
      for (int64_t j = 0; j < m[3]; ++j)
        for (int64_t o = 0; o < m[4]; ++o) {
          const float* from = context.inputs[0].data() + b * ms[1] + i * ms[2] + j * ms[3] + o;
          float* to =
              context.outputs[0].data() + b * ys[0] + o * ys[1] + kTile * i * ys[2] + kTile * j;
          for (int p = 0; p < kPoints; ++p) in[p] = from[p * ms[0]];
          WinogradOutputProgram().Evaluate(in, out);
          for (int p = 0; p < kTile * kTile; ++p) to[p / kTile * ys[2] + p % kTile] = out[p];
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

const Op kWinogradInputOp =
    MakeOp("WinogradInput", "transformed 6x6 patches", InferInput, RunInput);
const Op kWinogradWeightOp =
    MakeOp("WinogradWeight", "transformed 3x3 kernels", InferWeight, RunWeight);
const Op kWinogradOutputOp =
    MakeOp("WinogradOutput", "4x4 tiles of the result", InferOutput, RunOutput);

const ScalarProgram& WinogradInputProgram() {
  static const ScalarProgram program = Both<6, 6>(InputLine);
  return program;
}
const ScalarProgram& WinogradWeightProgram() {
  static const ScalarProgram program = Both<3, 6>(WeightLine);
  return program;
}
const ScalarProgram& WinogradOutputProgram() {
  static const ScalarProgram program = Both<6, 4>(OutputLine);
  return program;
}

bool WinogradFits(const ComputationGraph& graph, const ComputationNode& node) {
  // Below, the transforms of pixels (growing with the channels of both sides) and of kernels (read
  // once for all pixels) cost more than the products saved.
  constexpr int64_t kFewChannels = 24, kFewPixels = 256;
  if (node.op != &kConv2dOp && node.op != &kConv2dInputGradientOp) return false;
  const Shape &y = node.types[0].shape, &w = graph.type(node.inputs[1]).shape;
  return node.attrs.Int("stride") == 1 && w[2] == 3 && w[3] == 3 && y[2] % kTile == 0 &&
         y[3] % kTile == 0 && std::min(w[0], w[1]) >= kFewChannels &&
         y[0] * y[2] * y[3] >= kFewPixels;
}

int64_t WinogradBytes(const ComputationGraph& graph, const ComputationNode& node) {
  const Shape& w = graph.type(node.inputs[1]).shape;
  return CheckedMul(CheckedMul(w[0], w[1], "winograd"), kPoints * 4, "winograd");
}

Value WinogradConvolution(Value x, Value w, bool correlate) {
  const int64_t height = x.dim(2) - 2, width = x.dim(3) - 2, pixels = x.dim(0) * height * width;
  const int64_t in = x.dim(1), out = w.dim(correlate ? 1 : 0);
  ComputationGraph& graph = *x.graph;
  Value v = graph.EmitOne(kWinogradInputOp, {x});
  Value u = graph.EmitOne(kWinogradWeightOp, {w}, {{"correlate", int64_t{correlate}}});
  const int64_t tiles = pixels / (kTile * kTile);
  Value m = MatMul(Reshape(v, {kPoints, tiles, in}), u);
  m = Reshape(m, {kPoints, x.dim(0), height / kTile, width / kTile, out});
  return graph.EmitOne(kWinogradOutputOp, {m});
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

void Lowering::LowerWinogradInput(int node, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  const Shape& shape = graph_.node(node).types[0].shape;
  View x = SinglePieces(graph_.node(node).inputs[0], {2, 3});
  View v = OutputPlace(node, 0, label);
  const int64_t row = StrideOf(x.axes[2]), column = StrideOf(x.axes[3]),
                point = StrideOf(v.axes[0]);
  View patch = x, tile = v;
  patch.axes = {x.axes[0], Simplify({{shape[2], kTile * row}}),
                Simplify({{shape[3], kTile * column}}), x.axes[1]};
  tile.axes.erase(tile.axes.begin());
  AtomAxes axes = atoms.NewAxes({shape[1], shape[2], shape[3], shape[4]});
  Check<InternalError>(atoms.Fit(axes, tile), "{}: no place", label);
  if (!atoms.Fit(axes, patch)) Fail<InternalError>("{}: {} cannot be walked", label, x.ToString());

  ProgramBuilder builder(atoms, 0);
  std::vector<int> patch_numbers;
  std::vector<LoopOperand> places;
  for (int p = 0; p < kPoints; ++p) {
    patch_numbers.push_back(
        builder.Operand(At(patch, axes, p / kPatch * row + p % kPatch * column)));
    places.push_back(At(tile, axes, p * point));
  }
  std::vector<int32_t> results = builder.AppendAll(WinogradInputProgram(), patch_numbers);
  AddLoop(builder.operands(), builder.Finish(results), places, label);
}

void Lowering::LowerWinogradWeight(int node, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  const ComputationNode& n = graph_.node(node);
  const bool correlate = n.attrs.Int("correlate") != 0;
  View w = SinglePieces(n.inputs[0], {2, 3});
  View u = OutputPlace(node, 0, label);
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
  for (int p = 0; p < kPoints; ++p) places.push_back(At(place, axes, p * point));
  std::vector<int32_t> results = builder.AppendAll(WinogradWeightProgram(), numbers);
  AddLoop(builder.operands(), builder.Finish(results), places, label);
  ++program_.conversions;
  --program_.regions;
}

// A loop over tiles; the 16 pixels of a tile are written out, each with its own copy of the
// epilogue.
void Lowering::LowerWinogradOutput(Group& group, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  std::vector<RegionOutput> outputs = Outputs(group);
  ProgramBuilder epilogue(atoms, 1);
  std::map<int, int> numbers{{group.anchor, epilogue.Reserved(0)}};
  Evaluate(group.body, group.axes, numbers, epilogue);
  std::vector<int32_t> epilogue_results;
  for (const RegionOutput& output : outputs) {
    epilogue_results.push_back(numbers.at(output.value.node));
  }
  const ScalarProgram pixel = epilogue.Finish(epilogue_results);

  const AtomAxes& y =
      group.axes.at(group.anchor);  // rows and columns are (tile, pixel of the tile)
  const ComputationNode& node = graph_.node(group.anchor);
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
  for (int p = 0; p < kPoints; ++p) {
    points.push_back(builder.Operand(At(m, tiles, p * point)));
  }
  std::vector<int32_t> values = builder.AppendAll(WinogradOutputProgram(), points), results;
  std::vector<LoopOperand> places;
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; ++j) {
      std::vector<int> arguments = {values[i * kTile + j]};
      for (const LoopOperand& operand : epilogue.operands()) {
        arguments.push_back(builder.Operand(at_pixel(operand, i, j)));
      }
      for (int32_t result : builder.AppendAll(pixel, arguments)) results.push_back(result);
      for (const RegionOutput& output : outputs) places.push_back(at_pixel(output.place, i, j));
    }
  }
  AddLoop(builder.operands(), builder.Finish(results), places, label);
  FinishOutputs(outputs, label);
}

}  // namespace calotype::jit
