#include "graph/op.h"

#include <vector>

#include "core/error.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "graph/elementwise_kernels.h"
#include "graph/formulas.h"
#include "graph/functions.h"
#include "graph/op_elementwise.h"

namespace calotype {

#define CALL(Name) extern const Op k##Name##Op;
#include "graph/ops.def"

const Op kInputOp{.name = "Input",
                  .kind = OpKind::kLeaf,
                  .min_arity = 0,
                  .max_arity = 0,
                  .doc = "a tensor given at each call",
                  .source = "",
                  .infer = nullptr};
const Op kParameterOp{.name = "Parameter",
                      .kind = OpKind::kLeaf,
                      .min_arity = 0,
                      .max_arity = 0,
                      .doc = "a tensor that training changes",
                      .source = "",
                      .infer = nullptr};
const Op kConstantOp{.name = "Constant",
                     .kind = OpKind::kLeaf,
                     .min_arity = 0,
                     .max_arity = 0,
                     .doc = "a tensor fixed in the graph",
                     .source = "",
                     .infer = nullptr};

namespace {

using namespace scalar;  // NOLINT: the formulas

template <class S>
S Part(S like, Zero) {
  return Constant(like, 0);
}
template <class S>
S Part(S like, One) {
  return Constant(like, 1);
}
template <class S>
S Part(S, S d) {
  return d;
}

// Applies formula F, or its derivative to operand kPart - 1, to scalars of any kind.
template <class F, int kArity, int kPart, class S>
S ApplyPart(const S* v) {
  auto seed = [&](auto operand) {
    constexpr int k = decltype(operand)::value;
    if constexpr (k == kPart - 1)
      return MakeDual(v[k], One{});
    else
      return MakeDual(v[k], Zero{});
  };
  using I0 = std::integral_constant<int, 0>;
  using I1 = std::integral_constant<int, 1>;
  using I2 = std::integral_constant<int, 2>;
  if constexpr (kPart == 0) {
    if constexpr (kArity == 1)
      return F::Apply(v[0]);
    else if constexpr (kArity == 2)
      return F::Apply(v[0], v[1]);
    else
      return F::Apply(v[0], v[1], v[2]);
  } else {
    if constexpr (kArity == 1)
      return Part(v[0], F::Apply(seed(I0{})).derivative);
    else if constexpr (kArity == 2)
      return Part(v[0], F::Apply(seed(I0{}), seed(I1{})).derivative);
    else
      return Part(v[0], F::Apply(seed(I0{}), seed(I1{}), seed(I2{})).derivative);
  }
}

template <class F, int kArity, int kPart>
ElementwiseInfo MakeInfo(ElementwiseInfo::Domain domain, double error_eps) {
  ElementwiseInfo info;
  info.domain = domain;
  info.error_eps = error_eps;
  Recorder recorder;
  Sym operands[kArity];
  for (int i = 0; i < kArity; ++i) operands[i] = recorder.Input(i);
  Sym result = ApplyPart<F, kArity, kPart>(operands);
  info.program = recorder.Finish(kArity, result);
  info.reference = [](const double* v) { return ApplyPart<F, kArity, kPart>(v); };
  return info;
}

// All elementwise ops and their derivative ops, built once.
struct ElementwiseOps {
  std::vector<std::unique_ptr<Op>> ops;  // entries of ops.def, then derivatives
  std::vector<std::unique_ptr<ElementwiseInfo>> infos;
  std::vector<std::unique_ptr<std::string>> texts;
  std::vector<const Op*> entries;
  std::vector<const Op*> derivatives;

  template <class F, int kArity>
  void Add(const char* name, const char* formula, ElementwiseInfo::Domain domain, double eps,
           const char* source) {
    int entry = static_cast<int>(entries.size());
    Op* op = Make(name, formula, source, kArity, MakeInfo<F, kArity, 0>(domain, eps), entry, 0);
    entries.push_back(op);
    ElementwiseInfo& info = *infos.back();
    // A derivative's budget: relative to the largest, a few operations more than the formula.
    AddDerivative<F, kArity, 1>(op, info, domain, 4 * eps + 8, entry);
    if constexpr (kArity >= 2) AddDerivative<F, kArity, 2>(op, info, domain, 4 * eps + 8, entry);
    if constexpr (kArity >= 3) AddDerivative<F, kArity, 3>(op, info, domain, 4 * eps + 8, entry);
  }

  template <class F, int kArity, int kPart>
  void AddDerivative(const Op* op, ElementwiseInfo& of, ElementwiseInfo::Domain domain, double eps,
                     int entry) {
    ElementwiseInfo info = MakeInfo<F, kArity, kPart>(domain, eps);
    const ScalarInstruction& result = info.program.code[info.program.results[0]];
    if (result.op == Primitive::kConstant && result.constant == 0) return;
    static constexpr const char* kOperands[] = {"x", "y", "z"};
    texts.push_back(
        std::make_unique<std::string>(fmt::format("{}.d{}", op->name, kOperands[kPart - 1])));
    const char* name = texts.back()->c_str();
    texts.push_back(
        std::make_unique<std::string>(fmt::format("d/d{} of {}", kOperands[kPart - 1], op->doc)));
    const Op* derivative =
        Make(name, texts.back()->c_str(), "", kArity, std::move(info), entry, kPart);
    of.derivatives[kPart - 1] = derivative;
    derivatives.push_back(derivative);
  }

  Op* Make(const char* name, const char* formula, const char* source, int arity,
           ElementwiseInfo info, int entry, int part) {
    info.run = FindElementwiseKernel(entry, part);
    infos.push_back(std::make_unique<ElementwiseInfo>(std::move(info)));
    ops.push_back(std::make_unique<Op>(Op{.name = name,
                                          .kind = OpKind::kElementwise,
                                          .min_arity = arity,
                                          .max_arity = arity,
                                          .doc = formula,
                                          .source = source,
                                          .infer = InferElementwise,
                                          .run = RunElementwise,
                                          .reference = ReferenceElementwise,
                                          .gradient = part == 0 ? GradientElementwise : nullptr,
                                          .samples = SamplesElementwise(arity),
                                          .elementwise = infos.back().get()}));
    return ops.back().get();
  }
};

const ElementwiseOps& Elementwise() {
  static const ElementwiseOps ops = [] {
    ElementwiseOps result;
#define OP1(Name, formula, domain, eps, source) \
  result.Add<Name##Formula, 1>(#Name, #formula, ElementwiseInfo::domain, eps, source);
#define OP2(Name, formula, domain, eps, source) \
  result.Add<Name##Formula, 2>(#Name, #formula, ElementwiseInfo::domain, eps, source);
#define OP3(Name, formula, domain, eps, source) \
  result.Add<Name##Formula, 3>(#Name, #formula, ElementwiseInfo::domain, eps, source);
#include "graph/ops.def"
    return result;
  }();
  return ops;
}

// Positions of the elementwise entries in ops.def.
enum Entry : int {
#define OP1(Name, ...) k##Name##Entry,
#define OP2(Name, ...) k##Name##Entry,
#define OP3(Name, ...) k##Name##Entry,
#include "graph/ops.def"
};

Value EmitEntry(int entry, std::initializer_list<Value> inputs) {
  return inputs.begin()->graph->EmitOne(*Elementwise().entries[entry], inputs);
}

}  // namespace

#define OP1(Name, ...) \
  Value Name(Value x) { return EmitEntry(k##Name##Entry, {x}); }
#define OP2(Name, ...)                                                       \
  Value Name(Value x, Value y) { return EmitEntry(k##Name##Entry, {x, y}); } \
  Value Name(Value x, float y) { return Name(x, x.graph->Constant(y)); }     \
  Value Name(float x, Value y) { return Name(y.graph->Constant(x), y); }
#define OP3(Name, ...) \
  Value Name(Value x, Value y, Value z) { return EmitEntry(k##Name##Entry, {x, y, z}); }
#include "graph/ops.def"

std::span<const Op* const> AllOps() {
  static const std::vector<const Op*> ops = [] {
    const ElementwiseOps& elementwise = Elementwise();
    std::vector<const Op*> result = elementwise.entries;
#define CALL(Name) result.push_back(&k##Name##Op);
#include "graph/ops.def"
    result.insert(result.end(), elementwise.derivatives.begin(), elementwise.derivatives.end());
    return result;
  }();
  return ops;
}

const Op& FindOp(std::string_view name) {
  for (const Op* op : AllOps()) {
    if (op->name == name) return *op;
  }
  Fail("op: \"{}\" is unknown", name);
}

}  // namespace calotype
