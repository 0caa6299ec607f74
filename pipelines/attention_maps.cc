#include "pipelines/attention_maps.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "graph/functions.h"
#include "io/png.h"
#include "layers/attention_modules.h"
#include "pipelines/prompt_tokens.h"

namespace calotype {
namespace {

// Where the weights of the four neighbours of a position begin, and the weights.
struct CubicTap {
  int64_t first = 0;
  double weights[4] = {};
};

std::vector<CubicTap> CubicTaps(int64_t from, int64_t to) {
  constexpr double a = -0.75;
  // Keys' kernel for distances up to 1, and from 1 to 2.
  auto near = [](double d) { return ((a + 2) * d - (a + 3)) * d * d + 1; };
  auto far = [](double d) { return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a; };
  std::vector<CubicTap> taps(static_cast<size_t>(to));
  for (int64_t i = 0; i < to; ++i) {
    double at =
        (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
    double floor = std::floor(at), t = at - floor;
    taps[static_cast<size_t>(i)] = {static_cast<int64_t>(floor) - 1,
                                    {far(t + 1), near(t), near(1 - t), far(2 - t)}};
  }
  return taps;
}

}  // namespace

// ---------------------------------------------------------------- hooks

ScopedAttentionHooks::ScopedAttentionHooks(UNet2DConditionModel& unet, const Wants& wants,
                                           const Edit& edit) {
  for (const auto& [path, module] : nn::AttentionModules(unet)) {
    AttentionPlace place{.cross = module->options().cross_attention_dim > 0 ||
                                  module->options().added_kv_proj_dim > 0,
                         .path = path};
    using Block = AttentionPlace::Block;
    place.block = path.starts_with("down_blocks") ? Block::kDown
                  : path.starts_with("up_blocks") ? Block::kUp
                                                  : Block::kMid;
    module->SetAttentionProbsHook(
        {.edit = [edit, place](Value probs) { return edit(place, probs); },
         .wants = [wants, place](int64_t pixels,
                                 int64_t keys) { return wants(place, pixels, keys); }});
    modules_.push_back(module);
  }
}

ScopedAttentionHooks::~ScopedAttentionHooks() {
  for (nn::Attention* module : modules_) module->SetAttentionProbsHook({});
}

// ---------------------------------------------------------------- maps

Tensor ResizeBicubic(const Tensor& x, int64_t height, int64_t width) {
  Check<ShapeError>(x.shape().rank() == 3 && x.elements() > 0 && height > 0 && width > 0,
                    "bicubic: {} to {} x {}, needs [N, h, w]", x.shape(), height, width);
  int64_t count = x.shape()[0], h = x.shape()[1], w = x.shape()[2];
  std::vector<CubicTap> rows = CubicTaps(h, height), columns = CubicTaps(w, width);
  Tensor result({count, height, width});
  std::vector<double> line(static_cast<size_t>(w));
  for (int64_t n = 0; n < count; ++n) {
    const float* from = x.data() + n * h * w;
    for (int64_t i = 0; i < height; ++i) {
      const CubicTap& row = rows[static_cast<size_t>(i)];
      for (int64_t j = 0; j < w; ++j) {
        double sum = 0;
        for (int k = 0; k < 4; ++k) {
          sum += row.weights[k] * from[std::clamp<int64_t>(row.first + k, 0, h - 1) * w + j];
        }
        line[static_cast<size_t>(j)] = sum;
      }
      float* to = result.data() + (n * height + i) * width;
      for (int64_t j = 0; j < width; ++j) {
        const CubicTap& column = columns[static_cast<size_t>(j)];
        double sum = 0;
        for (int k = 0; k < 4; ++k) {
          auto at = static_cast<size_t>(std::clamp<int64_t>(column.first + k, 0, w - 1));
          sum += column.weights[k] * line[at];
        }
        to[j] = static_cast<float>(sum);
      }
    }
  }
  return result;
}

std::pair<int64_t, int64_t> MapSides(int64_t pixels, int64_t height, int64_t width) {
  for (int64_t h = height, w = width;; h = (h + 1) / 2, w = (w + 1) / 2) {
    if (h * w == pixels) return {h, w};
    Check<ShapeError>(h > 1 || w > 1, "attention maps: {} pixels are no halving of {} x {}", pixels,
                      height, width);
  }
}

GenerateHooks HeatMaps::Hooks(DiffusionModel& model) {
  GenerateHooks hooks;
  hooks.key = fmt::format("heat maps, {} mid block, skip {}", options_.mid_block ? "with" : "no",
                          options_.skip_factor);
  HeatMapOptions options = options_;
  hooks.denoise = [&model, options](const PictureBatch& batch, ComputationGraph&, Value sample,
                                    Value timestep, Value context) {
    Check(batch.positives == 1, "attention maps: a picture has {} contexts, must be 1",
          batch.positives);
    int64_t area = sample.dim(2) * sample.dim(3);
    std::vector<Value> outputs(1), maps;
    ScopedAttentionHooks scope(
        model.unet(),
        [&](const AttentionPlace& place, int64_t pixels, int64_t) {
          bool coarse = pixels * options.skip_factor * options.skip_factor <= area;
          bool mid = place.block == AttentionPlace::Block::kMid;
          return place.cross && !coarse && (!mid || options.mid_block);
        },
        [&](const AttentionPlace&, Value probs) {
          // The rows with the prompt follow those without.
          Value own = Slice(probs, 0, probs.dim(0) - batch.size(), batch.size());
          maps.push_back(Mean(own, {1}));
          return probs;
        });
    outputs[0] = model.Denoise(sample, timestep, context);
    Check(!maps.empty(), "attention maps: the U-Net has no layer to look at");
    outputs.insert(outputs.end(), maps.begin(), maps.end());
    return outputs;
  };
  hooks.outputs = [this](const PictureBatch& batch, int64_t step, std::span<const Tensor> maps) {
    for (int64_t i = 0; i < batch.size(); ++i) {
      Picture& picture = pictures_[batch.begin + static_cast<size_t>(i)];
      if (step == 0) picture.sums.clear();
      for (size_t layer = 0; layer < maps.size(); ++layer) {
        const Tensor& map = maps[layer];
        int64_t size = map.shape()[1] * map.shape()[2];
        if (step == 0) picture.sums.push_back(Tensor::Zeros({map.shape()[1], map.shape()[2]}));
        float* sum = picture.sums[layer].data();
        for (int64_t k = 0; k < size; ++k) sum[k] += map.data()[i * size + k];
      }
    }
  };
  hooks.after_step = [this](const PictureBatch& batch, int64_t, Tensor sample) {
    for (size_t i = batch.begin; i < batch.end; ++i) {
      pictures_[i].height = sample.shape()[2];
      pictures_[i].width = sample.shape()[3];
    }
    return sample;
  };
  return hooks;
}

const HeatMaps::Picture& HeatMaps::At(size_t picture) const {
  auto it = pictures_.find(picture);
  Check(it != pictures_.end() && it->second.height > 0,
        "attention maps: picture {} has not been drawn", picture);
  return it->second;
}

Tensor HeatMaps::Tokens(size_t index) const {
  const Picture& picture = At(index);
  int64_t tokens = picture.sums[0].shape()[1];
  Tensor result = Tensor::Zeros({tokens, picture.height, picture.width});
  for (const Tensor& sum : picture.sums) {
    int64_t pixels = sum.shape()[0];
    auto [h, w] = MapSides(pixels, picture.height, picture.width);
    Tensor maps({tokens, h, w});
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t p = 0; p < pixels; ++p) {
        maps.data()[token * pixels + p] = sum.data()[p * tokens + token];
      }
    }
    Tensor large = ResizeBicubic(maps, picture.height, picture.width);
    auto layers = static_cast<float>(picture.sums.size());
    for (int64_t k = 0; k < result.elements(); ++k) {
      result.data()[k] += std::max(large.data()[k], 0.0f) / layers;
    }
  }
  return result;
}

Tensor HeatMaps::Word(size_t picture, std::span<const int64_t> positions,
                      std::span<const int64_t> text) const {
  Tensor maps = Tokens(picture);
  int64_t tokens = maps.shape()[0], size = maps.shape()[1] * maps.shape()[2];
  Tensor result = Tensor::Zeros({maps.shape()[1], maps.shape()[2]});
  Check(!positions.empty(), "attention maps: a word without tokens");
  for (int64_t position : positions) {
    Check(position >= 0 && position < tokens, "attention maps: token {} of {}", position, tokens);
    for (int64_t k = 0; k < size; ++k) {
      result.data()[k] += maps.data()[position * size + k] / static_cast<float>(positions.size());
    }
  }
  if (options_.normalize) {
    for (int64_t k = 0; k < size; ++k) {
      float sum = 1e-6f;
      for (int64_t position : text) sum += maps.data()[position * size + k];
      result.data()[k] /= sum;
    }
  }
  return result;
}

// ---------------------------------------------------------------- pictures

Image HeatMapOverlay(const Image& picture, const Tensor& map) {
  CheckImage(picture, "heat map");
  Check<ShapeError>(map.shape().rank() == 2, "heat map: {}, needs [h, w]", map.shape());
  constexpr int kSide = 256;
  int factor = std::max(1, kSide / std::max(picture.width, picture.height));
  Image result{picture.width * factor, picture.height * factor, {}};
  Tensor heat =
      ResizeBicubic(map.Reshape({1, map.shape()[0], map.shape()[1]}), result.height, result.width);
  auto [least, most] = std::minmax_element(heat.values().begin(), heat.values().end());
  float low = *least, range = *most - *least + 1e-8f;
  result.rgb.resize(static_cast<size_t>(result.width) * static_cast<size_t>(result.height) * 3);
  for (int y = 0; y < result.height; ++y) {
    for (int x = 0; x < result.width; ++x) {
      float m = (heat.data()[y * result.width + x] - low) / range;
      // Blue, cyan, green, yellow, red.
      float colors[3] = {std::clamp(4 * m - 2, 0.0f, 1.0f),
                         std::clamp(2 - std::abs(4 * m - 2), 0.0f, 1.0f),
                         std::clamp(2 - 4 * m, 0.0f, 1.0f)};
      size_t from = static_cast<size_t>((y / factor) * picture.width + x / factor) * 3;
      size_t to = static_cast<size_t>(y * result.width + x) * 3;
      for (size_t c = 0; c < 3; ++c) {
        float value = 0.45f * static_cast<float>(picture.rgb[from + c]) + 0.55f * 255 * colors[c];
        result.rgb[to + c] = static_cast<uint8_t>(std::lround(value));
      }
    }
  }
  return result;
}

std::vector<std::filesystem::path> WriteHeatMaps(const std::filesystem::path& folder,
                                                 const HeatMaps& maps, const DiffusionModel& model,
                                                 std::span<const std::string> prompts,
                                                 std::span<const Image> pictures) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  std::vector<std::filesystem::path> paths;
  for (size_t i = 0; i < prompts.size(); ++i) {
    PromptTokens tokens = TokenizePrompt(model, prompts[i]);
    std::vector<int64_t> text;
    for (const auto& positions : tokens.positions) {
      text.insert(text.end(), positions.begin(), positions.end());
    }
    for (size_t word = 0; word < tokens.words.size(); ++word) {
      auto first = std::find(tokens.words.begin(), tokens.words.end(), tokens.words[word]);
      bool again = first != tokens.words.begin() + static_cast<int64_t>(word);
      if (again || tokens.positions[word].empty()) continue;
      std::string name = tokens.words[word];
      for (char& c : name) {
        bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                     static_cast<unsigned char>(c) >= 128;
        if (!plain) c = '_';
      }
      paths.push_back(folder / fmt::format("{:03}-{}-{}.png", i, word, name));
      std::vector<int64_t> positions = tokens.Of(tokens.words[word]);
      WritePng(paths.back(), HeatMapOverlay(pictures[i], maps.Word(i, positions, text)));
    }
  }
  return paths;
}

}  // namespace calotype
