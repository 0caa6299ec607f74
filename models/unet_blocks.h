// The blocks of a U-Net of diffusers: resnets, each followed by a transformer where the block
// attends to the text, and a resampling layer at the end. One class serves all kinds (DownBlock2D,
// CrossAttnDownBlock2D, ResnetDownsampleBlock2D, SimpleCrossAttnDownBlock2D, ...): without
// attention there simply are no `attentions`; in the last two they are single Attention modules
// with added keys and values, and the resampling layer is a resnet.
#pragma once

#include <string>
#include <vector>

#include "layers/attention.h"
#include "layers/resample.h"
#include "layers/resnet.h"
#include "layers/transformer.h"

namespace calotype::nn {

// What all blocks of a U-Net share, and the attention of one block.
struct UNetBlockOptions {
  int64_t temb_channels = 0;
  double eps = 1e-5;
  std::string act_fn = "silu";
  int64_t groups = 32;
  std::string time_scale_shift = "default";
  bool attention = false;
  int64_t heads = 1, cross_attention_dim = 0, transformer_layers = 1;
  bool use_linear_projection = false, only_cross_attention = false, upcast_attention = false;
  // The kind with added keys and values. `heads` is the width of a head there.
  bool simple = false;
  std::string cross_attention_norm = "";  // of the simple kind, see Attention
  bool skip_time_act = false;             // see ResnetBlock2D, as the next one
  double output_scale_factor = 1;
};

// What the blocks receive besides the picture; context and context_mask may be undefined in blocks
// without attention.
struct UNetCondition {
  Value temb;          // [B or 1, temb_channels]
  Value context;       // encoder_hidden_states [B or 1, S, cross_attention_dim]
  Value context_mask;  // of the attention to context, see Transformer2DModel
  Value mask;          // of the attention to the picture itself
};

// FreeU in one up block: the first half of the channels that come from below is multiplied by
// `backbone`, the lowest frequencies of the skips (0 and -1 in both directions) by `skip`. Si et
// al. 2023, arXiv:2309.11497.
struct FreeUScale {
  double backbone = 1, skip = 1;
};

// num_layers x (resnet [, transformer]), then a convolution of stride 2 unless it is the last
// block. Inputs: hidden_states, temb, encoder_hidden_states, encoder_attention_mask. Outputs: the
// result, then the value after each layer and after the downsampler, for the up blocks.
class UNetDownBlock2D : public Layer {
 public:
  struct Options {
    int64_t in_channels = 0, out_channels = 0, num_layers = 1;
    bool add_downsample = true;
    int64_t downsample_padding = 1;
    UNetBlockOptions block = {};
  };
  explicit UNetDownBlock2D(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  // The result; appends the values for the up blocks to `skips`. `adapter` (optional), what a
  // T2I-Adapter gives for this block, is added to the value after the last transformer, or, in a
  // block without attention, to the result; to the skip made of it, too. Errors: ShapeError;
  // UnsupportedError for an adapter in a simple block with attention, as in diffusers.
  Value Build(Value x, const UNetCondition& condition, std::vector<Value>& skips,
              Value adapter = {});

 private:
  std::vector<ResnetBlock2D*> resnets_;
  std::vector<Layer*> attentions_;  // Transformer2DModel, or Attention
  Layer* downsampler_ = nullptr;    // Downsample2D, or ResnetBlock2D
};

// resnet, transformer, resnet; without attention one resnet. Inputs: hidden_states, temb,
// encoder_hidden_states, encoder_attention_mask.
class UNetMidBlock2D : public Layer {
 public:
  struct Options {
    int64_t in_channels = 0;
    double output_scale_factor = 1;
    UNetBlockOptions block = {};
  };
  explicit UNetMidBlock2D(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  Value Build(Value x, const UNetCondition& condition);

 private:
  ResnetBlock2D *resnet_0_, *resnet_1_ = nullptr;
  Layer* attention_ = nullptr;  // Transformer2DModel, or Attention
};

// skip_channels.size() x (resnet over [x | skip] [, transformer]), then twice the size unless it is
// the last block. Inputs: hidden_states, temb, encoder_hidden_states, encoder_attention_mask, and
// as many skips as there are layers, the one that is used first at the end.
class UNetUpBlock2D : public Layer {
 public:
  struct Options {
    int64_t in_channels = 0, out_channels = 0;
    std::vector<int64_t> skip_channels = {};  // of the skip of each layer, in order of use
    bool add_upsample = true;
    UNetBlockOptions block = {};
  };
  explicit UNetUpBlock2D(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  // Pops the skips from the end. If others are left, the upsampler goes to the size of the next
  // one, so that odd sizes come back as they were.
  Value Build(Value x, const UNetCondition& condition, std::vector<Value>& skips,
              const FreeUScale* freeu = nullptr);

 private:
  std::vector<ResnetBlock2D*> resnets_;
  std::vector<Layer*> attentions_;  // Transformer2DModel, or Attention
  Upsample2D* upsampler_ = nullptr;
  ResnetBlock2D* resnet_upsampler_ = nullptr;
};

}  // namespace calotype::nn
