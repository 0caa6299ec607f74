// The formulas of ops.def as templates over the scalar kinds of core/scalar.h:
// SiluFormula::Apply(x).
#pragma once

#include "core/scalar.h"

namespace calotype::scalar {

#define OP1(Name, formula, ...)              \
  struct Name##Formula {                     \
    template <class X>                       \
    CALOTYPE_INLINE static auto Apply(X x) { \
      return formula;                        \
    }                                        \
  };
#define OP2(Name, formula, ...)                   \
  struct Name##Formula {                          \
    template <class X, class Y>                   \
    CALOTYPE_INLINE static auto Apply(X x, Y y) { \
      return formula;                             \
    }                                             \
  };
#define OP3(Name, formula, ...)                        \
  struct Name##Formula {                               \
    template <class X, class Y, class Z>               \
    CALOTYPE_INLINE static auto Apply(X x, Y y, Z z) { \
      return formula;                                  \
    }                                                  \
  };
#include "graph/ops.def"

}  // namespace calotype::scalar
