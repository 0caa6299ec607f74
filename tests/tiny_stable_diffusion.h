// A Stable Diffusion folder as diffusers lays it out, small enough to train in milliseconds: 16 x
// 16 pictures, latents of 4 x 8 x 8, a vocabulary of bytes.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "models/clip_tokenizer.h"
#include "pipelines/diffusion_model.h"
#include "tests/tiny_vocabulary.h"

namespace calotype::test {

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
  const auto [vocab, merges, size] = TinyVocabulary();
  const std::string tokenizer = R"({"model_max_length": 16})";
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
