// ScalarProgram: an elementwise formula as a list of primitive instructions in float32. Recorded by
// running the formula on Sym values (core/scalar.h); executed lane-wise by compiled code. The set
// of primitives is closed: a code generator is one switch over it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace calotype {

enum class Primitive : uint8_t {
  kInput,     // operand number `a`
  kConstant,  // `constant`
  kAdd,
  kSub,
  kMul,
  kDiv,  // IEEE, round to nearest
  kMax,  // (a > b or a is NaN) ? a : b
  kMin,  // (a < b or a is NaN) ? a : b
  kNeg,
  kAbs,
  kSqrt,
  kFloor,
  kRound,      // to the nearest integer, ties to even
  kLess,       // a < b ? 1 : 0
  kLessEqual,  // a <= b ? 1 : 0
  kEqual,      // a == b ? 1 : 0
  kSelect,     // a != 0 ? b : c (NaN counts as != 0)
  kPow2,       // 2^a for an integral a in [-126, 127]: bits (int(a) + 127) << 23
  kExponent,   // of a positive normal a: float(bits >> 23) - 127
  kMantissa,   // of a positive normal a: bits & 0x7fffff | 0x3f800000, in [1, 2)
};

struct ScalarInstruction {
  Primitive op;
  int32_t a = 0, b = 0, c = 0;  // numbers of earlier instructions (kInput: operand number)
  float constant = 0;
  bool operator==(const ScalarInstruction& o) const;
};

struct ScalarProgram {
  int inputs = 0;
  std::vector<ScalarInstruction> code;
  std::vector<int32_t> results;  // numbers of the instructions that are results (one for an op)

  // Executes for one element; the definition of the primitives, for tests.
  void Evaluate(const float* operands, float* outputs) const;
  std::string ToString() const;
  bool operator==(const ScalarProgram&) const = default;
};

}  // namespace calotype
