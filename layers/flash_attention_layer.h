// FlashAttentionLayer: self-attention over long sequences in memory that grows with the length, not
// with its square (Dao et al. 2022, arXiv:2205.14135).
#pragma once

#include <optional>
#include <string>

#include "layers/linear.h"

namespace calotype::nn {

struct FlashAttentionConfig {
  // Queries and keys that the eager kernel handles at a time. The result is the same up to
  // rounding. Without effect where the whole matrix of weights is formed (see the next fields).
  int64_t block_size_q = 64, block_size_kv = 64;
  bool use_causal_mask = false;    // token i sees tokens j <= i
  double dropout_probability = 0;  // of an attention weight, in training; in [0, 1)
  std::optional<double> scale_factor = std::nullopt;  // of the scores; 1/sqrt(head dimension)
  // True: Backward computes the weights again, tile by tile. False: training keeps all of them,
  // [B, heads, S, S], which spends memory to save that work.
  bool recompute_in_backward = true;
  // Adds the weights [B, heads, S, S] (rows sum to 1, before dropout) as a second output.
  bool return_attention_weights = false;

  static FlashAttentionConfig Default() { return {}; }
  static FlashAttentionConfig Causal() { return {.use_causal_mask = true}; }
  static FlashAttentionConfig MemoryEfficient() {
    return {.block_size_q = 32, .block_size_kv = 32};
  }
  // Larger tiles, weights kept for Backward.
  static FlashAttentionConfig HighPerformance() {
    return {.block_size_q = 128, .block_size_kv = 128, .recompute_in_backward = false};
  }
};

// Inputs: input [B, S, E] or a picture [B, E, H, W] (S = H W, row by row); seed i64[1], in training
// with dropout only, else absent or unused: equal seeds drop equal weights. Outputs: y of the
// input's shape, and the weights if the configuration asks for them:
//   Q, K, V = x to_{q,k,v}^T;  per head A = softmax(scale Q K^T [causal]), O = dropout(A) V;
//   y = activation(O to_out.0^T + bias)
// Parameters in flat order: to_q.weight, to_k.weight, to_v.weight, to_out.0.weight, each [E, E],
// and to_out.0.bias [E].
class FlashAttentionLayer : public Layer {
 public:
  // sequence_length: the length that ExportGraph declares; Forward takes any. activation: see
  // Activate. Errors: ValueError unless the sizes are positive, head_count divides
  // embedding_dimension, and the configuration is in range.
  FlashAttentionLayer(int64_t sequence_length, int64_t embedding_dimension, int64_t head_count,
                      FlashAttentionConfig config = FlashAttentionConfig::Default(),
                      std::string activation = "identity");

  const FlashAttentionConfig& config() const { return config_; }
  // The weight matrices [E, E], in torch order [out, in].
  ParameterPtr GetQueryWeights() { return to_q_->FindParameter("weight"); }
  ParameterPtr GetKeyWeights() { return to_k_->FindParameter("weight"); }
  ParameterPtr GetValueWeights() { return to_v_->FindParameter("weight"); }
  ParameterPtr GetOutputWeights() { return to_out_->FindParameter("weight"); }

  // The graph with the declared input "input" [batch, sequence_length, E], and "seed" where it is
  // used.
  ComputationGraph ExportGraph(int64_t batch = 1);

  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  std::map<std::string, std::string> GetDiagnostics() const override;

 private:
  bool drops() const { return training() && config_.dropout_probability > 0; }

  int64_t sequence_length_, embedding_dimension_, head_count_;
  FlashAttentionConfig config_;
  std::string activation_;
  double scale_;
  Linear *to_q_, *to_k_, *to_v_, *to_out_;
};

}  // namespace calotype::nn
