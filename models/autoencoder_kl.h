// AutoencoderKL of diffusers: the variational autoencoder between pictures and the latents in which
// Stable Diffusion denoises. Parameter names and shapes are diffusers' own, so its files load by
// name.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "layers/conv2d.h"
#include "models/vae_blocks.h"

namespace calotype {

// The fields of config.json. Defaults are diffusers'.
struct AutoencoderKLConfig {
  int64_t in_channels = 3, out_channels = 3;
  std::vector<std::string> down_block_types = {"DownEncoderBlock2D"};
  std::vector<std::string> up_block_types = {"UpDecoderBlock2D"};
  std::vector<int64_t> block_out_channels = {64};
  int64_t layers_per_block = 1;
  std::string act_fn = "silu";
  int64_t latent_channels = 4;
  int64_t norm_num_groups = 32;
  int64_t sample_size = 32;  // side of the training pictures; the side of a tile
  double scaling_factor = 0.18215;
  std::optional<double> shift_factor;
  bool force_upcast = true;  // arithmetic is float32 here: changes nothing
  bool use_quant_conv = true, use_post_quant_conv = true;
  bool mid_block_add_attention = true;

  // Pixels of a picture's side for each one of its latents: 2^(blocks - 1).
  int64_t Factor() const { return int64_t{1} << (block_out_channels.size() - 1); }
  // Errors: ValueError for text that is not JSON, a field of a wrong type, an unknown field, and
  // whatever Validate finds; UnsupportedError naming a field with an unsupported value.
  static AutoencoderKLConfig FromJson(std::string_view text);
  std::string ToJson() const;
  void Validate() const;
  bool operator==(const AutoencoderKLConfig&) const = default;
};

// A Gaussian with independent components, as the encoder gives it: mean and logvar [B, C, H, W],
// logvar within [-30, 20].
struct LatentDistribution {
  Value mean, logvar;

  Value Mode() const { return mean; }
  // mean + exp(logvar / 2) noise, noise ~ N(0, 1) of the shape of mean.
  Value Sample(Value noise) const;
  // KL divergence from N(0, 1) for each sample: sum of (mean^2 + exp(logvar) - 1 - logvar) / 2; [B]
  Value KlDivergence() const;
};

// Pictures larger than a tile are encoded and decoded tile by tile; neighbours share a band that is
// blended linearly. Memory is that of one tile; values differ from those without tiling, since
// attention and norms see a tile only.
struct VaeTiling {
  int64_t sample_size = 0;  // side of a tile in pixels; 0: the config's sample_size
  double overlap = 0.25;    // share of a tile that neighbours have in common
};

// Inputs: sample [B, in_channels, H, W] in [-1, 1]; noise (optional) of the shape of the latents.
// Outputs: decode(z), mean, logvar with z = mean, or a sample of the distribution if there is
// noise.
class AutoencoderKL : public Layer {
 public:
  // Errors: as AutoencoderKLConfig::Validate.
  explicit AutoencoderKL(const AutoencoderKLConfig& config);
  const AutoencoderKLConfig& config() const { return config_; }

  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  std::map<std::string, std::string> GetDiagnostics() const override;

  // quant_conv(encoder(x)); x [B, in_channels, H, W], latents [B, latent_channels, H/f, W/f].
  LatentDistribution Encode(Value x);
  // decoder(post_quant_conv(z)); [B, out_channels, f H, f W].
  Value Decode(Value z);
  // What the U-Net works on, z' = (z - shift_factor) scaling_factor, and back.
  Value ScaleLatents(Value z) const;
  Value UnscaleLatents(Value latents) const;

  // Errors: ValueError unless overlap is in [0, 0.5] and the tiles fit together: latents per tile
  // without the band must be the pixels without the band / f.
  void SetTiling(const std::optional<VaeTiling>& tiling);

  // The names of the attention's tensors in files of diffusers before 0.17 (query, key, value,
  // proj_attn) replaced by today's. Errors: ValueError if a tensor is there under both names.
  static std::map<std::string, Tensor> CurrentNames(std::map<std::string, Tensor> tensors);

 private:
  struct Tiles {           // sides and limits in units of the input's and of the result's elements
    int64_t size, stride;  // of the input
    int64_t band, limit;   // of the result
  };
  Value Moments(Value x);
  template <class F>
  Value Tiled(Value x, const Tiles& tiles, const F& apply);

  AutoencoderKLConfig config_;
  nn::VaeEncoder* encoder_;
  nn::VaeDecoder* decoder_;
  nn::Conv2d *quant_conv_ = nullptr, *post_quant_conv_ = nullptr;
  std::optional<Tiles> encode_tiles_, decode_tiles_;
};

}  // namespace calotype
