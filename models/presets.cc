#include "models/presets.h"

#include "core/error.h"

namespace calotype {

namespace {

UNet2DConditionConfig Toy16() {
  UNet2DConditionConfig c;
  c.sample_size = 16;
  c.in_channels = c.out_channels = 3;
  c.layers_per_block = {1};
  c.block_out_channels = {32, 64};
  c.down_block_types = {"DownBlock2D", "CrossAttnDownBlock2D"};
  c.up_block_types = {"CrossAttnUpBlock2D", "UpBlock2D"};
  c.cross_attention_dim = {64};
  c.attention_head_dim = {4};
  c.norm_num_groups = 8;
  return c;
}

UNet2DConditionConfig Small32() {
  UNet2DConditionConfig c = Toy16();
  c.sample_size = 32;
  c.block_out_channels = {32, 64, 128};
  c.down_block_types = {"DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"};
  c.up_block_types = {"CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"};
  return c;
}

UNet2DConditionConfig Attn32() {
  UNet2DConditionConfig c = Small32();
  c.down_block_types = {"CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"};
  c.up_block_types = {"UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"};
  return c;
}

UNet2DConditionConfig Sd15() {
  UNet2DConditionConfig c;  // diffusers' defaults are nearly it
  c.sample_size = 64;
  c.cross_attention_dim = {768};
  return c;
}

struct Preset {
  std::string_view name;
  UNet2DConditionConfig (*config)();
};
constexpr Preset kPresets[] = {
    {"toy16", Toy16}, {"small32", Small32}, {"attn32", Attn32}, {"sd15", Sd15}};

}  // namespace

UNet2DConditionConfig UNetPreset(std::string_view name) {
  for (const Preset& preset : kPresets) {
    if (preset.name == name) return preset.config();
  }
  Fail("there is no U-Net preset '{}'; known are {}", name, fmt::join(UNetPresetNames(), ", "));
}

std::vector<std::string_view> UNetPresetNames() {
  std::vector<std::string_view> names;
  for (const Preset& preset : kPresets) names.push_back(preset.name);
  return names;
}

}  // namespace calotype
