// BasicTransformerBlock and Transformer2DModel of diffusers: self-attention, cross-attention and a
// feed-forward net over the pixels of a picture.
#pragma once

#include <string>
#include <vector>

#include "layers/attention.h"
#include "layers/conv2d.h"
#include "layers/feed_forward.h"
#include "layers/norm.h"

namespace calotype::nn {

// Inputs: hidden_states [B, T, dim], encoder_hidden_states [B or 1, S, cross_attention_dim]
// (optional), attention_mask (optional, of attn1), encoder_attention_mask (optional, of attn2).
//   x += attn1(norm1(x));  x += attn2(norm2(x), encoder_hidden_states);  x += ff(norm3(x))
// attn1 is self-attention (cross-attention with only_cross_attention); attn2 exists if
// cross_attention_dim is given or with double_self_attention, and attends to x itself if no
// encoder_hidden_states are given.
class BasicTransformerBlock : public Layer {
 public:
  struct Options {
    int64_t dim = 0, num_attention_heads = 8, attention_head_dim = 64;
    double dropout = 0;               // another is an UnsupportedError
    int64_t cross_attention_dim = 0;  // 0: no cross-attention
    std::string activation_fn = "geglu";
    bool attention_bias = false;
    bool only_cross_attention = false, double_self_attention = false;
    bool upcast_attention = false;  // see Attention
    bool norm_elementwise_affine = true;
    double norm_eps = 1e-5;
    int64_t ff_inner_dim = 0;  // 0: 4 dim
    bool ff_bias = true, attention_out_bias = true;
  };
  explicit BasicTransformerBlock(const Options& options);  // Errors: as Attention's, and dropout
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
  LayerNorm *norm1_, *norm2_ = nullptr, *norm3_;
  Attention *attn1_, *attn2_ = nullptr;
  FeedForward* ff_;
};

// Inputs: hidden_states [B, in_channels, H, W], encoder_hidden_states (optional), attention_mask
// (optional), encoder_attention_mask (optional). Result [B, out_channels, H, W]:
//   x + proj_out(blocks(proj_in(norm(x)))), norm with eps 1e-6
// The projections are 1x1 convolutions, or with use_linear_projection linear layers on the tokens
// (the same function).
// A mask of rank 2 holds 1 (keep) and 0 (drop), one of rank 3 is added to the scores.
class Transformer2DModel : public Layer {
 public:
  struct Options {
    int64_t num_attention_heads = 16, attention_head_dim = 88;
    int64_t in_channels = 0;
    int64_t out_channels = 0;  // 0: in_channels
    int64_t num_layers = 1;
    double dropout = 0;  // another is an UnsupportedError
    int64_t norm_num_groups = 32;
    int64_t cross_attention_dim = 0;
    bool attention_bias = false;
    std::string activation_fn = "geglu";
    bool use_linear_projection = false;
    bool only_cross_attention = false, double_self_attention = false;
    bool upcast_attention = false;  // see Attention
    bool norm_elementwise_affine = true;
    double norm_eps = 1e-5;  // of the blocks
  };
  explicit Transformer2DModel(const Options& options);  // Errors: as Attention's, and dropout
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
  GroupNorm* norm_;
  Layer *proj_in_, *proj_out_;  // Conv2d or Linear
  std::vector<BasicTransformerBlock*> blocks_;
};

// A mask of 1 and 0 [B, S] as a bias of the scores [B, 1, S]: (1 - mask) * -10000. A mask of rank 3
// (and an undefined one) stays as it is. Errors: ShapeError for other ranks.
Value MaskToBias(Value mask);

}  // namespace calotype::nn
