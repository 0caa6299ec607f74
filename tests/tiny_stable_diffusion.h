// A Stable Diffusion folder as diffusers lays it out, small enough to train in milliseconds: 16 x
// 16 pictures, latents of 4 x 8 x 8, a vocabulary of bytes.
#pragma once

#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <string>

#include "models/clip_tokenizer.h"
#include "pipelines/diffusion_model.h"

namespace calotype::test {

// 256 byte characters, the same with </w>, and the two special tokens.
inline std::string ByteVocabulary() {
  std::string vocab = "{";
  int size = 0;
  auto add = [&](const std::string& token) {
    std::string escaped;
    for (char c : token) {
      if (c == '"' || c == '\\') escaped += '\\';
      escaped += c;
    }
    vocab += fmt::format("{}\"{}\": {}", size ? ", " : "", escaped, size);
    ++size;
  };
  for (const char* end : {"", "</w>"}) {
    for (int code = 33; code < 324; ++code) {
      if ((code >= 127 && code < 161) || code == 173) continue;
      std::string utf8;
      if (code < 128) {
        utf8 = static_cast<char>(code);
      } else {
        utf8 += static_cast<char>(0xc0 | (code >> 6));
        utf8 += static_cast<char>(0x80 | (code & 63));
      }
      add(utf8 + end);
    }
  }
  add("<|startoftext|>");
  add("<|endoftext|>");
  return vocab + "}";
}

inline std::unique_ptr<DiffusionModel> TinyStableDiffusion() {
  DiffusionModelConfig config;
  config.unet = UNet2DConditionConfig::FromJson(R"({"sample_size": 8, "in_channels": 4,
    "out_channels": 4, "layers_per_block": 1, "block_out_channels": [8, 8], "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 8, "attention_head_dim": 2})");
  config.vae = AutoencoderKLConfig::FromJson(R"({"in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "block_out_channels": [8, 8],
    "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16, "scaling_factor": 0.5})");
  config.text_encoder = CLIPTextConfig::FromJson(R"({"vocab_size": 514, "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "bos_token_id": 512, "eos_token_id": 513})");
  const std::string vocab = ByteVocabulary(), merges = "#version: 0.2\n",
                    tokenizer = R"({"model_max_length": 16})";
  config.tokenizer =
      std::make_shared<CLIPTokenizer>(vocab, merges, CLIPTokenizerConfig::FromJson(tokenizer));
  config.tokenizer_files = {
      {"vocab.json", vocab}, {"merges.txt", merges}, {"tokenizer_config.json", tokenizer}};
  config.scheduler.beta_schedule = "scaled_linear";
  config.scheduler.beta_start = 0.00085;
  config.scheduler.beta_end = 0.012;
  config.scheduler.prediction_type = "epsilon";
  auto model = std::make_unique<DiffusionModel>(std::move(config));
  model->Initialize(3);
  return model;
}

}  // namespace calotype::test
