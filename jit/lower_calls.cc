// Kernels that take no epilogue: gather, scatter, random numbers, attention.
#include <algorithm>

#include "jit/lower_internal.h"
#include "jit/lower_ops.h"

namespace calotype::jit {

namespace {

// Leaf atoms of each list, and all of them in one.
struct Loops {
  AtomAxis outer, index, inner;
  AtomAxis All() const {
    AtomAxis all = outer;
    all.insert(all.end(), index.begin(), index.end());
    all.insert(all.end(), inner.begin(), inner.end());
    return all;
  }
};

std::vector<int64_t> Extents(const Atoms& atoms, const AtomAxis& leaves) {
  std::vector<int64_t> extents;
  for (int leaf : leaves) extents.push_back(atoms.extent(leaf));
  return extents;
}

}  // namespace

// The place of an output that the kernel writes itself.
View Lowering::OutputPlace(int node, int output, const std::string& label) {
  auto& location = Location({node, output});
  const TensorType& type = graph_.node(node).types[output];
  if (!location) {
    location =
        NewArena(RowMajor(-1, type.dtype, type.shape), type.dtype, type.shape.elements(), label);
  }
  return *location;
}

void Lowering::CheckIndices(const View& indices, int64_t limit, const std::string& label) {
  Storage storage = program_.buffers[indices.buffer].storage;
  Check<UnsupportedError>(
      storage == Storage::kInput || storage == Storage::kConstant || storage == Storage::kParameter,
      "{}: indices that the graph computes cannot be compiled; pass them as an input", label);
  program_.checks.push_back({indices, limit, label});
}

void Lowering::LowerCall(int node, const std::string& label) {
  const ComputationNode& n = graph_.node(node);
  size_t results = n.types.size();
  if (n.op == &kGatherOp) {
    LowerGather(node, label);
  } else if (n.op == &kWinogradInputOp) {
    LowerWinogradInput(node, label);
  } else if (n.op == &kWinogradWeightOp) {
    LowerWinogradWeight(node, label);
  } else if (n.op == &kScatterAddOp) {
    LowerScatterAdd(node, label);
  } else if (n.op == &kPhiloxUniformOp) {
    LowerPhilox(node, label);
  } else if (n.op == &kAttentionOp) {
    LowerAttention(node, label);
  } else if (n.op == &kAttentionGradientOp) {
    LowerAttentionGradient(node, label);
  } else {
    std::vector<TensorType> types;
    for (ValueId input : n.inputs) types.push_back(graph_.type(input));
    Fail<UnsupportedError>("{}: no kernel for this op on ({})", LabelOf(node),
                           fmt::join(types, ", "));
  }
  for (size_t o = 0; o < results; ++o) {
    ValueId value{node, static_cast<int32_t>(o)};
    if (Location(value)) program_.steps.back().results.push_back({value, *Location(value)});
  }
}

void Lowering::LowerGather(int node, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  const ComputationNode& n = graph_.node(node);
  int axis = static_cast<int>(n.attrs.Int("axis"));
  const Shape& x_shape = graph_.type(n.inputs[0]).shape;
  const int index_rank = graph_.type(n.inputs[1]).shape.rank();
  View out = BitsView(OutputPlace(node, 0, label));
  View x = BitsView(SinglePieces(n.inputs[0], {axis}));
  View indices = ViewOf(n.inputs[1]);
  CheckIndices(indices, x_shape[axis], label);

  AtomAxes axes = atoms.NewAxes(n.types[0].shape);
  if (out.axes.size() > axes.size()) axes.push_back({atoms.New(2)});  // two words of an i64
  AtomAxes outer(axes.begin(), axes.begin() + axis);
  AtomAxes index(axes.begin() + axis, axes.begin() + axis + index_rank);
  AtomAxes inner(axes.begin() + axis + index_rank, axes.end());
  int64_t axis_stride = x.axes[axis].empty() ? 0 : x.axes[axis][0].stride;
  auto fits = [&] {
    if (!atoms.Fit(axes, out) || !atoms.Fit(index, indices)) return false;
    for (size_t i = 0; i < outer.size(); ++i) {
      if (!atoms.Fit(outer[i], x.axes[i])) return false;
    }
    for (size_t i = 0; i < inner.size(); ++i) {
      if (!atoms.Fit(inner[i], x.axes[axis + 1 + i])) return false;
    }
    return true;
  };
  if (!fits()) {
    x = BitsView(RowMajorCopy(n.inputs[0]));
    indices = ViewOf(n.inputs[1]);
    axis_stride = x.axes[axis].empty() ? 0 : x.axes[axis][0].stride;
    Check<UnsupportedError>(fits(), "{}: indices {} cannot be walked", label, indices.ToString());
  }
  View x_outer = x, x_inner = x;
  x_outer.axes.assign(x.axes.begin(), x.axes.begin() + axis);
  x_inner.axes.assign(x.axes.begin() + axis + 1, x.axes.end());
  auto flat = [&](const AtomAxes& list) {
    AtomAxis all;
    for (const AtomAxis& a : list) all.insert(all.end(), a.begin(), a.end());
    return atoms.Leaves(all);
  };
  Loops loops{flat(outer), flat(index), flat(inner)};
  GatherSpec spec;
  spec.outer = Extents(atoms, loops.outer);
  spec.index = Extents(atoms, loops.index);
  spec.inner = Extents(atoms, loops.inner);
  spec.axis_size = x_shape[axis];
  std::vector<int64_t> strides = StridesAlong({x_outer, outer}, loops.outer);
  strides.push_back(axis_stride);
  for (int64_t stride : StridesAlong({x_inner, inner}, loops.inner)) strides.push_back(stride);
  spec.x = MakeOperand(x, strides);
  spec.indices = MakeOperand(indices, StridesAlong({indices, index}, loops.index));
  spec.out = MakeOperand(out, StridesAlong({out, axes}, loops.All()));
  AddStep(std::move(spec), label);
}

void Lowering::LowerScatterAdd(int node, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  const ComputationNode& n = graph_.node(node);
  int axis = static_cast<int>(n.attrs.Int("axis"));
  const int index_rank = graph_.type(n.inputs[1]).shape.rank();
  View out = OutputPlace(node, 0, label);  // every axis in one piece, see AcceptsPlace
  View indices = ViewOf(n.inputs[1]);
  CheckIndices(indices, n.attrs.Int("size"), label);
  View dy = ViewOf(n.inputs[0]);

  AtomAxes axes = atoms.NewAxes(graph_.type(n.inputs[0]).shape);
  AtomAxes outer(axes.begin(), axes.begin() + axis);
  AtomAxes index(axes.begin() + axis, axes.begin() + axis + index_rank);
  AtomAxes inner(axes.begin() + axis + index_rank, axes.end());
  if (!atoms.Fit(index, indices) || !atoms.Fit(axes, dy)) {
    dy = RowMajorCopy(n.inputs[0]);
    Check<UnsupportedError>(atoms.Fit(axes, dy), "{}: {} cannot be walked", label, dy.ToString());
  }
  View out_outer = out, out_inner = out;
  out_outer.axes.assign(out.axes.begin(), out.axes.begin() + axis);
  out_inner.axes.assign(out.axes.begin() + axis + 1, out.axes.end());
  auto flat = [&](const AtomAxes& list) {
    AtomAxis all;
    for (const AtomAxis& a : list) all.insert(all.end(), a.begin(), a.end());
    return atoms.Leaves(all);
  };
  Loops loops{flat(outer), flat(index), flat(inner)};
  ScatterAddSpec spec;
  spec.outer = Extents(atoms, loops.outer);
  spec.index = Extents(atoms, loops.index);
  spec.inner = Extents(atoms, loops.inner);
  spec.axis_size = n.attrs.Int("size");
  std::vector<int64_t> strides = StridesAlong({out_outer, outer}, loops.outer);
  strides.push_back(out.axes[axis].empty() ? 0 : out.axes[axis][0].stride);
  for (int64_t stride : StridesAlong({out_inner, inner}, loops.inner)) strides.push_back(stride);
  spec.out = MakeOperand(out, strides);
  spec.indices = MakeOperand(indices, StridesAlong({indices, index}, loops.index));
  spec.dy = MakeOperand(dy, StridesAlong({dy, axes}, loops.All()));
  AddStep(std::move(spec), label);
}

void Lowering::LowerPhilox(int node, const std::string& label) {
  const ComputationNode& n = graph_.node(node);
  PhiloxSpec spec;
  spec.elements = n.types[0].shape.elements();
  spec.stream = n.attrs.Int("stream");
  spec.seed = MakeOperand(ViewOf(n.inputs[0]), {});
  spec.out = MakeOperand(OutputPlace(node, 0, label), {1});
  AddStep(std::move(spec), label);
}

// How many queries form a part of the gradient, 0 for all: so many that few heads still give work
// to every thread. A part pays for the sums that it writes if it has many queries.
int64_t GradientPart(const AttentionSpec& s) {
  constexpr int64_t kUnits = 16, kLeast = 128, kWork = 1 << 20;
  int64_t wanted = kUnits / (s.batch * s.heads);
  int64_t work = s.queries * s.keys * (s.head_dim + s.value_dim);
  wanted = std::min({wanted, s.queries / kLeast, work / kWork});
  if (wanted < 2) return 0;
  return ((s.queries + wanted - 1) / wanted + 63) / 64 * 64;
}

// The operand of [batch, tokens, heads * width] data along (b, h, token, width).
std::optional<Operand> Lowering::TokenOperand(const View& view, int64_t batch, int64_t heads) {
  int64_t tokens = view.size(1), width = view.size(2) / heads;
  auto split = ReshapeView(view, {view.size(0), tokens, heads, width});
  if (!split) return std::nullopt;
  View all = BroadcastView(*split, {batch, tokens, heads, width});
  std::vector<int64_t> strides;
  for (int axis : {0, 2, 1, 3}) {
    if (all.axes[axis].size() > 1) return std::nullopt;
    strides.push_back(all.axes[axis].empty() ? 0 : all.axes[axis][0].stride);
  }
  return MakeOperand(all, strides);
}

Operand Lowering::TokenInput(ValueId value, int64_t batch, int64_t heads) {
  if (auto operand = TokenOperand(ViewOf(value), batch, heads)) return *operand;
  return *TokenOperand(RowMajorCopy(value), batch, heads);
}

Operand Lowering::TokenOutput(int node, int output, int64_t batch, int64_t heads,
                              const std::string& label) {
  auto operand = TokenOperand(OutputPlace(node, output, label), batch, heads);
  Check<InternalError>(operand.has_value(), "{}: output {} has no place", label, output);
  return *operand;
}

// What Attention and its gradient share; `mask` is the position of the mask among the inputs.
AttentionSpec Lowering::AttentionOperands(const ComputationNode& n, size_t mask) {
  const Shape &q = graph_.type(n.inputs[0]).shape, &k = graph_.type(n.inputs[1]).shape;
  const Shape& v = graph_.type(n.inputs[2]).shape;
  AttentionSpec spec;
  spec.batch = q[0];
  spec.heads = n.attrs.Int("heads");
  spec.queries = q[1];
  spec.keys = k[1];
  spec.head_dim = q[2] / spec.heads;
  spec.value_dim = v[2] / spec.heads;
  spec.scale = n.attrs.Float("scale");
  spec.causal = n.attrs.Int("causal") != 0;
  spec.has_mask = n.attrs.Int("mask", 0) != 0;
  spec.q = TokenInput(n.inputs[0], spec.batch, spec.heads);
  spec.k = TokenInput(n.inputs[1], spec.batch, spec.heads);
  spec.v = TokenInput(n.inputs[2], spec.batch, spec.heads);
  if (spec.has_mask) {
    ValueId value = n.inputs[mask];
    Shape scores{spec.batch, spec.heads, spec.queries, spec.keys};
    auto pieces = [](const View& view) {
      return std::any_of(view.axes.begin(), view.axes.end(),
                         [](const Axis& a) { return a.size() > 1; });
    };
    View view = BroadcastView(ViewOf(value), scores);
    if (pieces(view)) view = BroadcastView(RowMajorCopy(value), scores);
    std::vector<int64_t> strides;
    for (const Axis& axis : view.axes) strides.push_back(axis.empty() ? 0 : axis[0].stride);
    spec.mask = MakeOperand(view, strides);
  }
  return spec;
}

Operand Lowering::LseOperand(const View& view) {
  std::vector<int64_t> strides;
  for (const Axis& axis : view.axes) strides.push_back(axis.empty() ? 0 : axis[0].stride);
  return MakeOperand(view, strides);
}

void Lowering::LowerAttention(int node, const std::string& label) {
  AttentionSpec spec = AttentionOperands(graph_.node(node), 3);
  spec.out = TokenOutput(node, 0, spec.batch, spec.heads, label);
  spec.lse = LseOperand(OutputPlace(node, 1, label));
  AddStep(std::move(spec), label);
}

void Lowering::LowerAttentionGradient(int node, const std::string& label) {
  const ComputationNode& n = graph_.node(node);
  AttentionGradientSpec spec;
  spec.forward = AttentionOperands(n, 6);
  const int64_t batch = spec.forward.batch, heads = spec.forward.heads;
  spec.forward.out = TokenInput(n.inputs[3], batch, heads);
  spec.forward.lse = LseOperand(SinglePieces(n.inputs[4], {0, 1, 2}));
  spec.dout = TokenInput(n.inputs[5], batch, heads);
  spec.dq = TokenOutput(node, 0, batch, heads, label);
  spec.dk = TokenOutput(node, 1, batch, heads, label);
  spec.dv = TokenOutput(node, 2, batch, heads, label);
  const int64_t keys = spec.forward.keys;
  spec.part = GradientPart(spec.forward);
  if (spec.part == 0) {
    AddStep(std::move(spec), label);
    return;
  }
  // Each part of the queries gives sums of its own, which are added up in order.
  struct Sum {
    Operand target;
    View parts;
    int64_t width, step;
  };
  std::vector<Sum> sums;
  for (auto [operand, step, width] :
       {std::tuple{&spec.dk, &spec.dk_step, spec.forward.head_dim},
        std::tuple{&spec.dv, &spec.dv_step, spec.forward.value_dim}}) {
    *step = batch * keys * heads * width;
    Shape shape{spec.Parts(), batch, keys, heads * width};
    View parts = NewArena(RowMajor(-1, DType::kF32, shape), DType::kF32, shape.elements(),
                          label + " (parts)");
    sums.push_back({*operand, parts, width, *step});
    *operand = MakeOperand(parts, {keys * heads * width, width, heads * width, 1});
  }
  const int64_t parts = spec.Parts();
  AddStep(std::move(spec), label + " (parts)");
  for (const Sum& sum : sums) {
    ReduceSpec add;
    add.extents = {batch, heads, keys, sum.width};
    add.reduced = {parts};
    add.inputs = {MakeOperand(
        sum.parts, {keys * heads * sum.width, sum.width, heads * sum.width, 1, sum.step})};
    ProgramBuilder builder(groups_.atoms, 1);
    add.program = add.epilogue.program = builder.Finish({builder.Reserved(0)});
    add.epilogue.outputs = {sum.target};
    AddReduce(std::move(add), label + " (sum of parts)");
  }
}

}  // namespace calotype::jit
