// Internal to core/fma_peak.cc: the loop, one copy for each instruction-set level.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace calotype {

struct FmaLoop {
  int width;
  bool fused;
  double flop;                   // of one round
  float (*run)(int64_t rounds);  // the result depends on every operation
};

CALOTYPE_DECLARE_ISA(extern const FmaLoop kFmaLoop)

}  // namespace calotype
