#include "core/contract.h"

#include <dnnl.hpp>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "core/contract_reference.h"
#include "core/error.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace calotype {

namespace {

using dnnl::memory;
using Desc = memory::desc;

// Below this many products plain loops beat the fixed cost of a primitive, and need no compilation.
constexpr int64_t kTinyProducts = 4096;

Desc Dense(const memory::dims& dims) {
  memory::dims strides(dims.size(), 1);
  for (size_t i = dims.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * dims[i];
  return {dims, memory::data_type::f32, strides};
}

// The layout that the primitive likes best.
Desc Any(const memory::dims& dims) {
  return {dims, memory::data_type::f32, memory::format_tag::any};
}

const dnnl::engine& Engine() {
  static const dnnl::engine* engine = [] {
    // oneDNN generates its own code: it must obey CALOTYPE_CPU as well. Level v4 is its default.
    if (HostIsa() != IsaLevel::v4) {
      dnnl::set_max_cpu_isa(HostIsa() == IsaLevel::v3 ? dnnl::cpu_isa::avx2 : dnnl::cpu_isa::sse41);
    }
    return new dnnl::engine(dnnl::engine::kind::cpu, 0);
  }();
  return *engine;
}

// One primitive of fixed shapes with the reorders around it. Immutable, so any number of threads
// may run it at once: packed operands and oneDNN's scratchpad lie in the scratch of the calling
// thread.
class Plan {
 public:
  // Operand `id` lies in the caller's memory as `user`; the primitive takes it as `used`.
  struct Operand {
    int id;
    Desc user, used;
    bool output = false;
  };

  Plan(dnnl::primitive primitive, const Desc& scratchpad, const std::vector<Operand>& operands)
      : primitive_(std::move(primitive)), scratchpad_(scratchpad) {
    scratchpad_bytes_ = scratchpad_.get_size();
    for (const Operand& operand : operands) {
      Argument argument{operand, {}, {}, 0};
      if (operand.user != operand.used) {
        dnnl::primitive_attr attr;
        attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
        const Desc& from = operand.output ? operand.used : operand.user;
        const Desc& to = operand.output ? operand.user : operand.used;
        dnnl::reorder::primitive_desc desc(Engine(), from, Engine(), to, attr);
        argument.reorder = dnnl::reorder(desc);
        argument.scratchpad = desc.scratchpad_desc();
        argument.packed_bytes = operand.used.get_size();
        scratchpad_bytes_ = std::max(scratchpad_bytes_, argument.scratchpad.get_size());
      }
      arguments_.push_back(std::move(argument));
    }
  }

  // `pointers` in the order of the operands.
  void Run(std::initializer_list<const void*> pointers) const {
    thread_local dnnl::stream stream(Engine());
    int64_t bytes = Layout(nullptr).size();
    std::byte* base = bytes > 0 ? ThreadScratch(bytes) : nullptr;
    ScratchLayout layout(base);
    void* scratchpad = layout.Take<std::byte>(scratchpad_bytes_);
    std::unordered_map<int, memory> used;
    std::vector<memory> user;
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const Argument& argument = arguments_[i];
      user.emplace_back(argument.operand.user, Engine(),
                        const_cast<void*>(pointers.begin()[i]));  // oneDNN has no const memory
      if (!argument.reorder) {
        used.emplace(argument.operand.id, user[i]);
        continue;
      }
      memory packed(argument.operand.used, Engine(), layout.Take<std::byte>(argument.packed_bytes));
      used.emplace(argument.operand.id, packed);
      if (!argument.operand.output) Move(argument, stream, user[i], packed, scratchpad);
    }
    if (scratchpad_.get_size() > 0) {
      used.emplace(DNNL_ARG_SCRATCHPAD, memory(scratchpad_, Engine(), scratchpad));
    }
    primitive_.execute(stream, used);
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const Argument& argument = arguments_[i];
      if (argument.reorder && argument.operand.output) {
        Move(argument, stream, used.at(argument.operand.id), user[i], scratchpad);
      }
    }
    stream.wait();
  }

 private:
  struct Argument {
    Operand operand;
    std::optional<dnnl::reorder> reorder;
    Desc scratchpad;
    size_t packed_bytes;
  };

  ScratchLayout Layout(std::byte* base) const {
    ScratchLayout layout(base);
    layout.Take<std::byte>(scratchpad_bytes_);
    for (const Argument& argument : arguments_) layout.Take<std::byte>(argument.packed_bytes);
    return layout;
  }

  static void Move(const Argument& argument, dnnl::stream& stream, const memory& from,
                   const memory& to, void* scratchpad) {
    std::unordered_map<int, memory> args{{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}};
    if (argument.scratchpad.get_size() > 0) {
      args.emplace(DNNL_ARG_SCRATCHPAD, memory(argument.scratchpad, Engine(), scratchpad));
    }
    argument.reorder->execute(stream, args);
  }

  dnnl::primitive primitive_;
  Desc scratchpad_;
  size_t scratchpad_bytes_;
  std::vector<Argument> arguments_;
};

// What makes two plans equal: the kind, the shape, and the thread count that oneDNN bakes in.
enum Kind : int64_t { kMatMul, kForward, kBackwardInput, kBackwardWeight };
using Key = std::array<int64_t, 16>;
struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325;
    for (int64_t x : key) {
      hash = (hash ^ static_cast<uint64_t>(x)) * 0x9E3779B97F4A7C15;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

std::string Describe(const Key& k) {
  if (k[0] == kMatMul) {
    return fmt::format("matmul: batch {}, m {}, n {}, k {}, strides of a {} {} {}, of b {} {} {}",
                       k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9], k[10], k[11]);
  }
  const char* names[] = {"forward", "input gradient", "weight gradient"};
  return fmt::format(
      "conv2d {}: batch {}, {} -> {} channels, {} x {}, kernel {} x {}, stride {}, padding {} {} "
      "{} {}",
      names[k[0] - kForward], k[3], k[4], k[7], k[5], k[6], k[8], k[9], k[10], k[11], k[12], k[13],
      k[14]);
}

// Runs the plan for `key`, made by `make` when it is not cached. The cache starts again when it is
// full: a program with more live shapes than that is dominated by other costs.
template <class Make>
void RunPlan(const Key& key, Make make, std::initializer_list<const void*> pointers) {
  constexpr size_t kMaxPlans = 1024;
  static std::mutex mutex;
  static auto& plans = *new std::unordered_map<Key, std::shared_ptr<const Plan>, KeyHash>();
  try {
    std::shared_ptr<const Plan> plan;
    {
      std::lock_guard lock(mutex);
      if (auto found = plans.find(key); found != plans.end()) plan = found->second;
    }
    if (!plan) {
      plan = std::make_shared<const Plan>(make());
      std::lock_guard lock(mutex);
      if (plans.size() >= kMaxPlans) plans.clear();
      plans.emplace(key, plan);
    }
    plan->Run(pointers);
  } catch (const dnnl::error& error) {
    Check<OutOfMemoryError>(error.status != dnnl_out_of_memory, "{}: oneDNN ran out of memory",
                            Describe(key));
    Fail<InternalError>("{}: oneDNN refused it: {}", Describe(key), error.what());
  }
}

dnnl::primitive_attr UserScratchpad() {
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attr;
}

// The matrix [batch, rows, cols] of one operand. A stride along an axis of size 1 means nothing,
// but oneDNN takes its fast path only if the strides look dense.
Desc MatrixDesc(int64_t batch, int64_t rows, int64_t cols, int64_t batch_stride, int64_t row_stride,
                int64_t col_stride) {
  if (batch_stride == 0) batch = 1;
  bool by_rows = col_stride == 1;
  int64_t lead = by_rows ? (rows == 1 ? cols : row_stride) : (cols == 1 ? rows : col_stride);
  if (batch == 1) batch_stride = lead * (by_rows ? rows : cols);
  return {{batch, rows, cols},
          memory::data_type::f32,
          by_rows ? memory::dims{batch_stride, lead, 1} : memory::dims{batch_stride, 1, lead}};
}

// With `row_bias` the bias belongs to the rows of C (bias[m]), as in a 1x1 convolution.
Plan MakeMatMul(const MatMulShape& s, bool bias, bool row_bias) {
  Desc a = MatrixDesc(s.batch, s.m, s.k, s.a_batch, s.a_row, s.a_col);
  Desc b = MatrixDesc(s.batch, s.k, s.n, s.b_batch, s.b_row, s.b_col);
  Desc c = Dense({s.batch, s.m, s.n});
  dnnl::primitive_attr attr = UserScratchpad();
  std::vector<Plan::Operand> operands = {{DNNL_ARG_SRC, a, a}, {DNNL_ARG_WEIGHTS, b, b}};
  Desc bias_desc = row_bias ? Dense({1, s.m, 1}) : Dense({1, 1, s.n});
  if (bias && row_bias) {
    dnnl::post_ops ops;
    ops.append_binary(dnnl::algorithm::binary_add, bias_desc);
    attr.set_post_ops(ops);
    operands.push_back({DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, bias_desc, bias_desc});
  } else if (bias) {
    operands.push_back({DNNL_ARG_BIAS, bias_desc, bias_desc});
  }
  operands.push_back({DNNL_ARG_DST, c, c, true});
  auto desc = bias && !row_bias ? dnnl::matmul::primitive_desc(Engine(), a, b, bias_desc, c, attr)
                                : dnnl::matmul::primitive_desc(Engine(), a, b, c, attr);
  return {dnnl::matmul(desc), desc.scratchpad_desc(), operands};
}

void RunMatMul(const MatMulShape& s, const float* a, const float* b, const float* bias,
               bool row_bias, float* c) {
  Key key{kMatMul,
          Threads(),
          s.batch,
          s.m,
          s.n,
          s.k,
          s.a_batch,
          s.a_row,
          s.a_col,
          s.b_batch,
          s.b_row,
          s.b_col,
          bias ? (row_bias ? 2 : 1) : 0};
  auto make = [&] { return MakeMatMul(s, bias, row_bias); };
  if (bias) {
    RunPlan(key, make, {a, b, bias, c});
  } else {
    RunPlan(key, make, {a, b, c});
  }
}

Key ConvKey(Kind kind, const Conv2dShape& s, bool bias) {
  return {kind,       Threads(),  bias,     s.batch, s.in,     s.height, s.width, s.out,
          s.kernel_h, s.kernel_w, s.stride, s.top,   s.bottom, s.left,   s.right};
}

struct ConvDims {
  explicit ConvDims(const Conv2dShape& s)
      : x{s.batch, s.in, s.height, s.width},
        w{s.out, s.in, s.kernel_h, s.kernel_w},
        y{s.batch, s.out, s.out_height(), s.out_width()},
        bias{s.out},
        strides{s.stride, s.stride},
        low{s.top, s.left},
        high{s.bottom, s.right} {}
  memory::dims x, w, y, bias, strides, low, high;
};

dnnl::convolution_forward::primitive_desc ForwardDesc(const ConvDims& d, bool bias) {
  auto kind = dnnl::prop_kind::forward_training;
  auto algorithm = dnnl::algorithm::convolution_direct;
  if (!bias) {
    return {Engine(), kind,      algorithm, Any(d.x), Any(d.w),
            Any(d.y), d.strides, d.low,     d.high,   UserScratchpad()};
  }
  return {Engine(), kind,      algorithm, Any(d.x), Any(d.w),        Dense(d.bias),
          Any(d.y), d.strides, d.low,     d.high,   UserScratchpad()};
}

Plan MakeForward(const Conv2dShape& s, bool bias) {
  ConvDims d(s);
  auto desc = ForwardDesc(d, bias);
  std::vector<Plan::Operand> operands = {{DNNL_ARG_SRC, Dense(d.x), desc.src_desc()},
                                         {DNNL_ARG_WEIGHTS, Dense(d.w), desc.weights_desc()}};
  if (bias) operands.push_back({DNNL_ARG_BIAS, Dense(d.bias), desc.bias_desc()});
  operands.push_back({DNNL_ARG_DST, Dense(d.y), desc.dst_desc(), true});
  return {dnnl::convolution_forward(desc), desc.scratchpad_desc(), operands};
}

Plan MakeBackwardInput(const Conv2dShape& s) {
  ConvDims d(s);
  dnnl::convolution_backward_data::primitive_desc desc(
      Engine(), dnnl::algorithm::convolution_direct, Any(d.x), Any(d.w), Any(d.y), d.strides, d.low,
      d.high, ForwardDesc(d, false), UserScratchpad());
  return {dnnl::convolution_backward_data(desc),
          desc.scratchpad_desc(),
          {{DNNL_ARG_DIFF_DST, Dense(d.y), desc.diff_dst_desc()},
           {DNNL_ARG_WEIGHTS, Dense(d.w), desc.weights_desc()},
           {DNNL_ARG_DIFF_SRC, Dense(d.x), desc.diff_src_desc(), true}}};
}

Plan MakeBackwardWeight(const Conv2dShape& s) {
  ConvDims d(s);
  dnnl::convolution_backward_weights::primitive_desc desc(
      Engine(), dnnl::algorithm::convolution_direct, Any(d.x), Any(d.w), Any(d.y), d.strides, d.low,
      d.high, ForwardDesc(d, false), UserScratchpad());
  return {dnnl::convolution_backward_weights(desc),
          desc.scratchpad_desc(),
          {{DNNL_ARG_SRC, Dense(d.x), desc.src_desc()},
           {DNNL_ARG_DIFF_DST, Dense(d.y), desc.diff_dst_desc()},
           {DNNL_ARG_DIFF_WEIGHTS, Dense(d.w), desc.diff_weights_desc(), true}}};
}

void CheckShape(const Conv2dShape& s) {
  Check<ShapeError>(s.stride >= 1 && std::min({s.top, s.bottom, s.left, s.right}) >= 0,
                    "conv2d: stride {} must be positive, padding {} {} {} {} not negative",
                    s.stride, s.top, s.bottom, s.left, s.right);
  Check<ShapeError>(s.kernel_h >= 1 && s.kernel_w >= 1 &&
                        s.height + s.top + s.bottom >= s.kernel_h &&
                        s.width + s.left + s.right >= s.kernel_w,
                    "conv2d: kernel {}x{} does not fit into the padded input {}x{}", s.kernel_h,
                    s.kernel_w, s.height + s.top + s.bottom, s.width + s.left + s.right);
}

// True for shapes that go through the plain loops: nothing to do, or too little for a primitive.
bool Tiny(const Conv2dShape& s) {
  CheckShape(s);
  return s.batch * s.in * s.height * s.width == 0 ||
         s.batch * s.out * s.out_height() * s.out_width() * s.in * s.kernel_h * s.kernel_w <=
             kTinyProducts;
}

// A convolution without a window is one matrix product for each picture, W [out, in] x [in,
// positions]: it needs no reorder of the activations.
bool Pointwise(const Conv2dShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride == 1 &&
         s.top + s.bottom + s.left + s.right == 0;
}

}  // namespace

void MatMul(const MatMulShape& shape, const float* a, const float* b, const float* bias, float* c) {
  MatMulShape s = shape;
  if (s.batch > 1 && s.a_batch == 0 && s.b_batch == 0) {  // the same product for the whole batch
    s.batch = 1;
    MatMul(s, a, b, bias, c);
    for (int64_t i = 1; i < shape.batch; ++i) std::copy_n(c, s.m * s.n, c + i * s.m * s.n);
    return;
  }
  // A batch of A against one B is one taller A.
  if (s.batch > 1 && s.b_batch == 0 && s.a_col == 1 && (s.m == 1 || s.a_batch == s.m * s.a_row) &&
      s.a_batch >= s.k) {
    if (s.m == 1) s.a_row = s.a_batch;
    s.m *= s.batch;
    s.batch = 1;
    s.a_batch = 0;
  }
  if (s.batch * s.m * s.n * s.k <= kTinyProducts) return reference::MatMul(s, a, b, bias, c);
  RunMatMul(s, a, b, bias, false, c);
}

void Conv2dForward(const Conv2dShape& s, const float* x, const float* w, const float* bias,
                   float* y) {
  if (Tiny(s)) return reference::Conv2dForward(s, x, w, bias, y);
  if (Pointwise(s)) {
    int64_t n = s.height * s.width;
    return RunMatMul({.batch = s.batch,
                      .m = s.out,
                      .n = n,
                      .k = s.in,
                      .a_row = s.in,
                      .b_batch = s.in * n,
                      .b_row = n},
                     w, x, bias, true, y);
  }
  auto make = [&] { return MakeForward(s, bias); };
  if (bias) {
    RunPlan(ConvKey(kForward, s, true), make, {x, w, bias, y});
  } else {
    RunPlan(ConvKey(kForward, s, false), make, {x, w, y});
  }
}

void Conv2dBackwardInput(const Conv2dShape& s, const float* dy, const float* w, float* dx) {
  if (Tiny(s)) return reference::Conv2dBackwardInput(s, dy, w, dx);
  if (Pointwise(s)) {
    int64_t n = s.height * s.width;
    return RunMatMul({.batch = s.batch,
                      .m = s.in,
                      .n = n,
                      .k = s.out,
                      .a_row = 1,
                      .a_col = s.in,
                      .b_batch = s.out * n,
                      .b_row = n},
                     w, dy, nullptr, false, dx);
  }
  RunPlan(ConvKey(kBackwardInput, s, false), [&] { return MakeBackwardInput(s); }, {dy, w, dx});
}

void Conv2dBackwardWeight(const Conv2dShape& s, const float* x, const float* dy, float* dw) {
  if (Tiny(s)) return reference::Conv2dBackwardWeight(s, x, dy, dw);
  RunPlan(ConvKey(kBackwardWeight, s, false), [&] { return MakeBackwardWeight(s); }, {x, dy, dw});
}

}  // namespace calotype
