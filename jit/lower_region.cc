// Regions: one kernel for each group of nodes.
#include <algorithm>

#include "jit/lower_internal.h"
#include "jit/lower_ops.h"
#include "jit/target.h"

namespace calotype::jit {

namespace {

const ScalarProgram& Identity() {
  static const ScalarProgram program = [] {
    ScalarProgram p;
    p.inputs = 1;
    p.code = {{.op = Primitive::kInput}};
    p.results = {0};
    return p;
  }();
  return program;
}

AtomAxis Flatten(const AtomAxes& axes) {
  AtomAxis all;
  for (const AtomAxis& axis : axes) all.insert(all.end(), axis.begin(), axis.end());
  return all;
}

}  // namespace

std::string Lowering::RegionLabel(const Group& group) const {
  int main = group.anchor >= 0 ? group.anchor : group.body.back();
  std::string label = graph_.label_of(main);
  if (!label.empty()) label += ": ";
  std::vector<std::string_view> ops;
  for (int node : group.prologue) ops.push_back(graph_.node(node).op->name);
  if (group.anchor >= 0) ops.push_back(graph_.node(group.anchor).op->name);
  for (int node : group.body) ops.push_back(graph_.node(node).op->name);
  constexpr size_t kMost = 8;
  size_t more = ops.size() > kMost ? ops.size() - kMost : 0;
  ops.resize(ops.size() - more);
  label += fmt::format("{}", fmt::join(ops, "+"));
  if (more) label += fmt::format("+{} more", more);
  return label;
}

void Lowering::LowerGroup(Group& group) {
  int main = group.anchor >= 0 ? group.anchor : group.body.back();
  const ComputationNode& node = graph_.node(main);
  bool empty = std::all_of(node.types.begin(), node.types.end(),
                           [](const TensorType& type) { return type.shape.elements() == 0; });
  if (empty) return;
  std::string label = RegionLabel(group);
  if (group.anchor >= 0 && IsAssembled(node)) {
    Assemble(group.anchor);
    return;
  }
  ++program_.regions;
  if (group.anchor < 0) {
    LowerLoop(group, label);
  } else if (IsReduce(node)) {
    LowerReduce(group, label);
  } else if (IsContraction(node)) {
    LowerContraction(group, label);
  } else if (node.op == &kWinogradOutputOp) {
    LowerWinogradOutput(group, label);
  } else {
    LowerCall(group.anchor, label);
  }
}

// The operand that reads `value`, broadcast to `shape`, along `axes`.
LoopOperand Lowering::FitOperand(ValueId value, const Shape& shape, const AtomAxes& axes) {
  LoopOperand operand{BroadcastView(ViewOf(value), shape), axes};
  size_t mark = groups_.atoms.Mark();
  if (groups_.atoms.Fit(axes, operand.view)) return operand;
  groups_.atoms.Rollback(mark);
  operand.view = BroadcastView(RowMajorCopy(value), shape);
  Check<InternalError>(groups_.atoms.Fit(axes, operand.view), "lowering: {} does not fit its loops",
                       operand.view.ToString());
  return operand;
}

int Lowering::Argument(ValueId value, const Shape& shape, const AtomAxes& axes,
                       const std::map<int, int>& numbers, ProgramBuilder& builder) {
  int root = groups_.TraceOf(value).root.node;
  if (IsScalarConstant(graph_.node(root))) {
    return builder.Constant(graph_.node(root).constant.data()[0]);
  }
  auto it = numbers.find(root);
  if (it != numbers.end()) return it->second;
  return builder.Operand(FitOperand(value, shape, axes));
}

// Appends the programs of elementwise nodes; `numbers` holds the instruction of each node's result.
void Lowering::Evaluate(const std::vector<int>& nodes, const std::map<int, AtomAxes>& axes,
                        std::map<int, int>& numbers, ProgramBuilder& builder) {
  for (int index : nodes) {
    const ComputationNode& node = graph_.node(index);
    std::vector<int> arguments;
    for (ValueId input : node.inputs) {
      arguments.push_back(Argument(input, node.types[0].shape, axes.at(index), numbers, builder));
    }
    // Loads convert integers, so a Cast is its operand.
    numbers[index] = node.op == &kCastOp ? arguments[0]
                                         : builder.Append(node.op->elementwise->program, arguments);
  }
}

// The places of everything that other kernels read from this group, the anchor's result first.
std::vector<Lowering::RegionOutput> Lowering::Outputs(const Group& group) {
  std::vector<int> nodes;
  if (group.anchor >= 0) nodes.push_back(group.anchor);
  nodes.insert(nodes.end(), group.body.begin(), group.body.end());
  std::vector<RegionOutput> outputs;
  for (int node : nodes) {
    ValueId value{node, 0};
    if (!groups_.NeedsMemory(value)) continue;
    const AtomAxes& axes = group.axes.at(node);
    const Shape& shape = graph_.type(value).shape;
    RegionOutput output{value, {{}, axes}, {}};
    auto& location = Location(value);
    size_t mark = groups_.atoms.Mark();
    if (location && !groups_.atoms.Fit(axes, *location)) {
      groups_.atoms.Rollback(mark);
      output.copy_to = *location;
      location.reset();
    }
    if (!location) {
      View layout = layouts_[node][0];
      if (!groups_.atoms.Fit(axes, layout)) {
        groups_.atoms.Rollback(mark);
        layout = RowMajor(-1, DType::kF32, shape);
        Check<InternalError>(groups_.atoms.Fit(axes, layout), "lowering: {} has no place",
                             LabelOf(node));
      }
      location = NewArena(layout, DType::kF32, shape.elements(), LabelOf(node));
    }
    output.place.view = *location;
    outputs.push_back(output);
  }
  // The largest stride order comes from an output with every element; all of them have.
  return outputs;
}

Lowering::RegionEpilogue Lowering::EvaluateEpilogue(const Group& group,
                                                    const std::vector<RegionOutput>& outputs) {
  ProgramBuilder builder(groups_.atoms, 1);
  std::map<int, int> numbers{{group.anchor, builder.Reserved(0)}};
  Evaluate(group.body, group.axes, numbers, builder);
  std::vector<int32_t> results;
  for (const RegionOutput& output : outputs) results.push_back(numbers.at(output.value.node));
  return {builder.Finish(results), builder.operands()};
}

void Lowering::FinishOutputs(const std::vector<RegionOutput>& outputs, const std::string& label) {
  for (const RegionOutput& output : outputs) {
    program_.steps.back().results.push_back({output.value, output.place.view});
  }
  for (const RegionOutput& output : outputs) {
    if (!output.copy_to) continue;
    Copy(output.place.view, *output.copy_to, label + " (to its place)");
    ++program_.conversions;
  }
}

void Lowering::LowerLoop(Group& group, const std::string& label) {
  std::vector<RegionOutput> outputs = Outputs(group);
  ProgramBuilder builder(groups_.atoms, 0);
  std::map<int, int> numbers;
  Evaluate(group.body, group.axes, numbers, builder);
  std::vector<LoopOperand> places;
  std::vector<int32_t> results;
  for (const RegionOutput& output : outputs) {
    places.push_back(output.place);
    results.push_back(numbers.at(output.value.node));
  }
  AddLoop(builder.operands(), builder.Finish(results), places, label);
  FinishOutputs(outputs, label);
}

namespace {

std::vector<int64_t> Extents(const Atoms& atoms, const AtomAxis& leaves) {
  std::vector<int64_t> extents;
  for (int leaf : leaves) extents.push_back(atoms.extent(leaf));
  return extents;
}

}  // namespace

void Lowering::LowerReduce(Group& group, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  const ComputationNode& node = graph_.node(group.anchor);
  const Shape& input_shape = graph_.type(node.inputs[0]).shape;
  std::vector<RegionOutput> outputs = Outputs(group);

  ProgramBuilder prologue(atoms, 0);
  std::map<int, int> inside;
  Evaluate(group.prologue, group.prologue_axes, inside, prologue);
  int summed = Argument(node.inputs[0], input_shape, group.input_axes, inside, prologue);

  const RegionEpilogue epilogue = EvaluateEpilogue(group, outputs);

  // Loops: kept atoms in the order of the first output, reduced atoms in the order of the operand
  // that moves most.
  AtomAxis kept = LeavesByStride(outputs[0].place);
  AtomAxis all = atoms.Leaves(Flatten(group.input_axes)), reduced;
  for (int atom : all) {
    if (std::find(kept.begin(), kept.end(), atom) == kept.end()) reduced.push_back(atom);
  }
  const LoopOperand* main = nullptr;
  int most = -1;
  for (const LoopOperand& operand : prologue.operands()) {
    std::vector<int64_t> strides = StridesAlong(operand, all);
    int moving = static_cast<int>(
        std::count_if(strides.begin(), strides.end(), [](int64_t stride) { return stride != 0; }));
    if (moving > most) {
      most = moving;
      main = &operand;
    }
  }
  std::map<int, int64_t> main_stride;
  if (main) {
    std::vector<int64_t> strides = StridesAlong(*main, all);
    for (size_t i = 0; i < all.size(); ++i) main_stride[all[i]] = strides[i];
    std::stable_sort(reduced.begin(), reduced.end(), [&](int a, int b) {
      return std::abs(main_stride[a]) > std::abs(main_stride[b]);
    });
  }

  ReduceSpec spec;
  spec.kind = node.op == &kSumOp ? ReduceSpec::kSum : ReduceSpec::kMax;
  spec.program = prologue.Finish({summed});
  auto fill = [&](const AtomAxis& extents, const AtomAxis& over) {
    spec.extents = Extents(atoms, extents);
    spec.reduced = Extents(atoms, over);
    AtomAxis loops = extents;
    loops.insert(loops.end(), over.begin(), over.end());
    spec.inputs.clear();
    for (const LoopOperand& operand : prologue.operands()) {
      spec.inputs.push_back(MakeOperand(operand.view, StridesAlong(operand, loops)));
    }
  };
  LoopOperand partial;
  const bool split = SplitReduction(kept, reduced, main_stride);
  if (split) {
    // First over all but the innermost reduced loop, which counts as kept: whole vectors of
    // neighbours. The few partial results are reduced by a second kernel.
    int last = reduced.back();
    AtomAxis first_kept = kept, first_reduced(reduced.begin(), reduced.end() - 1);
    std::stable_sort(first_kept.begin(), first_kept.end(), [&](int a, int b) {
      return std::abs(main_stride[a]) > std::abs(main_stride[b]);
    });
    first_kept.push_back(last);
    fill(first_kept, first_reduced);
    partial = NewTemporary(first_kept, label + " (partial)");
    spec.epilogue.program = Identity();
    spec.epilogue.outputs = {MakeOperand(partial.view, StridesAlong(partial, first_kept))};
    AddReduce(spec, label + " (partial)");
    spec.inputs.clear();
    spec.program = Identity();
    spec.extents = Extents(atoms, kept);
    spec.reduced = Extents(atoms, {last});
    AtomAxis loops = kept;
    loops.push_back(last);
    spec.inputs = {MakeOperand(partial.view, StridesAlong(partial, loops))};
  } else {
    fill(kept, reduced);
  }
  spec.epilogue.program = epilogue.program;
  spec.epilogue.operands.clear();
  spec.epilogue.outputs.clear();
  for (const LoopOperand& operand : epilogue.operands) {
    spec.epilogue.operands.push_back(MakeOperand(operand.view, StridesAlong(operand, kept)));
  }
  for (const RegionOutput& output : outputs) {
    spec.epilogue.outputs.push_back(
        MakeOperand(output.place.view, StridesAlong(output.place, kept)));
  }
  AddReduce(spec, label);
  FinishOutputs(outputs, label);
}

// True for sums over a short contiguous loop inside longer ones, such as the channels of a group
// inside the pixels of a channels-last picture.
bool Lowering::SplitReduction(const AtomAxis& kept, const AtomAxis& reduced,
                              const std::map<int, int64_t>& strides) const {
  constexpr int64_t kShort = 64, kLong = 16;
  if (reduced.size() < 2 || strides.empty()) return false;
  int last = reduced.back();
  int64_t extent = groups_.atoms.extent(last), others = 1;
  if (strides.at(last) != 1 || extent >= kShort) return false;
  for (size_t i = 0; i + 1 < reduced.size(); ++i) others *= groups_.atoms.extent(reduced[i]);
  if (others < kLong) return false;
  return std::any_of(kept.begin(), kept.end(),
                     [&](int atom) { return strides.at(atom) == extent; });
}

// A dense buffer over these loops, the last one fastest.
LoopOperand Lowering::NewTemporary(const AtomAxis& loops, const std::string& label) {
  LoopOperand place;
  int64_t elements = 1;
  for (size_t i = loops.size(); i-- > 0;) {
    int64_t extent = groups_.atoms.extent(loops[i]);
    place.view.axes.insert(place.view.axes.begin(), Simplify({{extent, elements}}));
    place.axes.insert(place.axes.begin(), {loops[i]});
    elements *= extent;
  }
  place.view = NewArena(place.view, DType::kF32, elements, label);
  return place;
}

// Into how many parts the outermost of the summed loops is cut. A sum over all pixels of a batch
// (the gradient of a weight) has operands beyond the cache, which every tile of the few results
// would stream through; cut into parts that fit, the partial results are added afterwards.
int64_t Lowering::SumParts(const AtomAxis& m, int64_t n, const AtomAxis& k) const {
  constexpr int64_t kPartFloats = 128 * 1024, kMostPartials = 4 * 1024 * 1024, kLong = 2048;
  const Atoms& atoms = groups_.atoms;
  int64_t rows = 1, depth = 1;
  for (int atom : m) rows *= atoms.extent(atom);
  for (int atom : k) depth *= atoms.extent(atom);
  if (depth < kLong || k.empty()) return 1;
  int64_t width = n + std::min<int64_t>(rows, 64);  // floats that one step of the sum reads
  int64_t wanted =
      std::min({depth * width / kPartFloats, depth / (kLong / 4), kMostPartials / (rows * n)});
  int64_t outermost = atoms.extent(k[0]);
  for (int64_t parts = std::min(wanted, outermost); parts > 1; --parts) {
    if (outermost % parts == 0) return parts;
  }
  return 1;
}

// True if there are enough results, and enough columns in the lanes, for turning to pay.
bool Lowering::WorthTurning(const AtomAxis& space, int64_t columns) const {
  constexpr int64_t kFewestResults = 32 * 1024;
  int64_t results = 1;
  for (int atom : space) results *= groups_.atoms.extent(atom);
  return columns >= HostTarget().vector_width && results >= kFewestResults;
}

// True if a contraction has its columns in the lanes, so that they should lie side by side in what
// the epilogue reads and writes.
bool Lowering::ColumnsInLanes(const Contraction& c, const AtomAxis& mn) const {
  AtomAxis mk = mn;
  mk.pop_back();
  for (int atom : groups_.atoms.Leaves(c.k)) mk.push_back(atom);
  std::vector<int64_t> strides = StridesAlong(c.a, mk);
  for (size_t i = 0; i + 1 < mn.size(); ++i) {
    if (strides[i] == 1) return false;  // pixels may lie in the lanes instead
  }
  return true;
}

// Results and operands whose columns (the last atom of `space`) lie far apart, pictures
// channels-first, are turned by loops of their own, in square blocks, instead of element by
// element: the operands now, and the outputs, which become temporaries, by TurnBack.
Lowering::Turned Lowering::TurnColumns(const AtomAxis& space, RegionEpilogue& epilogue,
                                       std::vector<RegionOutput>& outputs,
                                       const std::string& label) {
  auto apart = [&](const LoopOperand& operand) {
    const int64_t stride = StridesAlong(operand, space).back();
    return stride != 0 && stride != 1;
  };
  for (LoopOperand& operand : epilogue.operands) {
    if (!apart(operand)) continue;
    std::vector<int64_t> strides = StridesAlong(operand, space);
    AtomAxis moving;
    for (size_t i = 0; i < space.size(); ++i) {
      if (strides[i] != 0) moving.push_back(space[i]);
    }
    LoopOperand rows = NewTemporary(moving, label + " (turned)");
    AddLoop({operand}, Identity(), {rows}, label + " (turned)");
    ++program_.conversions;
    operand = rows;
  }
  Turned turned;
  for (RegionOutput& output : outputs) {
    if (!apart(output.place)) continue;
    LoopOperand rows = NewTemporary(space, label + " (to turn)");
    turned.emplace_back(rows, output.place);
    output.place = rows;
  }
  return turned;
}

void Lowering::TurnBack(const Turned& turned, std::vector<RegionOutput>& outputs,
                        const std::string& label) {
  for (const auto& [rows, place] : turned) {
    AddLoop({rows}, Identity(), {place}, label + " (turned)");
    ++program_.conversions;
    for (RegionOutput& output : outputs) {
      if (output.place.view.buffer == rows.view.buffer) output.place = place;
    }
  }
}

void Lowering::LowerContraction(Group& group, const std::string& label) {
  Atoms& atoms = groups_.atoms;
  std::vector<RegionOutput> outputs = Outputs(group);
  RegionEpilogue epilogue = EvaluateEpilogue(group, outputs);

  Contraction c = MakeContraction(group);
  // Only the innermost part of the columns is the vector loop; outer parts are rows.
  AtomAxis n = atoms.Leaves(c.n), k = atoms.Leaves(c.k), m;
  if (n.size() > 1) m.assign(n.begin(), n.end() - 1);
  AtomAxis rows = atoms.Leaves(c.m);
  m.insert(m.end(), rows.begin(), rows.end());
  const int64_t columns = n.empty() ? 1 : atoms.extent(n.back());
  AtomAxis mn = m;  // the space of the epilogue
  if (!n.empty()) mn.push_back(n.back());

  Turned turned;
  if (WorthTurning(mn, columns) && ColumnsInLanes(c, mn)) {
    turned = TurnColumns(mn, epilogue, outputs, label);
  }

  AtomAxis parts;
  if (int64_t count = SumParts(m, columns, k); count > 1) {
    AtomAxis halves = atoms.SplitLeaf(k[0], atoms.extent(k[0]) / count);
    parts = {halves[0]};
    k[0] = halves[1];
    m.insert(m.begin(), halves[0]);
  }

  ContractionSpec spec;
  spec.m = Extents(atoms, m);
  spec.n = columns;
  spec.k = Extents(atoms, k);
  AtomAxis mk = m, mkn;
  mk.insert(mk.end(), k.begin(), k.end());
  mkn = mk;
  if (!n.empty()) mkn.push_back(n.back());
  auto with_n = [&](const LoopOperand& operand, const AtomAxis& along) {
    std::vector<int64_t> strides = StridesAlong(operand, along);
    if (n.empty()) strides.push_back(0);
    return MakeOperand(operand.view, strides);
  };
  spec.a = MakeOperand(c.a.view, StridesAlong(c.a, mk));
  spec.b = with_n(c.b, mkn);

  if (parts.empty()) {
    spec.epilogue.program = epilogue.program;
    for (const LoopOperand& operand : epilogue.operands) {
      spec.epilogue.operands.push_back(with_n(operand, mn));
    }
    for (const RegionOutput& output : outputs) {
      spec.epilogue.outputs.push_back(with_n(output.place, mn));
    }
    AddContraction(std::move(spec), label);
  } else {
    AtomAxis all = m;
    if (!n.empty()) all.push_back(n.back());
    LoopOperand partial = NewTemporary(all, label + " (parts)");
    spec.epilogue.program = Identity();
    spec.epilogue.outputs = {with_n(partial, all)};
    AddContraction(std::move(spec), label + " (parts)");

    ReduceSpec sum;
    sum.kind = ReduceSpec::kSum;
    sum.extents = Extents(atoms, mn);
    sum.reduced = Extents(atoms, parts);
    AtomAxis loops = mn;
    loops.push_back(parts[0]);
    sum.inputs = {MakeOperand(partial.view, StridesAlong(partial, loops))};
    sum.program = Identity();
    sum.epilogue.program = epilogue.program;
    for (const LoopOperand& operand : epilogue.operands) {
      sum.epilogue.operands.push_back(MakeOperand(operand.view, StridesAlong(operand, mn)));
    }
    for (const RegionOutput& output : outputs) {
      sum.epilogue.outputs.push_back(
          MakeOperand(output.place.view, StridesAlong(output.place, mn)));
    }
    AddReduce(std::move(sum), label + " (sum of parts)");
  }
  TurnBack(turned, outputs, label);
  FinishOutputs(outputs, label);
}

}  // namespace calotype::jit
