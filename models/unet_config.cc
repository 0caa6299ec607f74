#include "models/unet_config.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "layers/activation.h"
#include "models/json_fields.h"

namespace calotype {

namespace {

constexpr std::string_view kOwner = "UNet2DConditionModel";

// The fields that diffusers knows and that must keep their default here.
const std::vector<std::pair<std::string, nlohmann::json>>& FixedFields() {
  static const std::vector<std::pair<std::string, nlohmann::json>> fields = {
      {"addition_embed_type", nullptr},
      {"addition_embed_type_num_heads", 64},
      {"addition_time_embed_dim", nullptr},
      {"attention_type", "default"},
      {"class_embed_type", nullptr},
      {"class_embeddings_concat", false},
      {"cross_attention_norm", nullptr},
      {"dropout", 0.0},
      {"dual_cross_attention", false},
      {"encoder_hid_dim", nullptr},
      {"encoder_hid_dim_type", nullptr},
      {"num_attention_heads", nullptr},
      {"num_class_embeds", nullptr},
      {"projection_class_embeddings_input_dim", nullptr},
      {"reverse_transformer_layers_per_block", nullptr},
      {"time_cond_proj_dim", nullptr},
      {"time_embedding_act_fn", nullptr},
      {"time_embedding_dim", nullptr},
      {"timestep_post_act", nullptr}};
  return fields;
}

template <class T>
bool AllEqual(const std::vector<T>& list) {
  return std::adjacent_find(list.begin(), list.end(), std::not_equal_to<>()) == list.end();
}

// A list of equal values is written as one value.
template <class T>
nlohmann::json OneOrMany(const std::vector<T>& list) {
  if (!AllEqual(list)) return list;
  return static_cast<T>(list[0]);
}
// Whole numbers are written without a point where diffusers' default has none.
nlohmann::json Number(double value) {
  bool whole = std::abs(value) < 1e15 && std::trunc(value) == value;
  return whole ? nlohmann::json(static_cast<int64_t>(value)) : nlohmann::json(value);
}

// Equal values in a list mean what one value means; keeps equality of configurations simple.
template <class T>
void Collapse(std::vector<T>& list) {
  if (AllEqual(list)) list.resize(1);
}

}  // namespace

UNet2DConditionConfig UNet2DConditionConfig::FromJson(std::string_view text) {
  UNet2DConditionConfig c;
  JsonFields fields(kOwner, text);
  std::string class_name(kOwner);
  fields.Read("_class_name", class_name);
  Check<UnsupportedError>(class_name == kOwner, "{}: _class_name is '{}'", kOwner, class_name);
  fields.Read("sample_size", c.sample_size);
  fields.Read("in_channels", c.in_channels);
  fields.Read("out_channels", c.out_channels);
  fields.Read("center_input_sample", c.center_input_sample);
  fields.Read("flip_sin_to_cos", c.flip_sin_to_cos);
  fields.Read("freq_shift", c.freq_shift);
  fields.Read("down_block_types", c.down_block_types);
  fields.Read("mid_block_type", c.mid_block_type);
  fields.Read("up_block_types", c.up_block_types);
  fields.ReadOneOrMany("only_cross_attention", c.only_cross_attention);
  fields.Read("mid_block_only_cross_attention", c.mid_block_only_cross_attention);
  fields.Read("block_out_channels", c.block_out_channels);
  fields.ReadOneOrMany("layers_per_block", c.layers_per_block);
  fields.Read("downsample_padding", c.downsample_padding);
  fields.Read("mid_block_scale_factor", c.mid_block_scale_factor);
  fields.Read("act_fn", c.act_fn);
  fields.Read("norm_num_groups", c.norm_num_groups);
  fields.Read("norm_eps", c.norm_eps);
  fields.ReadOneOrMany("cross_attention_dim", c.cross_attention_dim);
  fields.ReadOneOrMany("transformer_layers_per_block", c.transformer_layers_per_block);
  fields.ReadOneOrMany("attention_head_dim", c.attention_head_dim);
  fields.Read("use_linear_projection", c.use_linear_projection);
  fields.Read("upcast_attention", c.upcast_attention);
  fields.Read("resnet_time_scale_shift", c.resnet_time_scale_shift);
  fields.Read("resnet_skip_time_act", c.resnet_skip_time_act);
  fields.Read("resnet_out_scale_factor", c.resnet_out_scale_factor);
  fields.Read("time_embedding_type", c.time_embedding_type);
  fields.Read("conv_in_kernel", c.conv_in_kernel);
  fields.Read("conv_out_kernel", c.conv_out_kernel);
  for (const auto& [name, value] : FixedFields()) fields.Only(name, value);
  fields.CheckAllRead();
  c.Validate();
  Collapse(c.only_cross_attention);
  Collapse(c.layers_per_block);
  Collapse(c.cross_attention_dim);
  Collapse(c.transformer_layers_per_block);
  Collapse(c.attention_head_dim);
  return c;
}

std::string UNet2DConditionConfig::ToJson() const {
  nlohmann::json json;  // sorts its keys
  json["_class_name"] = kOwner;
  json["_diffusers_version"] = "0.42.1";  // the version that the golden files come from
  for (const auto& [name, value] : FixedFields()) json[name] = value;
  json["sample_size"] = sample_size ? nlohmann::json(*sample_size) : nlohmann::json(nullptr);
  json["in_channels"] = in_channels;
  json["out_channels"] = out_channels;
  json["center_input_sample"] = center_input_sample;
  json["flip_sin_to_cos"] = flip_sin_to_cos;
  json["freq_shift"] = Number(freq_shift);
  json["down_block_types"] = down_block_types;
  json["mid_block_type"] = mid_block_type;
  json["up_block_types"] = up_block_types;
  json["mid_block_only_cross_attention"] = mid_block_only_cross_attention
                                               ? nlohmann::json(*mid_block_only_cross_attention)
                                               : nlohmann::json(nullptr);
  json["only_cross_attention"] = OneOrMany(only_cross_attention);
  json["block_out_channels"] = block_out_channels;
  json["layers_per_block"] = OneOrMany(layers_per_block);
  json["downsample_padding"] = downsample_padding;
  json["mid_block_scale_factor"] = Number(mid_block_scale_factor);
  json["act_fn"] = act_fn;
  json["norm_num_groups"] = norm_num_groups;
  json["norm_eps"] = norm_eps;
  json["cross_attention_dim"] = OneOrMany(cross_attention_dim);
  json["transformer_layers_per_block"] = OneOrMany(transformer_layers_per_block);
  json["attention_head_dim"] = OneOrMany(attention_head_dim);
  json["use_linear_projection"] = use_linear_projection;
  json["upcast_attention"] = upcast_attention;
  json["resnet_time_scale_shift"] = resnet_time_scale_shift;
  json["resnet_skip_time_act"] = resnet_skip_time_act;
  json["resnet_out_scale_factor"] = resnet_out_scale_factor;
  json["time_embedding_type"] = time_embedding_type;
  json["conv_in_kernel"] = conv_in_kernel;
  json["conv_out_kernel"] = conv_out_kernel;
  return json.dump(2) + "\n";
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
        {"UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"});
  known("time_embedding_type", time_embedding_type, {"positional"});
  known("resnet_time_scale_shift", resnet_time_scale_shift, {"default", "scale_shift"});
  Check(resnet_out_scale_factor != 0, "{}: field 'resnet_out_scale_factor' must not be 0", kOwner);

  for (size_t i = 0; i < blocks; ++i) {
    int64_t channels = block_out_channels[i];
    Check(channels % norm_num_groups == 0,
          "{}: norm_num_groups {} must divide block_out_channels {} (block {})", kOwner,
          norm_num_groups, channels, i);
    auto attention = [](const std::string& type) { return type.find("CrossAttn") != type.npos; };
    bool attends = attention(down_block_types[i]) || i + 1 == blocks ||
                   attention(up_block_types[blocks - 1 - i]);
    int64_t heads = Of(attention_head_dim, i);
    Check(!attends || channels % heads == 0,
          "{}: attention_head_dim {} (number or width of the heads) must divide block_out_channels "
          "{} (block "
          "{})",
          kOwner, heads, channels, i);
  }
  const int64_t half = block_out_channels[0] / 2;
  Check(half > 0 && static_cast<double>(half) > freq_shift,
        "{}: freq_shift {} must be less than half of block_out_channels {}", kOwner, freq_shift,
        block_out_channels[0]);
}

}  // namespace calotype
