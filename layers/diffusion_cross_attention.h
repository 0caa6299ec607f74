// DiffusionCrossAttention: how a picture reads its prompt. Every position of the picture asks the
// tokens of the context; without a context the picture attends to itself.
#pragma once

#include "layers/linear.h"

namespace calotype::nn {

// Inputs: input [B, query_dim, H, W] or [B, S, query_dim]; context [B or 1, L, context_dim]
// (optional: the input itself, if query_dim = context_dim). Result of the input's shape, with h =
// num_heads and d = query_dim / h:
//   Q = x to_q^T, K = c to_k^T, V = c to_v^T;  per head A = softmax(Q K^T / sqrt(d)), O = A V;
//   y = O to_out.0^T + bias
// No norm and no residual; H and W are free. Parameters in flat order: to_q.weight [q, q],
// to_k.weight [q, c], to_v.weight [q, c], to_out.0.weight [q, q], to_out.0.bias [q]. The scores are
// not stored.
class DiffusionCrossAttention : public Layer {
 public:
  // spatial_size: side of the pictures that ExportGraph declares. Errors: ValueError unless all are
  // positive and num_heads divides query_dim.
  DiffusionCrossAttention(int64_t query_dim, int64_t context_dim, int64_t num_heads = 8,
                          int64_t spatial_size = 64);

  // Forward(x) is the base's; this is Forward({x, context}).
  Tensor ForwardWithContext(const Tensor& x, const Tensor& context) {
    return Forward({x, context});
  }
  // The graph with the declared inputs "input" [batch, query_dim, spatial_size, spatial_size] and
  // "context" [batch, context_tokens, context_dim]; without "context" if context_tokens is 0.
  ComputationGraph ExportGraph(int64_t batch = 1, int64_t context_tokens = 77);

  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  std::map<std::string, std::string> GetDiagnostics() const override;

 private:
  int64_t query_dim_, context_dim_, num_heads_, spatial_size_;
  Linear *to_q_, *to_k_, *to_v_, *to_out_;
};

}  // namespace calotype::nn
