// Compiled once per instruction set; see core/isa.h for what may be used here.
#include "graph/elementwise_kernels.h"
#include "graph/formulas.h"

namespace calotype::CALOTYPE_ISA {

namespace {

using namespace calotype::scalar;

template <bool kScalar>
CALOTYPE_INLINE float At(const float* p, int64_t i) {
  return p[kScalar ? 0 : i];
}

CALOTYPE_INLINE float ToFloat(float, float x) { return x; }
CALOTYPE_INLINE float ToFloat(float like, Zero) { return Constant(like, 0); }
CALOTYPE_INLINE float ToFloat(float like, One) { return Constant(like, 1); }

// part 0: the formula; part p: its derivative to operand p - 1.
template <class F, int kArity, int kPart>
CALOTYPE_INLINE float Apply(float x, float y, float z) {
  if constexpr (kArity == 1) {
    if constexpr (kPart == 0)
      return F::Apply(x);
    else
      return ToFloat(x, F::Apply(MakeDual(x, One{})).derivative);
  } else if constexpr (kArity == 2) {
    if constexpr (kPart == 0)
      return F::Apply(x, y);
    else if constexpr (kPart == 1)
      return ToFloat(x, F::Apply(MakeDual(x, One{}), MakeDual(y, Zero{})).derivative);
    else
      return ToFloat(x, F::Apply(MakeDual(x, Zero{}), MakeDual(y, One{})).derivative);
  } else {
    if constexpr (kPart == 0)
      return F::Apply(x, y, z);
    else if constexpr (kPart == 1)
      return ToFloat(
          x, F::Apply(MakeDual(x, One{}), MakeDual(y, Zero{}), MakeDual(z, Zero{})).derivative);
    else if constexpr (kPart == 2)
      return ToFloat(
          x, F::Apply(MakeDual(x, Zero{}), MakeDual(y, One{}), MakeDual(z, Zero{})).derivative);
    else
      return ToFloat(
          x, F::Apply(MakeDual(x, Zero{}), MakeDual(y, Zero{}), MakeDual(z, One{})).derivative);
  }
}

template <class F, int kArity, int kPart, int kScalars>
void Loop(int64_t n, const float* x, const float* y, const float* z, float* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    out[i] = Apply<F, kArity, kPart>(At<(kScalars & 1) != 0>(x, i), At<(kScalars & 2) != 0>(y, i),
                                     At<(kScalars & 4) != 0>(z, i));
  }
}

template <class F, int kArity, int kPart>
void Kernel(int64_t n, const float* x, const float* y, const float* z, int scalars, float* out) {
  if constexpr (kArity == 1) {
    y = z = x;
    scalars = scalars ? 7 : 0;
    if (scalars) return Loop<F, 1, kPart, 7>(n, x, y, z, out);
    return Loop<F, 1, kPart, 0>(n, x, y, z, out);
  } else if constexpr (kArity == 2) {
    z = x;
    switch (scalars & 3) {
      case 0:
        return Loop<F, 2, kPart, 0>(n, x, y, z, out);
      case 1:
        return Loop<F, 2, kPart, 1>(n, x, y, z, out);
      case 2:
        return Loop<F, 2, kPart, 2>(n, x, y, z, out);
      default:
        return Loop<F, 2, kPart, 3>(n, x, y, z, out);
    }
  } else {
    switch (scalars & 7) {
      case 0:
        return Loop<F, 3, kPart, 0>(n, x, y, z, out);
      case 1:
        return Loop<F, 3, kPart, 1>(n, x, y, z, out);
      case 2:
        return Loop<F, 3, kPart, 2>(n, x, y, z, out);
      case 3:
        return Loop<F, 3, kPart, 3>(n, x, y, z, out);
      case 4:
        return Loop<F, 3, kPart, 4>(n, x, y, z, out);
      case 5:
        return Loop<F, 3, kPart, 5>(n, x, y, z, out);
      case 6:
        return Loop<F, 3, kPart, 6>(n, x, y, z, out);
      default:
        return Loop<F, 3, kPart, 7>(n, x, y, z, out);
    }
  }
}

}  // namespace

extern const ElementwiseKernel kElementwiseKernels[][4] = {
#define OP1(Name, ...) {Kernel<Name##Formula, 1, 0>, Kernel<Name##Formula, 1, 1>, nullptr, nullptr},
#define OP2(Name, ...) \
  {Kernel<Name##Formula, 2, 0>, Kernel<Name##Formula, 2, 1>, Kernel<Name##Formula, 2, 2>, nullptr},
#define OP3(Name, ...)                                                                    \
  {Kernel<Name##Formula, 3, 0>, Kernel<Name##Formula, 3, 1>, Kernel<Name##Formula, 3, 2>, \
   Kernel<Name##Formula, 3, 3>},
#include "graph/ops.def"
};

}  // namespace calotype::CALOTYPE_ISA
