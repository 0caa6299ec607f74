#include "layers/attention_math.h"

#include <algorithm>

namespace calotype {

namespace {

// [B, T, H*D] -> [B, H, T, D]
Value SplitHeads(Value x, int64_t heads) {
  return Permute(Reshape(x, {x.dim(0), x.dim(1), heads, x.dim(2) / heads}), {0, 2, 1, 3});
}

}  // namespace

ExplicitAttentionResult ExplicitAttention(Value q, Value k, Value v, int64_t heads, double scale,
                                          Value mask, const ExplicitAttentionOptions& options) {
  int64_t tokens = q.dim(1), keys = k.dim(1);
  Value scores = MatMul(SplitHeads(q, heads), SplitHeads(k, heads), false, true);
  if (scale != 1) scores = scores * static_cast<float>(scale);
  if (mask.defined()) scores = scores + mask;
  if (options.causal) {
    std::vector<float> row(tokens), column(keys);
    for (int64_t i = 0; i < tokens; ++i) row[i] = static_cast<float>(i);
    for (int64_t j = 0; j < keys; ++j) column[j] = static_cast<float>(j);
    ComputationGraph& graph = *q.graph;
    Value visible = LessOrEqual(graph.Constant(Tensor::From({1, keys}, column)),
                                graph.Constant(Tensor::From({tokens, 1}, row)));
    // exp(-1e30 - max) is exactly 0, as it would be for -inf.
    scores = Select(visible, scores, graph.Constant(-1e30f));
  }
  Value weights = Softmax(scores, -1);
  Value used = options.edit ? options.edit(weights) : weights;
  if (options.dropout > 0) {
    Check(options.seed.defined(), "attention: a dropout of {} needs a seed", options.dropout);
    auto drop = static_cast<float>(options.dropout);
    Value keep = LessOrEqual(q.graph->Constant(drop),
                             PhiloxUniform(options.seed, weights.shape(), options.stream));
    used = used * (keep / (1 - drop));
  }
  Value out = Permute(MatMul(used, SplitHeads(v, heads)), {0, 2, 1, 3});
  return {Reshape(out, {q.dim(0), tokens, v.dim(2)}), weights};
}

Value SlicedAttention(Value q, Value k, Value v, int64_t heads, double scale, Value mask,
                      int64_t slice_size) {
  int64_t batch = q.dim(0), rows = batch * heads;
  // [rows, tokens, D], row b * heads + h.
  auto split = [&](Value x) {
    Value y = SplitHeads(x, heads);
    if (y.dim(0) != batch) y = Broadcast(y, {batch, heads, y.dim(2), y.dim(3)});
    return Reshape(y, {rows, y.dim(2), y.dim(3)});
  };
  // The scale goes to the queries: the scores are larger.
  q = split(scale != 1 ? q * static_cast<float>(scale) : q);
  k = split(k);
  v = split(v);
  if (mask.defined()) mask = Reshape(mask, {mask.dim(0) * mask.dim(1), mask.dim(2), mask.dim(3)});
  std::vector<Value> slices;
  for (int64_t begin = 0; begin < rows; begin += slice_size) {
    int64_t count = std::min(slice_size, rows - begin);
    Value scores = MatMul(Slice(q, 0, begin, count), Slice(k, 0, begin, count), false, true);
    if (mask.defined()) {
      std::vector<int64_t> mask_rows;  // one for each row, for each sample, or for all
      for (int64_t row = begin; row < begin + count; ++row) {
        mask_rows.push_back(mask.dim(0) == rows ? row : mask.dim(0) == 1 ? 0 : row / heads);
      }
      scores = scores + Gather(mask, q.graph->Constant(Tensor::From({count}, mask_rows)), 0);
    }
    slices.push_back(MatMul(Softmax(scores, -1), Slice(v, 0, begin, count)));
  }
  Value out = slices.size() == 1 ? slices[0] : Concat(slices, 0);
  out = Permute(Reshape(out, {batch, heads, out.dim(1), out.dim(2)}), {0, 2, 1, 3});
  return Reshape(out, {batch, out.dim(1), heads * out.dim(3)});
}

Value PictureToTokens(Value x) {
  return Permute(Reshape(x, {x.dim(0), x.dim(1), x.dim(2) * x.dim(3)}), {0, 2, 1});
}

Value TokensToPicture(Value tokens, int64_t height, int64_t width) {
  return Reshape(Permute(tokens, {0, 2, 1}), {tokens.dim(0), tokens.dim(2), height, width});
}

}  // namespace calotype
