#include "models/unet_config.h"

#include <algorithm>
#include <cmath>

#include "layers/activation.h"
#include "models/json_fields.h"

namespace calotype {

namespace {

constexpr std::string_view kOwner = "UNet2DConditionModel";

// All fields of diffusers' class; those that are Only ones must keep their default here.
template <class C, class Fields>
void VisitFields(C& c, Fields& fields) {
  fields.Only("_class_name", kOwner);
  fields.Ignore("_diffusers_version", kDiffusersVersion);
  fields.Field("sample_size", c.sample_size);
  fields.Field("in_channels", c.in_channels);
  fields.Field("out_channels", c.out_channels);
  fields.Field("center_input_sample", c.center_input_sample);
  fields.Field("flip_sin_to_cos", c.flip_sin_to_cos);
  fields.Number("freq_shift", c.freq_shift);
  fields.Field("down_block_types", c.down_block_types);
  fields.Field("mid_block_type", c.mid_block_type);
  fields.Field("up_block_types", c.up_block_types);
  fields.OneOrMany("only_cross_attention", c.only_cross_attention);
  fields.Field("mid_block_only_cross_attention", c.mid_block_only_cross_attention);
  fields.Field("block_out_channels", c.block_out_channels);
  fields.OneOrMany("layers_per_block", c.layers_per_block);
  fields.Field("downsample_padding", c.downsample_padding);
  fields.Number("mid_block_scale_factor", c.mid_block_scale_factor);
  fields.Only("dropout", 0.0);
  fields.Field("act_fn", c.act_fn);
  fields.Field("norm_num_groups", c.norm_num_groups);
  fields.Field("norm_eps", c.norm_eps);
  fields.OneOrMany("cross_attention_dim", c.cross_attention_dim);
  fields.OneOrMany("transformer_layers_per_block", c.transformer_layers_per_block);
  fields.Only("reverse_transformer_layers_per_block", nullptr);
  fields.Field("encoder_hid_dim", c.encoder_hid_dim);
  fields.Field("encoder_hid_dim_type", c.encoder_hid_dim_type);
  fields.OneOrMany("attention_head_dim", c.attention_head_dim);
  fields.Only("num_attention_heads", nullptr);
  fields.Only("dual_cross_attention", false);
  fields.Field("use_linear_projection", c.use_linear_projection);
  fields.Field("class_embed_type", c.class_embed_type);
  fields.Only("addition_embed_type", nullptr);
  fields.Only("addition_time_embed_dim", nullptr);
  fields.Field("num_class_embeds", c.num_class_embeds);
  fields.Field("upcast_attention", c.upcast_attention);
  fields.Field("resnet_time_scale_shift", c.resnet_time_scale_shift);
  fields.Field("resnet_skip_time_act", c.resnet_skip_time_act);
  fields.Field("resnet_out_scale_factor", c.resnet_out_scale_factor);
  fields.Field("time_embedding_type", c.time_embedding_type);
  fields.Field("time_embedding_dim", c.time_embedding_dim);
  fields.Field("time_embedding_act_fn", c.time_embedding_act_fn);
  fields.Field("timestep_post_act", c.timestep_post_act);
  fields.Field("time_cond_proj_dim", c.time_cond_proj_dim);
  fields.Field("conv_in_kernel", c.conv_in_kernel);
  fields.Field("conv_out_kernel", c.conv_out_kernel);
  fields.Field("projection_class_embeddings_input_dim", c.projection_class_embeddings_input_dim);
  fields.Only("attention_type", "default");
  fields.Field("class_embeddings_concat", c.class_embeddings_concat);
  fields.Field("cross_attention_norm", c.cross_attention_norm);
  fields.Only("addition_embed_type_num_heads", 64);
}

// Equal values in a list mean what one value means; keeps equality of configurations simple.
struct CollapseLists {
  void Field(auto&&...) {}
  void Number(auto&&...) {}
  void Only(auto&&...) {}
  void Ignore(auto&&...) {}
  void OneOrMany(const char*, auto& list) {
    if (JsonWriter::AllEqual(list)) list.resize(1);
  }
};

}  // namespace

UNet2DConditionConfig UNet2DConditionConfig::FromJson(std::string_view text) {
  UNet2DConditionConfig c;
  JsonFields fields(kOwner, text);
  VisitFields(c, fields);
  fields.CheckAllRead();
  c.Validate();
  CollapseLists collapse;
  VisitFields(c, collapse);
  return c;
}

std::string UNet2DConditionConfig::ToJson() const {
  JsonWriter writer;
  VisitFields(*this, writer);
  return writer.Text();
}

void UNet2DConditionConfig::Validate() const {
  // The upper bound keeps products of sizes, and what a damaged file can ask for, within reason.
  auto positive = [](std::string_view field, int64_t value, int64_t most = 1 << 20) {
    Check(value > 0 && value <= most, "{}: field '{}' is {}, must be in [1, {}]", kOwner, field,
          value, most);
  };
  if (sample_size) positive("sample_size", *sample_size);
  positive("in_channels", in_channels);
  positive("out_channels", out_channels);
  positive("norm_num_groups", norm_num_groups);
  Check(norm_eps >= 0, "{}: field 'norm_eps' is {}, must not be negative", kOwner, norm_eps);
  Check(downsample_padding >= 0 && downsample_padding <= 16,
        "{}: field 'downsample_padding' is {}, must be in [0, 16]", kOwner, downsample_padding);
  Check(mid_block_scale_factor != 0, "{}: field 'mid_block_scale_factor' must not be 0", kOwner);
  for (auto [field, kernel] : {std::pair("conv_in_kernel", conv_in_kernel),
                               std::pair("conv_out_kernel", conv_out_kernel)}) {
    Check(kernel > 0 && kernel % 2 == 1 && kernel <= 31,
          "{}: field '{}' is {}, must be odd and in [1, 31]", kOwner, field, kernel);
  }
  CheckActivation(act_fn);

  size_t blocks = down_block_types.size();
  Check(blocks > 0, "{}: field 'down_block_types' is empty", kOwner);
  auto same = [&](std::string_view field, size_t size) {
    Check(size == blocks, "{}: field '{}' has {} entries, down_block_types {}", kOwner, field, size,
          blocks);
  };
  same("up_block_types", up_block_types.size());
  same("block_out_channels", block_out_channels.size());
  auto spread = [&](std::string_view field, size_t size) {
    if (size != 1) same(field, size);
  };
  spread("only_cross_attention", only_cross_attention.size());
  auto spread_positive = [&](std::string_view field, const std::vector<int64_t>& list,
                             int64_t most = 1 << 20) {
    spread(field, list.size());
    for (int64_t value : list) positive(field, value, most);
  };
  spread_positive("block_out_channels", block_out_channels);
  spread_positive("layers_per_block", layers_per_block, 1000);
  spread_positive("cross_attention_dim", cross_attention_dim);
  spread_positive("transformer_layers_per_block", transformer_layers_per_block, 1000);
  spread_positive("attention_head_dim", attention_head_dim);

  auto known = [&](std::string_view field, const std::string& value,
                   const std::vector<std::string_view>& list) {
    Check<UnsupportedError>(std::ranges::find(list, value) != list.end(),
                            "{}: field '{}' names '{}', which is not supported; known: {}", kOwner,
                            field, value, fmt::join(list, ", "));
  };
  for (const auto& type : down_block_types) {
    known("down_block_types", type,
          {"CrossAttnDownBlock2D", "DownBlock2D", "SimpleCrossAttnDownBlock2D",
           "ResnetDownsampleBlock2D"});
  }
  for (const auto& type : up_block_types) {
    known("up_block_types", type,
          {"CrossAttnUpBlock2D", "UpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"});
  }
  known("mid_block_type", mid_block_type,
        {"UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"});
  known("time_embedding_type", time_embedding_type, {"positional"});
  known("resnet_time_scale_shift", resnet_time_scale_shift, {"default", "scale_shift"});
  Check(resnet_out_scale_factor != 0, "{}: field 'resnet_out_scale_factor' must not be 0", kOwner);

  for (auto [field, value] :
       {std::pair("time_embedding_dim", time_embedding_dim),
        std::pair("time_cond_proj_dim", time_cond_proj_dim),
        std::pair("num_class_embeds", num_class_embeds),
        std::pair("projection_class_embeddings_input_dim", projection_class_embeddings_input_dim),
        std::pair("encoder_hid_dim", encoder_hid_dim)}) {
    if (value) positive(field, *value);
  }
  if (time_embedding_act_fn) CheckActivation(*time_embedding_act_fn);
  if (timestep_post_act) CheckActivation(*timestep_post_act);
  if (cross_attention_norm) {
    known("cross_attention_norm", *cross_attention_norm, {"layer_norm", "group_norm"});
  }
  if (class_embed_type) {
    known("class_embed_type", *class_embed_type,
          {"timestep", "identity", "projection", "simple_projection"});
    Check(!class_embed_type->ends_with("projection") || projection_class_embeddings_input_dim,
          "{}: class_embed_type '{}' needs the field 'projection_class_embeddings_input_dim'",
          kOwner, *class_embed_type);
  }
  Check(!class_embeddings_concat || has_class_embedding(),
        "{}: class_embeddings_concat needs class_embed_type or num_class_embeds", kOwner);
  if (encoder_hid_dim_type) {
    known("encoder_hid_dim_type", *encoder_hid_dim_type, {"text_proj"});
    Check(encoder_hid_dim.has_value(), "{}: encoder_hid_dim_type '{}' needs encoder_hid_dim",
          kOwner, *encoder_hid_dim_type);
  }
  if (encoder_hid_dim) {
    Check(JsonWriter::AllEqual(cross_attention_dim),
          "{}: encoder_hid_dim needs one cross_attention_dim, not {}", kOwner,
          fmt::join(cross_attention_dim, ", "));
  }

  for (size_t i = 0; i < blocks; ++i) {
    int64_t channels = block_out_channels[i];
    Check(channels % norm_num_groups == 0,
          "{}: norm_num_groups {} must divide block_out_channels {} (block {})", kOwner,
          norm_num_groups, channels, i);
    auto check = [&](const std::string& type, size_t index) {
      int64_t heads = Of(attention_head_dim, index);
      Check(type.find("CrossAttn") == type.npos || channels % heads == 0,
            "{}: attention_head_dim {} (number or width of the heads) must divide "
            "block_out_channels {} ({}, block {})",
            kOwner, heads, channels, type, i);
      // The norm has the width of the block, but what it is given that of the text.
      const int64_t width = Of(cross_attention_dim, i);
      Check(type.find("SimpleCrossAttn") == type.npos || cross_attention_norm != "layer_norm" ||
                width == channels,
            "{}: cross_attention_norm 'layer_norm' of {} needs cross_attention_dim {} to be "
            "block_out_channels {} (block {}); take 'group_norm'",
            kOwner, type, width, channels, i);
    };
    const std::string& up = up_block_types[blocks - 1 - i];
    check(down_block_types[i], i);
    check(up, up.starts_with("Simple") ? blocks - 1 - i : i);
    if (i + 1 == blocks) check(mid_block_type, i);
  }
  const int64_t half = block_out_channels[0] / 2;
  Check(half > 0 && static_cast<double>(half) > freq_shift,
        "{}: freq_shift {} must be less than half of block_out_channels {}", kOwner, freq_shift,
        block_out_channels[0]);
}

}  // namespace calotype
