#include "models/original_config.h"

#include <algorithm>

namespace calotype {

namespace {

constexpr int64_t kHeadWidth = 64;  // of the heads of CLIP, OpenCLIP and SD 2.x's U-Net

class Shapes {
 public:
  explicit Shapes(const std::map<std::string, Shape>& shapes) : shapes_(shapes) {}

  bool Has(const std::string& name) const { return shapes_.contains(name); }
  // Errors: ValueError naming the tensor if it is not there or has another rank.
  const Shape& Of(const std::string& name, int rank) const {
    auto shape = shapes_.find(name);
    Check(shape != shapes_.end(),
          "tensor {} is missing: not a Stable Diffusion checkpoint in the original layout", name);
    Check(shape->second.rank() == rank, "tensor {} is {}, expected {} dimensions", name,
          shape->second, rank);
    return shape->second;
  }
  // 0 if it is not there.
  int RankOf(const std::string& name) const {
    auto shape = shapes_.find(name);
    return shape == shapes_.end() ? 0 : shape->second.rank();
  }

 private:
  const std::map<std::string, Shape>& shapes_;
};

// Equal values are one value.
void Collapse(std::vector<int64_t>& list) {
  if (std::ranges::count(list, list[0]) == std::ranges::ssize(list)) list.resize(1);
}

UNet2DConditionConfig UNet(const Shapes& shapes) {
  const std::string prefix(kOriginalUNet);
  Check<UnsupportedError>(!shapes.Has(prefix + "label_emb.0.0.weight"),
                          "the U-Net has class labels (label_emb), as SDXL; only Stable Diffusion "
                          "1.x and 2.x are supported");
  UNet2DConditionConfig c;
  const Shape& conv_in = shapes.Of(prefix + "input_blocks.0.0.weight", 4);
  c.in_channels = conv_in[1];
  c.out_channels = shapes.Of(prefix + "out.2.weight", 4)[0];
  c.conv_in_kernel = conv_in[2];
  c.down_block_types.clear();
  c.up_block_types.clear();
  c.block_out_channels.clear();
  c.layers_per_block.clear();
  c.transformer_layers_per_block.clear();
  // Of the block that is being read: whether it attends, and its transformers' depth.
  bool attends = false;
  int64_t layers = 0, depth = 1, channels = conv_in[0];
  auto finish = [&] {
    c.block_out_channels.push_back(channels);
    c.layers_per_block.push_back(layers);
    c.transformer_layers_per_block.push_back(depth);
    c.down_block_types.push_back(attends ? "CrossAttnDownBlock2D" : "DownBlock2D");
    c.up_block_types.insert(c.up_block_types.begin(), attends ? "CrossAttnUpBlock2D" : "UpBlock2D");
    attends = false;
    layers = 0;
    depth = 1;
  };
  auto blocks_of = [&](const std::string& attention) {
    int64_t count = 0;
    while (shapes.Has(fmt::format("{}transformer_blocks.{}.norm1.weight", attention, count))) {
      ++count;
    }
    return count;
  };
  for (int64_t n = 1;; ++n) {
    std::string block = fmt::format("{}input_blocks.{}.", prefix, n);
    if (shapes.Has(block + "0.op.weight")) {
      finish();
      continue;
    }
    if (!shapes.Has(block + "0.in_layers.2.weight")) break;
    channels = shapes.Of(block + "0.in_layers.2.weight", 4)[0];
    ++layers;
    if (!shapes.Has(block + "1.norm.weight")) continue;
    attends = true;
    depth = blocks_of(block + "1.");
  }
  finish();
  std::string middle = prefix + "middle_block.1.";
  c.cross_attention_dim = {shapes.Of(middle + "transformer_blocks.0.attn2.to_k.weight", 2)[1]};
  // The depth that is given for a block without transformers counts only for the last one: it is
  // the middle block's.
  c.transformer_layers_per_block.back() = blocks_of(middle);
  // SD 2.x projects by matrices and has heads of a fixed width, SD 1.x by convolutions and has a
  // fixed number of heads.
  c.use_linear_projection = shapes.RankOf(middle + "proj_in.weight") == 2;
  if (c.use_linear_projection) {
    c.attention_head_dim.clear();
    for (int64_t width : c.block_out_channels) {
      c.attention_head_dim.push_back(std::max<int64_t>(1, width / kHeadWidth));
    }
  }
  c.sample_size = 64;
  Collapse(c.layers_per_block);
  Collapse(c.transformer_layers_per_block);
  Collapse(c.attention_head_dim);
  return c;
}

AutoencoderKLConfig Vae(const Shapes& shapes) {
  const std::string prefix(kOriginalVae), encoder = prefix + "encoder.";
  AutoencoderKLConfig c;
  c.in_channels = shapes.Of(encoder + "conv_in.weight", 4)[1];
  c.out_channels = shapes.Of(prefix + "decoder.conv_out.weight", 4)[0];
  c.latent_channels = shapes.Of(encoder + "conv_out.weight", 4)[0] / 2;
  c.use_quant_conv = shapes.Has(prefix + "quant_conv.weight");
  c.use_post_quant_conv = shapes.Has(prefix + "post_quant_conv.weight");
  c.mid_block_add_attention = shapes.Has(encoder + "mid.attn_1.q.weight");
  auto layer = [&](size_t block, int64_t layer) {
    return fmt::format("{}down.{}.block.{}.conv1.weight", encoder, block, layer);
  };
  c.block_out_channels.clear();
  for (size_t i = 0; i == 0 || shapes.Has(layer(i, 0)); ++i) {
    c.block_out_channels.push_back(shapes.Of(layer(i, 0), 4)[0]);
  }
  for (c.layers_per_block = 1; shapes.Has(layer(0, c.layers_per_block));) ++c.layers_per_block;
  c.down_block_types.assign(c.block_out_channels.size(), "DownEncoderBlock2D");
  c.up_block_types.assign(c.block_out_channels.size(), "UpDecoderBlock2D");
  c.sample_size = 512;
  return c;
}

CLIPTextConfig Text(const Shapes& shapes, TextLayout layout) {
  const bool open = layout == TextLayout::kOpenClip;
  const std::string prefix(open ? kOriginalOpenClip : kOriginalText);
  const std::string embeddings = prefix + (open ? "" : "text_model.embeddings.");
  const std::string layers =
      prefix + (open ? "transformer.resblocks." : "text_model.encoder.layers.");
  CLIPTextConfig c;
  const Shape& tokens = shapes.Of(embeddings + "token_embedding.weight", 2);
  c.vocab_size = tokens[0];
  c.hidden_size = tokens[1];
  c.max_position_embeddings =
      shapes.Of(embeddings + (open ? "positional_embedding" : "position_embedding.weight"), 2)[0];
  c.intermediate_size = shapes.Of(layers + (open ? "0.mlp.c_fc.weight" : "0.mlp.fc1.weight"), 2)[0];
  c.num_hidden_layers = 1;
  const std::string last = open ? ".ln_1.weight" : ".layer_norm1.weight";
  while (shapes.Has(fmt::format("{}{}{}", layers, c.num_hidden_layers, last)))
    ++c.num_hidden_layers;
  // SD 2.x conditions on the layer before the last, so diffusers leaves the last one out.
  if (open) --c.num_hidden_layers;
  c.num_attention_heads = std::max<int64_t>(1, c.hidden_size / kHeadWidth);
  c.hidden_act = open ? "gelu" : "quick_gelu";
  c.bos_token_id = 0;  // these three are what the folders of both versions say
  c.eos_token_id = 2;
  c.pad_token_id = 1;
  c.projection_dim = open ? 512 : 768;
  return c;
}

}  // namespace

OriginalConfigs DeriveOriginalConfigs(const std::map<std::string, Shape>& given) {
  const Shapes shapes(given);
  for (const auto& [name, shape] : given) {
    Check<UnsupportedError>(!name.starts_with("conditioner."),
                            "tensor {}: SDXL; only Stable Diffusion 1.x and 2.x are supported",
                            name);
  }
  OriginalConfigs configs;
  if (shapes.Has(std::string(kOriginalOpenClip) + "token_embedding.weight")) {
    configs.layout = TextLayout::kOpenClip;
  }
  configs.unet = UNet(shapes);
  configs.vae = Vae(shapes);
  configs.text_encoder = Text(shapes, configs.layout);
  return configs;
}

}  // namespace calotype
