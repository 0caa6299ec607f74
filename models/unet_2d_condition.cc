#include "models/unet_2d_condition.h"

#include <algorithm>

#include "graph/functions.h"
#include "layers/activation.h"

namespace calotype {

UNet2DConditionModel::UNet2DConditionModel(const UNet2DConditionConfig& config)
    : Layer("UNet2DConditionModel"), config_(config) {
  const UNet2DConditionConfig& c = config_;
  c.Validate();
  size_t blocks = c.block_out_channels.size();
  int64_t first = c.block_out_channels.front(), last = c.block_out_channels.back();
  auto block_options = [&](size_t level, bool attention) {
    return nn::UNetBlockOptions{.temb_channels = 4 * first,
                                .eps = c.norm_eps,
                                .act_fn = c.act_fn,
                                .groups = c.norm_num_groups,
                                .time_scale_shift = c.resnet_time_scale_shift,
                                .attention = attention,
                                .heads = c.Of(c.attention_head_dim, level),
                                .cross_attention_dim = c.Of(c.cross_attention_dim, level),
                                .transformer_layers = c.Of(c.transformer_layers_per_block, level),
                                .use_linear_projection = c.use_linear_projection,
                                .only_cross_attention = c.Of(c.only_cross_attention, level),
                                .upcast_attention = c.upcast_attention};
  };

  conv_in_ = AddLayer<nn::Conv2d>(
      "conv_in",
      nn::Conv2d::Options{c.in_channels, first, c.conv_in_kernel, 1, (c.conv_in_kernel - 1) / 2});
  time_proj_ = AddLayer<nn::Timesteps>(
      "time_proj", nn::Timesteps::Options{.num_channels = first,
                                          .flip_sin_to_cos = c.flip_sin_to_cos,
                                          .downscale_freq_shift = c.freq_shift});
  time_embedding_ = AddLayer<nn::TimestepEmbedding>(
      "time_embedding", nn::TimestepEmbedding::Options{first, 4 * first, c.act_fn});

  std::vector<int64_t> skips = {first};  // channels of what the down path leaves for the up path
  int64_t channels = first;
  for (size_t i = 0; i < blocks; ++i) {
    int64_t out = c.block_out_channels[i], layers = c.Of(c.layers_per_block, i);
    bool is_last = i + 1 == blocks;
    down_blocks_.push_back(AddLayer<nn::UNetDownBlock2D>(
        fmt::format("down_blocks.{}", i),
        nn::UNetDownBlock2D::Options{
            .in_channels = channels,
            .out_channels = out,
            .num_layers = layers,
            .add_downsample = !is_last,
            .downsample_padding = c.downsample_padding,
            .block = block_options(i, c.down_block_types[i] == "CrossAttnDownBlock2D")}));
    skips.insert(skips.end(), static_cast<size_t>(layers + (is_last ? 0 : 1)), out);
    channels = out;
  }
  for (size_t i = 0; i < blocks; ++i) {
    size_t level = blocks - 1 - i;
    int64_t out = c.block_out_channels[level];
    std::vector<int64_t> skip_channels;
    for (int64_t layer = 0; layer <= c.Of(c.layers_per_block, level); ++layer) {
      skip_channels.push_back(skips.back());
      skips.pop_back();
    }
    up_blocks_.push_back(AddLayer<nn::UNetUpBlock2D>(
        fmt::format("up_blocks.{}", i),
        nn::UNetUpBlock2D::Options{
            .in_channels = channels,
            .out_channels = out,
            .skip_channels = skip_channels,
            .add_upsample = i + 1 < blocks,
            .block = block_options(level, c.up_block_types[i] == "CrossAttnUpBlock2D")}));
    channels = out;
  }
  nn::UNetBlockOptions mid = block_options(blocks - 1, true);
  mid.only_cross_attention = false;  // the field does not concern the mid block
  mid_block_ = AddLayer<nn::UNetMidBlock2D>(
      "mid_block", nn::UNetMidBlock2D::Options{last, c.mid_block_scale_factor, mid});
  conv_norm_out_ = AddLayer<nn::GroupNorm>(
      "conv_norm_out", nn::GroupNorm::Options{c.norm_num_groups, first, c.norm_eps});
  conv_out_ =
      AddLayer<nn::Conv2d>("conv_out", nn::Conv2d::Options{first, c.out_channels, c.conv_out_kernel,
                                                           1, (c.conv_out_kernel - 1) / 2});
}

std::vector<Value> UNet2DConditionModel::ExportComputationGraph(ComputationGraph&,
                                                                std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "sample"), t = Required(inputs, 1, "timestep");
  nn::UNetCondition condition;
  condition.context = Required(inputs, 2, "encoder_hidden_states");
  condition.context_mask = nn::MaskToBias(Optional(inputs, 3));
  Check<ShapeError>(x.rank() == 4 && x.dim(1) == config_.in_channels,
                    "{}: sample {} must be [B, {}, H, W]", Describe(), x.shape(),
                    config_.in_channels);
  Check<ShapeError>(t.rank() == 1 && (t.dim(0) == x.dim(0) || t.dim(0) == 1),
                    "{}: timestep {} must be [{}] or [1]", Describe(), t.shape(), x.dim(0));
  const Shape& context = condition.context.shape();
  int64_t width = config_.Of(config_.cross_attention_dim, config_.block_out_channels.size() - 1);
  Check<ShapeError>(
      context.rank() == 3 && context[2] == width && (context[0] == x.dim(0) || context[0] == 1),
      "{}: encoder_hidden_states {} must be [{} or 1, S, {}]", Describe(), context, x.dim(0),
      width);

  if (config_.center_input_sample) x = 2.0f * x - 1.0f;
  condition.temb = time_embedding_->Call(time_proj_->Call(t));

  x = conv_in_->Call(x);
  std::vector<Value> skips = {x};
  for (auto* block : down_blocks_) x = block->Build(x, condition, skips);
  x = mid_block_->Build(x, condition);
  for (auto* block : up_blocks_) x = block->Build(x, condition, skips);
  return {conv_out_->Call(Activate(config_.act_fn, conv_norm_out_->Call(x)))};
}

std::map<std::string, std::string> UNet2DConditionModel::GetDiagnostics() const {
  auto facts = Layer::GetDiagnostics();
  facts["unet.down_block_types"] = fmt::format("{}", fmt::join(config_.down_block_types, ", "));
  facts["unet.up_block_types"] = fmt::format("{}", fmt::join(config_.up_block_types, ", "));
  facts["unet.block_out_channels"] = fmt::format("{}", fmt::join(config_.block_out_channels, ", "));
  facts["unet.cross_attention_dim"] =
      fmt::format("{}", fmt::join(config_.cross_attention_dim, ", "));
  return facts;
}

}  // namespace calotype
