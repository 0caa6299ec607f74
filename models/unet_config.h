// UNet2DConditionConfig: the fields of diffusers' UNet2DConditionModel, read from and written to
// its config.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace calotype {

// Defaults are diffusers'. A field that diffusers accepts as a number or as a list of one number
// for each block is always a list here, [down_block_types.size()]; FromJson spreads a single
// number, and a list of one value stands for all blocks. Values that diffusers accepts although
// other fields leave them without effect are accepted, since its files hold them.
struct UNet2DConditionConfig {
  std::optional<int64_t>
      sample_size;  // side of the pictures that the model was made for; information
  int64_t in_channels = 4, out_channels = 4;
  bool center_input_sample = false;  // x = 2 x - 1 first
  bool flip_sin_to_cos = true;       // see Timesteps
  double freq_shift = 0;
  std::vector<std::string> down_block_types = {"CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                                               "CrossAttnDownBlock2D", "DownBlock2D"};
  std::string mid_block_type = "UNetMidBlock2DCrossAttn";
  std::vector<std::string> up_block_types = {"UpBlock2D", "CrossAttnUpBlock2D",
                                             "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"};
  std::vector<bool> only_cross_attention = {false};  // of the down and up blocks
  // Of a simple mid block; null: only_cross_attention, if that is one value for all.
  std::optional<bool> mid_block_only_cross_attention;
  std::vector<int64_t> block_out_channels = {320, 640, 1280, 1280};
  std::vector<int64_t> layers_per_block = {2};
  int64_t downsample_padding = 1;
  double mid_block_scale_factor = 1;  // the mid block's residuals are divided by it
  std::string act_fn = "silu";
  int64_t norm_num_groups = 32;
  double norm_eps = 1e-5;
  std::vector<int64_t> cross_attention_dim = {1280};
  std::vector<int64_t> transformer_layers_per_block = {1};
  // The NUMBER of heads of each block, as in diffusers; the width of a head in simple blocks.
  std::vector<int64_t> attention_head_dim = {8};
  bool use_linear_projection = false;
  bool upcast_attention = false;                    // arithmetic is float32 here: changes nothing
  std::string resnet_time_scale_shift = "default";  // or "scale_shift"
  // Of the simple and the Resnet... blocks alone, as in diffusers.
  bool resnet_skip_time_act = false;
  double resnet_out_scale_factor = 1;
  // Of the simple blocks alone: a norm of encoder_hidden_states; null, "layer_norm", "group_norm".
  std::optional<std::string> cross_attention_norm;
  std::string time_embedding_type = "positional";
  std::optional<int64_t> time_embedding_dim;  // null: four times block_out_channels[0]
  // Applied to the finished time embedding, and to the result of its two linear layers.
  std::optional<std::string> time_embedding_act_fn, timestep_post_act;
  std::optional<int64_t> time_cond_proj_dim;  // width of the input timestep_cond
  // What class_labels are and how they become a vector that is added to the time embedding, or with
  // class_embeddings_concat appended to it: null with num_class_embeds: ids, a table; "timestep":
  // numbers, as timesteps; "projection" and "simple_projection": vectors
  // [projection_class_embeddings_input_dim], two linear layers and one; "identity": the vector.
  // A type goes before num_class_embeds, which then has no effect.
  std::optional<std::string> class_embed_type;
  std::optional<int64_t> num_class_embeds, projection_class_embeddings_input_dim;
  bool class_embeddings_concat = false;
  // With a width here encoder_hidden_states have it, and a linear layer goes first: type null or
  // "text_proj".
  std::optional<int64_t> encoder_hid_dim;
  std::optional<std::string> encoder_hid_dim_type;
  int64_t conv_in_kernel = 3, conv_out_kernel = 3;

  bool has_class_embedding() const { return class_embed_type || num_class_embeds; }
  bool has_class_table() const { return !class_embed_type && num_class_embeds; }
  int64_t time_embed_dim() const { return time_embedding_dim.value_or(4 * block_out_channels[0]); }
  // Width of the encoder_hidden_states that the model is given.
  int64_t context_width() const {
    return encoder_hid_dim.value_or(Of(cross_attention_dim, block_out_channels.size() - 1));
  }

  // Element `block` of a list field.
  template <class T>
  static T Of(const std::vector<T>& list, size_t block) {
    return list.size() == 1 ? list[0] : list[block];
  }

  // Errors: ValueError for text that is not JSON, a field of a wrong type, an unknown field
  // (named), and whatever Validate finds; UnsupportedError naming a known field with an unsupported
  // value. Keys that start with "_" are skipped, but _class_name must be UNet2DConditionModel if it
  // is there.
  static UNet2DConditionConfig FromJson(std::string_view text);
  // diffusers' config.json: all of its fields, sorted, indented by 2.
  std::string ToJson() const;
  // Errors: ValueError naming the field that is out of range or does not fit the others,
  // UnsupportedError naming an unsupported block type or mode.
  void Validate() const;
  bool operator==(const UNet2DConditionConfig&) const = default;
};

}  // namespace calotype
