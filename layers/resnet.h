// ResnetBlock2D of diffusers: two convolutions with group norms, the time embedding between them,
// and a skip connection.
#pragma once

#include <optional>
#include <string>

#include "layers/conv2d.h"
#include "layers/linear.h"
#include "layers/norm.h"
#include "layers/resample.h"

namespace calotype::nn {

// Inputs: input_tensor [B, in_channels, H, W]; temb [B or 1, temb_channels] unless temb_channels is
// 0.
//   h = conv1(resize(f(norm1(x))))
//   t = time_emb_proj(f(temb))                      (f is left out with skip_time_act)
//   "default":     h = norm2(h + t)                 "scale_shift": h = norm2(h) (1 + t_1) + t_2
//   y = (shortcut(resize(x)) + conv2(f(h))) / output_scale_factor
// with resize = nearest 2x (up), 2x2 mean (down) or nothing; shortcut is a 1x1 convolution where
// the channel counts differ (or as use_in_shortcut says), else the identity.
class ResnetBlock2D : public Layer {
 public:
  struct Options {
    int64_t in_channels = 0;
    int64_t out_channels = 0;     // 0: in_channels
    double dropout = 0;           // only 0 is supported
    int64_t temb_channels = 512;  // 0: no time embedding
    int64_t groups = 32;
    int64_t groups_out = 0;  // 0: groups
    double eps = 1e-6;
    std::string non_linearity = "swish";
    bool skip_time_act = false;
    std::string time_embedding_norm = "default";  // or "scale_shift"
    double output_scale_factor = 1;
    std::optional<bool> use_in_shortcut = std::nullopt;
    bool up = false, down = false;
    bool conv_shortcut_bias = true;
    int64_t conv_2d_out_channels = 0;  // 0: out_channels
  };
  // Errors: UnsupportedError for another time_embedding_norm or a dropout; ValueError otherwise.
  explicit ResnetBlock2D(const Options& options);
  const Options& options() const { return options_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
  GroupNorm *norm1_, *norm2_;
  Conv2d *conv1_, *conv2_, *conv_shortcut_ = nullptr;
  Linear* time_emb_proj_ = nullptr;
  Upsample2D* upsample_ = nullptr;
  Downsample2D* downsample_ = nullptr;
};

}  // namespace calotype::nn
