// Attention with explicit scores, for processors and layers that need the weights themselves.
#pragma once

#include <functional>

#include "graph/functions.h"

namespace calotype {

struct ExplicitAttentionResult {
  Value out;      // [B, L, H*Dv]
  Value weights;  // [B, H, L, S]: softmax(scale q k^T + mask), before edit and dropout
};
struct ExplicitAttentionOptions {
  bool causal = false;  // query i sees keys j <= i
  double dropout = 0;   // drops weights with the mask that the fused Attention op draws
  int64_t stream = 0;   // of the random numbers
  Value seed = {};      // i64[1], needed for a dropout
  std::function<Value(Value weights)> edit = {};  // gives the weights that are used
};
// The same function as the fused Attention op in plain ops; stores the L x S weights. q [B, L,
// H*D], k, v [B or 1, S, H*D]; mask broadcasts to [B, H, L, S].
ExplicitAttentionResult ExplicitAttention(Value q, Value k, Value v, int64_t heads, double scale,
                                          Value mask, const ExplicitAttentionOptions& options = {});

// The same for slice_size rows at a time of the batch * heads rows (the last slice may be smaller),
// one slice after the other, so that only one slice's scores exist at a time; [B, L, H*D].
Value SlicedAttention(Value q, Value k, Value v, int64_t heads, double scale, Value mask,
                      int64_t slice_size);

// Pictures as tokens and back: [B, C, H, W] <-> [B, H*W, C].
Value PictureToTokens(Value x);
Value TokensToPicture(Value tokens, int64_t height, int64_t width);

}  // namespace calotype
