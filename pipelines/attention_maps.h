// Attention probabilities of a U-Net at work: which layers there are, how they are looked at or
// changed while the graph is built, and heat maps of words (DAAM, Tang et al. 2022,
// arXiv:2210.04885).
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor.h"
#include "io/image.h"
#include "layers/attention.h"
#include "pipelines/text_to_image.h"

namespace calotype {

// An attention module of a U-Net.
struct AttentionPlace {
  enum class Block : uint8_t { kDown, kMid, kUp } block = Block::kDown;
  bool cross = false;  // reads the prompt
  std::string path;    // from the U-Net
};

// Gives attention modules of a U-Net a hook for its life; the others compute as ever. `wants` says
// which, by place, pixels and keys. Graphs that were built meanwhile stay as they are.
class ScopedAttentionHooks {
 public:
  using Wants = std::function<bool(const AttentionPlace&, int64_t pixels, int64_t keys)>;
  using Edit = std::function<Value(const AttentionPlace&, Value probs)>;
  ScopedAttentionHooks(UNet2DConditionModel& unet, const Wants& wants, const Edit& edit);
  ~ScopedAttentionHooks();
  ScopedAttentionHooks(const ScopedAttentionHooks&) = delete;

 private:
  std::vector<nn::Attention*> modules_;
};

// x [N, h, w] as [N, height, width], bicubic as in PyTorch (a = -0.75, half-pixel centres, edges
// repeated).
Tensor ResizeBicubic(const Tensor& x, int64_t height, int64_t width);

// Sides of a map of `pixels` pixels of a height x width sample that was halved (rounding up) some
// times. Errors: ShapeError if there are none.
std::pair<int64_t, int64_t> MapSides(int64_t pixels, int64_t height, int64_t width);

struct HeatMapOptions {
  bool mid_block = false;  // count the mid block's attention too
  // Layers whose pixels are this many times as wide as the sample's are left out, as too coarse.
  int64_t skip_factor = 8;
  bool normalize = false;  // divide each pixel by its sum over the words
};

// Collects the cross-attention of pictures while they are drawn.
class HeatMaps {
 public:
  explicit HeatMaps(const HeatMapOptions& options = {}) : options_(options) {}

  // Hooks for one call of Generate, which the object must outlive. The pictures must have one
  // positive context each.
  GenerateHooks Hooks(DiffusionModel& model);
  size_t pictures() const { return pictures_.size(); }
  // Maps of the tokens of a picture [S, height, width] at the size of the sample: for each layer
  // the mean over heads of its probabilities, summed over steps, resized (ResizeBicubic), negative
  // values 0; the mean over the layers. Errors: ValueError for a picture that was not drawn.
  Tensor Tokens(size_t picture) const;
  // The map of some tokens: the mean of theirs [height, width]. `text`: the tokens of the text, for
  // `normalize`.
  Tensor Word(size_t picture, std::span<const int64_t> positions,
              std::span<const int64_t> text) const;

 private:
  struct Picture {
    int64_t height = 0, width = 0;  // of the sample
    std::vector<Tensor> sums;       // [L, S] of each layer
  };
  const Picture& At(size_t picture) const;

  HeatMapOptions options_;
  std::map<size_t, Picture> pictures_;
};

// A map [h, w] over a picture: stretched to its smallest and largest value, resized (bicubic) and
// laid over the picture in colours from blue (least) over green to red. Pictures of less than 256
// pixels are enlarged by a whole factor first.
Image HeatMapOverlay(const Image& picture, const Tensor& map);

// Writes an overlay for each word of each prompt (all its occurrences together), pictures[i] being
// that of prompts[i]: FOLDER/PICTURE-WORD-TEXT.png, "000-2-circle.png". Returns the paths. Errors:
// FileError.
std::vector<std::filesystem::path> WriteHeatMaps(const std::filesystem::path& folder,
                                                 const HeatMaps& maps, const DiffusionModel& model,
                                                 std::span<const std::string> prompts,
                                                 std::span<const Image> pictures);

}  // namespace calotype
