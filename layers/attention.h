// Attention of diffusers: the projections and norms of one attention module, and a processor that
// says how queries, keys and values meet. Processors are interchangeable functions that build
// graph.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "layers/linear.h"
#include "layers/norm.h"

namespace calotype::nn {

class Attention;

// What a processor is given. encoder_hidden_states and attention_mask may be undefined.
struct AttentionInputs {
  Value hidden_states;          // [B, T, query_dim] or a picture [B, query_dim, H, W]
  Value encoder_hidden_states;  // [B or 1, S, cross_attention_dim]; absent: self-attention
  Value attention_mask;         // [B or B*heads, 1 or T, S], added to the scaled scores
};

struct AttentionProcessor {
  std::string_view name;  // diffusers' class name
  Value (*build)(Attention& attention, const AttentionInputs& inputs);
  // Throws UnsupportedError if the processor cannot serve a module with these options.
  void (*check)(const Attention& attention);
};
// "AttnProcessor" (explicit scores: product, softmax, product) and "AttnProcessor2_0" (one fused
// call that never stores the scores). Errors: UnsupportedError for another name, listing the known
// ones.
const AttentionProcessor& FindAttentionProcessor(std::string_view name);
std::vector<std::string_view> AttentionProcessorNames();

// Inputs: hidden_states, encoder_hidden_states (optional), attention_mask (optional), see
// AttentionInputs. Result: of the shape of hidden_states (width out_dim where that is given):
//   q = to_q(group_norm(x)), k = to_k(e), v = to_v(e) with e = norm_cross(encoder_hidden_states) or
//   x per head of width dim_head: o = softmax(scale norm_q(q) norm_k(k)^T + mask) v y =
//   (to_out.0(o) + (residual_connection ? x : 0)) / rescale_output_factor
class Attention : public Layer {
 public:
  struct Options {
    int64_t query_dim = 0;
    int64_t cross_attention_dim = 0;  // 0: query_dim, self-attention
    int64_t heads = 8, dim_head = 64;
    double dropout = 0;  // only 0 is supported
    bool bias = false;   // of to_q, to_k, to_v
    // All arithmetic is float32 here, so the two upcasts to float32 change nothing.
    bool upcast_attention = false, upcast_softmax = false;
    std::string cross_attention_norm = "";  // "", "layer_norm" or "group_norm"
    int64_t cross_attention_norm_num_groups = 32;
    std::string qk_norm = "";     // "" or "layer_norm" (over dim_head, eps)
    int64_t norm_num_groups = 0;  // 0: no group_norm
    bool out_bias = true;
    bool scale_qk = true;  // scale = 1/sqrt(dim_head), else 1
    double eps = 1e-5;     // of group_norm, norm_q, norm_k
    double rescale_output_factor = 1;
    bool residual_connection = false;
    int64_t out_dim = 0;         // 0: query_dim; otherwise also heads = out_dim / dim_head
    std::string processor = "";  // "": AttnProcessor2_0, or AttnProcessor without scale_qk
  };
  // Errors: ValueError for sizes out of range, UnsupportedError for an unsupported field.
  explicit Attention(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  std::map<std::string, std::string> GetDiagnostics() const override;

  void SetProcessor(std::string_view name);
  std::string_view processor() const { return processor_->name; }

  // ---- For processors.
  const Options& options() const { return options_; }
  double scale() const;  // factor of the scores
  // The mask as [B, 1 or heads, 1 or T, S], by diffusers' prepare_attention_mask: a mask whose last
  // size is not that of the keys has as many zeros appended as there are keys. Errors: ShapeError
  // if the result does not fit.
  Value PrepareMask(Value mask, int64_t batch, int64_t tokens, int64_t keys) const;
  // The tokens [B, T, query_dim] of the input, after group_norm.
  Value Tokens(Value hidden_states);
  // The keys' and values' source: norm_cross(encoder_hidden_states), or `tokens`.
  Value Source(Value encoder_hidden_states, Value tokens);
  Value Query(Value tokens);  // [B, T, heads * dim_head], after norm_q
  Value Key(Value source);    // [B, S, heads * dim_head], after norm_k
  Value ValueOf(Value source);
  // to_out.0, back to the shape of `hidden_states`, residual, rescale.
  Value Finish(Value attended, Value hidden_states);

 private:
  Value NormalizeHeads(LayerNorm* norm, Value x);

  Options options_;
  const AttentionProcessor* processor_ = nullptr;
  GroupNorm *group_norm_ = nullptr, *norm_cross_group_ = nullptr;
  LayerNorm *norm_cross_layer_ = nullptr, *norm_q_ = nullptr, *norm_k_ = nullptr;
  Linear *to_q_, *to_k_, *to_v_, *to_out_;
};

}  // namespace calotype::nn
