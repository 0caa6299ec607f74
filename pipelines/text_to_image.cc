#include "pipelines/text_to_image.h"

#include <algorithm>
#include <array>
#include <cmath>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "core/random.h"
#include "core/torch_random.h"
#include "diffusion/guidance.h"
#include "diffusion/sampler_names.h"
#include "diffusion/scheduler.h"
#include "pipelines/init_image.h"
#include "pipelines/rows.h"

namespace calotype {
namespace {

constexpr std::array<std::string_view, 3> kNoiseNames{"philox", "torch", "torch-batch"};
// Compiled U-Nets of large models take gigabytes.
constexpr size_t kMostUNets = 2, kMostOthers = 8;
// Buys most of what Winograd's algorithm saves in the time of a U-Net of Stable Diffusion.
constexpr int64_t kOnDemandWinogradBytes = int64_t{3} << 29;

// The noise of the pictures of a batch.
class NoiseSource {
 public:
  NoiseSource(const std::string& rng, std::span<const uint64_t> seeds) {
    if (rng == "philox") {
      for (uint64_t seed : seeds) philox_.emplace_back(seed, "generate");
    } else {
      if (rng == "torch-batch") seeds = seeds.first(1);
      for (uint64_t seed : seeds) torch_.emplace_back(seed);
    }
  }
  // True if all pictures draw from one stream.
  bool shared() const { return torch_.size() == 1; }
  // [pictures, C, H, W]
  Tensor Normal(const Shape& shape) {
    if (shared()) return torch_[0].NormalTensor(shape);
    std::vector<Tensor> pictures;
    for (Random& random : philox_) pictures.push_back(random.NormalTensor(shape.With(0, 1)));
    for (TorchRandom& random : torch_) pictures.push_back(random.NormalTensor(shape.With(0, 1)));
    return StackRows(pictures);
  }

 private:
  std::vector<Random> philox_;
  std::vector<TorchRandom> torch_;
};

void CheckOptions(const DiffusionModel& model, const GenerateOptions& o) {
  Check(!o.prompts.empty(), "generate: no prompt");
  Check(o.prompts.size() == o.seeds.size(), "generate: {} prompts, {} seeds", o.prompts.size(),
        o.seeds.size());
  const double scale = *o.guidance_scale;
  Check(scale >= 0 && scale <= 1000, "generate: guidance_scale is {}, must be in [0, 1000]", scale);
  Check(o.negative_prompt.empty() || scale > 1,
        "generate: a negative prompt has no effect without a guidance_scale above 1 (it is {})",
        scale);
  Check(o.guidance_rescale >= 0 && o.guidance_rescale <= 1,
        "generate: guidance_rescale is {}, must be in [0, 1]", o.guidance_rescale);
  Check(o.guidance_rescale == 0 || scale > 1,
        "generate: guidance_rescale has no effect without a guidance_scale above 1 (it is {})",
        scale);
  Check(std::count(kNoiseNames.begin(), kNoiseNames.end(), o.rng) == 1,
        "generate: rng `{}` is unknown; there are {}", o.rng, fmt::join(kNoiseNames, ", "));
  for (auto [name, pixels] : {std::pair{"width", o.width}, {"height", o.height}}) {
    Check(pixels >= 1 && pixels <= 4096, "generate: the {} is {} pixels, must be in [1, 4096]",
          name, pixels);
    Check(pixels % model.factor() == 0,
          "generate: the {} is {} pixels, must be a multiple of {} for this model", name, pixels,
          model.factor());
  }
  Check(o.batch_size >= 1, "generate: the batch size is {}, must be at least 1", o.batch_size);
  Check(o.init_image || (!o.mask_image && !o.strength),
        "generate: a mask or a strength has no effect without a picture to start from");
  if (o.mask_image) {
    Check(
        o.mask_image->width == o.init_image->width && o.mask_image->height == o.init_image->height,
        "generate: the mask is {} x {}, the picture to start from {} x {}", o.mask_image->width,
        o.mask_image->height, o.init_image->width, o.init_image->height);
  }
  if (o.init_image) {
    Check(*o.strength >= 0 && *o.strength <= 1, "generate: the strength is {}, must be in [0, 1]",
          *o.strength);
    Check(FirstStep(o.steps, *o.strength) < o.steps,
          "generate: a strength of {} leaves none of {} steps", *o.strength, o.steps);
  }
  Check(!model.takes_mask() || o.mask_image,
        "generate: this model is made for inpainting; give it a picture and a mask");
  Check(!o.hooks.denoise || !o.hooks.key.empty(), "generate: hooks that build need a key");
}

bool HasWeights(const PictureContext& context) {
  return context.positive.size() > 1 || (context.weights.size() == 1 && context.weights[0] != 1);
}

void CheckContext(const PictureContext& c, int64_t width, bool guided) {
  Check(!c.positive.empty() && (c.weights.empty() || c.weights.size() == c.positive.size()),
        "generate: a context has {} positive embeddings and {} weights", c.positive.size(),
        c.weights.size());
  auto check = [&](const Tensor& x) {
    Check<ShapeError>(x.defined() && x.dtype() == DType::kF32 && x.shape().rank() == 2 &&
                          x.shape()[0] == c.positive[0].shape()[0] && x.shape()[1] == width,
                      "generate: an embedding is {}, must be f32 [{}, {}] like the others",
                      x.defined() ? ToString(x.type()) : "undefined", c.positive[0].shape()[0],
                      width);
  };
  for (const Tensor& x : c.positive) check(x);
  if (guided) check(c.negative);
}

// The rows of the U-Net's batch, see PictureBatch.
Tensor ContextRows(std::span<const PictureContext> contexts, const PictureBatch& batch) {
  std::vector<Tensor> rows;
  auto add = [&](const Tensor& x) { rows.push_back(x.Reshape({1, x.shape()[0], x.shape()[1]})); };
  if (batch.guided) {
    for (const PictureContext& c : contexts) add(c.negative);
  }
  for (size_t i = 0; i < batch.positives; ++i) {
    for (const PictureContext& c : contexts) add(c.positive[i]);
  }
  return StackRows(rows);
}

// The output of each picture, from those of its rows.
Tensor Guide(const Tensor& outputs, const PictureBatch& batch,
             std::span<const PictureContext> contexts, const Guidance& guidance) {
  if (!batch.guided) return outputs;
  if (std::none_of(contexts.begin(), contexts.end(), HasWeights)) return guidance.Apply(outputs);
  // c = u + sum of w_i (c_i - u) takes the place of the output with the prompt.
  const int64_t B = batch.size(), each = outputs.elements() / batch.rows();
  Tensor pair(outputs.shape().With(0, 2 * B));
  const float* u = outputs.data();
  float* c = pair.data() + B * each;
  std::copy(u, u + B * each, pair.data());
  for (int64_t b = 0; b < B; ++b) {
    const PictureContext& context = contexts[static_cast<size_t>(b)];
    for (int64_t k = b * each; k < (b + 1) * each; ++k) {
      double sum = u[k];
      for (size_t i = 0; i < batch.positives; ++i) {
        const double w = context.weights.empty() ? 1 : context.weights[i];
        sum += w * (u[(static_cast<int64_t>(i) + 1) * B * each + k] - double{u[k]});
      }
      c[k] = static_cast<float>(sum);
    }
  }
  if (guidance.active()) return guidance.Apply(pair);
  Tensor result(outputs.shape().With(0, B));
  std::copy(c, c + B * each, result.data());
  return result;
}

Shape SampleShape(const DiffusionModel& model, const GenerateOptions& options,
                  const PictureBatch& batch) {
  return {batch.size(), model.channels(), options.height / model.factor(),
          options.width / model.factor()};
}

void CheckNotCancelled(const GenerateCallbacks& callbacks) {
  Check<CancelledError>(!callbacks.cancelled || !callbacks.cancelled(), "sampling was cancelled");
}

}  // namespace

struct TextToImagePipeline::Sampling {
  PictureBatch batch;
  NoiseSource noise;
  std::unique_ptr<Scheduler> scheduler;
  int64_t first = 0;  // step
  Tensor x;
  Tensor start, clean, masked, mask;  // the first noise; samples of the picture and the masked one
};

std::span<const std::string_view> NoiseNames() { return kNoiseNames; }

TextToImagePipeline::TextToImagePipeline(DiffusionModel& model, Backend backend,
                                         const jit::CompileOptions& compile)
    : model_(model), backend_(backend), compile_(compile) {
  model_.CheckInputs();
}

std::unique_ptr<TextToImagePipeline> TextToImagePipeline::Load(const std::filesystem::path& folder,
                                                               Backend backend,
                                                               const jit::CompileOptions& compile,
                                                               const DiffusionModel::Warn& warn) {
  auto model = DiffusionModel::Load(folder, warn);
  auto pipeline = std::make_unique<TextToImagePipeline>(*model, backend, compile);
  pipeline->owned_ = std::move(model);
  return pipeline;
}

std::unique_ptr<TextToImagePipeline> TextToImagePipeline::Open(
    const std::filesystem::path& folder, Backend backend, const jit::CompileOptions& compile,
    const DiffusionModel::Warn& warn, std::function<void(Layer& part)> loaded) {
  auto model = DiffusionModel::Open(folder, warn);
  auto pipeline = std::make_unique<TextToImagePipeline>(*model, backend, compile);
  pipeline->owned_ = std::move(model);
  pipeline->on_demand_ = true;
  pipeline->loaded_ = std::move(loaded);
  return pipeline;
}

void TextToImagePipeline::LeaveOnly(const Layer& part) {
  for (const auto& other : model_.layers()) {
    if (other.get() == &part) continue;
    Clear(*other);
    other->ReleaseParameters();
  }
#if defined(__GLIBC__)
  malloc_trim(0);  // what was freed between blocks in use goes back to the system
#endif
}

template <class Key, class Make>
GraphRunner& TextToImagePipeline::Runner(Layer& part,
                                         std::map<Key, std::unique_ptr<GraphRunner>>& runners,
                                         const Key& key, size_t most, const Make& make,
                                         const jit::CompileOptions& compile) {
  ClearIfChanged(part);
  auto found = runners.find(key);
  if (found != runners.end()) return *found->second;
  if (runners.size() >= most) runners.erase(runners.begin());
  if (on_demand_ && here_ != &part) {
    here_ = nullptr;
    LeaveOnly(part);
    part.ReleaseParameters();
    model_.LoadPart(part);
    if (loaded_) loaded_(part);
    here_ = &part;
  }
  auto runner = std::make_unique<GraphRunner>(make(), backend_, compile);
  compile_seconds_ += runner->compile_seconds();
  revisions_[&part] = part.Revision();  // now: making a graph can change a part and change it back
  return *(runners[key] = std::move(runner));
}

GraphRunner& TextToImagePipeline::UNet(const UNetShape& shape, const PictureBatch& batch,
                                       const GenerateHooks& hooks) {
  ClearIfChanged(model_.unet());
  DenoiseBuilder denoise;
  if (hooks.denoise) {
    denoise = [&](ComputationGraph& graph, Value sample, Value timestep, Value context) {
      return hooks.denoise(batch, graph, sample, timestep, context);
    };
  }
  std::string key = hooks.key;
  if (!key.empty()) key += fmt::format(" {} {}", batch.guided, batch.positives);
  const std::pair<UNetShape, std::string> id{shape, key};
  const bool another = !unets_.count(id);
  if (another && unets_.size() >= (on_demand_ ? 1 : kMostUNets)) ClearUNets();
  // The context is the same in all steps.
  jit::CompileOptions compile = compile_;
  compile.rare_inputs = {"encoder_hidden_states"};
  if (on_demand_) {
    compile.release_weights = !jit::CheckRequested();
    compile.winograd_bytes = std::min(compile.winograd_bytes, kOnDemandWinogradBytes);
  }
  GraphRunner& unet = Runner(
      model_.unet(), unets_, id, kMostUNets, [&] { return UNetGraph(model_, shape, denoise); },
      compile);
  // What is compiled for another shape needs the weights again.
  if (another && backend_ == Backend::kJit && compile.release_weights) here_ = nullptr;
  return unet;
}

void TextToImagePipeline::ClearUNets() {
  context_runs_ = context_runs();
  unets_.clear();
}

void TextToImagePipeline::Clear(const Layer& part) {
  if (&part == &model_.unet()) {
    ClearUNets();
  } else if (&part == model_.vae()) {
    decoders_.clear(), picture_encoders_.clear();
  } else {
    encoders_.clear();
  }
}

void TextToImagePipeline::ClearIfChanged(const Layer& part) {
  auto known = revisions_.find(&part);
  if (known == revisions_.end() || known->second == part.Revision()) return;
  Clear(part);
  revisions_.erase(known);
}

Tensor TextToImagePipeline::Encode(const Tensor& tokens, int64_t clip_skip) {
  const int64_t batch = tokens.shape()[0];
  Layer* part = model_.text_encoder();
  if (!part) part = model_.caption_encoder();
  GraphRunner& encoder = Runner(
      *part, encoders_, Sides{batch, clip_skip}, kMostOthers,
      [&] { return EncoderGraph(model_, batch, clip_skip); }, compile_);
  return encoder.Run(std::vector{tokens})[0];
}

Tensor TextToImagePipeline::Decode(const Tensor& latents) {
  Check(model_.vae() != nullptr, "generate: the model has no autoencoder");
  const int64_t height = latents.shape()[2], width = latents.shape()[3];
  GraphRunner& decoder = Runner(
      *model_.vae(), decoders_, Sides{height, width}, kMostOthers,
      [&] { return LatentDecoderGraph(model_, height, width); }, compile_);
  return decoder.Run(std::vector{latents})[0];
}

Tensor TextToImagePipeline::EncodePicture(const Tensor& picture, const Tensor& noise) {
  Check(model_.vae() != nullptr, "generate: the model has no autoencoder");
  const int64_t height = noise.shape()[2], width = noise.shape()[3];
  GraphRunner& encoder = Runner(
      *model_.vae(), picture_encoders_, Sides{height, width}, kMostOthers,
      [&] { return LatentEncoderGraph(model_, height, width); }, compile_);
  return encoder.Run(std::vector{picture, noise})[0];
}

std::vector<PictureContext> TextToImagePipeline::EncodePrompts(const GenerateOptions& options,
                                                               const GenerateCallbacks& callbacks) {
  std::vector<PictureContext> contexts;
  Tensor tokens = model_.Tokens(options.prompts, callbacks.warn), negative;
  if (*options.guidance_scale > 1) {
    Tensor row = model_.Tokens(std::vector{options.negative_prompt}, callbacks.warn);
    negative = Row(Encode(row), 0);
  }
  const int64_t count = tokens.shape()[0];
  for (int64_t begin = 0; begin < count; begin += options.batch_size) {
    const int64_t end = std::min(count, begin + options.batch_size);
    Tensor encoded = Encode(Rows(tokens, begin, end), options.clip_skip);
    for (int64_t i = begin; i < end; ++i)
      contexts.push_back({.negative = negative, .positive = {Row(encoded, i - begin)}});
  }
  return contexts;
}

Tensor TextToImagePipeline::Generate(const GenerateOptions& given,
                                     const GenerateCallbacks& callbacks) {
  const GenerateOptions options = Resolved(model_, given);
  CheckOptions(model_, options);
  auto scheduler = MakeScheduler(model_.SchedulerFor(options.sampler), {.eta = options.eta});
  scheduler->SetTimesteps(options.steps);
  const int64_t calls =
      scheduler->size() - (options.init_image ? FirstStep(options.steps, *options.strength) : 0);

  auto context = options.context;
  if (!context) {
    context = [contexts = EncodePrompts(options, callbacks)](size_t picture, int64_t, int64_t) {
      return contexts[picture];
    };
  }
  // Pictures computed together have as many contexts of the same length.
  std::vector<PictureBatch> batches;
  int64_t tokens = 0;
  for (size_t i = 0; i < options.prompts.size(); ++i) {
    PictureContext first = context(i, 0, calls);
    const bool guided = *options.guidance_scale > 1 || HasWeights(first);
    CheckContext(first, model_.context_width(), guided);
    if (!batches.empty()) {
      PictureBatch& last = batches.back();
      if (last.size() < options.batch_size && last.guided == guided &&
          last.positives == first.positive.size() && tokens == first.positive[0].shape()[0]) {
        last.end = i + 1;
        continue;
      }
    }
    tokens = first.positive[0].shape()[0];
    batches.push_back({i, i + 1, guided, first.positive.size()});
  }

  int64_t done = 0;
  auto tick = [&](int64_t calls_of_batch) {
    ++done;
    if (callbacks.progress)
      callbacks.progress(done, static_cast<int64_t>(batches.size()) * calls_of_batch);
  };
  // One part of the model after the other, see Open.
  std::vector<Sampling> begun;
  for (const PictureBatch& batch : batches) begun.push_back(Begin(options, batch));
  std::vector<Tensor> samples, pictures;
  for (Sampling& sampling : begun)
    samples.push_back(Sample(options, sampling, context, tick, callbacks));
  for (const Tensor& batch : samples) {
    if (!model_.vae()) pictures.push_back(batch);
    for (int64_t i = 0; model_.vae() && i < batch.shape()[0]; ++i) {
      CheckNotCancelled(callbacks);
      pictures.push_back(Decode(Row(batch, i).Reshape(batch.shape().With(0, 1))));
    }
  }
  Tensor all = StackRows(pictures);
  auto finite = [](float v) { return std::isfinite(v); };
  if (std::ranges::all_of(all.values(), finite)) return all;
  for (const auto& part : model_.layers()) {
    if (on_demand_) {  // most of the weights have made place for those of other parts
      here_ = nullptr;
      LeaveOnly(*part);
      part->ReleaseParameters();
      model_.LoadPart(*part);
      if (loaded_) loaded_(*part);
    }
    for (const ParameterPtr& p : part->NamedParameters()) {
      Check<NumericError>(std::ranges::all_of(p->value().values(), finite),
                          "generate: a picture is not finite, as the weights {} are not",
                          p->name());
    }
  }
  Fail<NumericError>("generate: a picture is not finite, although the weights are");
}

TextToImagePipeline::Sampling TextToImagePipeline::Begin(const GenerateOptions& options,
                                                         const PictureBatch& batch) {
  Sampling s{
      .batch = batch,
      .noise = NoiseSource(options.rng,
                           std::span(options.seeds).subspan(batch.begin, batch.end - batch.begin)),
      .scheduler = MakeScheduler(model_.SchedulerFor(options.sampler), {.eta = options.eta})};
  s.scheduler->SetTimesteps(options.steps);
  const Shape shape = SampleShape(model_, options, batch);
  // The numbers are drawn in the order of diffusers' pipelines.
  if (options.init_image) {
    const bool inpaint = options.mask_image.has_value();
    InitImage init = PrepareInitImage(*options.init_image, options.mask_image, options.width,
                                      options.height, model_.factor());
    s.mask = init.mask;
    auto encode = [&](const Tensor& picture) {
      std::vector<Tensor> samples(static_cast<size_t>(shape[0]), picture);
      if (!model_.vae()) return StackRows(samples);
      const Tensor drawn = s.noise.Normal(s.noise.shared() ? shape.With(0, 1) : shape);
      for (int64_t b = 0; b < shape[0]; ++b) {
        if (b > 0 && s.noise.shared()) {
          samples[static_cast<size_t>(b)] = samples[0];
        } else {
          samples[static_cast<size_t>(b)] =
              EncodePicture(picture, Row(drawn, b).Reshape(shape.With(0, 1)));
        }
      }
      return StackRows(samples);
    };
    const bool from_noise = inpaint && *options.strength == 1;
    s.first = FirstStep(options.steps, *options.strength);
    if (!from_noise || !model_.takes_mask()) s.clean = encode(init.picture);
    s.start = s.noise.Normal(shape);
    if (!from_noise) s.x = s.scheduler->AddNoise(s.clean, s.start, s.first);
    if (model_.takes_mask()) {
      s.masked = encode(init.masked_picture);
    } else if (inpaint && model_.vae()) {
      // Encoded there, but not used.
      s.noise.Normal(s.noise.shared() ? shape.With(0, 1) : shape);
    }
  } else {
    s.start = s.noise.Normal(shape);
  }
  if (!s.x.defined()) s.x = LinearCombination({{s.scheduler->init_noise_sigma(), s.start}});
  return s;
}

Tensor TextToImagePipeline::Sample(
    const GenerateOptions& options, Sampling& s,
    const std::function<PictureContext(size_t, int64_t, int64_t)>& context,
    const std::function<void(int64_t)>& count, const GenerateCallbacks& callbacks) {
  const PictureBatch& batch = s.batch;
  const GenerateHooks& hooks = options.hooks;
  const Guidance guidance{*options.guidance_scale, options.guidance_rescale};
  const Shape shape = SampleShape(model_, options, batch);
  const auto& scheduler = s.scheduler;
  const int64_t first = s.first;
  Tensor x = s.x;
  const int64_t steps = scheduler->size() - first;
  int64_t tokens = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t i = first + step;
    CheckNotCancelled(callbacks);
    std::vector<PictureContext> contexts;
    for (size_t picture = batch.begin; picture < batch.end; ++picture) {
      PictureContext one = context(picture, step, steps);
      CheckContext(one, model_.context_width(), batch.guided);
      const int64_t length = one.positive[0].shape()[0];
      if (tokens == 0) tokens = length;
      Check(one.positive.size() == batch.positives && length == tokens,
            "generate: picture {} has {} contexts of {} tokens at step {}, before {} of {}",
            picture, one.positive.size(), length, step, batch.positives, tokens);
      contexts.push_back(std::move(one));
    }
    GraphRunner& unet = UNet({batch.rows(), shape[2], shape[3], tokens}, batch, hooks);

    Tensor input = scheduler->ScaleModelInput(x, i);
    if (model_.takes_mask()) input = JoinMask(input, s.mask, s.masked);
    std::vector<Tensor> rows(batch.positives + (batch.guided ? 1 : 0), input);
    std::vector<Tensor> inputs{
        rows.size() == 1 ? input : StackRows(rows),
        Tensor::Full({batch.rows()}, static_cast<float>(scheduler->timesteps()[i])),
        ContextRows(contexts, batch)};
    if (hooks.inputs) {
      for (Tensor& more : hooks.inputs(batch, step)) inputs.push_back(std::move(more));
    }
    const std::vector<Tensor> outputs = unet.Run(inputs);
    if (hooks.outputs) hooks.outputs(batch, step, std::span(outputs).subspan(1));
    const Tensor output = Guide(outputs[0], batch, contexts, guidance);
    x = scheduler->Step(output, i, x, scheduler->NeedsNoise(i) ? s.noise.Normal(shape) : Tensor());
    if (s.mask.defined() && !model_.takes_mask()) {
      x = BlendByMask(s.mask, x,
                      step + 1 < steps ? scheduler->AddNoise(s.clean, s.start, i + 1) : s.clean);
    }
    if (hooks.after_step) x = hooks.after_step(batch, step, x);
    count(steps);
  }
  return x;
}

int64_t TextToImagePipeline::context_runs() const {
  int64_t runs = context_runs_;
  for (const auto& [key, unet] : unets_) {
    if (unet->compiled()) runs += unet->compiled()->Stats().derivations;
  }
  return runs;
}

GenerateOptions Resolved(const DiffusionModel& model, GenerateOptions o) {
  if (!o.guidance_scale) o.guidance_scale = model.stable_diffusion() ? 7.5 : 1;
  const int64_t factor = model.factor();
  auto size = [&](int64_t given, int64_t picture) {
    if (given != 0) return given;
    return o.init_image ? std::max(picture / factor * factor, factor) : model.side();
  };
  o.width = size(o.width, o.init_image ? o.init_image->width : 0);
  o.height = size(o.height, o.init_image ? o.init_image->height : 0);
  if (o.init_image && !o.strength) o.strength = o.mask_image ? 1.0 : 0.8;
  if (o.batch_size == 0) o.batch_size = model.factor() > 1 ? 1 : 64;
  return o;
}

std::string GenerationParameters(const DiffusionModel& model, const GenerateOptions& options,
                                 size_t index) {
  const GenerateOptions o = Resolved(model, options);
  std::string text = o.prompts[index] + "\n";
  if (!o.negative_prompt.empty()) text += "Negative prompt: " + o.negative_prompt + "\n";
  text += fmt::format("Steps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {}x{}, ", o.steps,
                      SamplerTitle(model.SchedulerFor(o.sampler)), *o.guidance_scale,
                      o.seeds[index], o.width, o.height);
  if (o.strength) text += fmt::format("Denoising strength: {}, ", *o.strength);
  if (o.clip_skip > 0) text += fmt::format("Clip skip: {}, ", o.clip_skip + 1);
  if (o.rng != "philox") text += "RNG: CPU, ";
  return text + "Version: calotype " CALOTYPE_VERSION;
}

}  // namespace calotype
