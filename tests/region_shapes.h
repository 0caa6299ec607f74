// What a random region is (region_fuzz.h makes graphs of them): anchor, sizes, and the links before
// and behind it. A region is plain data, a function of its seed alone; consecutive seeds run
// through the anchors, and each anchor through all sizes 1..2*tile of the dimension that lies in
// the vector lanes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/random.h"

namespace calotype::region_fuzz {

enum Anchor {
  kMatMul,
  kMatMulTransposed,
  kMatMulBatched,
  kMatMulGradients,
  kConv3x3,
  kConv3x3Stride2,
  kConv1x1,
  kConvAny,
  kConvUpsampled,
  kConvGradients,
  kSelfAttention,
  kCrossAttention,
  kAttentionGradients,
  kReduceRows,
  kReduceColumns,
  kGroupNorm,
  kLayerNorm,
  kSoftmax,
  kNormGradients,
  kElementwise,
  kAnchors
};

inline constexpr std::array<std::string_view, kAnchors> kAnchorNames = {"MatMul",
                                                                        "MatMulTransposed",
                                                                        "MatMulBatched",
                                                                        "MatMulGradients",
                                                                        "Conv3x3",
                                                                        "Conv3x3Stride2",
                                                                        "Conv1x1",
                                                                        "ConvAny",
                                                                        "ConvUpsampled",
                                                                        "ConvGradients",
                                                                        "SelfAttention",
                                                                        "CrossAttention",
                                                                        "AttentionGradients",
                                                                        "ReduceRows",
                                                                        "ReduceColumns",
                                                                        "GroupNorm",
                                                                        "LayerNorm",
                                                                        "Softmax",
                                                                        "NormGradients",
                                                                        "Elementwise"};

// One link of a prologue or an epilogue; `seed` decides its details.
struct Link {
  enum Kind : uint8_t {
    // Prologue and epilogue.
    kUnary,
    kScale,
    kBinary,  // with a leaf that may repeat along some axes
    kGroupNorm,
    kLayerNorm,
    kSoftmax,
    kPermute,
    kReshape,
    kSlice,
    kPad,
    kConcat,
    kContraction,
    // The same, with several views of one value.
    kMeeting,  // element by element: a value and its part, its transpose, itself moved or rotated
    kParts,    // parts that may overlap, combined or side by side
    kBeside,   // a value beside itself or its part
    kReduced,  // a value and a reduction of it
    kGram,     // products of its rows with its rows
    // Prologue only.
    kBroadcast,
    kGather,
    kUpsample,
    // Epilogue only.
    kBias,
    kTimeEmbedding,
    kResidual,
    kGated,       // half of the channels times an activation of the other half
    kStatistics,  // sums of the result as further outputs
    kOutput,      // what is there so far is a further output
    kTwice,       // two readers that meet again
    kUpdate,      // a parameter is read and written
  } kind;
  uint64_t seed;
};

struct Region {
  uint64_t seed = 0;
  Anchor anchor = kMatMul;
  bool exact = false;     // small integers and exact operations: no rounding at all
  bool large = false;     // too large for the reference; run for thread counts only
  bool winograd = false;  // allowed
  std::vector<int64_t> sizes;
  std::vector<Link> prologue, epilogue;
};

// The region of a seed.
inline Region MakeRegion(uint64_t seed) {
  Region r;
  r.seed = seed;
  r.anchor = static_cast<Anchor>(seed % kAnchors);
  int64_t turn = static_cast<int64_t>(seed / kAnchors);
  if (turn % 2 == 1) {  // the anchors that take many kernels come half as often
    if (r.anchor == kConvUpsampled) r.anchor = kConv1x1;
    if (r.anchor == kConvGradients) r.anchor = kConv3x3;
    if (r.anchor == kAttentionGradients) r.anchor = kSelfAttention;
    if (r.anchor == kNormGradients) r.anchor = kMatMul;
  }
  Random random(seed, "region");
  auto between = [&](int64_t low, int64_t high) { return low + random.Integer(high - low + 1); };
  auto chance = [&](int percent) { return random.Integer(100) < percent; };
  constexpr int64_t kLanes = 97;  // a prime; twice the widest tile along the lanes is 96
  constexpr int64_t kRows = 28;   // twice the tallest tile
  // Neighbouring turns differ much, and 97 of them (or of every second one) see every size.
  int64_t lanes = 1 + 37 * turn % kLanes, rows = between(1, kRows), batch = between(1, 3);
  r.large = turn % 24 == 11;
  bool smooth = r.anchor == kSelfAttention || r.anchor == kCrossAttention ||
                r.anchor == kAttentionGradients || r.anchor == kGroupNorm ||
                r.anchor == kLayerNorm || r.anchor == kSoftmax || r.anchor == kNormGradients;
  r.exact = !smooth && chance(40);
  r.winograd = !r.exact && chance(60);
  int64_t grow = r.large ? between(2, 6) : 1, most = r.large ? 30'000'000 : 400'000;
  auto limit = [&](std::initializer_list<size_t> which, int64_t factor) {
    for (;;) {
      int64_t work = factor;
      size_t longest = *which.begin();
      for (size_t i : which) {
        work *= r.sizes[i];
        if (r.sizes[i] > r.sizes[longest]) longest = i;
      }
      if (work <= most || r.sizes[longest] == 1) return;
      // Not the dimension in the lanes, which comes last in `which`, unless it alone is too large.
      size_t cut = *(which.begin());
      for (size_t i : which) {
        if (i != *(which.end() - 1) && r.sizes[i] > r.sizes[cut]) cut = i;
      }
      if (r.sizes[cut] == 1) cut = longest;
      r.sizes[cut] = (r.sizes[cut] + 1) / 2;
    }
  };
  switch (r.anchor) {
    case kMatMul:
    case kMatMulTransposed:
    case kMatMulBatched:
    case kMatMulGradients:
      if (chance(15)) rows = between(1, 200);
      r.sizes = {batch, rows * grow * grow, lanes, between(1, chance(70) ? 40 : 130) * grow};
      if (chance(25)) std::swap(r.sizes[1], r.sizes[2]);
      limit({0, 1, 3, 2}, 1);
      break;
    case kConv3x3:
    case kConv3x3Stride2:
    case kConv1x1:
    case kConvAny:
    case kConvUpsampled:
    case kConvGradients:
      r.sizes = {batch, between(1, 10) * grow, between(1, 20) * grow, between(1, 40), lanes};
      if (chance(20)) std::swap(r.sizes[3], r.sizes[4]);
      if (r.winograd && chance(50)) {  // what Winograd's form takes
        r.sizes[1] = 4 * between(1, 3) * grow;
        r.sizes[2] = 4 * between(2, 3) * grow;
        r.sizes[3] = between(16, 40);
        r.sizes[4] = std::max<int64_t>(r.sizes[4], 16);
        most *= 4;
      }
      limit({0, 1, 2, 3, 4}, 9);
      break;
    case kSelfAttention:
    case kCrossAttention:
    case kAttentionGradients:
      r.sizes = {batch, lanes * grow, between(1, 100) * grow, between(1, 4), between(1, 48)};
      if (r.anchor != kCrossAttention) r.sizes[2] = 1;
      limit({0, 2, 3, 4, 1}, r.anchor == kCrossAttention ? 2 : 2 * lanes * grow);
      break;
    default:
      r.sizes = {batch, chance(80) ? rows : between(1, 300), lanes * grow * grow};
      if (r.large) r.sizes[1] = std::max<int64_t>(rows, 16) * grow * grow;
      if (chance(30)) std::swap(r.sizes[1], r.sizes[2]);
      most = r.large ? 1'000'000 : 30'000;
      limit({0, 1, 2}, 1);
  }
  auto link = [&](std::initializer_list<Link::Kind> kinds) {
    Link::Kind kind = kinds.begin()[random.Integer(static_cast<int64_t>(kinds.size()))];
    return Link{kind, (static_cast<uint64_t>(random.Next()) << 32) | random.Next()};
  };
  int64_t before = (chance(65) ? 1 : 0) + (chance(25) ? 1 : 0), after = before == 0;
  if (r.anchor == kElementwise) before += 2;
  while (after < 3 && chance(48)) ++after;
  for (int64_t i = 0; i < before; ++i) {
    r.prologue.push_back(link(
        {Link::kUnary,     Link::kUnary,       Link::kScale,     Link::kBinary,  Link::kBinary,
         Link::kGroupNorm, Link::kGroupNorm,   Link::kLayerNorm, Link::kSoftmax, Link::kPermute,
         Link::kPermute,   Link::kReshape,     Link::kSlice,     Link::kPad,     Link::kConcat,
         Link::kConcat,    Link::kContraction, Link::kBroadcast, Link::kGather,  Link::kUpsample,
         Link::kMeeting,   Link::kMeeting,     Link::kMeeting,   Link::kMeeting, Link::kParts,
         Link::kParts,     Link::kBeside,      Link::kReduced,   Link::kReduced, Link::kGram}));
  }
  for (int64_t i = 0; i < after; ++i) {
    r.epilogue.push_back(
        link({Link::kUnary,         Link::kUnary,      Link::kScale,    Link::kBinary,
              Link::kGroupNorm,     Link::kLayerNorm,  Link::kSoftmax,  Link::kPermute,
              Link::kReshape,       Link::kSlice,      Link::kPad,      Link::kConcat,
              Link::kContraction,   Link::kBias,       Link::kBias,     Link::kTimeEmbedding,
              Link::kTimeEmbedding, Link::kResidual,   Link::kResidual, Link::kGated,
              Link::kStatistics,    Link::kStatistics, Link::kOutput,   Link::kTwice,
              Link::kMeeting,       Link::kMeeting,    Link::kMeeting,  Link::kParts,
              Link::kParts,         Link::kBeside,     Link::kReduced,  Link::kReduced,
              Link::kGram,          Link::kUpdate,     Link::kUpdate}));
  }
  return r;
}

}  // namespace calotype::region_fuzz
