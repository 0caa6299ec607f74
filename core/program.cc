#include "core/program.h"

#include <bit>

#include "core/error.h"
#include "core/scalar.h"

namespace calotype {

bool ScalarInstruction::operator==(const ScalarInstruction& o) const {
  return op == o.op && a == o.a && b == o.b && c == o.c &&
         std::bit_cast<uint32_t>(constant) == std::bit_cast<uint32_t>(o.constant);
}

void ScalarProgram::Evaluate(const float* operands, float* outputs) const {
  std::vector<float> v(code.size());
  for (size_t i = 0; i < code.size(); ++i) {
    const ScalarInstruction& s = code[i];
    auto a = [&] { return v[s.a]; };
    auto b = [&] { return v[s.b]; };
    switch (s.op) {
      case Primitive::kInput:
        v[i] = operands[s.a];
        break;
      case Primitive::kConstant:
        v[i] = s.constant;
        break;
      case Primitive::kAdd:
        v[i] = a() + b();
        break;
      case Primitive::kSub:
        v[i] = a() - b();
        break;
      case Primitive::kMul:
        v[i] = a() * b();
        break;
      case Primitive::kDiv:
        v[i] = a() / b();
        break;
      case Primitive::kMax:
        v[i] = scalar::Max(a(), b());
        break;
      case Primitive::kMin:
        v[i] = scalar::Min(a(), b());
        break;
      case Primitive::kNeg:
        v[i] = -a();
        break;
      case Primitive::kAbs:
        v[i] = scalar::Fabs(a());
        break;
      case Primitive::kSqrt:
        v[i] = scalar::SquareRoot(a());
        break;
      case Primitive::kFloor:
        v[i] = scalar::Floor(a());
        break;
      case Primitive::kRound:
        v[i] = scalar::Round(a());
        break;
      case Primitive::kLess:
        v[i] = scalar::LessThan(a(), b());
        break;
      case Primitive::kLessEqual:
        v[i] = scalar::LessEqual(a(), b());
        break;
      case Primitive::kEqual:
        v[i] = scalar::EqualTo(a(), b());
        break;
      case Primitive::kSelect:
        v[i] = scalar::Where(a(), b(), v[s.c]);
        break;
      case Primitive::kPow2:
        v[i] = scalar::Pow2(a());
        break;
      case Primitive::kExponent:
        v[i] = scalar::ExponentOf(a());
        break;
      case Primitive::kMantissa:
        v[i] = scalar::MantissaOf(a());
        break;
    }
  }
  for (size_t r = 0; r < results.size(); ++r) outputs[r] = v[results[r]];
}

std::string ScalarProgram::ToString() const {
  static constexpr const char* kNames[] = {"in",    "const",  "add",   "sub",      "mul",
                                           "div",   "max",    "min",   "neg",      "abs",
                                           "sqrt",  "floor",  "round", "less",     "less_equal",
                                           "equal", "select", "pow2",  "exponent", "mantissa"};
  static constexpr int kArity[] = {0, 0, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 2, 2, 2, 3, 1, 1, 1};
  std::string text;
  for (size_t i = 0; i < code.size(); ++i) {
    const ScalarInstruction& s = code[i];
    int kind = static_cast<int>(s.op);
    text += fmt::format("v{}={}", i, kNames[kind]);
    if (s.op == Primitive::kInput) text += fmt::format(" {}", s.a);
    if (s.op == Primitive::kConstant) text += fmt::format(" {}", s.constant);
    const int32_t operands[] = {s.a, s.b, s.c};
    for (int k = 0; k < kArity[kind]; ++k) text += fmt::format(" v{}", operands[k]);
    text += "; ";
  }
  text += "->";
  for (int32_t r : results) text += fmt::format(" v{}", r);
  return text;
}

}  // namespace calotype
