// Scalar programs on vectors: one switch over the primitives of core/program.h. Every instruction
// is the IEEE operation without fast-math flags, so that compiled code gives the bits of
// ScalarProgram::Evaluate.
#include <llvm/IR/Intrinsics.h>

#include "core/error.h"
#include "jit/emit.h"

namespace calotype::jit {

namespace {

using Value = llvm::Value;

// The next integer towards nearest-even for targets without a rounding instruction: adding and
// subtracting 2^23 rounds what is smaller; the sign is put back for results of -0.
Value* RoundByAddition(llvm::IRBuilder<>& b, Value* x) {
  llvm::Type* type = x->getType();
  auto constant = [&](float c) { return llvm::ConstantFP::get(type, llvm::APFloat(c)); };
  Value* magnitude = b.CreateUnaryIntrinsic(llvm::Intrinsic::fabs, x);
  Value* rounded = b.CreateFSub(b.CreateFAdd(magnitude, constant(0x1p23f)), constant(0x1p23f));
  rounded = b.CreateBinaryIntrinsic(llvm::Intrinsic::copysign, rounded, x);
  return b.CreateSelect(b.CreateFCmpOLT(magnitude, constant(0x1p23f)), rounded, x);
}

}  // namespace

Value* Emitter::Round(Value* x) {
  return target.rounding ? b.CreateUnaryIntrinsic(llvm::Intrinsic::roundeven, x)
                         : RoundByAddition(b, x);
}

Value* Emitter::Floor(Value* x) {
  if (target.rounding) return b.CreateUnaryIntrinsic(llvm::Intrinsic::floor, x);
  Value* rounded = RoundByAddition(b, x);
  llvm::Type* type = x->getType();
  Value* lower = b.CreateFSub(rounded, llvm::ConstantFP::get(type, llvm::APFloat(1.0f)));
  lower = b.CreateSelect(b.CreateFCmpOGT(rounded, x), lower, rounded);
  return b.CreateBinaryIntrinsic(llvm::Intrinsic::copysign, lower, x);
}

// By bits: LLVM 19 joins a floating-point NaN test with the comparison of |x| with 0 and loses the
// absolute value, so that max(|x|, 0) became x > 0 ? |x| : 0.
Value* Emitter::IsNan(Value* x) {
  int width =
      x->getType()->isVectorTy()
          ? static_cast<int>(llvm::cast<llvm::FixedVectorType>(x->getType())->getNumElements())
          : 1;
  llvm::Type* bits = Int(width);
  Value* magnitude =
      b.CreateAnd(b.CreateBitCast(x, bits), llvm::ConstantInt::get(bits, 0x7fffffff));
  return b.CreateICmpSGT(magnitude, llvm::ConstantInt::get(bits, 0x7f800000));
}

Value* Emitter::Maximum(Value* x, Value* y) {
  Value* larger = b.CreateSelect(b.CreateFCmpOGT(x, y), x, y);
  return b.CreateSelect(IsNan(x), x, larger);
}

Emitter::Values Emitter::Program(const ScalarProgram& program, std::span<Value* const> inputs,
                                 int width) {
  llvm::Type* type = Float(width);
  llvm::Type* bits = Int(width);
  Values v(program.code.size());
  Value* one = Splat(1.0, width);
  Value* zero = Splat(0.0, width);
  auto integer = [&](int64_t c) { return llvm::ConstantInt::get(bits, c); };
  auto truth = [&](Value* condition) { return b.CreateSelect(condition, one, zero); };
  for (size_t i = 0; i < v.size(); ++i) {
    const ScalarInstruction& s = program.code[i];
    Check<InternalError>(s.op == Primitive::kInput
                             ? s.a >= 0 && static_cast<size_t>(s.a) < inputs.size()
                             : s.op == Primitive::kConstant || s.a < static_cast<int32_t>(i),
                         "scalar program: instruction {} of {} has operand {}, there are {} inputs",
                         i, v.size(), s.a, inputs.size());
    Value* x = s.op == Primitive::kInput || s.op == Primitive::kConstant ? nullptr : v[s.a];
    switch (s.op) {
      case Primitive::kInput:
        v[i] = inputs[s.a];
        break;
      case Primitive::kConstant:
        v[i] = llvm::ConstantFP::get(type, llvm::APFloat(s.constant));
        break;
      case Primitive::kAdd:
        v[i] = b.CreateFAdd(x, v[s.b]);
        break;
      case Primitive::kSub:
        v[i] = b.CreateFSub(x, v[s.b]);
        break;
      case Primitive::kMul:
        v[i] = b.CreateFMul(x, v[s.b]);
        break;
      case Primitive::kDiv:
        v[i] = b.CreateFDiv(x, v[s.b]);
        break;
      case Primitive::kMax:
        v[i] = Maximum(x, v[s.b]);
        break;
      case Primitive::kMin: {
        Value* smaller = b.CreateSelect(b.CreateFCmpOLT(x, v[s.b]), x, v[s.b]);
        v[i] = b.CreateSelect(IsNan(x), x, smaller);
        break;
      }
      case Primitive::kNeg:
        v[i] = b.CreateFNeg(x);
        break;
      case Primitive::kAbs:
        v[i] = b.CreateUnaryIntrinsic(llvm::Intrinsic::fabs, x);
        break;
      case Primitive::kSqrt:
        v[i] = b.CreateUnaryIntrinsic(llvm::Intrinsic::sqrt, x);
        break;
      case Primitive::kFloor:
        v[i] = Floor(x);
        break;
      case Primitive::kRound:
        v[i] = Round(x);
        break;
      case Primitive::kLess:
        v[i] = truth(b.CreateFCmpOLT(x, v[s.b]));
        break;
      case Primitive::kLessEqual:
        v[i] = truth(b.CreateFCmpOLE(x, v[s.b]));
        break;
      case Primitive::kEqual:
        v[i] = truth(b.CreateFCmpOEQ(x, v[s.b]));
        break;
      case Primitive::kSelect:
        v[i] = b.CreateSelect(b.CreateFCmpUNE(x, zero), v[s.b], v[s.c]);
        break;
      case Primitive::kPow2: {
        // The conversion is poison outside the range of i32; frozen it is just an unused number.
        Value* n = b.CreateFreeze(b.CreateFPToSI(x, bits));
        v[i] = b.CreateBitCast(b.CreateShl(b.CreateAdd(n, integer(127)), integer(23)), type);
        break;
      }
      case Primitive::kExponent: {
        Value* n = b.CreateAShr(b.CreateBitCast(x, bits), integer(23));
        v[i] = b.CreateSIToFP(b.CreateSub(n, integer(127)), type);
        break;
      }
      case Primitive::kMantissa: {
        Value* n = b.CreateAnd(b.CreateBitCast(x, bits), integer(0x7fffff));
        v[i] = b.CreateBitCast(b.CreateOr(n, integer(0x3f800000)), type);
        break;
      }
    }
  }
  Values results;
  for (int32_t r : program.results) results.push_back(v[r]);
  return results;
}

}  // namespace calotype::jit
