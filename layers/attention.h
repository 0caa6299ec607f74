// Attention of diffusers: the projections and norms of one attention module, and a processor that
// says how queries, keys and values meet (attention_processors.h).
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "layers/attention_processors.h"
#include "layers/conv2d.h"
#include "layers/linear.h"
#include "layers/norm.h"

namespace calotype::nn {

// f [B, channels, H, W] normalised, then scaled and shifted pixel by pixel as the picture z [B,
// spatial_channels, h, w] says, resized to H x W (nearest pixel): norm_layer(f) conv_y(z) +
// conv_b(z). Zheng et al. 2022, arXiv:2209.09002.
class SpatialNorm : public Layer {
 public:
  SpatialNorm(int64_t channels, int64_t spatial_channels);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  GroupNorm* norm_layer_;
  Conv2d *conv_y_, *conv_b_;
};

// What a module is given. All but the first may be undefined.
struct AttentionInputs {
  Value hidden_states;          // [B, T, query_dim] or a picture [B, query_dim, H, W]
  Value encoder_hidden_states;  // [B or 1, S, cross_attention_dim]; absent: self-attention
  Value attention_mask;         // [B or B*heads, 1 or T, S], added to the scaled scores
  Value temb;                   // picture for spatial_norm [B, spatial_norm_dim, h, w]
  Value seed;                   // i64[1], for dropout in training: equal seeds drop the same
};

// Looks at, or edits, the probabilities of a module, softmax(scale q k^T + mask), while its graph
// is built.
struct AttentionProbsHook {
  // Is given the probabilities [B, heads, T, S] and returns what multiplies the values in their
  // place (its argument, to only look at them): a value of the same graph and shape.
  std::function<Value(Value probs)> edit;
  // False for T and S at which the module shall compute as without a hook; absent: true for all.
  std::function<bool(int64_t tokens, int64_t keys)> wants;
};

// Inputs: those of AttentionInputs, in that order. Result: of the shape of hidden_states (width
// out_dim where that is given):
//   t = group_norm(spatial_norm(x, temb)), e = norm_cross(encoder_hidden_states), or t without
//   these
//   q = to_q(t), k = to_k(e), v = to_v(e)
//   per head of width dim_head: o = softmax(scale norm_q(q) norm_k(k)^T + mask) v
//   y = (dropout(to_out.0(o)) + (residual_connection ? x : 0)) / rescale_output_factor
// unless the processor says otherwise.
class Attention : public Layer {
 public:
  struct Options {
    int64_t query_dim = 0;
    int64_t cross_attention_dim = 0;  // 0: query_dim, self-attention
    int64_t heads = 8, dim_head = 64;
    double dropout = 0;  // of the result of to_out.0, in training mode; in [0, 1)
    bool bias = false;   // of to_q, to_k, to_v
    // All arithmetic is float32 here, so the two upcasts to float32 change nothing.
    bool upcast_attention = false, upcast_softmax = false;
    std::string cross_attention_norm = "";  // "", "layer_norm" or "group_norm"
    int64_t cross_attention_norm_num_groups = 32;
    int64_t added_kv_proj_dim = 0;      // 0: no add_k_proj and add_v_proj
    bool only_cross_attention = false;  // no to_k and to_v; needs added_kv_proj_dim
    std::string qk_norm = "";           // "" or "layer_norm" (over dim_head, eps)
    int64_t norm_num_groups = 0;        // 0: no group_norm
    int64_t spatial_norm_dim = 0;       // 0: no spatial_norm
    bool out_bias = true;
    bool scale_qk = true;  // scale = 1/sqrt(dim_head), else 1
    double eps = 1e-5;     // of group_norm, norm_q, norm_k
    double rescale_output_factor = 1;
    bool residual_connection = false;
    int64_t out_dim = 0;  // 0: query_dim; otherwise also heads = out_dim / dim_head
    // A name for MakeAttentionProcessor. "": AttnProcessor2_0, or AttnProcessor without scale_qk;
    // with added_kv_proj_dim AttnAddedKVProcessor2_0, or AttnAddedKVProcessor.
    std::string processor = "";
  };
  // Errors: ValueError for sizes out of range, UnsupportedError for an unsupported field.
  explicit Attention(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  std::map<std::string, std::string> GetDiagnostics() const override;

  // Parameters of the processor before, if it had any, are dropped; those of the new one are drawn
  // as all parameters. Errors: UnsupportedError if the processor cannot serve this module or would
  // ignore one of its options; ValueError for an argument out of range.
  void SetProcessor(const AttentionProcessor& processor);
  void SetProcessor(std::string_view name) { SetProcessor(MakeAttentionProcessor(name)); }
  // Throws what SetProcessor would throw, and changes nothing.
  void CheckProcessor(const AttentionProcessor& processor) const;
  // The processor that Options::processor = "" gives.
  void SetDefaultProcessor();
  const AttentionProcessor& processor() const { return processor_; }
  bool processor_has_parameters() const { return !processor_layers_.empty(); }

  // With a hook the module stores its scores, whatever its processor: graphs that are built from
  // now on call it once. A hook without `edit` leaves the scores to the processor again.
  void SetAttentionProbsHook(AttentionProbsHook hook);

  // Adds the rows of to_q, to_k and to_v in one projection to_qkv (self-attention), or those of
  // to_k and to_v in to_kv, for FusedAttnProcessor2_0. The originals stay, and stay apart: a later
  // change of one does not reach the other. Errors: UnsupportedError with added_kv_proj_dim.
  void FuseProjections();
  // Removes them. Errors: ValueError if the processor uses them.
  void UnfuseProjections();
  bool fused() const { return fused_ != nullptr; }

  const Options& options() const { return options_; }
  double scale() const;  // factor of the scores
  int64_t inner_dim() const { return options_.heads * options_.dim_head; }

 private:
  friend struct AttentionProcessorBuilder;

  Value NormalizeHeads(LayerNorm* norm, Value x);
  void CheckInputs(const AttentionInputs& in) const;

  Options options_;
  AttentionProcessor processor_;
  AttentionProbsHook probs_hook_;
  std::map<std::string, Layer*> processor_layers_;  // without "processor."
  SpatialNorm* spatial_norm_ = nullptr;
  GroupNorm *group_norm_ = nullptr, *norm_cross_group_ = nullptr;
  LayerNorm *norm_cross_layer_ = nullptr, *norm_q_ = nullptr, *norm_k_ = nullptr;
  Linear *to_q_, *to_k_ = nullptr, *to_v_ = nullptr, *to_out_;
  Linear *add_k_proj_ = nullptr, *add_v_proj_ = nullptr, *fused_ = nullptr;
};

}  // namespace calotype::nn
