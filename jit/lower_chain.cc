// Chains: a norm is a sum, a sum of squares and a loop. Each passes over all rows; where a row does
// not fit into the cache with all others, that is three times the traffic, and each is a step that
// threads begin together. One kernel that does all of it row by row reads the row once.
#include <algorithm>
#include <optional>

#include "jit/lower.h"

namespace calotype::jit {

namespace {

constexpr int64_t kFewestTurns = 16;     // of the chain's loop: threads share them
constexpr int64_t kFewestElements = 64;  // of the longest link in one turn: vectors worth a loop
// As many rows in one turn as keep within a part of a level-1 cache: the sums of several rows run
// side by side, where one row alone would wait for each of its sums.
constexpr int64_t kMostElements = 4096;
constexpr size_t kMostLinks = 8;

// An operand of a link, the buffer that it lies in, and the elements that one turn touches.
struct Access {
  Operand operand;
  int buffer;
  bool written;
  int64_t low, high;
};

struct Link {
  ChainSpec::Link spec;
  std::vector<Access> accesses;
  int64_t elements = 1;  // of one turn
};

void Extend(Access& access, const std::vector<int64_t>& extents, size_t first) {
  for (size_t d = 0; d < extents.size(); ++d) {
    int64_t reach = (extents[d] - 1) * access.operand.strides[first + d];
    (reach < 0 ? access.low : access.high) += reach;
  }
}

// Moves `turns` parts of dimension d out of the operand's loops.
void TakeOut(Operand& operand, size_t d, int64_t rest) {
  operand.chain = rest * operand.strides[d];
  if (rest == 1) operand.strides.erase(operand.strides.begin() + static_cast<int64_t>(d));
}

// The step as a link of a chain over dimension d, cut into `turns` parts; nothing if a turn's
// elements would not lie apart from those of other turns.
std::optional<Link> MakeLink(const Step& step, size_t d, int64_t turns) {
  Link link;
  std::vector<int64_t> reduced;
  auto take = [&](std::vector<int64_t>& extents,
                  std::initializer_list<std::vector<Operand>*> lists) {
    const int64_t rest = extents[d] / turns;
    for (std::vector<Operand>* list : lists) {
      for (Operand& operand : *list) TakeOut(operand, d, rest);
    }
    extents[d] = rest;
    if (rest == 1) extents.erase(extents.begin() + static_cast<int64_t>(d));
  };
  auto add = [&](const std::vector<Operand>& operands, bool written,
                 const std::vector<int64_t>& extents, const std::vector<int64_t>& more) {
    for (const Operand& operand : operands) {
      Access access{operand, step.buffers[operand.pointer], written, operand.offset,
                    operand.offset};
      Extend(access, extents, 0);
      Extend(access, more, extents.size());
      link.accesses.push_back(std::move(access));
    }
  };
  if (const auto* loop = std::get_if<LoopSpec>(&step.spec)) {
    LoopSpec spec = *loop;
    take(spec.extents, {&spec.inputs, &spec.outputs});
    add(spec.inputs, false, spec.extents, {});
    add(spec.outputs, true, spec.extents, {});
    for (int64_t extent : spec.extents) link.elements *= extent;
    link.spec = std::move(spec);
  } else {
    ReduceSpec spec = std::get<ReduceSpec>(step.spec);
    take(spec.extents, {&spec.inputs, &spec.epilogue.operands, &spec.epilogue.outputs});
    add(spec.inputs, false, spec.extents, spec.reduced);
    add(spec.epilogue.operands, false, spec.extents, {});
    add(spec.epilogue.outputs, true, spec.extents, {});
    for (int64_t extent : spec.extents) link.elements *= extent;
    for (int64_t extent : spec.reduced) link.elements *= extent;
    link.spec = std::move(spec);
  }
  for (const Access& access : link.accesses) {
    const int64_t chain = std::abs(access.operand.chain);
    if (access.operand.dtype != DType::kF32) return {};
    if (chain == 0 ? access.written : access.high - access.low >= chain) return {};
  }
  return link;
}

// True if whatever one of the two writes and the other touches belongs to the same turn.
bool Apart(const Link& a, const Link& b) {
  for (const Access& x : a.accesses) {
    for (const Access& y : b.accesses) {
      if (x.buffer != y.buffer || !(x.written || y.written)) continue;
      const int64_t chain = x.operand.chain;
      if (chain == 0 || chain != y.operand.chain) return false;
      if (std::max(x.high, y.high) - std::min(x.low, y.low) >= std::abs(chain)) return false;
    }
  }
  return true;
}

bool ReadsWhatIsWritten(const Link& link, const std::vector<Link>& before) {
  for (const Link& earlier : before) {
    for (const Access& written : earlier.accesses) {
      if (!written.written) continue;
      for (const Access& read : link.accesses) {
        if (!read.written && read.buffer == written.buffer) return true;
      }
    }
  }
  return false;
}

const std::vector<int64_t>* ExtentsOf(const Step& step) {
  if (const auto* loop = std::get_if<LoopSpec>(&step.spec)) return &loop->extents;
  if (const auto* reduce = std::get_if<ReduceSpec>(&step.spec)) return &reduce->extents;
  return nullptr;
}

// The links that steps [first, ...) give as a chain of so many turns.
std::vector<Link> Follow(const std::vector<Step>& steps, size_t first, int64_t turns) {
  std::vector<Link> links;
  for (size_t s = first; s < steps.size() && links.size() < kMostLinks; ++s) {
    const std::vector<int64_t>* extents = ExtentsOf(steps[s]);
    if (extents == nullptr) break;
    std::optional<Link> link;
    for (size_t d = 0; d < extents->size() && !link; ++d) {
      if ((*extents)[d] % turns != 0) continue;
      link = MakeLink(steps[s], d, turns);
      if (!link || links.empty()) continue;
      const bool fits = ReadsWhatIsWritten(*link, links) &&
                        std::all_of(links.begin(), links.end(),
                                    [&](const Link& before) { return Apart(before, *link); });
      if (!fits) link.reset();
    }
    if (!link) break;
    links.push_back(std::move(*link));
  }
  return links;
}

Step Join(std::vector<Step>& steps, size_t first, std::vector<Link> links, int64_t turns) {
  Step chain;
  ChainSpec spec{turns, {}};
  for (size_t l = 0; l < links.size(); ++l) {
    Step& step = steps[first + l];
    // The pointers of a link number the buffers of its step, those of the chain all of them.
    std::vector<int> number;
    for (int buffer : step.buffers) {
      auto it = std::find(chain.buffers.begin(), chain.buffers.end(), buffer);
      number.push_back(static_cast<int>(it - chain.buffers.begin()));
      if (it == chain.buffers.end()) chain.buffers.push_back(buffer);
    }
    KernelSpec single = ChainSpec{1, {std::move(links[l].spec)}};
    ForEachOperand(single,
                   [&](Operand& operand, bool) { operand.pointer = number[operand.pointer]; });
    spec.links.push_back(std::move(std::get<ChainSpec>(single).links[0]));
    for (auto& result : step.results) chain.results.push_back(std::move(result));
    chain.label += chain.label.empty() ? step.label : ", " + step.label;
  }
  chain.spec = std::move(spec);
  return chain;
}

void ChainSteps(std::vector<Step>& steps) {
  std::vector<Step> result;
  for (size_t s = 0; s < steps.size();) {
    std::vector<Link> best;
    int64_t best_turns = 0;
    std::vector<int64_t> candidates;
    for (size_t t = s; t < std::min(s + 2, steps.size()); ++t) {
      const std::vector<int64_t>* extents = ExtentsOf(steps[t]);
      if (extents == nullptr) break;
      candidates.insert(candidates.end(), extents->begin(), extents->end());
    }
    for (int64_t turns : candidates) {
      if (turns < kFewestTurns || turns == best_turns) continue;
      std::vector<Link> links = Follow(steps, s, turns);
      if (std::make_pair(links.size(), turns) <= std::make_pair(best.size(), best_turns)) continue;
      best = std::move(links);
      best_turns = turns;
    }
    int64_t elements = 0;
    for (const Link& link : best) elements = std::max(elements, link.elements);
    if (best.size() < 2 || elements < kFewestElements) {
      result.push_back(std::move(steps[s++]));
      continue;
    }
    const size_t count = best.size();
    for (int64_t rows = kMostElements / elements; rows > 1; --rows) {
      if (best_turns % rows != 0 || best_turns / rows < kFewestTurns) continue;
      std::vector<Link> fewer = Follow(steps, s, best_turns / rows);
      if (fewer.size() < count) continue;
      fewer.resize(count);
      best = std::move(fewer);
      best_turns /= rows;
      break;
    }
    result.push_back(Join(steps, s, std::move(best), best_turns));
    s += count;
  }
  steps = std::move(result);
}

}  // namespace

void ChainSteps(LoweredProgram& program) { ChainSteps(program.steps); }

}  // namespace calotype::jit
