// Random graphs for tests: 2 to 24 operations over small shapes, values with several readers, views
// of every kind, reductions, contractions, fused calls, optionally gradients. A graph is a function
// of its seed alone.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "core/random.h"
#include "graph/functions.h"
#include "graph/op.h"
#include "tests/op_inputs.h"
#include "tests/random_views.h"

namespace calotype {

struct RandomGraph {
  ComputationGraph graph;
  std::vector<Tensor> inputs;
  bool exact = true;  // only elementwise ops, views and gathers: eager and compiled bits are equal
};

class RandomGraphBuilder {
 public:
  RandomGraphBuilder(uint64_t seed, bool gradients)
      : random_(seed, "random graph"), gradients_(gradients) {}

  RandomGraph Build() {
    only_exact_ = !gradients_ && Chance(25);
    int leaves = 1 + Below(3);
    for (int i = 0; i < leaves; ++i) Add(Leaf(RandomShape()), true);
    int steps = 2 + Below(23);
    for (int i = 0; i < steps; ++i) Step();
    Finish();
    return std::move(result_);
  }

 private:
  struct Entry {
    Value value;
    bool exact;  // reached by exact operations only
  };

  int Below(int n) { return static_cast<int>(random_.Integer(n)); }
  bool Chance(int percent) { return Below(100) < percent; }
  template <class T>
  const T& Any(const std::vector<T>& list) {
    return list[Below(static_cast<int>(list.size()))];
  }
  ComputationGraph& graph() { return result_.graph; }

  Shape RandomShape(int rank = -1) {
    static const std::vector<int64_t> kSizes = {1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 16, 17};
    if (rank < 0) rank = Below(5);
    std::vector<int64_t> dims;
    int64_t elements = 1;
    for (int i = 0; i < rank; ++i) {
      int64_t size = Any(kSizes);
      if (elements * size > 3000) size = 2;
      elements *= size;
      dims.push_back(size);
    }
    return Shape(dims);
  }

  // A new input or parameter with values in [-1.5, 1.5).
  Value Leaf(const Shape& shape) {
    Tensor value = random_.UniformTensor(shape, -1.5f, 1.5f);
    if (Chance(35)) {
      auto parameter = std::make_shared<Parameter>(fmt::format("p{}", leaf_++), value);
      leaves_.push_back(graph().ParameterLeaf(parameter));
    } else {
      leaves_.push_back(graph().Input(fmt::format("x{}", leaf_++), shape));
      result_.inputs.push_back(value);
    }
    return leaves_.back();
  }
  Value Indices(const Shape& shape, int64_t limit) {
    std::vector<int64_t> values(shape.elements());
    for (int64_t& v : values) v = random_.Integer(limit);
    DType dtype = Chance(50) ? DType::kI64 : DType::kI32;
    result_.inputs.push_back(Tensor::From(shape, values).To(dtype));
    return graph().Input(fmt::format("i{}", leaf_++), TensorType{dtype, shape});
  }

  void Add(Value value, bool exact) {
    if (value.shape().elements() > 20000 || value.shape().elements() == 0) return;
    pool_.push_back({value, exact});
    if (!exact) result_.exact = false;
  }
  // Later values more often, so graphs are deep.
  Entry Pick() {
    int n = static_cast<int>(pool_.size());
    return pool_[n - 1 - std::min({Below(n), Below(n), Below(n)})];
  }
  Entry PickExact() {
    std::vector<Entry> exact;
    for (const Entry& entry : pool_) {
      if (entry.exact) exact.push_back(entry);
    }
    return Any(exact);
  }

  // ------------------------------------------------------------------------------ view ops

  Value AnyView(Value x) {
    switch (Below(7)) {
      case 0:
        return RandomReshape(x);
      case 1:
      case 2:
        return RandomPermute(x);
      case 3: {
        if (x.shape().elements() > 1500) return RandomPermute(x);
        std::vector<int64_t> dims = x.shape().ToVector();
        for (int64_t& size : dims) {
          if (size == 1 && Chance(70)) size = 2 + Below(4);
        }
        if (dims.size() < 5 && Chance(50)) dims.insert(dims.begin(), 1 + Below(3));
        return Broadcast(x, Shape(dims));
      }
      case 4: {
        if (x.rank() == 0) return x;
        int axis = Below(x.rank());
        int64_t size = 1 + Below(static_cast<int>(x.dim(axis)));
        return Slice(x, axis, Below(static_cast<int>(x.dim(axis) - size + 1)), size);
      }
      case 5: {
        std::vector<int64_t> low(x.rank(), 0), high(x.rank(), 0);
        for (int axis = 0; axis < x.rank(); ++axis) {
          if (Chance(40)) low[axis] = Below(3);
          if (Chance(40)) high[axis] = Below(3);
        }
        return Pad(x, low, high);
      }
      default:
        return RandomConcat(x);
    }
  }

  // Another grouping of the prime factors of the sizes.
  Value RandomReshape(Value x) {
    std::vector<int64_t> factors;
    for (int64_t size : x.shape()) {
      for (int64_t p = 2; size > 1; ++p) {
        for (; size % p == 0; size /= p) factors.push_back(p);
      }
    }
    std::vector<int64_t> dims = {1};
    for (int64_t p : factors) {
      if (Chance(45) && dims.size() < 5) dims.push_back(1);
      dims.back() *= p;
    }
    if (Chance(20)) dims.insert(dims.begin() + Below(static_cast<int>(dims.size()) + 1), 1);
    return Reshape(x, Shape(dims));
  }
  Value RandomPermute(Value x) {
    std::vector<int64_t> axes(x.rank());
    for (int i = 0; i < x.rank(); ++i) axes[i] = i;
    for (int i = x.rank() - 1; i > 0; --i) std::swap(axes[i], axes[Below(i + 1)]);
    return Permute(x, axes);
  }
  Value RandomConcat(Value x) {
    if (x.rank() == 0) return x;
    int axis = Below(x.rank());
    std::vector<Value> parts = {x};
    for (const Entry& entry : pool_) {
      if (parts.size() < 3 && entry.value.shape() == x.shape() && Chance(60)) {
        parts.push_back(entry.value);
        concat_exact_ = concat_exact_ && entry.exact;
      }
    }
    if (parts.size() == 1) parts.push_back(Chance(50) ? x : Slice(x, axis, 0, 1));
    if (Chance(50)) std::swap(parts[0], parts.back());
    return Concat(parts, axis);
  }

  // --------------------------------------------------------------------------- elementwise

  // A value that broadcasts against x.
  Entry Partner(const Entry& x) {
    std::vector<Entry> same;
    for (const Entry& entry : pool_) {
      if (entry.value.shape() == x.value.shape()) same.push_back(entry);
    }
    if (Chance(60)) return Any(same);
    if (Chance(25)) return {graph().Constant(0.25f * static_cast<float>(1 + Below(8))), true};
    std::vector<int64_t> dims = x.value.shape().ToVector();
    for (int64_t& size : dims) {
      if (Chance(50)) size = 1;
    }
    while (!dims.empty() && Chance(25)) dims.erase(dims.begin());
    return {Leaf(Shape(dims)), true};
  }
  Value InDomain(const Op& op, Value x) {
    if (op.elementwise->domain == ElementwiseInfo::kPositive) return Abs(x) + 0.1f;
    if (op.elementwise->domain == ElementwiseInfo::kNonZero) return Square(x) + 0.3f;
    if (op.name == "Exp") return Minimum(x, 2.0f);
    return x;
  }
  static bool Discontinuous(const Op& op) {
    return op.name == "Less" || op.name == "LessOrEqual" || op.name == "Equals" ||
           op.name == "Select";
  }

  void Elementwise() {
    static const std::vector<const Op*> kOps = [] {
      std::vector<const Op*> ops;
      for (const Op* op : AllOps()) {
        // The derivative ops come in by gradients.
        if (op->kind == OpKind::kElementwise && op->name.find('.') == std::string_view::npos) {
          ops.push_back(op);
        }
      }
      return ops;
    }();
    const Op& op = *Any(kOps);
    // A comparison of values that carry rounding errors would turn them into errors of size one.
    Entry x = Discontinuous(op) ? PickExact() : Pick();
    std::vector<Value> operands;
    bool exact = x.exact;
    for (int i = 0; i < op.min_arity; ++i) {
      Entry operand = i == 0 ? x : Partner(x);
      while (Discontinuous(op) && !operand.exact) operand = x;
      if (i > 0 && operand.value.shape() == x.value.shape() && Chance(10)) operand = x;
      exact = exact && operand.exact;
      operands.push_back(op.min_arity == 1 || i > 0 ? InDomain(op, operand.value) : operand.value);
    }
    Add(graph().EmitOne(op, operands), exact);
  }

  // Several views of one value, element by element or side by side; or views of two values.
  void Views() {
    Entry entry = Pick();
    Value x = entry.value;
    if (x.rank() == 0) return;
    auto combine = [&](Value a, Value b) {
      switch (Below(4)) {
        case 0:
          return a * b;
        case 1:
          return a - b;
        case 2:
          return Maximum(a, b);
        default:
          return a + b;
      }
    };
    auto map = [&](Value a) { return Chance(50) ? Silu(a) : Minimum(Abs(a), 1.5f); };
    // The gradient of a maximum of values that carry rounding errors jumps.
    auto smooth = [&](Value a, Value b) { return Chance(50) ? a * b : a - b; };
    const int axis = Below(x.rank());
    const int64_t size = 1 + random_.Integer(x.dim(axis));
    const bool steps = entry.exact && !gradients_;
    switch (Below(4)) {
      case 0:
        x = steps ? random_views::Parts(x, axis, size, random_, combine, map)
                  : random_views::Parts(x, axis, size, random_, smooth, map);
        break;
      case 1:
        x = random_views::Beside(x, axis, size, random_, map);
        break;
      case 2: {
        Entry other = Pick();
        entry.exact = entry.exact && other.exact;
        Value y = random_views::ViewAs(other.value, x.shape(), random_, Chance(50));
        x = entry.exact && !gradients_ ? combine(x, y) : smooth(x, y);
        break;
      }
      default:
        x = steps ? random_views::Meeting(x, random_, combine, map)
                  : random_views::Meeting(x, random_, smooth, map);
    }
    Add(x, entry.exact);
  }

  // ------------------------------------------------------------------- reductions and calls

  void Reduction() {
    bool max = Chance(25);
    Entry x = max ? PickExact() : Pick();
    std::vector<int64_t> axes;
    for (int axis = 0; axis < x.value.rank(); ++axis) {
      if (Chance(45)) axes.push_back(axis);
    }
    if (axes.empty() && x.value.rank() > 0) axes = {Below(x.value.rank())};
    bool keep = Chance(50);
    if (max) {
      Add(Max(x.value, axes, keep), x.exact);
    } else {
      Add(Chance(50) ? Mean(x.value, axes, keep) : Sum(x.value, axes, keep) * 0.3f, false);
    }
  }

  // x as [.., .., ..] of the given rank.
  Value Ranked(Value x, int rank) {
    while (x.rank() < rank) {
      std::vector<int64_t> dims = x.shape().ToVector();
      dims.insert(dims.begin() + Below(x.rank() + 1), 1);
      x = Reshape(x, Shape(dims));
    }
    while (x.rank() > rank) {
      std::vector<int64_t> dims = x.shape().ToVector();
      dims[1] *= dims[0];
      dims.erase(dims.begin());
      x = Reshape(x, Shape(dims));
    }
    return x;
  }

  void Contraction() {
    static const std::vector<int64_t> kOut = {1, 3, 4, 8, 16, 17, 33};
    Value x = Pick().value;
    if (Chance(50)) {
      x = Ranked(x, std::max(2, x.rank()));
      bool ta = Chance(30), tb = Chance(50);
      int64_t depth = x.dim(ta ? -2 : -1), n = Any(kOut);
      float scale = 1 / std::sqrt(static_cast<float>(depth));
      if (Chance(20)) {  // two computed values
        Value y = MatMul(x, x, ta, !ta);
        Add(y * scale, false);
        return;
      }
      std::vector<int64_t> dims =
          tb ? std::vector<int64_t>{n, depth} : std::vector<int64_t>{depth, n};
      if (x.rank() == 3 && Chance(30)) dims.insert(dims.begin(), x.dim(0));
      Value bias = Chance(40) ? Leaf({n}) : Value{};
      Add(MatMul(x, Leaf(Shape(dims)) * scale, ta, tb, bias), false);
      return;
    }
    if (Chance(15)) {  // large enough for Winograd's convolution
      Value w = Leaf({24 + Below(3), 24, 3, 3}) * 0.07f;
      Value bias = Chance(50) ? Leaf({w.dim(0)}) : Value{};
      Value y = Conv2d(Fit(x, {2, 24, 12, 12}), w, bias, Conv2dOptions::Padded(1, 1));
      Add(Slice(y, 1, Below(8), 16), false);
      return;
    }
    x = Ranked(x, 4);
    if (Chance(15) && x.shape().elements() < 2000) {
      x = ResizeNearest(x, 2 * x.dim(2), 2 * x.dim(3));
      Value w =
          Leaf({Any(kOut), x.dim(1), 3, 3}) * (1 / std::sqrt(9.0f * static_cast<float>(x.dim(1))));
      Add(Conv2d(x, w, {}, Conv2dOptions::Padded(1, 1)), false);
      return;
    }
    Conv2dOptions options;
    options.stride = Chance(70) ? 1 : 2;
    int64_t kh = 1 + Below(3), kw = Chance(70) ? kh : 1 + Below(3);
    for (int64_t* side : {&options.top, &options.bottom, &options.left, &options.right}) {
      *side = Chance(60) ? kh / 2 : Below(3);
    }
    options.bottom += std::max<int64_t>(0, kh - x.dim(2) - options.top - options.bottom);
    options.right += std::max<int64_t>(0, kw - x.dim(3) - options.left - options.right);
    int64_t out = Any(kOut);
    float scale = 1 / std::sqrt(static_cast<float>(x.dim(1) * kh * kw));
    Value bias = Chance(50) ? Leaf({out}) : Value{};
    Value w = Leaf({out, x.dim(1), kh, kw});
    if (Chance(50)) w = w * scale;
    Add(Conv2d(x, w, bias, options), false);
  }

  void Call() {
    Entry entry = Pick();
    Value x = entry.value;
    switch (Below(6)) {
      case 0: {
        x = Ranked(x, std::max(2, x.rank()));
        std::vector<int64_t> groups;
        for (int64_t g = 1; g <= x.dim(1); ++g) {
          if (x.dim(1) % g == 0) groups.push_back(g);
        }
        bool affine = Chance(60);
        Value gamma = affine ? Leaf({x.dim(1)}) : Value{},
              beta = affine ? Leaf({x.dim(1)}) : Value{};
        Add(GroupNorm(x, gamma, beta, Any(groups), 0.1), false);
        return;
      }
      case 1: {
        x = Ranked(x, std::max(1, x.rank()));
        Value gamma = Leaf({x.dim(-1)}), beta = Leaf({x.dim(-1)});
        Add(LayerNorm(x, gamma, beta, 0.1), false);
        return;
      }
      case 2: {
        x = Ranked(x, std::max(1, x.rank()));
        Add(Softmax(x, Below(x.rank())), false);
        return;
      }
      case 3: {
        x = Ranked(x, std::max(1, x.rank()));
        int axis = Below(x.rank());
        Shape indices = RandomShape(Below(3));
        if (indices.elements() > 40) indices = {3};
        if (x.rank() - 1 + indices.rank() > 5) indices = {2};
        Value index = Indices(indices, x.dim(axis));
        if (Chance(70) || indices.rank() == 0) {
          Add(Gather(x, index, axis), entry.exact);
        } else {
          Value dy = Leaf(Shape{indices.elements(), 3});
          Add(ScatterAdd(dy, Reshape(index, {indices.elements()}), 0, x.dim(axis)), false);
        }
        return;
      }
      case 4: {
        x = Ranked(x, 3);
        std::vector<int64_t> heads;
        for (int64_t h = 1; h <= x.dim(2); ++h) {
          if (x.dim(2) % h == 0) heads.push_back(h);
        }
        AttentionOptions options;
        options.heads = Any(heads);
        options.scale = 0.5;
        options.causal = Chance(25);
        Value k = x, v = x * 0.5f;
        if (Chance(60)) {
          int64_t batch = Chance(80) ? x.dim(0) : 1, tokens = 1 + Below(20);
          k = Leaf({batch, tokens, x.dim(2)});
          v = Leaf({batch, tokens, options.heads * (1 + Below(6))});
        }
        Value mask;
        if (Chance(25)) mask = Leaf({1, 1, Chance(50) ? 1 : x.dim(1), k.dim(1)});
        Add(Attention(x, k, v, options, mask).out, false);
        return;
      }
      default: {
        if (Chance(40)) {
          result_.inputs.push_back(
              Tensor::From({1}, std::vector<int64_t>{random_.Integer(1 << 30)}));
          Value seed = graph().Input(fmt::format("s{}", leaf_++), TensorType{DType::kI64, {1}});
          Add(PhiloxUniform(seed, RandomShape(), Below(5)), true);
          return;
        }
        Value index = Indices(RandomShape(), 50);
        Add(Cast(index) * 0.02f, true);
        return;
      }
    }
  }

  // An op of the table on one of its own samples, each operand cut out of some value.
  void Sampled() {
    const Op* op = nullptr;
    std::vector<OpSample> samples;
    while (samples.empty()) {
      op = Any(std::vector<const Op*>(AllOps().begin(), AllOps().end()));
      samples = op->samples();
      std::erase_if(samples, [](const OpSample& sample) {
        return std::any_of(sample.inputs.begin(), sample.inputs.end(), [](const TensorType& type) {
          return type.shape.elements() == 0 || type.dtype != DType::kF32 ||
                 type.shape.elements() > 4000;
        });
      });
      if (Discontinuous(*op) || op->name.find("Norm") != std::string_view::npos ||
          op->name == "Exp" || op->name == "Max" || op->name.find('.') != std::string_view::npos ||
          op->name == "AttentionGradient" || (gradients_ && !op->gradient)) {
        samples.clear();
      }
    }
    const OpSample& sample = Any(samples);
    std::vector<Value> operands;
    bool exact = op->kind == OpKind::kElementwise || op->kind == OpKind::kView;
    for (const TensorType& type : sample.inputs) {
      Entry entry = Pick();
      exact = exact && entry.exact;
      Value x = Fit(entry.value, type.shape);
      operands.push_back(op->elementwise ? InDomain(*op, x) : x * 0.5f);
    }
    Add(graph().EmitOne(*op, operands, sample.attrs), exact);
  }
  Value Fit(Value x, const Shape& shape) {
    int64_t have = x.shape().elements(), need = shape.elements();
    x = Reshape(x, {have});
    if (have < need && have * 2 >= need) {
      x = Concat({x, x}, 0);
    } else if (have < need) {
      int64_t times = (need + have - 1) / have;
      x = Reshape(Broadcast(Reshape(x, {1, have}), {times, have}), {times * have});
    }
    if (x.dim(0) > need) x = Slice(x, 0, Below(static_cast<int>(x.dim(0) - need + 1)), need);
    return Reshape(x, shape);
  }

  void Step() {
    int kind = Below(only_exact_ ? 60 : 100);
    if (kind < 30) {
      Elementwise();
    } else if (kind < 42) {
      Views();
    } else if (kind < 60) {
      Entry x = Pick();
      concat_exact_ = true;
      Value y = AnyView(x.value);
      Add(y, x.exact && concat_exact_);
    } else if (kind < 70) {
      Reduction();
    } else if (kind < 82) {
      Contraction();
    } else if (kind < 92) {
      Call();
    } else {
      Sampled();
    }
  }

  void Finish() {
    // What nothing reads yet, the latest first, so that most of the graph counts.
    std::vector<bool> read(graph().nodes().size(), false);
    for (const ComputationNode& node : graph().nodes()) {
      for (ValueId input : node.inputs) read[input.node] = true;
    }
    std::vector<Value> outputs = {pool_.back().value};
    size_t most = 1 + Below(4);
    for (size_t i = pool_.size() - 1; i-- > 0 && outputs.size() < most;) {
      if (!read[pool_[i].value.id.node]) outputs.push_back(pool_[i].value);
    }
    if (Chance(20)) outputs.push_back(Pick().value);  // one that others read as well
    if (!gradients_) {
      for (size_t i = 0; i < outputs.size(); ++i) graph().Output(fmt::format("y{}", i), outputs[i]);
      return;
    }
    result_.exact = false;
    std::vector<Value> cotangents, wrt;
    for (Value y : outputs) cotangents.push_back(Leaf(y.shape()));
    for (size_t i = 0; i + cotangents.size() < leaves_.size(); ++i) {
      if (wrt.size() < 6) wrt.push_back(leaves_[i]);
    }
    std::vector<Value> gradients = Gradients(outputs, cotangents, wrt);
    graph().Output("y", outputs[0]);
    for (size_t i = 0; i < gradients.size(); ++i)
      graph().Output(fmt::format("g{}", i), gradients[i]);
  }

  Random random_;
  bool gradients_;
  RandomGraph result_;
  std::vector<Entry> pool_;
  std::vector<Value> leaves_;
  int leaf_ = 0;
  bool concat_exact_ = true, only_exact_ = false;
};

}  // namespace calotype
