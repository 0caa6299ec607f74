#include "pipelines/text_to_image.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/random.h"
#include "core/torch_random.h"
#include "diffusion/guidance.h"
#include "diffusion/sampler_names.h"
#include "diffusion/scheduler.h"
#include "jit/compile.h"
#include "pipelines/model_graphs.h"

namespace calotype {
namespace {

Tensor Rows(const Tensor& x, int64_t begin, int64_t end) {
  Shape shape = x.shape().With(0, end - begin);
  Tensor rows(shape, x.dtype());
  int64_t row_bytes = x.bytes() / x.shape()[0];
  std::memcpy(rows.raw(), static_cast<const char*>(x.raw()) + begin * row_bytes,
              static_cast<size_t>(rows.bytes()));
  return rows;
}

// The noise of one picture.
class NoiseStream {
 public:
  NoiseStream(const std::string& rng, uint64_t seed)
      : torch_(rng == "torch"), random_(seed, "generate"), torch_random_(seed) {}
  Tensor Normal(const Shape& shape) {
    return torch_ ? torch_random_.NormalTensor(shape) : random_.NormalTensor(shape);
  }

 private:
  bool torch_;
  Random random_;
  TorchRandom torch_random_;
};

// [a; b] along the first axis.
Tensor Stack(const Tensor& a, const Tensor& b) {
  Tensor both(a.shape().With(0, a.shape()[0] + b.shape()[0]), a.dtype());
  std::memcpy(both.raw(), a.raw(), static_cast<size_t>(a.bytes()));
  std::memcpy(static_cast<char*>(both.raw()) + a.bytes(), b.raw(), static_cast<size_t>(b.bytes()));
  return both;
}

void Check(const GenerateOptions& o) {
  calotype::Check(!o.prompts.empty(), "generate: no prompt");
  calotype::Check(o.prompts.size() == o.seeds.size(), "generate: {} prompts, {} seeds",
                  o.prompts.size(), o.seeds.size());
  calotype::Check(o.guidance_scale >= 0 && o.guidance_scale <= 1000,
                  "generate: guidance_scale is {}, must be in [0, 1000]", o.guidance_scale);
  calotype::Check(
      o.negative_prompt.empty() || o.guidance_scale > 1,
      "generate: a negative prompt has no effect without a guidance_scale above 1 (it is {})",
      o.guidance_scale);
  calotype::Check(o.guidance_rescale >= 0 && o.guidance_rescale <= 1,
                  "generate: guidance_rescale is {}, must be in [0, 1]", o.guidance_rescale);
  calotype::Check(
      o.guidance_rescale == 0 || o.guidance_scale > 1,
      "generate: guidance_rescale has no effect without a guidance_scale above 1 (it is {})",
      o.guidance_scale);
  WithSampler({}, o.sampler);  // names an unknown one
  calotype::Check(o.rng == "philox" || o.rng == "torch",
                  "generate: rng `{}` is unknown; there are philox and torch", o.rng);
  calotype::Check(o.side >= 0 && o.side <= 4096,
                  "generate: a side of {} pixels, must be in [1, 4096]", o.side);
  calotype::Check(o.batch_size >= 1, "generate: the batch size is {}, must be at least 1",
                  o.batch_size);
}

}  // namespace

TextToImagePipeline::TextToImagePipeline(DiffusionModel& model, Backend backend)
    : model_(model), backend_(backend) {}

std::unique_ptr<TextToImagePipeline> TextToImagePipeline::Load(const std::filesystem::path& folder,
                                                               Backend backend) {
  auto model = DiffusionModel::Load(folder);
  auto pipeline = std::make_unique<TextToImagePipeline>(*model, backend);
  pipeline->owned_ = std::move(model);
  return pipeline;
}

GraphRunner& TextToImagePipeline::Encoder(int64_t batch) {
  auto& encoder = encoders_[batch];
  if (!encoder) {
    encoder = std::make_unique<GraphRunner>(EncoderGraph(model_, batch), backend_);
    compile_seconds_ += encoder->compile_seconds();
  }
  return *encoder;
}

GraphRunner& TextToImagePipeline::UNet(int64_t batch, int64_t side) {
  auto& unet = unets_[{batch, side}];
  if (!unet) {
    // The context is the same in all steps.
    unet = std::make_unique<GraphRunner>(
        UNetGraph(model_, batch, side), backend_,
        jit::CompileOptions{.rare_inputs = {"encoder_hidden_states"}});
    compile_seconds_ += unet->compile_seconds();
  }
  return *unet;
}

Tensor TextToImagePipeline::Generate(const GenerateOptions& options,
                                     const GenerateCallbacks& callbacks) {
  Check(options);
  Tensor tokens = model_.Tokens(options.prompts, callbacks.warn);
  Tensor pictures;
  size_t count = options.prompts.size(), batch = static_cast<size_t>(options.batch_size);
  int64_t batches = static_cast<int64_t>((count + batch - 1) / batch), done = 0;
  auto tick = [&](int64_t calls) {
    ++done;
    if (callbacks.progress) callbacks.progress(done, batches * calls);
  };
  for (size_t begin = 0; begin < count; begin += batch) {
    size_t end = std::min(count, begin + batch);
    Tensor part = GenerateBatch(
        options, begin, end, Rows(tokens, static_cast<int64_t>(begin), static_cast<int64_t>(end)),
        tick, callbacks);
    pictures = pictures.defined() ? Stack(pictures, part) : part;
  }
  for (float v : pictures.values()) {
    calotype::Check<NumericError>(std::isfinite(v),
                                  "generate: a picture is not finite; are the weights?");
  }
  return pictures;
}

Tensor TextToImagePipeline::GenerateBatch(const GenerateOptions& options, size_t begin, size_t end,
                                          const Tensor& tokens,
                                          const std::function<void(int64_t)>& count,
                                          const GenerateCallbacks& callbacks) {
  auto scheduler =
      MakeScheduler(WithSampler(model_.scheduler(), options.sampler), {.eta = options.eta});
  scheduler->SetTimesteps(options.steps);
  Guidance guidance{options.guidance_scale, options.guidance_rescale};
  auto size = static_cast<int64_t>(end - begin);
  int64_t side = options.side > 0 ? options.side : model_.side();
  Shape picture{1, model_.channels(), side, side};

  Tensor all_tokens = tokens;
  if (guidance.active()) {
    std::vector<std::string> negative(static_cast<size_t>(size), options.negative_prompt);
    all_tokens = Stack(model_.Tokens(negative, callbacks.warn), tokens);
  }
  int64_t batch = all_tokens.shape()[0];
  Tensor context = Encoder(batch).Run(std::vector{all_tokens})[0];
  GraphRunner& unet = UNet(batch, side);

  // Each picture draws its noise from its own stream.
  std::vector<NoiseStream> streams;
  for (size_t i = begin; i < end; ++i) streams.emplace_back(options.rng, options.seeds[i]);
  auto noise = [&] {
    Tensor result;
    for (NoiseStream& stream : streams) {
      Tensor one = stream.Normal(picture);
      result = result.defined() ? Stack(result, one) : one;
    }
    return result;
  };
  Tensor x = LinearCombination({{scheduler->init_noise_sigma(), noise()}});
  for (int64_t i = 0; i < scheduler->size(); ++i) {
    calotype::Check<CancelledError>(!callbacks.cancelled || !callbacks.cancelled(),
                                    "sampling was cancelled");
    Tensor input = scheduler->ScaleModelInput(x, i);
    Tensor timesteps = Tensor::Full({batch}, static_cast<float>(scheduler->timesteps()[i]));
    Tensor output = unet.Run(
        std::vector{guidance.active() ? Stack(input, input) : input, timesteps, context})[0];
    if (guidance.active()) output = guidance.Apply(output);
    x = scheduler->Step(output, i, x, scheduler->NeedsNoise(i) ? noise() : Tensor());
    count(scheduler->size());
  }
  return x;
}

int64_t TextToImagePipeline::context_runs() const {
  int64_t runs = 0;
  for (const auto& [key, unet] : unets_) {
    if (unet->compiled()) runs += unet->compiled()->Stats().derivations;
  }
  return runs;
}

std::string GenerationParameters(const GenerateOptions& o, size_t index, int64_t side) {
  std::string text = o.prompts[index] + "\n";
  if (!o.negative_prompt.empty()) text += "Negative prompt: " + o.negative_prompt + "\n";
  return text +
         fmt::format(
             "Steps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {}x{}, {}Version: calotype {}",
             o.steps, SamplerTitle(WithSampler({}, o.sampler)), o.guidance_scale, o.seeds[index],
             side, side, o.rng == "torch" ? "RNG: CPU, " : "", CALOTYPE_VERSION);
}

}  // namespace calotype
