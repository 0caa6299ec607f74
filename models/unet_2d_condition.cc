#include "models/unet_2d_condition.h"

#include <algorithm>

#include "graph/functions.h"
#include "layers/activation.h"

namespace calotype {

namespace {

// The kind with added keys and values, and its twin without attention.
bool IsSimple(const std::string& type) {
  return type.starts_with("Simple") || type.starts_with("Resnet");
}

}  // namespace

UNet2DConditionModel::UNet2DConditionModel(const UNet2DConditionConfig& config)
    : Layer("UNet2DConditionModel"), config_(config) {
  const UNet2DConditionConfig& c = config_;
  c.Validate();
  size_t blocks = c.block_out_channels.size();
  int64_t first = c.block_out_channels.front(), last = c.block_out_channels.back();
  // A block of the kind that its type's name says.
  int64_t temb = c.time_embed_dim();
  auto block_options = [&](size_t level, const std::string& type) {
    bool simple = IsSimple(type);
    bool attention = type.find("CrossAttn") != type.npos;
    return nn::UNetBlockOptions{.temb_channels = c.class_embeddings_concat ? 2 * temb : temb,
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
                                .upcast_attention = c.upcast_attention,
                                .simple = simple,
                                .cross_attention_norm = c.cross_attention_norm.value_or(""),
                                .skip_time_act = simple && c.resnet_skip_time_act,
                                .output_scale_factor = simple ? c.resnet_out_scale_factor : 1};
  };

  conv_in_ = AddLayer<nn::Conv2d>(
      "conv_in",
      nn::Conv2d::Options{c.in_channels, first, c.conv_in_kernel, 1, (c.conv_in_kernel - 1) / 2});
  time_proj_ = AddLayer<nn::Timesteps>(
      "time_proj", nn::Timesteps::Options{.num_channels = first,
                                          .flip_sin_to_cos = c.flip_sin_to_cos,
                                          .downscale_freq_shift = c.freq_shift});
  time_embedding_ = AddLayer<nn::TimestepEmbedding>(
      "time_embedding",
      nn::TimestepEmbedding::Options{.in_channels = first,
                                     .time_embed_dim = temb,
                                     .act_fn = c.act_fn,
                                     .post_act_fn = c.timestep_post_act.value_or(""),
                                     .cond_proj_dim = c.time_cond_proj_dim.value_or(0)});
  if (c.encoder_hid_dim) {
    encoder_hid_proj_ = AddLayer<nn::Linear>(
        "encoder_hid_proj", nn::Linear::Options{*c.encoder_hid_dim, c.cross_attention_dim[0]});
  }
  const char* kClassEmbedding = "class_embedding";
  if (c.has_class_table()) {
    class_embedding_ =
        AddLayer<nn::Embedding>(kClassEmbedding, nn::Embedding::Options{*c.num_class_embeds, temb});
  } else if (c.class_embed_type == "timestep") {
    class_embedding_ = AddLayer<nn::TimestepEmbedding>(
        kClassEmbedding, nn::TimestepEmbedding::Options{first, temb, c.act_fn});
  } else if (c.class_embed_type == "projection") {  // silu whatever act_fn is, as in diffusers
    class_embedding_ = AddLayer<nn::TimestepEmbedding>(
        kClassEmbedding,
        nn::TimestepEmbedding::Options{*c.projection_class_embeddings_input_dim, temb});
  } else if (c.class_embed_type == "simple_projection") {
    class_embedding_ = AddLayer<nn::Linear>(
        kClassEmbedding, nn::Linear::Options{*c.projection_class_embeddings_input_dim, temb});
  }

  std::vector<int64_t> skips = {first};  // channels of what the down path leaves for the up path
  int64_t channels = first;
  for (size_t i = 0; i < blocks; ++i) {
    int64_t out = c.block_out_channels[i], layers = c.Of(c.layers_per_block, i);
    bool is_last = i + 1 == blocks;
    down_blocks_.push_back(AddLayer<nn::UNetDownBlock2D>(
        fmt::format("down_blocks.{}", i),
        nn::UNetDownBlock2D::Options{.in_channels = channels,
                                     .out_channels = out,
                                     .num_layers = layers,
                                     .add_downsample = !is_last,
                                     .downsample_padding = c.downsample_padding,
                                     .block = block_options(i, c.down_block_types[i])}));
    skips.insert(skips.end(), static_cast<size_t>(layers + (is_last ? 0 : 1)), out);
    channels = out;
  }
  skips_ = skips.size();
  for (size_t i = 0; i < blocks; ++i) {
    size_t level = blocks - 1 - i;
    int64_t out = c.block_out_channels[level];
    std::vector<int64_t> skip_channels;
    for (int64_t layer = 0; layer <= c.Of(c.layers_per_block, level); ++layer) {
      skip_channels.push_back(skips.back());
      skips.pop_back();
    }
    nn::UNetBlockOptions block = block_options(level, c.up_block_types[i]);
    // diffusers does not turn the list around where it means widths.
    if (block.simple) block.heads = c.Of(c.attention_head_dim, i);
    up_blocks_.push_back(AddLayer<nn::UNetUpBlock2D>(
        fmt::format("up_blocks.{}", i), nn::UNetUpBlock2D::Options{.in_channels = channels,
                                                                   .out_channels = out,
                                                                   .skip_channels = skip_channels,
                                                                   .add_upsample = i + 1 < blocks,
                                                                   .block = block}));
    channels = out;
  }
  bool simple_mid = c.mid_block_type == "UNetMidBlock2DSimpleCrossAttn";
  nn::UNetBlockOptions mid =
      block_options(blocks - 1, simple_mid ? "SimpleCrossAttn" : c.mid_block_type);
  // only_cross_attention concerns the mid block only if it is simple and has no field of its own.
  mid.only_cross_attention =
      simple_mid && c.mid_block_only_cross_attention.value_or(c.only_cross_attention.size() == 1 &&
                                                              c.only_cross_attention[0]);
  mid_block_ = AddLayer<nn::UNetMidBlock2D>(
      "mid_block", nn::UNetMidBlock2D::Options{last, c.mid_block_scale_factor, mid});
  conv_norm_out_ = AddLayer<nn::GroupNorm>(
      "conv_norm_out", nn::GroupNorm::Options{c.norm_num_groups, first, c.norm_eps});
  conv_out_ =
      AddLayer<nn::Conv2d>("conv_out", nn::Conv2d::Options{first, c.out_channels, c.conv_out_kernel,
                                                           1, (c.conv_out_kernel - 1) / 2});
}

Value UNet2DConditionModel::TimeEmbedding(Value t, Value class_labels, Value timestep_cond) {
  Value temb = time_embedding_->Call({time_proj_->Call(t), timestep_cond});
  const UNet2DConditionConfig& c = config_;
  if (c.has_class_embedding()) {
    Check<ShapeError>(class_labels.defined(), "{}: class_labels are missing, which its {} needs",
                      Describe(), c.has_class_table() ? "num_class_embeds" : "class_embed_type");
    bool numbers = c.has_class_table() || c.class_embed_type == "timestep";
    int64_t width = c.projection_class_embeddings_input_dim.value_or(c.time_embed_dim());
    if (c.class_embed_type == "identity") width = c.time_embed_dim();
    const Shape& shape = class_labels.shape();
    Check<ShapeError>(shape.rank() == (numbers ? 1 : 2) && (numbers || shape[1] == width),
                      "{}: class_labels {} must be {}", Describe(), shape,
                      numbers ? "[B]" : fmt::format("[B, {}]", width));
    Value y = c.class_embed_type == "timestep" ? time_proj_->Call(class_labels) : class_labels;
    if (class_embedding_) y = class_embedding_->Call(y);
    int64_t batch = std::max(temb.dim(0), y.dim(0));
    Check<ShapeError>(std::min(temb.dim(0), y.dim(0)) == 1 || temb.dim(0) == y.dim(0),
                      "{}: class_labels {} do not fit {} timesteps", Describe(), shape,
                      temb.dim(0));
    auto all = [&](Value v) { return Broadcast(v, {batch, v.dim(1)}); };
    temb = c.class_embeddings_concat ? Concat({all(temb), all(y)}, 1) : temb + y;
  } else {
    Check<ShapeError>(!class_labels.defined(),
                      "{}: class_labels {} are given, but the model has no class embedding",
                      Describe(), class_labels.defined() ? class_labels.shape() : Shape{});
  }
  return c.time_embedding_act_fn ? Activate(*c.time_embedding_act_fn, temb) : temb;
}

std::vector<Value> UNet2DConditionModel::ExportComputationGraph(ComputationGraph&,
                                                                std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "sample"), t = Required(inputs, 1, "timestep");
  nn::UNetCondition condition;
  condition.context = Required(inputs, 2, "encoder_hidden_states");
  condition.context_mask = nn::MaskToBias(Optional(inputs, 3));
  condition.mask = nn::MaskToBias(Optional(inputs, 4));
  Value class_labels = Optional(inputs, 5), timestep_cond = Optional(inputs, 6);
  Value mid_residual = Optional(inputs, kMidResidual);
  std::span<const Value> rest = inputs.subspan(std::min(kMidResidual + 1, inputs.size()));
  std::span<const Value> residuals = rest.first(std::min(skips_, rest.size()));
  std::span<const Value> adapters = rest.subspan(residuals.size());
  const auto given = static_cast<size_t>(
      std::ranges::count_if(residuals, [](const Value& value) { return value.defined(); }));
  Check<ShapeError>(given == 0 || given == skips_,
                    "{}: {} down_block_additional_residuals given, {} needed, one for each skip",
                    Describe(), given, skips_);
  Check<ShapeError>(adapters.size() <= down_blocks_.size(),
                    "{}: {} down_intrablock_additional_residuals given for {} down blocks",
                    Describe(), adapters.size(), down_blocks_.size());
  Check<ShapeError>(x.rank() == 4 && x.dim(1) == config_.in_channels,
                    "{}: sample {} must be [B, {}, H, W]", Describe(), x.shape(),
                    config_.in_channels);
  Check<ShapeError>(t.rank() == 1 && (t.dim(0) == x.dim(0) || t.dim(0) == 1),
                    "{}: timestep {} must be [{}] or [1]", Describe(), t.shape(), x.dim(0));
  const Shape& context = condition.context.shape();
  int64_t width = config_.context_width();
  Check<ShapeError>(
      context.rank() == 3 && context[2] == width && (context[0] == x.dim(0) || context[0] == 1),
      "{}: encoder_hidden_states {} must be [{} or 1, S, {}]", Describe(), context, x.dim(0),
      width);

  if (config_.center_input_sample) x = 2.0f * x - 1.0f;
  condition.temb = TimeEmbedding(t, class_labels, timestep_cond);
  if (encoder_hid_proj_) condition.context = encoder_hid_proj_->Call(condition.context);

  x = conv_in_->Call(x);
  std::vector<Value> skips = {x};
  for (size_t i = 0; i < down_blocks_.size(); ++i) {
    x = down_blocks_[i]->Build(x, condition, skips, Optional(adapters, i));
  }
  auto add = [&](Value to, Value residual, std::string_view name) {
    Check<ShapeError>(residual.shape() == to.shape(), "{}: {} {} must have the shape {}",
                      Describe(), name, residual.shape(), to.shape());
    return to + residual;
  };
  for (size_t i = 0; i < given; ++i) {
    skips[i] = add(skips[i], residuals[i], "down_block_additional_residual");
  }
  x = mid_block_->Build(x, condition);
  if (mid_residual.defined()) x = add(x, mid_residual, "mid_block_additional_residual");
  for (size_t i = 0; i < up_blocks_.size(); ++i) {
    std::optional<nn::FreeUScale> freeu;
    if (freeu_ && TakesFreeU(i)) {
      freeu =
          i == 0 ? nn::FreeUScale{freeu_->b1, freeu_->s1} : nn::FreeUScale{freeu_->b2, freeu_->s2};
    }
    x = up_blocks_[i]->Build(x, condition, skips, freeu ? &*freeu : nullptr);
  }
  return {conv_out_->Call(Activate(config_.act_fn, conv_norm_out_->Call(x)))};
}

void UNet2DConditionModel::EnableGradientCheckpointing(bool enable) {
  auto visit = [enable](auto&& self, Layer& layer) -> void {
    if (layer.type() == "ResnetBlock2D" || layer.type() == "Transformer2DModel")
      layer.SetRecompute(enable);
    for (const auto& child : layer.layers()) self(self, *child);
  };
  visit(visit, *this);
}

bool UNet2DConditionModel::TakesFreeU(size_t up_block) const {
  return up_block < 2 && up_block < up_blocks_.size() &&
         !IsSimple(config_.up_block_types[up_block]);
}

void UNet2DConditionModel::SetFreeU(const std::optional<FreeU>& freeu) {
  Check<UnsupportedError>(!freeu || TakesFreeU(0) || TakesFreeU(1),
                          "{}: FreeU has no effect on the up blocks {}", Describe(),
                          fmt::join(config_.up_block_types, ", "));
  freeu_ = freeu;
  Changed();
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
