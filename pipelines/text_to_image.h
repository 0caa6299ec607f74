// TextToImagePipeline: pictures from prompts. Encodes the captions, walks the sampler from noise to
// a sample with the U-Net, eagerly or compiled, and decodes latents to pictures. A picture depends
// on its own prompt, seed and options alone, not on what else is in the batch.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "core/tensor.h"
#include "io/image.h"
#include "jit/compile.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"
#include "pipelines/model_graphs.h"

namespace calotype {

// What one picture is drawn from at one step: text embeddings [T, D], all of one T. With output u
// for `negative` and c_i for positive[i], the guided output is u + g sum of weights[i] (c_i - u).
struct PictureContext {
  Tensor negative;  // may be undefined if there is no guidance and one positive of weight 1
  std::vector<Tensor> positive;
  std::vector<double> weights;  // one for each of positive; empty: 1 each
};

// The pictures that are computed together: `begin` to `end` of the options' prompts. The rows of
// the U-Net's batch are, if guided, all pictures with their negative contexts, then all pictures
// with their first positive one, and so on.
struct PictureBatch {
  size_t begin = 0, end = 0;
  bool guided = false;
  size_t positives = 1;  // contexts of a picture

  int64_t size() const { return static_cast<int64_t>(end - begin); }
  int64_t rows() const { return size() * static_cast<int64_t>(positives + (guided ? 1 : 0)); }
};

// For what looks at the U-Net at work or changes it: attention maps and editing, blending. Absent
// functions do nothing. Steps count the U-Net's calls from 0.
struct GenerateHooks {
  // Stands for what `denoise` builds; compiled U-Nets are kept by it. Must not be empty if there is
  // a `denoise`.
  std::string key;
  // Builds the U-Net in place of DiffusionModel::Denoise, see DenoiseBuilder.
  std::function<std::vector<Value>(const PictureBatch&, ComputationGraph&, Value sample,
                                   Value timestep, Value context)>
      denoise;
  // Values of the further inputs that `denoise` declares, in their order.
  std::function<std::vector<Tensor>(const PictureBatch&, int64_t step)> inputs;
  // Takes its further outputs.
  std::function<void(const PictureBatch&, int64_t step, std::span<const Tensor>)> outputs;
  // Takes the sample [pictures, C, H, W] that the sampler made of this step and returns the one to
  // go on with.
  std::function<Tensor(const PictureBatch&, int64_t step, Tensor sample)> after_step;
};

struct GenerateOptions {
  std::vector<std::string> prompts;  // one a picture; "" is the empty caption
  std::vector<uint64_t> seeds;       // one a picture
  std::string negative_prompt;       // what guidance leads away from; needs guidance_scale > 1
  int64_t steps = 25;
  // 1: the prompt alone. None: 7.5 for Stable Diffusion, else 1.
  std::optional<double> guidance_scale;
  double guidance_rescale = 0;
  std::string sampler;    // see WithSampler; empty: the model's
  double eta = 0;         // noise of DDIM's steps
  int64_t clip_skip = 0;  // last layers of CLIP that the prompts skip; the negative one does not
  std::string rng = "philox";     // see NoiseNames
  int64_t width = 0, height = 0;  // pixels; 0: the model's. Multiples of DiffusionModel::factor()
  int64_t batch_size = 0;         // pictures computed together; 0: 64, for latents 1

  // Image to image: start from this picture, resized to width x height, if those are 0 to its own
  // size rounded down. With a mask of its size, only where that is white (inpainting): a U-Net that
  // takes the mask sees it, for others the rest of the sample is put back after each step.
  std::optional<Image> init_image, mask_image;
  // Share of the steps that are taken, 0 to 1; none: 0.8, with a mask 1. At 1 and with a mask the
  // picture has no influence where it is drawn anew.
  std::optional<double> strength;

  // Ready embeddings in place of the prompts: of a picture (index into prompts) at a step of
  // `steps` (the U-Net's calls). The number of positive contexts of a picture and their length must
  // be the same at all steps; pictures that differ in them are computed one after the other.
  std::function<PictureContext(size_t picture, int64_t step, int64_t steps)> context;
  GenerateHooks hooks;
};

// Where the noise of a picture comes from: philox; torch, PyTorch's numbers of the picture's seed
// (diffusers with a list of generators); torch-batch, PyTorch's numbers of the first picture's seed
// for all pictures that are computed together (diffusers with one generator).
std::span<const std::string_view> NoiseNames();

struct GenerateCallbacks {
  std::function<void(int64_t done, int64_t total)> progress;  // U-Net calls
  std::function<bool()> cancelled;
  std::function<void(const std::string&)> warn;  // what of a prompt the model does not know or read
};

class TextToImagePipeline {
 public:
  // Keeps a reference to the model; weights changed later are seen by later calls, and so is what
  // else is done to it (words, LoRAs, attention processors, tiling): graphs and code of the part
  // are then made again. `compile` has no effect on kEager; its rare_inputs are the pipeline's own.
  // Errors: as CheckUNetInputs.
  TextToImagePipeline(DiffusionModel& model, Backend backend,
                      const jit::CompileOptions& compile = {});
  // A pipeline with the model of a folder. Errors: those of DiffusionModel::Load.
  static std::unique_ptr<TextToImagePipeline> Load(const std::filesystem::path& folder,
                                                   Backend backend,
                                                   const jit::CompileOptions& compile = {},
                                                   const DiffusionModel::Warn& warn = {});
  // The same for models of gigabytes: only the part that works (text encoder, U-Net, autoencoder)
  // is in memory. Its weights are read when its turn comes, and again when it comes again, then
  // handed to `loaded` (to merge a LoRA); compiled code takes the place of the U-Net's. Errors: as
  // Load; FileError if files of the folder change and do not fit any more, in any later call.
  static std::unique_ptr<TextToImagePipeline> Open(const std::filesystem::path& folder,
                                                   Backend backend,
                                                   const jit::CompileOptions& compile = {},
                                                   const DiffusionModel::Warn& warn = {},
                                                   std::function<void(Layer& part)> loaded = {});

  // [N, 3, height, width], about [-1, 1]. A prompt's unknown words are reported to warn and taken
  // as <unk>. Errors: ValueError for an option out of range or a prompt all of whose words are
  // unknown; CancelledError; NumericError if a picture is not finite.
  Tensor Generate(const GenerateOptions& options, const GenerateCallbacks& callbacks = {});

  // Text embeddings [B, L, D] of token rows (DiffusionModel::Tokens).
  Tensor Encode(const Tensor& tokens, int64_t clip_skip = 0);
  // A picture [1, 3, height, width] of latents [1, C, h, w], and latents of a picture and noise of
  // their shape, as LatentEncoderGraph says. Errors: ValueError without an autoencoder.
  Tensor Decode(const Tensor& latents);
  Tensor EncodePicture(const Tensor& picture, const Tensor& noise);

  DiffusionModel& model() { return model_; }
  double compile_seconds() const { return compile_seconds_; }  // so far
  // How often compiled code has computed what the contexts alone decide (keys and values of the
  // cross-attention): once for each batch of pictures, not for each step. 0 for eager.
  int64_t context_runs() const;

 private:
  std::vector<PictureContext> EncodePrompts(const GenerateOptions& options,
                                            const GenerateCallbacks& callbacks);
  struct Sampling;  // what a batch is sampled from
  Sampling Begin(const GenerateOptions& options, const PictureBatch& batch);
  Tensor Sample(const GenerateOptions& options, Sampling& sampling,
                const std::function<PictureContext(size_t, int64_t, int64_t)>& context,
                const std::function<void(int64_t)>& count, const GenerateCallbacks& callbacks);
  GraphRunner& UNet(const UNetShape& shape, const PictureBatch& batch, const GenerateHooks& hooks);
  // The runner of a key for a part of the model, made first if there is none.
  template <class Key, class Make>
  GraphRunner& Runner(Layer& part, std::map<Key, std::unique_ptr<GraphRunner>>& runners,
                      const Key& key, size_t most, const Make& make,
                      const jit::CompileOptions& compile);
  void ClearUNets();
  // Lets go of what was made of a part: always, or if the part has changed since.
  void Clear(const Layer& part);
  void ClearIfChanged(const Layer& part);
  // Of a pipeline that was opened: lets go of all that is there for other parts than this one.
  void LeaveOnly(const Layer& part);

  std::unique_ptr<DiffusionModel> owned_;
  DiffusionModel& model_;
  bool on_demand_ = false;                   // see Open
  std::function<void(Layer& part)> loaded_;  // likewise
  const Layer* here_ = nullptr;              // the part that on_demand_ has read
  Backend backend_;
  jit::CompileOptions compile_;
  double compile_seconds_ = 0;
  int64_t context_runs_ = 0;  // of U-Nets that are no longer kept
  using Sides = std::pair<int64_t, int64_t>;
  std::map<Sides, std::unique_ptr<GraphRunner>> encoders_;  // by batch and clip skip
  // By height and width of the latents.
  std::map<Sides, std::unique_ptr<GraphRunner>> decoders_, picture_encoders_;
  std::map<std::pair<UNetShape, std::string>, std::unique_ptr<GraphRunner>> unets_;
  std::map<const Layer*, uint64_t> revisions_;  // of the parts that these were made of
};

// The options with the model's values in place of empty ones.
GenerateOptions Resolved(const DiffusionModel& model, GenerateOptions options);

// The text of a PNG's `parameters` chunk as other programs write it: the prompt, the negative
// prompt, then "Steps: 25, Sampler: DDIM, CFG scale: 1, Seed: 7, Size: 16x16, Version: calotype
// 0.1.0", with "Denoising strength: 0.8, " for image to image, "Clip skip: 2, " for a clip_skip of
// 1 and "RNG: CPU, " for PyTorch's numbers.
std::string GenerationParameters(const DiffusionModel& model, const GenerateOptions& options,
                                 size_t index);

}  // namespace calotype
