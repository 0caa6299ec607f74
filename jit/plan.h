// The memory plan: where the buffers of a lowered program lie in one arena. A buffer lives from the
// first to the last step that touches it; buffers that live at the same time do not overlap.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "jit/lower.h"

namespace calotype::jit {

struct MemoryPlan {
  int64_t arena_bytes = 0;
  int64_t max_live_bytes = 0;    // the least that any plan can need
  int64_t persistent_bytes = 0;  // packed weights and other results of the prepare steps
  int64_t derived_bytes = 0;     // results of the derive steps
  // Parts of the arena, offset and bytes, to be cleared before the first run.
  std::vector<std::pair<int64_t, int64_t>> zeros;
};

// Sets the offsets of the arena, persistent and derived buffers: greedily by size, each at the
// lowest offset that is free during its life. Offsets are multiples of 64 bytes. Errors:
// OutOfMemoryError if sizes overflow.
MemoryPlan PlanMemory(LoweredProgram& program);

}  // namespace calotype::jit
