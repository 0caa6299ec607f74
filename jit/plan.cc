#include "jit/plan.h"

#include <algorithm>
#include <vector>

namespace calotype::jit {

namespace {

constexpr int64_t kAlign = 64;

int64_t Bytes(const Buffer& buffer) {
  int64_t bytes = CheckedMul(buffer.elements, DTypeSize(buffer.dtype), "memory plan");
  return CheckedAdd(bytes, kAlign - 1, "memory plan") / kAlign * kAlign;
}

struct Life {
  int buffer;
  int first, last;
  int64_t bytes;
};

}  // namespace

MemoryPlan PlanMemory(LoweredProgram& program) {
  MemoryPlan plan;
  std::vector<int> first(program.buffers.size(), -1), last(program.buffers.size(), -1);
  for (size_t s = 0; s < program.steps.size(); ++s) {
    for (int buffer : program.steps[s].buffers) {
      if (first[buffer] < 0) first[buffer] = static_cast<int>(s);
      last[buffer] = static_cast<int>(s);
    }
  }
  std::vector<Life> lives;
  for (size_t b = 0; b < program.buffers.size(); ++b) {
    Buffer& buffer = program.buffers[b];
    if (buffer.storage == Storage::kPersistent || buffer.storage == Storage::kDerived) {
      int64_t& bytes =
          buffer.storage == Storage::kPersistent ? plan.persistent_bytes : plan.derived_bytes;
      buffer.offset = bytes;
      bytes = CheckedAdd(bytes, Bytes(buffer), "memory plan");
    }
    if (buffer.storage != Storage::kArena || first[b] < 0) continue;
    lives.push_back({static_cast<int>(b), first[b], last[b], Bytes(buffer)});
  }

  std::vector<int64_t> change(program.steps.size() + 1, 0);
  for (const Life& life : lives) {
    change[life.first] += life.bytes;
    change[life.last + 1] -= life.bytes;
  }
  int64_t live = 0;
  for (int64_t bytes : change) plan.max_live_bytes = std::max(plan.max_live_bytes, live += bytes);

  std::stable_sort(lives.begin(), lives.end(),
                   [](const Life& a, const Life& b) { return a.bytes > b.bytes; });
  std::vector<std::pair<int64_t, Life>> placed;  // by offset
  for (const Life& life : lives) {
    int64_t offset = 0;
    for (const auto& [start, other] : placed) {
      if (other.last < life.first || life.last < other.first) continue;
      if (offset + life.bytes <= start) break;
      offset = std::max(offset, start + other.bytes);
    }
    program.buffers[life.buffer].offset = offset;
    auto at = std::upper_bound(placed.begin(), placed.end(), offset,
                               [](int64_t x, const auto& p) { return x < p.first; });
    placed.insert(at, {offset, life});
    plan.arena_bytes = std::max(plan.arena_bytes, CheckedAdd(offset, life.bytes, "memory plan"));
  }
  return plan;
}

}  // namespace calotype::jit
