#include "jit/lower_groups.h"

#include <algorithm>
#include <set>

#include "jit/lower_ops.h"

namespace calotype::jit {

namespace {

// Limits of one kernel: vector registers hold its operands, and compile time grows with its length.
constexpr int kMaxLoopOperands = 14;
constexpr int kMaxEpilogueOperands = 8;
constexpr size_t kMaxInstructions = 400;
constexpr size_t kMaxTileInstructions = 24;  // written out for each pixel of a Winograd tile
// What may be computed twice instead of being stored.
constexpr int kCheapInstructions = 4;
constexpr int kMaxPrologueOperands = 6;

bool TakesEpilogue(const ComputationNode& node) { return IsReduce(node) || EndsProduct(node); }

size_t Instructions(const ComputationNode& node) {
  return node.op->elementwise ? node.op->elementwise->program.code.size() : 1;
}

bool IsCheap(const ComputationNode& node) {
  if (!node.op->elementwise) return true;
  int count = 0;
  for (const ScalarInstruction& code : node.op->elementwise->program.code) {
    if (code.op == Primitive::kDiv || code.op == Primitive::kSqrt) return false;
    if (code.op != Primitive::kInput && code.op != Primitive::kConstant) ++count;
  }
  return count <= kCheapInstructions;
}

}  // namespace

Groups::Groups(const ComputationGraph& graph, bool fuse) : graph_(graph) {
  const auto& nodes = graph.nodes();
  FindTraces();
  group_of_.assign(nodes.size(), -1);
  kept_.assign(nodes.size(), false);
  for (const GraphOutput& output : graph.outputs()) kept_[TraceOf(output.value).root.node] = true;
  for (const GraphUpdate& update : graph.updates()) kept_[TraceOf(update.source).root.node] = true;

  live_.assign(nodes.size(), false);
  for (size_t i = nodes.size(); i-- > 0;) {
    live_[i] = live_[i] || kept_[i];
    if (!live_[i] || IsLeaf(nodes[i])) continue;
    for (ValueId input : nodes[i].inputs) live_[TraceOf(input).root.node] = true;
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (!live_[i] || IsLeaf(nodes[i]) || IsTransparent(nodes[i])) continue;
    Group group;
    const Shape& shape = nodes[i].types[0].shape;
    group.axes[i] = atoms.NewAxes(shape);
    if (IsElementwise(nodes[i])) {
      group.body = {static_cast<int>(i)};
    } else {
      group.anchor = static_cast<int>(i);
    }
    if (nodes[i].op == &kWinogradOutputOp) {
      // Pixels of a tile are loops of their own from the start.
      for (int axis : {2, 3}) {
        const int64_t tile = nodes[i].attrs.Int("tile");
        AtomAxis split = {atoms.New(tile)};
        if (shape[axis] > tile) split.insert(split.begin(), atoms.New(shape[axis] / tile));
        group.axes[i][axis] = split;
      }
    }
    if (IsReduce(nodes[i])) {
      const auto& reduced = nodes[i].attrs.Ints("axes");
      const Shape& input = graph.type(nodes[i].inputs[0]).shape;
      int kept = 0;
      for (int axis = 0; axis < input.rank(); ++axis) {
        if (std::find(reduced.begin(), reduced.end(), axis) == reduced.end()) {
          group.input_axes.push_back(group.axes[i][kept++]);
        } else {
          group.input_axes.push_back({});
          if (input[axis] != 1) group.input_axes.back() = {atoms.New(input[axis])};
        }
      }
    }
    group_of_[i] = static_cast<int>(groups_.size());
    groups_.push_back(std::move(group));
  }
  FindUsers();
  if (fuse) {
    AbsorbIntoReductions();
    FindUsers();
    Merge();
  }
  Schedule();
}

void Groups::FindTraces() {
  const auto& nodes = graph_.nodes();
  traces_.resize(nodes.size());
  for (size_t i = 0; i < nodes.size(); ++i) {
    int count = static_cast<int>(nodes[i].types.size());
    for (int o = 0; o < count; ++o) traces_[i].push_back({{static_cast<int32_t>(i), o}, true});
    if (!IsTransparent(nodes[i])) continue;
    Trace trace = TraceOf(nodes[i].inputs[0]);
    trace.bijective =
        trace.bijective && nodes[i].op != &kBarrierOp &&
        graph_.type(nodes[i].inputs[0]).shape.elements() == nodes[i].types[0].shape.elements();
    traces_[i] = {trace};
  }
}

std::vector<ValueId> Groups::Reads(int node) const {
  const auto& nodes = graph_.nodes();
  std::vector<ValueId> reads;
  int g = group_of_[node];
  if (g >= 0 && groups_[g].anchor == node && !groups_[g].prologue.empty()) {
    const auto& prologue = groups_[g].prologue;
    for (int p : prologue) {
      for (ValueId input : nodes[p].inputs) {
        int root = TraceOf(input).root.node;
        bool inside = std::find(prologue.begin(), prologue.end(), root) != prologue.end();
        if (!inside && !IsScalarConstant(nodes[root])) reads.push_back(input);
      }
    }
    return reads;
  }
  for (ValueId input : nodes[node].inputs) reads.push_back(input);
  return reads;
}

void Groups::FindUsers() {
  const auto& nodes = graph_.nodes();
  users_.assign(nodes.size(), {});
  // Backwards, so that nodes computed only inside reductions count as dead.
  std::vector<bool> used(nodes.size(), false);
  for (size_t i = nodes.size(); i-- > 0;) {
    if (group_of_[i] < 0) continue;
    if (!used[i] && !kept_[i]) {
      group_of_[i] = -1;  // its group is left empty
      continue;
    }
    for (ValueId input : Reads(static_cast<int>(i))) {
      int root = TraceOf(input).root.node;
      used[root] = true;
      if (users_[root].empty() || users_[root].back() != static_cast<int>(i)) {
        users_[root].push_back(static_cast<int>(i));
      }
    }
  }
}

void Groups::AbsorbIntoReductions() {
  for (size_t i = 0; i < group_of_.size(); ++i) {
    if (group_of_[i] >= 0 && IsReduce(graph_.node(i))) Absorb(static_cast<int>(i));
  }
}

// True if the node is the end of a contraction's epilogue: computing it elsewhere as well would
// force the contraction to store its bare result.
bool Groups::EndsContraction(int node) const {
  for (ValueId input : graph_.node(node).inputs) {
    int root = TraceOf(input).root.node;
    if (users_[root].size() != 1 || kept_[root]) continue;
    if (EndsProduct(graph_.node(root))) return true;
    if (IsElementwise(graph_.node(root)) && EndsContraction(root)) return true;
  }
  return false;
}

// Collects the elementwise nodes that feed only this reduction, or are cheap to compute again.
void Groups::Absorb(int reduce) {
  const auto& nodes = graph_.nodes();
  Group& group = groups_[group_of_[reduce]];
  std::map<int, AtomAxes> reached;  // candidate -> axes
  std::set<int> refused, taken;
  size_t mark = atoms.Mark();
  auto reach = [&](ValueId value, const AtomAxes& axes) {
    Trace trace = TraceOf(value);
    int root = trace.root.node;
    if (group_of_[root] < 0 || !IsElementwise(nodes[root])) return;
    if (!trace.bijective) {  // a part of it, or copies: other elements than the cone computes
      refused.insert(root);
      return;
    }
    // Walk back from the operand to the root that it views.
    AtomAxes back = axes;
    for (ValueId v = value; !(v == trace.root);) {
      const ComputationNode& view = nodes[v.node];
      const Shape& shape = graph_.type(view.inputs[0]).shape;
      if (view.op == &kPermuteOp) {
        back = Atoms::InversePermute(back, view.attrs.Ints("axes"));
      } else {
        auto reshaped = atoms.Reshape(back, shape);
        if (!reshaped) {
          refused.insert(root);
          return;
        }
        back = *reshaped;
      }
      v = view.inputs[0];
    }
    auto [it, inserted] = reached.insert({root, back});
    if (!inserted && atoms.Leaves(it->second) != atoms.Leaves(back)) refused.insert(root);
  };
  reach(nodes[reduce].inputs[0], group.input_axes);
  std::set<ValueId, bool (*)(ValueId, ValueId)> outside([](ValueId a, ValueId b) {
    return a.node != b.node ? a.node < b.node : a.output < b.output;
  });
  // Descending: all readers inside the cone are known before a node is decided.
  std::set<int> done;
  while (true) {
    int node = -1;
    for (auto it = reached.rbegin(); it != reached.rend() && node < 0; ++it) {
      if (!done.count(it->first)) node = it->first;
    }
    if (node < 0) break;
    done.insert(node);
    bool sole = !kept_[node];
    for (int user : users_[node]) sole = sole && (user == reduce || taken.count(user));
    if (refused.count(node)) continue;
    if (!sole && (!IsCheap(nodes[node]) || EndsContraction(node))) continue;
    if (node != TraceOf(nodes[reduce].inputs[0]).root.node) {
      bool read = false;  // only what the cone still reads
      for (int t : taken) {
        for (ValueId input : nodes[t].inputs) read = read || TraceOf(input).root.node == node;
      }
      if (!read) continue;
    }
    taken.insert(node);
    const Shape& shape = nodes[node].types[0].shape;
    for (ValueId input : nodes[node].inputs) {
      const Shape& from = graph_.type(input).shape;
      if (from.elements() != shape.elements()) {
        refused.insert(TraceOf(input).root.node);
        continue;
      }
      auto axes = atoms.Reshape(reached[node], from);  // drops leading axes of size 1
      if (axes) {
        reach(input, *axes);
      } else {
        refused.insert(TraceOf(input).root.node);
      }
    }
  }
  size_t instructions = 0;
  for (int node : taken) {
    instructions += Instructions(nodes[node]);
    for (ValueId input : nodes[node].inputs) {
      int root = TraceOf(input).root.node;
      if (!taken.count(root) && !IsScalarConstant(nodes[root])) outside.insert(input);
    }
    if (refused.count(node)) instructions = kMaxInstructions + 1;
  }
  int top = TraceOf(nodes[reduce].inputs[0]).root.node;
  if (!taken.count(top) || outside.size() > kMaxPrologueOperands ||
      instructions > kMaxInstructions) {
    atoms.Rollback(mark);
    return;
  }
  group.prologue.assign(taken.begin(), taken.end());
  for (int node : taken) group.prologue_axes[node] = reached[node];
}

bool Groups::MapAxes(ValueId value, ValueId root, const AtomAxes& root_axes, AtomAxes& axes) {
  if (value == root) {
    axes = root_axes;
    return true;
  }
  const ComputationNode& view = graph_.node(value.node);
  if (!MapAxes(view.inputs[0], root, root_axes, axes)) return false;
  if (view.op == &kPermuteOp) {
    axes = Atoms::Permute(axes, view.attrs.Ints("axes"));
    return true;
  }
  auto reshaped = atoms.Reshape(axes, view.types[0].shape);
  if (reshaped) axes = *reshaped;
  return reshaped.has_value();
}

// True if group `from` leads to group `to` through at least one other group.
bool Groups::Reaches(int from, int to) const {
  ++visit_;
  visited_.resize(groups_.size(), 0);
  std::vector<int> stack;
  auto push_users = [&](int g, bool direct) {
    const Group& group = groups_[g];
    auto push = [&](int node) {
      for (int user : users_[node]) {
        int next = group_of_[user];
        if (next == from || (direct && next == to)) continue;
        if (visited_[next] != visit_) {
          visited_[next] = visit_;
          stack.push_back(next);
        }
      }
    };
    if (group.anchor >= 0) push(group.anchor);
    for (int node : group.body) push(node);
  };
  push_users(from, true);
  while (!stack.empty()) {
    int g = stack.back();
    stack.pop_back();
    if (g == to) return true;
    push_users(g, false);
  }
  return false;
}

int Groups::Operands(const Group& a, const Group& b) const {
  std::set<std::pair<int, int>> values;
  auto add = [&](const Group& group) {
    for (int node : group.body) {
      for (ValueId input : graph_.node(node).inputs) {
        int root = TraceOf(input).root.node;
        if (IsScalarConstant(graph_.node(root)) || a.axes.count(root) || b.axes.count(root))
          continue;
        values.insert({input.node, input.output});
      }
    }
  };
  add(a);
  add(b);
  int outputs = 0;
  for (const Group* group : {&a, &b}) {
    for (const auto& [node, axes] : group->axes) {
      bool outside = kept_[node];
      for (int user : users_[node])
        outside = outside || (!a.axes.count(user) && !b.axes.count(user));
      outputs += outside;
    }
  }
  return static_cast<int>(values.size()) + std::max(0, outputs - 1);
}

bool Groups::TryMerge(int producer, int consumer) {
  Group& a = groups_[producer];
  Group& b = groups_[consumer];
  if (a.anchor >= 0 && (b.anchor >= 0 || !TakesEpilogue(graph_.node(a.anchor)))) return false;
  if (b.anchor >= 0) {
    if (!TakesEpilogue(graph_.node(b.anchor))) return false;
    for (ValueId input : Reads(b.anchor)) {
      if (a.axes.count(TraceOf(input).root.node)) return false;
    }
  }
  size_t instructions = 0;
  for (const Group* group : {&a, &b}) {
    for (int node : group->body) instructions += Instructions(graph_.node(node));
  }
  int anchor = std::max(a.anchor, b.anchor);
  int limit = anchor >= 0 ? kMaxEpilogueOperands : kMaxLoopOperands;
  bool tile = anchor >= 0 && graph_.node(anchor).op == &kWinogradOutputOp;
  if (instructions > (tile ? kMaxTileInstructions : kMaxInstructions)) return false;
  if (Operands(a, b) > limit) return false;
  if (anchor >= 0 && graph_.node(anchor).op == &kConv2dWeightGradientOp) {
    // Its tiles lie across the rows of the weight: leave whole-weight operands to a loop of their
    // own.
    const Group& loop = a.anchor >= 0 ? b : a;
    for (int node : loop.body) {
      for (ValueId input : graph_.node(node).inputs) {
        if (IsLeaf(graph_.node(TraceOf(input).root.node)) &&
            graph_.type(input).shape.elements() == graph_.node(anchor).types[0].shape.elements() &&
            graph_.type(input).shape.elements() > 1) {
          return false;
        }
      }
    }
  }
  if (Reaches(producer, consumer)) return false;

  size_t mark = atoms.Mark();
  bool first = true, fits = true;
  for (int node : b.body) {
    const ComputationNode& n = graph_.node(node);
    for (ValueId input : n.inputs) {
      Trace trace = TraceOf(input);
      if (!a.axes.count(trace.root.node)) continue;
      AtomAxes axes;
      fits = fits && trace.bijective && trace.root.output == 0 &&
             graph_.type(input).shape.elements() == n.types[0].shape.elements() &&
             MapAxes(input, trace.root, a.axes[trace.root.node], axes);
      if (!fits) break;
      auto full = atoms.Reshape(axes, n.types[0].shape);  // adds leading axes of size 1
      fits = full.has_value();
      if (!fits) break;
      if (first) {
        fits = atoms.Identify(*full, b.axes[node]);
        first = false;
      } else {
        fits = atoms.Leaves(*full) == atoms.Leaves(b.axes[node]);
      }
    }
  }
  if (!fits || first) {
    atoms.Rollback(mark);
    return false;
  }
  // `b` takes over.
  if (a.anchor >= 0) {
    b.anchor = a.anchor;
    b.prologue = a.prologue;
    b.prologue_axes = a.prologue_axes;
    b.input_axes = a.input_axes;
    group_of_[a.anchor] = consumer;
  }
  for (int node : a.body) group_of_[node] = consumer;
  b.body.insert(b.body.end(), a.body.begin(), a.body.end());
  std::sort(b.body.begin(), b.body.end());
  for (auto& [node, axes] : a.axes) b.axes[node] = axes;
  a = Group();
  return true;
}

void Groups::Merge() {
  const auto& nodes = graph_.nodes();
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (group_of_[i] < 0 || !IsElementwise(nodes[i]) || nodes[i].types[0].shape.elements() == 0)
      continue;
    // Contractions first, the latest of them: its other operands are ready by then.
    std::vector<std::pair<int, int>> candidates;  // (rank, root)
    for (ValueId input : nodes[i].inputs) {
      Trace trace = TraceOf(input);
      int root = trace.root.node;
      if (!trace.bijective || group_of_[root] < 0) continue;
      const Group& group = groups_[group_of_[root]];
      int rank = group.anchor < 0 ? 0 : EndsProduct(nodes[group.anchor]) ? 2 : 1;
      candidates.push_back({rank, root});
    }
    std::sort(candidates.rbegin(), candidates.rend());
    for (auto [rank, root] : candidates) {
      if (group_of_[root] != group_of_[i]) TryMerge(group_of_[root], group_of_[i]);
    }
  }
}

void Groups::Schedule() {
  const auto& nodes = graph_.nodes();
  std::vector<std::set<int>> before(groups_.size()), after(groups_.size());
  std::vector<int> key(groups_.size(), -1);
  for (size_t i = 0; i < nodes.size(); ++i) {
    int g = group_of_[i];
    if (g < 0) continue;
    key[g] = std::max(key[g], static_cast<int>(i));
    for (int user : users_[i]) {
      int h = group_of_[user];
      if (h == g) continue;
      before[h].insert(g);
      after[g].insert(h);
    }
  }
  std::set<std::pair<int, int>> ready;
  std::vector<size_t> waiting(groups_.size());
  size_t total = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (key[g] < 0) continue;
    ++total;
    waiting[g] = before[g].size();
    if (waiting[g] == 0) ready.insert({key[g], static_cast<int>(g)});
  }
  while (!ready.empty()) {
    int g = ready.begin()->second;
    ready.erase(ready.begin());
    order_.push_back(g);
    for (int h : after[g]) {
      if (--waiting[h] == 0) ready.insert({key[h], h});
    }
  }
  Check<InternalError>(order_.size() == total, "lowering: regions form a cycle");
}

bool Groups::NeedsMemory(ValueId root) const {
  int g = group_of_[root.node];
  if (kept_[root.node]) return true;
  for (int user : users_[root.node]) {
    if (group_of_[user] != g) return true;
  }
  return false;
}

}  // namespace calotype::jit
