// TextToImagePipeline: pictures from prompts. Encodes the captions, walks the sampler from noise to
// a picture with the U-Net, eagerly or compiled. A picture depends on its own prompt, seed and
// options alone, not on what else is in the batch.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"

namespace calotype {

struct GenerateOptions {
  std::vector<std::string> prompts;  // one a picture; "" is the empty caption
  std::vector<uint64_t> seeds;       // one a picture
  std::string negative_prompt;       // what guidance leads away from; needs guidance_scale > 1
  int64_t steps = 25;
  double guidance_scale = 1;  // 1: the prompt alone
  double guidance_rescale = 0;
  std::string sampler = "ddim";  // see WithSampler
  double eta = 0;                // noise of DDIM's steps
  std::string rng = "philox";    // or torch: PyTorch's numbers of the seed, see TorchRandom
  int64_t side = 0;              // width and height; 0: the model's
  int64_t batch_size = 64;       // pictures computed together
};

struct GenerateCallbacks {
  std::function<void(int64_t done, int64_t total)> progress;  // U-Net calls
  std::function<bool()> cancelled;
  std::function<void(const std::string&)> warn;  // words of a prompt that the model does not know
};

class TextToImagePipeline {
 public:
  // Keeps a reference to the model; weights changed later are seen by later calls.
  TextToImagePipeline(DiffusionModel& model, Backend backend);
  // A pipeline with the model of a run folder. Errors: those of DiffusionModel::Load.
  static std::unique_ptr<TextToImagePipeline> Load(const std::filesystem::path& folder,
                                                   Backend backend);

  // [N, 3, side, side], in [-1, 1] where the sampler clips. A prompt's unknown words are reported
  // to warn and taken as <unk>. Errors: ValueError for an option out of range or a prompt all of
  // whose words are unknown; CancelledError; NumericError if a picture is not finite.
  Tensor Generate(const GenerateOptions& options, const GenerateCallbacks& callbacks = {});

  DiffusionModel& model() { return model_; }
  double compile_seconds() const { return compile_seconds_; }  // so far
  // How often compiled code has computed what the prompts alone decide (keys and values of the
  // cross-attention): once for each batch of pictures, not for each step. 0 for eager.
  int64_t context_runs() const;

 private:
  Tensor GenerateBatch(const GenerateOptions& options, size_t begin, size_t end,
                       const Tensor& tokens, const std::function<void(int64_t)>& count,
                       const GenerateCallbacks& callbacks);
  GraphRunner& Encoder(int64_t batch);
  GraphRunner& UNet(int64_t batch, int64_t side);

  std::unique_ptr<DiffusionModel> owned_;
  DiffusionModel& model_;
  Backend backend_;
  double compile_seconds_ = 0;
  std::map<int64_t, std::unique_ptr<GraphRunner>> encoders_;                   // by batch
  std::map<std::pair<int64_t, int64_t>, std::unique_ptr<GraphRunner>> unets_;  // by batch and side
};

// The text of a PNG's `parameters` chunk as other programs write it: the prompt, the negative
// prompt, then "Steps: 25, Sampler: DDIM, CFG scale: 1, Seed: 7, Size: 16x16, Version: calotype
// 0.1.0", with "RNG: CPU, " before the version for PyTorch's numbers.
std::string GenerationParameters(const GenerateOptions& options, size_t index, int64_t side);

}  // namespace calotype
