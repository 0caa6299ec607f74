// Scalar algebra: the functions that the formulas of graph/ops.def are written in, over four kinds
// of scalar S: float (eager kernels), double (reference), Sym (records a ScalarProgram for the JIT)
// and Dual<S> (derivatives). Float and Sym share the same polynomial approximations, written once
// over the primitives, so eager and compiled code give the same bits. Everything is always_inline:
// GCC does not vectorize callers otherwise, and the copies compiled for several instruction sets
// must not mix.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "core/program.h"

#define CALOTYPE_INLINE [[gnu::always_inline]] inline

namespace calotype::scalar {

// ---------------------------------------------------------------- float: the primitives

CALOTYPE_INLINE float Constant(float, double c) { return static_cast<float>(c); }
CALOTYPE_INLINE float Max(float x, float y) { return x > y ? x : (x != x ? x : y); }
CALOTYPE_INLINE float Min(float x, float y) { return x < y ? x : (x != x ? x : y); }
CALOTYPE_INLINE float Fabs(float x) { return __builtin_fabsf(x); }
CALOTYPE_INLINE float SquareRoot(float x) { return __builtin_sqrtf(x); }
CALOTYPE_INLINE float Floor(float x) { return __builtin_floorf(x); }
CALOTYPE_INLINE float Round(float x) { return __builtin_rintf(x); }
CALOTYPE_INLINE float LessThan(float x, float y) { return x < y ? 1.0f : 0.0f; }
CALOTYPE_INLINE float LessEqual(float x, float y) { return x <= y ? 1.0f : 0.0f; }
CALOTYPE_INLINE float EqualTo(float x, float y) { return x == y ? 1.0f : 0.0f; }
CALOTYPE_INLINE float Where(float m, float x, float y) { return m != 0.0f ? x : y; }
CALOTYPE_INLINE float Pow2(float n) {
  return __builtin_bit_cast(float, (static_cast<int32_t>(n) + 127) << 23);
}
CALOTYPE_INLINE float ExponentOf(float x) {
  return static_cast<float>((__builtin_bit_cast(int32_t, x) >> 23) - 127);
}
CALOTYPE_INLINE float MantissaOf(float x) {
  return __builtin_bit_cast(float, (__builtin_bit_cast(int32_t, x) & 0x7fffff) | 0x3f800000);
}

// ---------------------------------------------------------------- Sym: records the primitives

class Recorder;
struct Sym {
  Recorder* recorder = nullptr;
  int32_t id = -1;
};

// Collects instructions, sharing equal ones.
class Recorder {
 public:
  Sym Input(int number) { return Record({Primitive::kInput, number, 0, 0, 0}); }
  Sym Record(ScalarInstruction instruction) {
    for (size_t i = 0; i < program_.code.size(); ++i) {
      if (program_.code[i] == instruction) return {this, static_cast<int32_t>(i)};
    }
    program_.code.push_back(instruction);
    return {this, static_cast<int32_t>(program_.code.size()) - 1};
  }
  ScalarProgram Finish(int inputs, Sym result) {
    program_.inputs = inputs;
    program_.results = {result.id};
    return std::move(program_);
  }

 private:
  ScalarProgram program_;
};

inline Sym Constant(Sym x, double c) {
  return x.recorder->Record({Primitive::kConstant, 0, 0, 0, static_cast<float>(c)});
}
#define CALOTYPE_SYM1(Name, Kind) \
  inline Sym Name(Sym x) { return x.recorder->Record({Primitive::Kind, x.id, 0, 0, 0}); }
#define CALOTYPE_SYM2(Name, Kind) \
  inline Sym Name(Sym x, Sym y) { return x.recorder->Record({Primitive::Kind, x.id, y.id, 0, 0}); }
CALOTYPE_SYM2(operator+, kAdd)
CALOTYPE_SYM2(operator-, kSub)
CALOTYPE_SYM2(operator*, kMul)
CALOTYPE_SYM2(operator/, kDiv)
CALOTYPE_SYM2(Max, kMax)
CALOTYPE_SYM2(Min, kMin)
CALOTYPE_SYM1(operator-, kNeg)
CALOTYPE_SYM1(Fabs, kAbs)
CALOTYPE_SYM1(SquareRoot, kSqrt)
CALOTYPE_SYM1(Floor, kFloor)
CALOTYPE_SYM1(Round, kRound)
CALOTYPE_SYM2(LessThan, kLess)
CALOTYPE_SYM2(LessEqual, kLessEqual)
CALOTYPE_SYM2(EqualTo, kEqual)
CALOTYPE_SYM1(Pow2, kPow2)
CALOTYPE_SYM1(ExponentOf, kExponent)
CALOTYPE_SYM1(MantissaOf, kMantissa)
#undef CALOTYPE_SYM1
#undef CALOTYPE_SYM2
inline Sym Where(Sym m, Sym x, Sym y) {
  return m.recorder->Record({Primitive::kSelect, m.id, x.id, y.id, 0});
}

// ---------------------------------------------------------------- approximations over primitives

// The polynomial c[0] x^(n-1) + ... + c[n-1] by Horner's rule.
template <class S, class... C>
CALOTYPE_INLINE S Polynomial(S x, double first, C... rest) {
  S y = Constant(x, first);
  ((y = y * x + Constant(x, rest)), ...);
  return y;
}

// e^x within 2 ulp; overflows to inf, underflows through the denormals to 0, keeps NaN.
// Cody-Waite reduction and the Cephes polynomial (Moshier).
template <class S>
CALOTYPE_INLINE S ExponentialApprox(S x) {
  S t = Where(LessThan(x, Constant(x, -104)), Constant(x, -104), x);
  t = Where(LessThan(Constant(x, 89), t), Constant(x, 89), t);
  t = Where(EqualTo(x, x), t, Constant(x, 0));
  S n = Round(t * Constant(x, 1.44269504088896341));
  S r = t - n * Constant(x, 0.693359375) - n * Constant(x, -2.12194440e-4);
  S p = Polynomial(r, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                   1.6666665459e-1, 5.0000001201e-1);
  p = p * (r * r) + r + Constant(x, 1);
  S half = Floor(n * Constant(x, 0.5));
  p = p * Pow2(half) * Pow2(n - half);
  return Where(EqualTo(x, x), p, x);
}

// ln x within 2 ulp for x > 0 (denormals included); ln 0 = -inf, ln(negative) = NaN. Cephes
// (Moshier).
template <class S>
CALOTYPE_INLINE S LogarithmApprox(S x) {
  S tiny = LessThan(x, Constant(x, 1.17549435e-38));
  S y = Where(tiny, x * Constant(x, 8388608.0), x);
  S e = ExponentOf(y) - Where(tiny, Constant(x, 23), Constant(x, 0));
  S m = MantissaOf(y);
  S big = LessThan(Constant(x, 1.41421356), m);
  m = Where(big, m * Constant(x, 0.5), m);
  e = Where(big, e + Constant(x, 1), e);
  S f = m - Constant(x, 1);
  S z = f * f;
  S p = Polynomial(f, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1,
                   1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1,
                   3.3333331174e-1);
  p = p * f * z + e * Constant(x, -2.12194440e-4) - Constant(x, 0.5) * z;
  S result = f + p + e * Constant(x, 0.693359375);
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  result = Where(LessThan(x, Constant(x, kInf)), result, x);  // inf and NaN stay
  result = Where(EqualTo(x, Constant(x, 0)), Constant(x, -kInf), result);
  return Where(LessThan(x, Constant(x, 0)), Constant(x, kNaN), result);
}

// sin(x + quarter * pi/2) within 1.2e-7 absolute for |x| <= 8192.
template <class S>
CALOTYPE_INLINE S SineApprox(S x, double quarter) {
  S n = Round(x * Constant(x, 0.63661977236758134));
  S r = x - n * Constant(x, 1.5703125) - n * Constant(x, 4.837512969970703125e-4) -
        n * Constant(x, 7.54978995489188216e-8);
  S q = n + Constant(x, quarter);
  q = q - Constant(x, 4) * Floor(q * Constant(x, 0.25));  // 0, 1, 2 or 3
  S z = r * r;
  S s = Polynomial(z, -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1) * z * r + r;
  S c = Polynomial(z, 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2) * z * z -
        Constant(x, 0.5) * z + Constant(x, 1);
  S odd = q - Constant(x, 2) * Floor(q * Constant(x, 0.5));
  S y = Where(odd, c, s);
  return Where(LessThan(q, Constant(x, 2)), y, -y);
}

template <class S>
CALOTYPE_INLINE S HyperbolicTangentApprox(S x) {
  S a = Fabs(x);
  S z = x * x;
  S small = Polynomial(z, -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1,
                       -3.33332819422e-1) *
                z * x +
            x;
  S large = Constant(x, 1) - Constant(x, 2) / (ExponentialApprox(a + a) + Constant(x, 1));
  large = Where(LessThan(x, Constant(x, 0)), -large, large);
  return Where(LessThan(a, Constant(x, 0.625)), small, large);
}

// erf within 2e-7: a Taylor-like polynomial below 1, 1 - erfc by Cephes' rational forms above.
template <class S>
CALOTYPE_INLINE S ErrorFunctionApprox(S x) {
  S a = Fabs(x);
  S z = x * x;
  S small = x * Polynomial(z, 7.853861353153693e-5, -8.010193625184903e-4, 5.188327685732524e-3,
                           -2.685381193529856e-2, 1.128358514861418e-1, -3.761262582423300e-1,
                           1.128379165726710e+0);
  S b = Max(a, Constant(x, 1));
  S q = Constant(x, 1) / b;
  S w = q * q;
  S near = Polynomial(w, 2.326819970068386e-2, -1.387039388740657e-1, 3.687424674597105e-1,
                      -5.824733027278666e-1, 6.210004621745983e-1, -4.944515323274145e-1,
                      3.404879937665872e-1, -2.741127028184656e-1, 5.638259427386472e-1);
  S far = Polynomial(w, -1.047766399936249e+1, 1.297719955372516e+1, -7.495518717768503e+0,
                     2.921019019210786e+0, -1.015265279202700e+0, 4.218463358204948e-1,
                     -2.820767439740514e-1, 5.641895067754075e-1);
  S tail = ExponentialApprox(-z) * q * Where(LessThan(b, Constant(x, 2)), near, far);
  S large = Constant(x, 1) - tail;
  large = Where(LessThan(x, Constant(x, 0)), -large, large);
  return Where(LessThan(a, Constant(x, 1)), small, large);
}

#define CALOTYPE_APPROX(S)                                                        \
  CALOTYPE_INLINE S Exponential(S x) { return ExponentialApprox(x); }             \
  CALOTYPE_INLINE S Logarithm(S x) { return LogarithmApprox(x); }                 \
  CALOTYPE_INLINE S Sine(S x) { return SineApprox(x, 0); }                        \
  CALOTYPE_INLINE S Cosine(S x) { return SineApprox(x, 1); }                      \
  CALOTYPE_INLINE S HyperbolicTangent(S x) { return HyperbolicTangentApprox(x); } \
  CALOTYPE_INLINE S ErrorFunction(S x) { return ErrorFunctionApprox(x); }         \
  CALOTYPE_INLINE S Logistic(S x) { return Constant(x, 1) / (Constant(x, 1) + Exponential(-x)); }
CALOTYPE_APPROX(float)
CALOTYPE_APPROX(Sym)
#undef CALOTYPE_APPROX

// ---------------------------------------------------------------- double: the reference

inline double Constant(double, double c) { return c; }
inline double Max(double x, double y) { return x > y || x != x ? x : y; }
inline double Min(double x, double y) { return x < y || x != x ? x : y; }
inline double Fabs(double x) { return std::fabs(x); }
inline double SquareRoot(double x) { return std::sqrt(x); }
inline double LessThan(double x, double y) { return x < y; }
inline double LessEqual(double x, double y) { return x <= y; }
inline double EqualTo(double x, double y) { return x == y; }
inline double Where(double m, double x, double y) { return m != 0 ? x : y; }
inline double Exponential(double x) { return std::exp(x); }
inline double Logarithm(double x) { return std::log(x); }
inline double Sine(double x) { return std::sin(x); }
inline double Cosine(double x) { return std::cos(x); }
inline double HyperbolicTangent(double x) { return std::tanh(x); }
inline double ErrorFunction(double x) { return std::erf(x); }
inline double Logistic(double x) { return 1 / (1 + std::exp(-x)); }

// ---------------------------------------------------------------- Dual: derivative rules

// A derivative part is Zero, One or an S. Zero and One are types, so that what is structurally zero
// or one costs nothing and cannot meet an infinity.
struct Zero {};
struct One {};

CALOTYPE_INLINE Zero DerivativeTimes(auto, Zero) { return {}; }
template <class S>
CALOTYPE_INLINE S DerivativeTimes(S factor, One) {
  return factor;
}
template <class S>
CALOTYPE_INLINE S DerivativeTimes(S factor, S d) {
  return factor * d;
}

// The derivative part as an S; `like` says which recorder.
template <class S>
CALOTYPE_INLINE S AsScalar(S like, Zero) {
  return Constant(like, 0);
}
template <class S>
CALOTYPE_INLINE S AsScalar(S like, One) {
  return Constant(like, 1);
}
template <class S>
CALOTYPE_INLINE S AsScalar(S, S d) {
  return d;
}

template <class S>
CALOTYPE_INLINE Zero DerivativeSum(S, Zero, Zero) {
  return {};
}
template <class S, class D>
CALOTYPE_INLINE D DerivativeSum(S, Zero, D d) {
  return d;
}
template <class S, class D>
CALOTYPE_INLINE D DerivativeSum(S, D d, Zero) {
  return d;
}
template <class S, class D, class E>
CALOTYPE_INLINE S DerivativeSum(S like, D d, E e) {
  return AsScalar(like, d) + AsScalar(like, e);
}

CALOTYPE_INLINE Zero DerivativeNeg(auto, Zero) { return {}; }
template <class S, class D>
CALOTYPE_INLINE S DerivativeNeg(S like, D d) {
  return -AsScalar(like, d);
}

template <class S>
CALOTYPE_INLINE Zero DerivativeWhere(S, Zero, Zero) {
  return {};
}
template <class S, class D, class E>
CALOTYPE_INLINE S DerivativeWhere(S m, D d, E e) {
  return Where(m, AsScalar(m, d), AsScalar(m, e));
}

template <class S, class D>
struct Dual {
  S value;
  D derivative;
};
template <class S, class D>
CALOTYPE_INLINE Dual<S, D> MakeDual(S value, D derivative) {
  return {value, derivative};
}

#define CALOTYPE_X            \
  template <class S, class D> \
  CALOTYPE_INLINE auto
#define CALOTYPE_XY                    \
  template <class S, class D, class E> \
  CALOTYPE_INLINE auto
CALOTYPE_X Constant(Dual<S, D> x, double c) { return MakeDual(Constant(x.value, c), Zero{}); }
CALOTYPE_XY operator+(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(x.value + y.value, DerivativeSum(x.value, x.derivative, y.derivative));
}
CALOTYPE_XY operator-(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(x.value - y.value,
                  DerivativeSum(x.value, x.derivative, DerivativeNeg(x.value, y.derivative)));
}
CALOTYPE_XY operator*(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(x.value * y.value, DerivativeSum(x.value, DerivativeTimes(y.value, x.derivative),
                                                   DerivativeTimes(x.value, y.derivative)));
}
CALOTYPE_XY operator/(Dual<S, D> x, Dual<S, E> y) {
  S q = x.value / y.value, r = Constant(x.value, 1) / y.value;
  return MakeDual(q, DerivativeSum(x.value, DerivativeTimes(r, x.derivative),
                                   DerivativeTimes(-(q * r), y.derivative)));
}
CALOTYPE_X operator-(Dual<S, D> x) {
  return MakeDual(-x.value, DerivativeNeg(x.value, x.derivative));
}
// At a tie the gradient goes to the first argument.
CALOTYPE_XY Max(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(Max(x.value, y.value),
                  DerivativeWhere(LessEqual(y.value, x.value), x.derivative, y.derivative));
}
CALOTYPE_XY Min(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(Min(x.value, y.value),
                  DerivativeWhere(LessEqual(x.value, y.value), x.derivative, y.derivative));
}
CALOTYPE_XY LessThan(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(LessThan(x.value, y.value), Zero{});
}
CALOTYPE_XY LessEqual(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(LessEqual(x.value, y.value), Zero{});
}
CALOTYPE_XY EqualTo(Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(EqualTo(x.value, y.value), Zero{});
}
template <class S, class C, class D, class E>
CALOTYPE_INLINE auto Where(Dual<S, C> m, Dual<S, D> x, Dual<S, E> y) {
  return MakeDual(Where(m.value, x.value, y.value),
                  DerivativeWhere(m.value, x.derivative, y.derivative));
}
CALOTYPE_X Fabs(Dual<S, D> x) {
  S zero = Constant(x.value, 0);
  S sign = LessThan(zero, x.value) - LessThan(x.value, zero);
  return MakeDual(Fabs(x.value), DerivativeTimes(sign, x.derivative));
}
CALOTYPE_X SquareRoot(Dual<S, D> x) {
  S y = SquareRoot(x.value);
  return MakeDual(y, DerivativeTimes(Constant(y, 0.5) / y, x.derivative));
}
CALOTYPE_X Exponential(Dual<S, D> x) {
  S y = Exponential(x.value);
  return MakeDual(y, DerivativeTimes(y, x.derivative));
}
CALOTYPE_X Logarithm(Dual<S, D> x) {
  return MakeDual(Logarithm(x.value),
                  DerivativeTimes(Constant(x.value, 1) / x.value, x.derivative));
}
CALOTYPE_X Sine(Dual<S, D> x) {
  return MakeDual(Sine(x.value), DerivativeTimes(Cosine(x.value), x.derivative));
}
CALOTYPE_X Cosine(Dual<S, D> x) {
  return MakeDual(Cosine(x.value), DerivativeTimes(-Sine(x.value), x.derivative));
}
CALOTYPE_X HyperbolicTangent(Dual<S, D> x) {
  S y = HyperbolicTangent(x.value);
  return MakeDual(y, DerivativeTimes(Constant(y, 1) - y * y, x.derivative));
}
CALOTYPE_X ErrorFunction(Dual<S, D> x) {
  S slope = Constant(x.value, 1.1283791670955126) * Exponential(-(x.value * x.value));
  return MakeDual(ErrorFunction(x.value), DerivativeTimes(slope, x.derivative));
}
CALOTYPE_X Logistic(Dual<S, D> x) {
  S y = Logistic(x.value);
  return MakeDual(y, DerivativeTimes(y * (Constant(y, 1) - y), x.derivative));
}
#undef CALOTYPE_X
#undef CALOTYPE_XY

}  // namespace calotype::scalar
