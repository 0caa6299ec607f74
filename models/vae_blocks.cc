#include "models/vae_blocks.h"

#include "graph/functions.h"
#include "layers/activation.h"

namespace calotype::nn {

namespace {

constexpr double kEps = 1e-6;  // of all norms

ResnetBlock2D::Options Resnet(int64_t in, int64_t out, const VaeOptions& options) {
  return {.in_channels = in,
          .out_channels = out,
          .temb_channels = 0,
          .groups = options.norm_num_groups,
          .eps = kEps,
          .non_linearity = options.act_fn};
}

}  // namespace

VaeBlock2D::VaeBlock2D(int64_t in_channels, int64_t out_channels, int64_t num_layers,
                       Resample resample, const VaeOptions& options)
    : Layer("VaeBlock2D") {
  for (int64_t i = 0; i < num_layers; ++i) {
    resnets_.push_back(AddLayer<ResnetBlock2D>(
        fmt::format("resnets.{}", i),
        Resnet(i == 0 ? in_channels : out_channels, out_channels, options)));
  }
  if (resample == Resample::kDown) {
    resample_ = AddLayer<Downsample2D>(
        "downsamplers.0",
        Downsample2D::Options{
            .channels = out_channels, .use_conv = true, .padding = 0, .name = "op"});
  } else if (resample == Resample::kUp) {
    resample_ = AddLayer<Upsample2D>(
        "upsamplers.0", Upsample2D::Options{.channels = out_channels, .use_conv = true});
  }
}

std::vector<Value> VaeBlock2D::ExportComputationGraph(ComputationGraph&,
                                                      std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "hidden_states");
  for (ResnetBlock2D* resnet : resnets_) x = resnet->Call(x);
  return {resample_ ? resample_->Call(x) : x};
}

VaeMidBlock2D::VaeMidBlock2D(int64_t channels, const VaeOptions& options) : Layer("VaeMidBlock2D") {
  if (options.mid_block_add_attention) {
    attention_ = AddLayer<Attention>("attentions.0",
                                     Attention::Options{.query_dim = channels,
                                                        .heads = 1,
                                                        .dim_head = channels,
                                                        .bias = true,
                                                        .upcast_softmax = true,
                                                        .norm_num_groups = options.norm_num_groups,
                                                        .eps = kEps,
                                                        .residual_connection = true});
  }
  resnet_0_ = AddLayer<ResnetBlock2D>("resnets.0", Resnet(channels, channels, options));
  resnet_1_ = AddLayer<ResnetBlock2D>("resnets.1", Resnet(channels, channels, options));
}

std::vector<Value> VaeMidBlock2D::ExportComputationGraph(ComputationGraph&,
                                                         std::span<const Value> inputs) {
  Value x = resnet_0_->Call(Required(inputs, 0, "hidden_states"));
  if (attention_) x = attention_->Call(x);
  return {resnet_1_->Call(x)};
}

VaeEncoder::VaeEncoder(const VaeOptions& o) : Layer("VaeEncoder") {
  int64_t channels = o.block_out_channels.front();
  conv_in_ = AddLayer<Conv2d>("conv_in", Conv2d::Options{o.in_channels, channels, 3, 1, 1});
  for (size_t i = 0; i < o.block_out_channels.size(); ++i) {
    bool last = i + 1 == o.block_out_channels.size();
    down_blocks_.push_back(AddLayer<VaeBlock2D>(
        fmt::format("down_blocks.{}", i), channels, o.block_out_channels[i], o.layers_per_block,
        last ? VaeBlock2D::Resample::kNone : VaeBlock2D::Resample::kDown, o));
    channels = o.block_out_channels[i];
  }
  mid_block_ = AddLayer<VaeMidBlock2D>("mid_block", channels, o);
  conv_norm_out_ =
      AddLayer<GroupNorm>("conv_norm_out", GroupNorm::Options{o.norm_num_groups, channels, kEps});
  conv_out_ = AddLayer<Conv2d>("conv_out", Conv2d::Options{channels, o.out_channels, 3, 1, 1});
}

std::vector<Value> VaeEncoder::ExportComputationGraph(ComputationGraph&,
                                                      std::span<const Value> inputs) {
  Value x = conv_in_->Call(Required(inputs, 0, "sample"));
  for (VaeBlock2D* block : down_blocks_) x = block->Call(x);
  x = mid_block_->Call(x);
  return {conv_out_->Call(Silu(conv_norm_out_->Call(x)))};
}

VaeDecoder::VaeDecoder(const VaeOptions& o) : Layer("VaeDecoder") {
  int64_t channels = o.block_out_channels.back();
  conv_in_ = AddLayer<Conv2d>("conv_in", Conv2d::Options{o.in_channels, channels, 3, 1, 1});
  mid_block_ = AddLayer<VaeMidBlock2D>("mid_block", channels, o);
  for (size_t i = 0; i < o.block_out_channels.size(); ++i) {
    bool last = i + 1 == o.block_out_channels.size();
    int64_t out = o.block_out_channels[o.block_out_channels.size() - 1 - i];
    up_blocks_.push_back(
        AddLayer<VaeBlock2D>(fmt::format("up_blocks.{}", i), channels, out, o.layers_per_block + 1,
                             last ? VaeBlock2D::Resample::kNone : VaeBlock2D::Resample::kUp, o));
    channels = out;
  }
  conv_norm_out_ =
      AddLayer<GroupNorm>("conv_norm_out", GroupNorm::Options{o.norm_num_groups, channels, kEps});
  conv_out_ = AddLayer<Conv2d>("conv_out", Conv2d::Options{channels, o.out_channels, 3, 1, 1});
}

std::vector<Value> VaeDecoder::ExportComputationGraph(ComputationGraph&,
                                                      std::span<const Value> inputs) {
  Value x = mid_block_->Call(conv_in_->Call(Required(inputs, 0, "sample")));
  for (VaeBlock2D* block : up_blocks_) x = block->Call(x);
  return {conv_out_->Call(Silu(conv_norm_out_->Call(x)))};
}

}  // namespace calotype::nn
