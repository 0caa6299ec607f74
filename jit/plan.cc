#include "jit/plan.h"

#include <algorithm>
#include <map>
#include <string_view>
#include <vector>

namespace calotype::jit {

namespace {

constexpr int64_t kAlign = 64;

int64_t Bytes(const Buffer& buffer) {
  int64_t bytes = CheckedMul(buffer.elements, DTypeSize(buffer.dtype), "memory plan");
  return CheckedAdd(bytes, kAlign - 1, "memory plan") / kAlign * kAlign;
}

struct Life {
  std::vector<int> buffers;
  int first, last;
  int64_t bytes;
};

// Buffers whose zeros last: each set of them shares one place for the whole run, one after the
// other.
std::vector<Life> SharedPlaces(const LoweredProgram& program, std::vector<Life> lives) {
  const int end = static_cast<int>(program.steps.size()) - 1;
  std::stable_sort(lives.begin(), lives.end(),
                   [](const Life& a, const Life& b) { return a.first < b.first; });
  std::multimap<std::string_view, std::pair<int, Life>> places;  // text -> last step so far
  for (const Life& life : lives) {
    const std::string& zeros = program.buffers[life.buffers[0]].zeros;
    auto [it, stop] = places.equal_range(zeros);
    while (it != stop && it->second.first >= life.first) ++it;
    if (it == stop) {
      places.insert({zeros, {life.last, {life.buffers, 0, end, life.bytes}}});
      continue;
    }
    it->second.first = life.last;
    it->second.second.buffers.push_back(life.buffers[0]);
  }
  std::vector<Life> shared;
  for (auto& [zeros, place] : places) shared.push_back(std::move(place.second));
  return shared;
}

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
  std::vector<Life> lives, with_zeros;
  for (size_t b = 0; b < program.buffers.size(); ++b) {
    Buffer& buffer = program.buffers[b];
    if (buffer.storage == Storage::kPersistent || buffer.storage == Storage::kDerived) {
      int64_t& bytes =
          buffer.storage == Storage::kPersistent ? plan.persistent_bytes : plan.derived_bytes;
      buffer.offset = bytes;
      bytes = CheckedAdd(bytes, Bytes(buffer), "memory plan");
    }
    if (buffer.storage != Storage::kArena || first[b] < 0) continue;
    (buffer.zeros.empty() ? lives : with_zeros)
        .push_back({{static_cast<int>(b)}, first[b], last[b], Bytes(buffer)});
  }
  for (Life& life : SharedPlaces(program, with_zeros)) lives.push_back(std::move(life));

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
    for (int buffer : life.buffers) program.buffers[buffer].offset = offset;
    if (!program.buffers[life.buffers[0]].zeros.empty()) {
      plan.zeros.emplace_back(offset, life.bytes);
    }
    auto at = std::upper_bound(placed.begin(), placed.end(), offset,
                               [](int64_t x, const auto& p) { return x < p.first; });
    placed.insert(at, {offset, life});
    plan.arena_bytes = std::max(plan.arena_bytes, CheckedAdd(offset, life.bytes, "memory plan"));
  }
  return plan;
}

}  // namespace calotype::jit
