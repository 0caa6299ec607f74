#include "jit/layout.h"

#include <algorithm>
#include <set>

#include "jit/lower_ops.h"

namespace calotype::jit {

namespace {

constexpr int kChannelsLast[] = {0, 2, 3, 1};

// Dense with one piece for each axis, in the order of the innermost pieces' strides.
View WholeAxes(const View& like, const Shape& shape) {
  std::vector<int> order(shape.rank());
  std::vector<int64_t> stride(shape.rank());
  int64_t outside = 1;  // an axis of size 1 goes just outside the next one, as in row-major order
  for (int i = shape.rank() - 1; i >= 0; --i) {
    order[i] = i;
    stride[i] = like.axes[i].empty() ? outside : like.axes[i].back().stride;
    outside = stride[i] * (like.axes[i].empty() ? 1 : like.axes[i].back().extent);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return stride[a] > stride[b]; });
  return DenseInOrder(-1, like.dtype, shape, order);
}

class Layouts {
 public:
  explicit Layouts(const ComputationGraph& graph) : graph_(graph) {
    for (const ComputationNode& node : graph.nodes()) {
      if (node.op == &kConv2dOp || node.op == &kCorrelateOp || node.op == &kWinogradInputOp) {
        convolved_.insert(node.inputs[0].node);
      }
    }
  }

  std::vector<std::vector<View>> Run() {
    for (size_t i = 0; i < graph_.nodes().size(); ++i) {
      const ComputationNode& node = graph_.node(static_cast<int32_t>(i));
      std::vector<View> views;
      for (const TensorType& type : node.types)
        views.push_back(RowMajor(-1, type.dtype, type.shape));
      bool leaf = IsLeaf(node);
      if (!leaf && node.types[0].shape.elements() > 0) {
        View view = Choose(node, views[0]);
        view.dtype = node.types[0].dtype;
        views[0] = view;
        if (node.op->kind == OpKind::kView || node.op == &kStopGradientOp) {
          leaf = from_leaf_[node.inputs[0].node];
        }
      }
      from_leaf_.push_back(leaf);
      layouts_.push_back(std::move(views));
    }
    return std::move(layouts_);
  }

 private:
  const View& Of(ValueId value) const { return layouts_[value.node][value.output]; }

  View Choose(const ComputationNode& node, const View& row_major) {
    const Shape& shape = node.types[0].shape;
    const Op* op = node.op;
    if (op == &kConv2dOp || op == &kCorrelateOp || op == &kWinogradOutputOp) {
      return DenseInOrder(-1, DType::kF32, shape, kChannelsLast);
    }
    if (op == &kConv2dWeightGradientOp) {
      constexpr int kOrder[] = {2, 3, 1, 0};
      return DenseInOrder(-1, DType::kF32, shape, kOrder);
    }
    if (IsElementwise(node)) return Elementwise(node, row_major);
    if (IsTransparent(node)) return Transparent(node, row_major);
    if (IsAssembled(node)) {
      // A caller's picture is copied anyway, into the order that its convolution reads best.
      constexpr int64_t kFewChannels = 16;
      if (node.op == &kPadOp && from_leaf_[node.inputs[0].node] &&
          convolved_.count(static_cast<int32_t>(layouts_.size())) > 0 && shape.rank() == 4 &&
          shape[1] >= kFewChannels) {
        return DenseInOrder(-1, DType::kF32, shape, kChannelsLast);
      }
      return WholeAxes(Of(node.inputs[0]), shape);
    }
    if (IsReduce(node)) {
      const View& x = Of(node.inputs[0]);
      const auto& axes = node.attrs.Ints("axes");
      View kept;
      for (int i = 0; i < static_cast<int>(x.axes.size()); ++i) {
        if (std::find(axes.begin(), axes.end(), i) == axes.end()) kept.axes.push_back(x.axes[i]);
      }
      return Compact(kept);
    }
    return row_major;
  }

  // As the operand that has all elements; a computed one before a leaf.
  View Elementwise(const ComputationNode& node, const View& row_major) {
    const Shape& shape = node.types[0].shape;
    const View* best = nullptr;
    bool best_leaf = true;
    for (ValueId input : node.inputs) {
      if (graph_.type(input).shape.elements() != shape.elements()) continue;
      bool leaf = from_leaf_[input.node];
      if (best == nullptr || (best_leaf && !leaf)) {
        best = &Of(input);
        best_leaf = leaf;
      }
    }
    if (best == nullptr) return row_major;
    auto view = ReshapeView(*best, shape);
    return view ? Compact(*view) : row_major;
  }

  View Transparent(const ComputationNode& node, const View& row_major) {
    const View& x = Of(node.inputs[0]);
    const Shape& shape = node.types[0].shape;
    if (node.op == &kPermuteOp) return PermuteView(x, node.attrs.Ints("axes"));
    if (node.op == &kBroadcastOp) return Compact(BroadcastView(x, shape));
    std::optional<View> view = x;
    if (node.op == &kReshapeOp) view = ReshapeView(x, shape);
    if (node.op == &kSliceOp) {
      view = SliceView(x, static_cast<int>(node.attrs.Int("axis")), node.attrs.Int("start"),
                       node.attrs.Int("size"));
    }
    return view ? Compact(*view) : row_major;
  }

  const ComputationGraph& graph_;
  std::vector<std::vector<View>> layouts_;
  std::vector<bool> from_leaf_;  // a leaf or a view of one
  std::set<int32_t> convolved_;  // nodes that a convolution reads as its picture
};

}  // namespace

std::vector<std::vector<View>> PreferredLayouts(const ComputationGraph& graph) {
  return Layouts(graph).Run();
}

}  // namespace calotype::jit
