#include "jit/kernel_info.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

namespace calotype::jit {

namespace {

double Product(const std::vector<int64_t>& extents) {
  double product = 1;
  for (int64_t extent : extents) product *= static_cast<double>(extent);
  return product;
}

// Without the extents of 1, which only hold a place.
std::string Text(const std::vector<int64_t>& extents) {
  std::vector<int64_t> shown;
  for (int64_t extent : extents) {
    if (extent != 1) shown.push_back(extent);
  }
  return fmt::format("[{}]", fmt::join(shown, " "));
}

KernelInfo Info(const LoopSpec& s) { return {"loop", Text(s.extents)}; }

KernelInfo Info(const ReduceSpec& s) {
  return {"reduction", fmt::format("{} over {}", Text(s.extents), Text(s.reduced))};
}

KernelInfo Info(const ChainSpec& s) {
  std::string text = fmt::format("{} times", s.extent);
  for (const ChainSpec::Link& link : s.links) {
    KernelInfo info = std::visit([](const auto& l) { return Info(l); }, link);
    text += fmt::format(", {} {}", info.kind, info.shape);
  }
  return {"chain", text};
}

KernelInfo Info(const ContractionSpec& s) {
  return {"contraction", fmt::format("m {} n {} k {}", Text(s.m), s.n, Text(s.k)),
          2 * Product(s.m) * static_cast<double>(s.n) * Product(s.k)};
}

// Two products with the scores, D and Dv wide, without the pairs that causality hides.
double Pairs(const AttentionSpec& s) {
  double pairs = 0;
  for (int64_t i = 0; i < s.queries; ++i) {
    pairs += static_cast<double>(s.causal ? std::min(i + 1, s.keys) : s.keys);
  }
  return pairs * static_cast<double>(s.batch * s.heads);
}

std::string Text(const AttentionSpec& s) {
  return fmt::format("{}x{} heads, {} queries, {} keys, {}{}{}{}", s.batch, s.heads, s.queries,
                     s.keys, s.head_dim,
                     s.value_dim == s.head_dim ? "" : fmt::format("/{}", s.value_dim),
                     s.causal ? ", causal" : "", s.has_mask ? ", mask" : "");
}

KernelInfo Info(const AttentionSpec& s) {
  return {"attention", Text(s), 2 * Pairs(s) * static_cast<double>(s.head_dim + s.value_dim)};
}

// The scores again, and dq, dk over D; dp and dv over Dv.
KernelInfo Info(const AttentionGradientSpec& s) {
  const AttentionSpec& f = s.forward;
  return {"attention gradient", Text(f),
          2 * Pairs(f) * static_cast<double>(3 * f.head_dim + 2 * f.value_dim)};
}

KernelInfo Info(const GatherSpec& s) {
  return {"gather",
          fmt::format("{} {} of {} {}", Text(s.outer), Text(s.index), s.axis_size, Text(s.inner))};
}

KernelInfo Info(const ScatterAddSpec& s) {
  return {"scatter",
          fmt::format("{} {} of {} {}", Text(s.outer), Text(s.index), s.axis_size, Text(s.inner))};
}

KernelInfo Info(const PhiloxSpec& s) { return {"random", fmt::format("[{}]", s.elements)}; }

}  // namespace

KernelInfo DescribeKernel(const KernelSpec& spec) {
  return std::visit([](const auto& s) { return Info(s); }, spec);
}

}  // namespace calotype::jit
