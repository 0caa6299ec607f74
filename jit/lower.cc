#include "jit/lower.h"

#include <algorithm>

#include "jit/layout.h"
#include "jit/lower_internal.h"
#include "jit/lower_ops.h"

namespace calotype::jit {

Lowering::Lowering(const ComputationGraph& graph, const LowerOptions& options)
    : graph_(program_.graph = Normalize(graph, options)),
      groups_(graph_, options.fuse),
      layouts_(PreferredLayouts(graph_)),
      fuse_(options.fuse),
      rare_inputs_(options.rare_inputs) {
  for (const ComputationNode& node : graph_.nodes()) {
    locations_.emplace_back(node.types.size());
  }
}

LoweredProgram Lowering::Run() {
  Place();
  for (int index : groups_.order()) LowerGroup(groups_.group(index));
  WriteOutputs();
  WriteUpdates();
  UpdateInPlace();
  SplitByChange(rare_inputs_);
  ClearOnce();
  if (fuse_) ChainSteps(program_);
  return std::move(program_);
}

LoweredProgram Lower(const ComputationGraph& graph, const LowerOptions& options) {
  return Lowering(graph, options).Run();
}

std::string Lowering::LabelOf(int node) const {
  const std::string& path = graph_.label_of(node);
  std::string_view op = graph_.node(node).op->name;
  return path.empty() ? std::string(op) : fmt::format("{}: {}", path, op);
}

int Lowering::NewBuffer(Storage storage, int index, DType dtype, int64_t elements,
                        std::string label) {
  program_.buffers.push_back({storage, index, dtype, elements, 0, std::move(label)});
  return static_cast<int>(program_.buffers.size()) - 1;
}

View Lowering::NewArena(const View& layout, DType dtype, int64_t elements,
                        const std::string& label) {
  View view = layout;
  view.buffer = NewBuffer(Storage::kArena, 0, dtype, elements, label);
  view.dtype = dtype;
  view.offset = 0;
  return view;
}

// ------------------------------------------------------------------------------------- places

// Decides, before anything is lowered, which values are written straight into a graph output, a
// parameter's new value, the inside of a Pad, or a part of a Concat. Later readers come first, so a
// Concat inside a Pad is placed before its parts.
void Lowering::Place() {
  for (size_t o = 0; o < graph_.outputs().size(); ++o) {
    const GraphOutput& output = graph_.outputs()[o];
    const TensorType& type = graph_.type(output.value);
    int buffer = NewBuffer(Storage::kOutput, static_cast<int>(o), type.dtype, type.shape.elements(),
                           output.name);
    output_placed_.push_back(PlaceValue(output.value, RowMajor(buffer, type.dtype, type.shape)));
  }
  for (const GraphUpdate& update : graph_.updates()) {
    const TensorType& type = graph_.type(update.source);
    ValueId root = groups_.TraceOf(update.source).root;
    if (groups_.group_of(root.node) < 0 || Location(root)) continue;
    int buffer = NewBuffer(Storage::kArena, 0, type.dtype, type.shape.elements(),
                           graph_.node(update.target.node).parameter->name());
    PlaceValue(update.source, RowMajor(buffer, type.dtype, type.shape));
  }
  for (int node = static_cast<int>(graph_.nodes().size()) - 1; node >= 0; --node) {
    const ComputationNode& n = graph_.node(node);
    if (groups_.group_of(node) < 0 || !IsAssembled(n) || n.types[0].shape.elements() == 0) continue;
    auto& location = Location({node, 0});
    if (!location) {
      location =
          NewArena(layouts_[node][0], n.types[0].dtype, n.types[0].shape.elements(), LabelOf(node));
      if (n.op == &kPadOp) padded_.insert(location->buffer);
    }
    View part = *location;
    if (n.op == &kPadOp) {
      const auto& low = n.attrs.Ints("low");
      const Shape& inside = graph_.type(n.inputs[0]).shape;
      for (int axis = 0; axis < inside.rank(); ++axis) {
        part = *SliceView(part, axis, low[axis], inside[axis]);
      }
      if (!PlaceValue(n.inputs[0], part)) to_copy_.insert({node, 0});
      continue;
    }
    int axis = static_cast<int>(n.attrs.Int("axis"));
    int64_t start = 0;
    for (size_t i = 0; i < n.inputs.size(); ++i) {
      int64_t size = graph_.type(n.inputs[i]).shape[axis];
      part = *SliceView(*location, axis, start, size);
      if (!PlaceValue(n.inputs[i], part)) to_copy_.insert({node, static_cast<int>(i)});
      start += size;
    }
  }
}

// Makes the producer of `value` write to `view`, following views back. False if it cannot.
bool Lowering::PlaceValue(ValueId value, View view) {
  Trace trace = groups_.TraceOf(value);
  if (!trace.bijective || groups_.group_of(trace.root.node) < 0) return false;
  if (Location(trace.root) || view.elements() == 0) return false;
  while (!(value == trace.root)) {
    const ComputationNode& node = graph_.node(value.node);
    if (node.op == &kPermuteOp) {
      view = InversePermuteView(view, node.attrs.Ints("axes"));
    } else {
      auto reshaped = ReshapeView(view, graph_.type(node.inputs[0]).shape);
      if (!reshaped) return false;
      view = *reshaped;
    }
    value = node.inputs[0];
  }
  if (!AcceptsPlace(value, view)) return false;
  Location(value) = view;
  return true;
}

bool Lowering::AcceptsPlace(ValueId root, const View& view) const {
  const ComputationNode& node = graph_.node(root.node);
  if (node.op == &kPhiloxUniformOp) return IsRowMajor(view);
  if (node.op == &kWinogradOutputOp) return true;
  bool single = std::all_of(view.axes.begin(), view.axes.end(),
                            [](const Axis& axis) { return axis.size() <= 1; });
  if (IsAssembled(node)) return single;  // its parts are slices
  if (node.op == &kAttentionOp || node.op == &kAttentionGradientOp) {
    if (node.op == &kAttentionOp && root.output == 1) return single;
    // Heads and their width may be two pieces.
    return TokenOperand(view, view.size(0), node.attrs.Int("heads")).has_value();
  }
  if (node.op->kind == OpKind::kCall && !IsContraction(node) && !IsElementwise(node)) return single;
  return true;
}

View Lowering::Leaf(int node) {
  auto it = leaves_.find(node);
  if (it != leaves_.end()) return it->second;
  const ComputationNode& n = graph_.node(node);
  const TensorType& type = n.types[0];
  Storage storage = Storage::kConstant;
  size_t index = 0;
  if (n.op == &kInputOp) {
    storage = Storage::kInput;
    index =
        std::find(graph_.inputs().begin(), graph_.inputs().end(), node) - graph_.inputs().begin();
  } else if (n.op == &kParameterOp) {
    storage = Storage::kParameter;
    index = program_.parameters.size();
    program_.parameters.push_back(n.parameter);
  } else {
    index = program_.constants.size();
    program_.constants.push_back(n.constant);
  }
  int buffer = NewBuffer(storage, static_cast<int>(index), type.dtype, type.shape.elements(),
                         n.parameter ? n.parameter->name() : n.name);
  return leaves_[node] = RowMajor(buffer, type.dtype, type.shape);
}

View Lowering::ViewOf(ValueId value) {
  const ComputationNode& node = graph_.node(value.node);
  const Shape& shape = graph_.type(value).shape;
  if (shape.elements() == 0) return RowMajor(-1, graph_.type(value).dtype, shape);
  if (IsLeaf(node)) return Leaf(value.node);
  if (!IsTransparent(node)) {
    Check<InternalError>(Location(value).has_value(), "lowering: {} (node {}) was not computed",
                         LabelOf(value.node), value.node);
    return *Location(value);
  }
  View x = ViewOf(node.inputs[0]);
  if (node.op == &kStopGradientOp || node.op == &kBarrierOp) return x;
  if (node.op == &kPermuteOp) return PermuteView(x, node.attrs.Ints("axes"));
  if (node.op == &kBroadcastOp) return BroadcastView(x, shape);
  auto apply = [&](const View& from) {
    if (node.op == &kReshapeOp) return ReshapeView(from, shape);
    return SliceView(from, static_cast<int>(node.attrs.Int("axis")), node.attrs.Int("start"),
                     node.attrs.Int("size"));
  };
  if (auto view = apply(x)) return *view;
  return *apply(RowMajorCopy(node.inputs[0]));
}

View Lowering::RowMajorCopy(ValueId value) {
  auto key = std::make_pair(value.node, value.output);
  auto it = row_major_.find(key);
  if (it != row_major_.end()) return it->second;
  const TensorType& type = graph_.type(value);
  std::string label = fmt::format("{} (as rows)", LabelOf(value.node));
  View from = ViewOf(value);
  View to =
      NewArena(RowMajor(-1, type.dtype, type.shape), type.dtype, type.shape.elements(), label);
  Copy(from, to, label);
  ++program_.conversions;
  return row_major_[key] = to;
}

// The zeros of a Pad, and what did not write its part itself.
void Lowering::Assemble(int node) {
  const ComputationNode& n = graph_.node(node);
  View whole = *Location({node, 0});
  std::string label = LabelOf(node);
  size_t before = program_.steps.size();
  if (n.op == &kPadOp) {
    const auto& low = n.attrs.Ints("low");
    const Shape& inside = graph_.type(n.inputs[0]).shape;
    // Slabs of whole outer axes first, the largest stride outermost.
    std::vector<int> order(inside.rank());
    for (int i = 0; i < inside.rank(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      auto stride = [&](int axis) {
        return whole.axes[axis].empty() ? 0 : whole.axes[axis][0].stride;
      };
      return stride(a) > stride(b);
    });
    View rest = whole;
    for (int axis : order) {
      int64_t size = rest.size(axis), start = low[axis], stop = start + inside[axis];
      if (start > 0) Zero(*SliceView(rest, axis, 0, start), label + " (border)");
      if (stop < size) Zero(*SliceView(rest, axis, stop, size - stop), label + " (border)");
      rest = *SliceView(rest, axis, start, inside[axis]);
    }
    if (padded_.count(whole.buffer)) {
      for (size_t s = before; s < program_.steps.size(); ++s) program_.steps[s].clears = true;
    }
    if (to_copy_.count({node, 0})) Copy(ViewOf(n.inputs[0]), rest, label);
  } else {
    int axis = static_cast<int>(n.attrs.Int("axis"));
    int64_t start = 0;
    for (size_t i = 0; i < n.inputs.size(); ++i) {
      int64_t size = graph_.type(n.inputs[i]).shape[axis];
      if (to_copy_.count({node, static_cast<int>(i)})) {
        Copy(ViewOf(n.inputs[i]), *SliceView(whole, axis, start, size), label);
      }
      start += size;
    }
  }
  program_.copies += static_cast<int>(program_.steps.size() - before);
  if (program_.steps.size() > before) {
    program_.steps.back().results.push_back({ValueId{node, 0}, whole});
  }
}

// ------------------------------------------------------------------------- outputs and updates

void Lowering::WriteOutputs() {
  for (size_t o = 0; o < graph_.outputs().size(); ++o) {
    if (output_placed_[o]) continue;
    const GraphOutput& output = graph_.outputs()[o];
    const TensorType& type = graph_.type(output.value);
    if (type.shape.elements() == 0) continue;
    View from = ViewOf(output.value);
    Copy(from, RowMajor(static_cast<int>(o), type.dtype, type.shape),
         fmt::format("output {}", output.name));
    ++program_.copies;
  }
}

void Lowering::WriteUpdates() {
  std::set<int> targets;
  for (const GraphUpdate& update : graph_.updates())
    targets.insert(Leaf(update.target.node).buffer);
  // A new value that is itself an updated parameter, or a view of one, is kept before any is
  // written.
  std::vector<View> sources;
  for (const GraphUpdate& update : graph_.updates()) {
    View source = ViewOf(update.source);
    if (targets.count(source.buffer)) {
      View copy = NewArena(RowMajor(-1, source.dtype, graph_.type(update.source).shape),
                           source.dtype, source.elements(), "old value");
      Copy(source, copy, "old value");
      ++program_.copies;
      source = copy;
    }
    sources.push_back(source);
  }
  for (size_t u = 0; u < sources.size(); ++u) {
    View target = Leaf(graph_.updates()[u].target.node);
    program_.updated.push_back(program_.buffers[target.buffer].index);
    if (target.elements() == 0) continue;
    Copy(sources[u], target, fmt::format("update {}", program_.buffers[target.buffer].label));
    ++program_.copies;
  }
}

// Drops the final copy of a new value whose kernel may write into the parameter itself: nothing
// reads the old value later, and the kernel reads it only where it writes.
void Lowering::UpdateInPlace() {
  std::vector<Step>& steps = program_.steps;
  auto writes_parameter = [&](const Step& step) {
    const auto* loop = std::get_if<LoopSpec>(&step.spec);
    return loop != nullptr && loop->outputs.size() == 1 &&
           program_.buffers[step.buffers[loop->outputs[0].pointer]].storage == Storage::kParameter;
  };
  std::vector<std::vector<std::pair<int, bool>>> uses(program_.buffers.size());  // (step, written)
  for (size_t s = 0; s < steps.size(); ++s) {
    ForEachOperand(steps[s].spec, [&](const Operand& operand, bool written) {
      uses[steps[s].buffers[operand.pointer]].emplace_back(static_cast<int>(s), written);
    });
  }
  for (size_t u = 0; u < steps.size(); ++u) {
    if (!writes_parameter(steps[u])) continue;
    const auto& copy = std::get<LoopSpec>(steps[u].spec);
    int from = steps[u].buffers[copy.inputs[0].pointer];
    int to = steps[u].buffers[copy.outputs[0].pointer];
    const Buffer& buffer = program_.buffers[from];
    if (buffer.storage != Storage::kArena || from == to || copy.inputs[0].offset != 0 ||
        copy.inputs[0].strides != copy.outputs[0].strides ||
        buffer.elements != program_.buffers[to].elements ||
        buffer.dtype != program_.buffers[to].dtype) {
      continue;
    }
    int writer = -1, last_read = -1;
    bool fits = true;
    for (auto [s, written] : uses[from]) {
      if (!written) continue;
      fits = fits && (writer < 0 || writer == s);
      writer = s;
    }
    for (auto [s, written] : uses[to]) {
      if (s == static_cast<int>(u)) continue;
      fits = fits && !written;
      last_read = std::max(last_read, s);
    }
    if (!fits || writer < 0 || last_read > writer) continue;
    if (last_read == writer) {
      // Same index in, same index out; the operands that a contraction or reduction sums over are
      // not.
      const Operand* output = nullptr;
      ForEachOperand(steps[writer].spec, [&](const Operand& operand, bool written) {
        if (written && steps[writer].buffers[operand.pointer] == from) output = &operand;
      });
      auto same = [&](const Operand& operand) {
        return steps[writer].buffers[operand.pointer] != to ||
               (operand.offset == output->offset && operand.strides == output->strides);
      };
      auto apart = [&](const Operand& operand) {
        return steps[writer].buffers[operand.pointer] != to;
      };
      auto all = [](const std::vector<Operand>& operands, auto test) {
        return std::all_of(operands.begin(), operands.end(), test);
      };
      const KernelSpec& spec = steps[writer].spec;
      if (const auto* loop = std::get_if<LoopSpec>(&spec)) {
        fits = all(loop->inputs, same);
      } else if (const auto* reduce = std::get_if<ReduceSpec>(&spec)) {
        fits = all(reduce->inputs, apart) && all(reduce->epilogue.operands, same);
      } else if (const auto* contraction = std::get_if<ContractionSpec>(&spec)) {
        fits = apart(contraction->a) && apart(contraction->b) &&
               all(contraction->epilogue.operands, same);
      } else {
        fits = false;
      }
      if (!fits) continue;
    }
    for (auto [s, written] : uses[from]) {
      for (int& used : steps[s].buffers) {
        if (used == from) used = to;
      }
      for (auto& [value, view] : steps[s].results) {
        if (view.buffer == from) view.buffer = to;
      }
      if (s != static_cast<int>(u)) uses[to].emplace_back(s, written);
    }
    steps[u].buffers.clear();  // marks it as dropped
    --program_.copies;
  }
  std::erase_if(steps, [](const Step& step) { return step.buffers.empty(); });
  // In-place kernels name the parameter twice: once as it was and once as the new value.
  for (Step& step : steps) {
    std::vector<int> unique, number;
    for (int buffer : step.buffers) {
      auto it = std::find(unique.begin(), unique.end(), buffer);
      number.push_back(static_cast<int>(it - unique.begin()));
      if (it == unique.end()) unique.push_back(buffer);
    }
    if (unique.size() == step.buffers.size()) continue;
    ForEachOperand(step.spec,
                   [&](Operand& operand, bool) { operand.pointer = number[operand.pointer]; });
    step.buffers = unique;
  }
}

// Steps that depend only on parameters which the graph does not write, and on constants, run once
// for each version of the parameters; those that depend on rare inputs besides, once for each value
// of these. What they write outlives a run.
void Lowering::SplitByChange(const std::vector<std::string>& rare_inputs) {
  enum Change : uint8_t { kNever, kRarely, kAlways };
  std::set<int> rare;  // numbers of the inputs
  for (const std::string& name : rare_inputs) {
    std::vector<std::string> names;
    for (int32_t input : graph_.inputs()) names.push_back(graph_.node(input).name);
    auto it = std::find(names.begin(), names.end(), name);
    Check(it != names.end(), "compile: the rare input \"{}\" is none of the inputs ({})", name,
          fmt::join(names, ", "));
    rare.insert(static_cast<int>(it - names.begin()));
  }
  std::set<int> updated(program_.updated.begin(), program_.updated.end());
  std::vector<Change> change;
  for (const Buffer& buffer : program_.buffers) {
    bool never = buffer.storage == Storage::kArena || buffer.storage == Storage::kConstant ||
                 (buffer.storage == Storage::kParameter && !updated.count(buffer.index));
    bool rarely = buffer.storage == Storage::kInput && rare.count(buffer.index);
    change.push_back(never ? kNever : rarely ? kRarely : kAlways);
  }
  auto change_of = [&](const Step& step) {
    Change most = kNever;
    for (int buffer : step.buffers) most = std::max(most, change[buffer]);
    return most;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (const Step& step : program_.steps) {
      Change most = change_of(step);
      ForEachOperand(step.spec, [&](const Operand& operand, bool written) {
        int buffer = step.buffers[operand.pointer];
        if (written && change[buffer] < most) {
          change[buffer] = most;
          changed = true;
        }
      });
    }
  }
  std::vector<Step> steps;
  for (Step& step : program_.steps) {
    Change most = change_of(step);
    (most == kNever    ? program_.prepare
     : most == kRarely ? program_.derive
                       : steps)
        .push_back(std::move(step));
  }
  program_.steps = std::move(steps);
  auto keep = [&](const std::vector<Step>& part, Storage kept) {
    for (const Step& step : part) {
      for (int buffer : step.buffers) {
        Storage& storage = program_.buffers[buffer].storage;
        if (storage == Storage::kArena) storage = kept;
      }
    }
  };
  keep(program_.prepare, Storage::kPersistent);
  keep(program_.derive, Storage::kDerived);
}

// The borders of padded values are cleared when the memory is allocated, not in every call.
void Lowering::ClearOnce() {
  std::vector<Step> kept;
  for (Step& step : program_.steps) {
    // What the step completes is checked after the one before it.
    if (!step.clears || (!step.results.empty() && kept.empty())) {
      kept.push_back(std::move(step));
      continue;
    }
    Buffer& buffer = program_.buffers[step.buffers[0]];
    buffer.zeros +=
        fmt::format("{} of {} {}; ", ToString(step.spec), buffer.elements, buffer.dtype);
    for (auto& result : step.results) kept.back().results.push_back(std::move(result));
    --program_.copies;
  }
  program_.steps = std::move(kept);
}

std::string ToString(const LoweredProgram& program) {
  std::string text;
  auto add = [&](const char* kind, const std::vector<Step>& steps) {
    for (size_t i = 0; i < steps.size(); ++i) {
      std::string buffers;
      for (int buffer : steps[i].buffers) {
        const Buffer& b = program.buffers[buffer];
        constexpr const char* kNames[] = {"",        "persistent ", "derived ", "input ",
                                          "output ", "parameter ",  "constant "};
        buffers += fmt::format("{}{}{}", buffers.empty() ? "" : ", ",
                               kNames[static_cast<int>(b.storage)], buffer);
      }
      text += fmt::format("{} {}: {}\n    {} on [{}]\n", kind, i, steps[i].label,
                          ToString(steps[i].spec), buffers);
    }
  };
  add("prepare", program.prepare);
  add("derive", program.derive);
  add("step", program.steps);
  return text;
}

}  // namespace calotype::jit
