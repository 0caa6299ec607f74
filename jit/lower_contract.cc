// Contractions: matrix products and convolutions as sums over strided operands. The columns (n) are
// the vector loop, so operand b needs unit stride along them; it is packed where it has not.
#include <algorithm>
#include <numeric>

#include "jit/contraction_plan.h"
#include "jit/lower_internal.h"
#include "jit/lower_ops.h"

namespace calotype::jit {

namespace {

Axis Stepped(const Axis& axis, int64_t extent, int64_t step) {
  if (extent == 1 || axis.empty()) return {};
  return {{extent, axis.back().stride * step}};
}

}  // namespace

// The view of a value with at most one piece along the given axes.
View Lowering::SinglePieces(ValueId value, std::initializer_list<int> axes) {
  View view = ViewOf(value);
  for (int axis : axes) {
    if (view.axes[axis].size() > 1) return RowMajorCopy(value);
  }
  return view;
}

// A dense copy in the order of the view's axes, last one fastest; axes of stride 0 stay broadcast.
View Lowering::Pack(const View& view, const std::string& label) {
  std::string key = view.ToString();
  auto it = packed_.find(key);
  if (it != packed_.end()) return it->second;
  View moving = view;
  int64_t elements = 1;
  for (Axis& axis : moving.axes) {
    std::erase_if(axis, [](const Piece& piece) { return piece.stride == 0; });
    for (const Piece& piece : axis) elements *= piece.extent;
  }
  std::vector<int64_t> dims;
  for (size_t i = 0; i < moving.axes.size(); ++i) dims.push_back(moving.size(static_cast<int>(i)));
  View dense{-1, view.dtype, 0, std::vector<Axis>(dims.size())};
  int64_t stride = 1;
  for (size_t i = dims.size(); i-- > 0;) {
    dense.axes[i] = Simplify({{dims[i], stride}});
    stride *= dims[i];
  }
  dense = NewArena(dense, view.dtype, elements, label);
  Copy(moving, dense, label);
  ++program_.conversions;
  // The broadcast pieces go back to where they were.
  View packed = view;
  packed.buffer = dense.buffer;
  packed.offset = 0;
  for (size_t i = 0; i < packed.axes.size(); ++i) {
    int64_t inner = 1;
    for (size_t j = packed.axes[i].size(); j-- > 0;) {
      Piece& piece = packed.axes[i][j];
      if (piece.stride == 0) continue;
      piece.stride = inner * dense.axes[i].back().stride;
      inner *= piece.extent;
    }
    packed.axes[i] = Simplify(packed.axes[i]);
  }
  return packed_[key] = packed;
}

// True for what no call changes: packing it costs once for each version of the parameters.
bool Lowering::IsFixed(const View& view) const {
  if (view.buffer < 0) return false;
  const Buffer& buffer = program_.buffers[view.buffer];
  if (buffer.storage == Storage::kConstant) return true;
  if (buffer.storage != Storage::kParameter) return false;
  const Parameter* parameter = program_.parameters[buffer.index].get();
  return std::none_of(graph_.updates().begin(), graph_.updates().end(), [&](const auto& update) {
    return graph_.node(update.target.node).parameter.get() == parameter;
  });
}

// Few columns would leave most lanes empty. Where a has unit stride along the sum, so has b then.
bool Lowering::MakeSumVector(const LoopOperand& a, LoopOperand& b, const std::string& label) {
  const Target& target = HostTarget();
  const int columns = static_cast<int>(b.view.axes.size()) - 1;
  auto unit = [](const View& view, int axis) {
    return !view.axes[axis].empty() && view.axes[axis].back().stride == 1;
  };
  const int sum = static_cast<int>(a.view.axes.size()) - 1;
  if (2 * b.view.size(columns) > target.vector_width || !unit(a.view, sum) ||
      a.view.axes[sum].back().extent < 2 * target.vector_width) {
    return false;
  }
  if (unit(b.view, columns - 1)) return true;
  View turned = b.view;
  std::rotate(turned.axes.begin(), turned.axes.end() - 1, turned.axes.end());
  turned = Pack(turned, label + " (packed)");
  std::rotate(turned.axes.begin(), turned.axes.begin() + 1, turned.axes.end());
  b.view = turned;
  return true;
}

// Packs b into panels of some columns, all sums one after the other, so that a tile reads it in the
// order of memory: [N / width][K][width]. Without a suitable width, or if b has its columns side by
// side already and would be packed in every call, it becomes or stays [K][N].
void Lowering::MakeVector(LoopOperand& b, const std::string& label) {
  const Axis n = b.view.axes.back();
  const bool vector =
      n.empty() ||
      (n.back().stride == 1 && (n.size() == 1 || n.back().extent >= HostTarget().vector_width));
  if (vector && !IsFixed(b.view)) return;
  const AtomAxis leaves = groups_.atoms.Leaves(b.axes.back());
  int64_t columns = leaves.empty() ? 1 : groups_.atoms.extent(leaves.back());
  if (!n.empty()) columns = std::gcd(columns, n.back().extent);
  const int64_t width = PanelWidth(columns, HostTarget());
  if (width == 0 || n.empty() || n.back().stride == 0) {
    if (!vector) b.view = Pack(b.view, label + " (packed)");
    return;
  }
  View split = b.view;  // panels, the other axes, columns of a panel
  Axis panels = n;
  panels.back() = {n.back().extent / width, n.back().stride * width};
  split.axes.back() = {{width, n.back().stride}};
  split.axes.insert(split.axes.begin(), Simplify(panels));
  split = Pack(split, label + " (packed)");
  Axis joined = split.axes.front();
  joined.push_back(split.axes.back()[0]);
  split.axes.erase(split.axes.begin());
  split.axes.back() = Simplify(joined);
  b.view = split;
}

Lowering::Contraction Lowering::MakeContraction(Group& group) {
  Atoms& atoms = groups_.atoms;
  const ComputationNode& node = graph_.node(group.anchor);
  const std::string label = LabelOf(group.anchor);
  const AtomAxes& y = group.axes.at(group.anchor);
  const Shape& shape = node.types[0].shape;
  auto join = [](std::initializer_list<AtomAxis> parts) {
    AtomAxis all;
    for (const AtomAxis& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  };
  auto sum = [&](int64_t extent) { return extent == 1 ? AtomAxis{} : AtomAxis{atoms.New(extent)}; };
  Contraction c;

  if (node.op == &kMatMulOp) {
    int rank = shape.rank();
    auto matrix = [&](ValueId value, bool transposed, int64_t rows, int64_t columns) {
      std::vector<int64_t> dims = shape.ToVector();
      View view = ViewOf(value);
      if (transposed) std::swap(view.axes[view.axes.size() - 1], view.axes[view.axes.size() - 2]);
      dims[rank - 2] = rows;
      dims[rank - 1] = columns;
      return BroadcastView(view, Shape(dims));
    };
    bool ta = node.attrs.Int("transpose_a"), tb = node.attrs.Int("transpose_b");
    int64_t depth = graph_.type(node.inputs[0]).shape[ta ? -2 : -1];
    c.k = sum(depth);
    c.n = y[rank - 1];
    AtomAxes leading(y.begin(), y.end() - 2);
    for (const AtomAxis& axis : leading) c.m.insert(c.m.end(), axis.begin(), axis.end());
    c.m.insert(c.m.end(), y[rank - 2].begin(), y[rank - 2].end());
    c.a = {matrix(node.inputs[0], ta, shape[-2], depth), leading};
    c.a.axes.push_back(y[rank - 2]);
    c.a.axes.push_back(c.k);
    c.b = {matrix(node.inputs[1], tb, depth, shape[-1]), leading};
    c.b.axes.push_back(c.k);
    c.b.axes.push_back(c.n);
  } else if (node.op == &kConv2dOp || node.op == &kCorrelateOp) {
    bool correlate = node.op == &kCorrelateOp;
    const Shape& w_shape = graph_.type(node.inputs[1]).shape;
    int64_t kh = w_shape[2], kw = w_shape[3], step = correlate ? 1 : node.attrs.Int("stride");
    View x = ViewOf(node.inputs[0]), w = ViewOf(node.inputs[1]);
    if (kh > 1 || kw > 1 || step > 1) x = SinglePieces(node.inputs[0], {2, 3});
    AtomAxis row = sum(kh), column = sum(kw), channel = sum(w_shape[correlate ? 0 : 1]);
    bool window = kh > 1 || kw > 1 || step > 1;
    c.a.view = x;
    c.a.view.axes = {x.axes[0],
                     window ? Stepped(x.axes[2], shape[2], step) : x.axes[2],
                     window ? Stepped(x.axes[3], shape[3], step) : x.axes[3],
                     Stepped(x.axes[2], kh, 1),
                     Stepped(x.axes[3], kw, 1),
                     x.axes[1]};
    c.a.axes = {y[0], y[2], y[3], row, column, channel};
    c.b.view = w;
    if (correlate) {
      w = SinglePieces(node.inputs[1], {2, 3});
      c.b.view = w;
      for (int axis : {2, 3}) {
        for (Piece& piece : w.axes[axis]) {
          c.b.view.offset += (piece.extent - 1) * piece.stride;
          piece.stride = -piece.stride;
        }
      }
      c.b.view.axes = {w.axes[2], w.axes[3], w.axes[0], w.axes[1]};
    } else {
      c.b.view.axes = {w.axes[2], w.axes[3], w.axes[1], w.axes[0]};
    }
    c.b.axes = {row, column, channel, y[1]};
    c.m = join({y[0], y[2], y[3]});
    c.n = y[1];
    c.k = join({row, column, channel});
  } else {
    Check<InternalError>(node.op == &kConv2dWeightGradientOp, "lowering: {} is no contraction",
                         label);
    int64_t step = node.attrs.Int("stride");
    const Shape& dy_shape = graph_.type(node.inputs[1]).shape;
    View x = SinglePieces(node.inputs[0], {2, 3}), dy = ViewOf(node.inputs[1]);
    AtomAxis batch = sum(dy_shape[0]), row = sum(dy_shape[2]), column = sum(dy_shape[3]);
    c.a.view = x;
    c.a.view.axes = {Stepped(x.axes[2], shape[2], 1),
                     Stepped(x.axes[3], shape[3], 1),
                     x.axes[1],
                     x.axes[0],
                     Stepped(x.axes[2], dy_shape[2], step),
                     Stepped(x.axes[3], dy_shape[3], step)};
    c.a.axes = {y[2], y[3], y[1], batch, row, column};
    c.b.view = dy;
    c.b.view.axes = {dy.axes[0], dy.axes[2], dy.axes[3], dy.axes[1]};
    c.b.axes = {batch, row, column, y[0]};
    c.m = join({y[2], y[3], y[1]});
    c.n = y[0];
    c.k = join({batch, row, column});
  }
  if (!MakeSumVector(c.a, c.b, label)) MakeVector(c.b, label);
  // Atoms that other operands have split already divide evenly as long as each axis here is whole;
  // one that is not is copied.
  auto fit = [&](LoopOperand& operand) {
    size_t mark = atoms.Mark();
    if (atoms.Fit(operand.axes, operand.view)) return;
    atoms.Rollback(mark);
    // Every axis in one piece, broadcast ones too.
    View dense{-1, DType::kF32, 0, std::vector<Axis>(operand.view.axes.size())};
    int64_t elements = 1;
    for (size_t i = dense.axes.size(); i-- > 0;) {
      int64_t size = operand.view.size(static_cast<int>(i));
      dense.axes[i] = Simplify({{size, elements}});
      elements *= size;
    }
    dense = NewArena(dense, DType::kF32, elements, label + " (packed)");
    Copy(operand.view, dense, label + " (packed)");
    ++program_.conversions;
    operand.view = dense;
    Check<InternalError>(atoms.Fit(operand.axes, operand.view), "lowering: {} does not fit {}",
                         operand.view.ToString(), label);
  };
  fit(c.b);
  fit(c.a);
  return c;
}

}  // namespace calotype::jit
