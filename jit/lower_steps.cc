// Steps: how operands become strides, and the kernels that only move elements.
#include <algorithm>

#include "jit/lower_internal.h"

namespace calotype::jit {

namespace {

// Walks the operands of specs, const or not.
template <class Spec, class F>
struct OperandWalk {
  F& f;
  template <class E>
  void Walk(E& epilogue) {
    for (auto& operand : epilogue.operands) f(operand, false);
    for (auto& operand : epilogue.outputs) f(operand, true);
  }
  template <class S>
  void operator()(S& s) {
    using T = std::remove_const_t<S>;
    if constexpr (std::is_same_v<T, LoopSpec>) {
      for (auto& operand : s.inputs) f(operand, false);
      for (auto& operand : s.outputs) f(operand, true);
    } else if constexpr (std::is_same_v<T, ReduceSpec>) {
      for (auto& operand : s.inputs) f(operand, false);
      Walk(s.epilogue);
    } else if constexpr (std::is_same_v<T, ChainSpec>) {
      for (auto& link : s.links) std::visit(*this, link);
    } else if constexpr (std::is_same_v<T, ContractionSpec>) {
      f(s.a, false);
      f(s.b, false);
      Walk(s.epilogue);
    } else if constexpr (std::is_same_v<T, AttentionSpec>) {
      f(s.q, false);
      f(s.k, false);
      f(s.v, false);
      if (s.has_mask) f(s.mask, false);
      f(s.out, true);
      f(s.lse, true);
    } else if constexpr (std::is_same_v<T, AttentionGradientSpec>) {
      auto& forward = s.forward;
      f(forward.q, false);
      f(forward.k, false);
      f(forward.v, false);
      if (forward.has_mask) f(forward.mask, false);
      f(forward.out, false);
      f(forward.lse, false);
      f(s.dout, false);
      f(s.dq, true);
      f(s.dk, true);
      f(s.dv, true);
    } else if constexpr (std::is_same_v<T, GatherSpec>) {
      f(s.x, false);
      f(s.indices, false);
      f(s.out, true);
    } else if constexpr (std::is_same_v<T, ScatterAddSpec>) {
      f(s.dy, false);
      f(s.indices, false);
      f(s.out, true);
    } else {
      static_assert(std::is_same_v<T, PhiloxSpec>);
      f(s.seed, false);
      f(s.out, true);
    }
  }
};

// Joins neighbouring loops that every operand walks as one, and drops loops of extent 1.
void Coalesce(std::vector<int64_t>& extents, std::vector<std::vector<int64_t>*> strides) {
  size_t kept = 0;
  for (size_t i = 0; i < extents.size(); ++i) {
    if (extents[i] == 1) continue;
    bool joins = kept > 0;
    for (const auto* s : strides) joins = joins && (*s)[kept - 1] == (*s)[i] * extents[i];
    if (joins) {
      extents[kept - 1] *= extents[i];
      for (auto* s : strides) (*s)[kept - 1] = (*s)[i];
    } else {
      extents[kept] = extents[i];
      for (auto* s : strides) (*s)[kept] = (*s)[i];
      ++kept;
    }
  }
  extents.resize(kept);
  for (auto* s : strides) s->resize(kept);
}

}  // namespace

void ForEachOperand(KernelSpec& spec, const std::function<void(Operand&, bool)>& f) {
  std::visit([&](auto& s) { OperandWalk<KernelSpec, decltype(f)>{f}(s); }, spec);
}

void ForEachOperand(const KernelSpec& spec, const std::function<void(const Operand&, bool)>& f) {
  std::visit([&](const auto& s) { OperandWalk<const KernelSpec, decltype(f)>{f}(s); }, spec);
}

Operand Lowering::MakeOperand(const View& view, std::vector<int64_t> strides) {
  return {view.buffer, view.dtype, view.offset, std::move(strides)};
}

Step& Lowering::AddStep(KernelSpec spec, std::string label) {
  Step step{std::move(spec), {}, std::move(label), {}};
  ForEachOperand(step.spec, [&](Operand& operand, bool) {
    auto it = std::find(step.buffers.begin(), step.buffers.end(), operand.pointer);
    int pointer = static_cast<int>(it - step.buffers.begin());
    if (it == step.buffers.end()) step.buffers.push_back(operand.pointer);
    operand.pointer = pointer;
  });
  program_.steps.push_back(std::move(step));
  return program_.steps.back();
}

std::vector<int64_t> Lowering::StridesAlong(const LoopOperand& operand,
                                            const AtomAxis& along) const {
  std::vector<int64_t> strides(along.size(), 0);
  for (auto [atom, stride] : groups_.atoms.Strides(operand.axes, operand.view)) {
    if (stride == 0) continue;  // the same element wherever this atom is
    auto it = std::find(along.begin(), along.end(), atom);
    Check<InternalError>(it != along.end(), "lowering: operand {} leaves its loops",
                         operand.view.ToString());
    strides[it - along.begin()] = stride;
  }
  return strides;
}

AtomAxis Lowering::LeavesByStride(const LoopOperand& operand) const {
  auto strides = groups_.atoms.Strides(operand.axes, operand.view);
  std::stable_sort(strides.begin(), strides.end(), [](const auto& a, const auto& b) {
    return std::abs(a.second) > std::abs(b.second);
  });
  AtomAxis leaves;
  for (auto [atom, stride] : strides) leaves.push_back(atom);
  return leaves;
}

void Lowering::AddLoop(const std::vector<LoopOperand>& inputs, const ScalarProgram& program,
                       const std::vector<LoopOperand>& outputs, const std::string& label) {
  LoopSpec spec;
  spec.program = program;
  AtomAxis order = LeavesByStride(outputs[0]);
  for (int atom : order) spec.extents.push_back(groups_.atoms.extent(atom));
  for (const LoopOperand& input : inputs) {
    spec.inputs.push_back(MakeOperand(input.view, StridesAlong(input, order)));
  }
  for (const LoopOperand& output : outputs) {
    spec.outputs.push_back(MakeOperand(output.view, StridesAlong(output, order)));
  }
  std::vector<std::vector<int64_t>*> strides;
  for (Operand& operand : spec.inputs) strides.push_back(&operand.strides);
  for (Operand& operand : spec.outputs) strides.push_back(&operand.strides);
  Coalesce(spec.extents, strides);
  AddStep(std::move(spec), label);
}

namespace {

// Coalesces one range [first, first + extents.size()) of the loops that the operands' strides
// cover.
void CoalescePart(std::vector<int64_t>& extents, size_t first,
                  const std::vector<Operand*>& operands) {
  size_t count = extents.size();
  std::vector<std::vector<int64_t>> parts;
  std::vector<std::vector<int64_t>*> strides;
  for (Operand* operand : operands) {
    auto begin = operand->strides.begin() + static_cast<int64_t>(first);
    parts.emplace_back(begin, begin + static_cast<int64_t>(count));
    operand->strides.erase(begin, begin + static_cast<int64_t>(count));
  }
  for (auto& part : parts) strides.push_back(&part);
  Coalesce(extents, strides);
  for (size_t i = 0; i < operands.size(); ++i) {
    auto& all = operands[i]->strides;
    all.insert(all.begin() + static_cast<int64_t>(first), parts[i].begin(), parts[i].end());
  }
}

std::vector<Operand*> Pointers(std::initializer_list<std::vector<Operand>*> lists) {
  std::vector<Operand*> operands;
  for (std::vector<Operand>* list : lists) {
    for (Operand& operand : *list) operands.push_back(&operand);
  }
  return operands;
}

}  // namespace

void Lowering::AddReduce(ReduceSpec spec, const std::string& label) {
  CoalescePart(spec.extents, 0,
               Pointers({&spec.inputs, &spec.epilogue.operands, &spec.epilogue.outputs}));
  CoalescePart(spec.reduced, spec.extents.size(), Pointers({&spec.inputs}));
  AddStep(std::move(spec), label);
}

void Lowering::AddContraction(ContractionSpec spec, const std::string& label) {
  std::vector<Operand*> operands = Pointers({&spec.epilogue.operands, &spec.epilogue.outputs});
  operands.push_back(&spec.a);
  operands.push_back(&spec.b);
  CoalescePart(spec.m, 0, operands);
  CoalescePart(spec.k, spec.m.size(), {&spec.a, &spec.b});
  AddStep(std::move(spec), label);
}

void Lowering::Copy(View from, View to, const std::string& label) {
  if (to.elements() == 0) return;
  from = BitsView(from);
  to = BitsView(to);
  AtomAxes axes;
  View whole{-1, DType::kF32, 0, std::vector<Axis>(to.axes.size())};  // row-major
  int64_t elements = 1;
  for (size_t i = to.axes.size(); i-- > 0;) {
    int64_t size = to.size(static_cast<int>(i));
    axes.insert(axes.begin(), AtomAxis{});
    if (size != 1) axes.front() = {groups_.atoms.New(size)};
    whole.axes[i] = Simplify({{size, elements}});
    elements *= size;
  }
  const bool fits_to = groups_.atoms.Fit(axes, to);
  size_t mark = groups_.atoms.Mark();
  if (!fits_to || !groups_.atoms.Fit(axes, from)) {
    // The axes are split in ways that have no common refinement: by way of whole axes.
    groups_.atoms.Rollback(mark);
    View rows = whole;
    rows.buffer = NewBuffer(Storage::kArena, 0, DType::kF32, elements, label);
    Copy(from, rows, label);
    Copy(rows, to, label);
    return;
  }
  ProgramBuilder builder(groups_.atoms, 0);
  int value = builder.Operand({from, axes});
  AddLoop(builder.operands(), builder.Finish({value}), {{to, axes}}, label);
}

void Lowering::Zero(const View& view, const std::string& label) {
  View to = BitsView(view);
  if (to.elements() == 0) return;
  AtomAxes axes;
  for (size_t i = 0; i < to.axes.size(); ++i) {
    int64_t size = to.size(static_cast<int>(i));
    axes.push_back({});
    if (size != 1) axes.back() = {groups_.atoms.New(size)};
  }
  Check<InternalError>(groups_.atoms.Fit(axes, to), "lowering: {} cannot be cleared",
                       to.ToString());
  ProgramBuilder builder(groups_.atoms, 0);
  int value = builder.Constant(0);
  AddLoop({}, builder.Finish({value}), {{to, axes}}, label);
}

}  // namespace calotype::jit
