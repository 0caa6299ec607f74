// A U-Net small enough to train in milliseconds, for tests of the pipelines and the program.
#pragma once

namespace calotype::test {

constexpr const char* kTinyUNet = R"({"sample_size": 16, "in_channels": 3, "out_channels": 3,
  "layers_per_block": 1, "block_out_channels": [8, 8], "norm_num_groups": 4,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
  "cross_attention_dim": 8, "attention_head_dim": 2})";

}  // namespace calotype::test
