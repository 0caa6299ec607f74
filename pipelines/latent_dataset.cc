#include "pipelines/latent_dataset.h"

#include <algorithm>
#include <map>

#include "core/error.h"
#include "core/parallel.h"
#include "graph/functions.h"
#include "jit/target.h"
#include "pipelines/model_graphs.h"

namespace calotype {
namespace {

// Input picture [1, 3, side, side]; outputs mean and std of its latents.
ComputationGraph MomentsGraph(DiffusionModel& model, int64_t side) {
  model.SetTrainingMode(false);
  ComputationGraph graph;
  LatentDistribution latents = model.vae()->Encode(graph.Input("picture", Shape{1, 3, side, side}));
  graph.Output("mean", latents.mean);
  graph.Output("std", Exp(latents.logvar * 0.5f));
  return graph;
}

// What decides the bits of the results besides the graph and its inputs: the instructions, and for
// oneDNN, which computes eagerly, the number of threads.
std::string HowOf(Backend backend) {
  std::string how = fmt::format("{}\n{}", NameOf(backend), jit::ToString(jit::HostTarget()));
  if (backend == Backend::kEager) how += fmt::format("\n{} threads", Threads());
  return how;
}

}  // namespace

LatentDataset::LatentDataset(const Dataset& pictures, DiffusionModel& model, Backend backend,
                             bool cache, const std::filesystem::path& disk, WarningCallback warn)
    : pictures_(pictures),
      side_(static_cast<int>(pictures.side() / model.factor())),
      channels_(static_cast<int>(model.channels())),
      cache_(cache),
      warn_(std::move(warn)) {
  Check(model.vae() != nullptr, "latents: the model has no autoencoder");
  Check(pictures.channels() == 3 && pictures.side() % model.factor() == 0,
        "latents: the pictures have {} channels and {} pixels a side, expected 3 and a multiple of "
        "{}",
        pictures.channels(), pictures.side(), model.factor());
  const AutoencoderKLConfig& config = model.vae()->config();
  scale_ = static_cast<float>(config.scaling_factor);
  shift_ = static_cast<float>(config.shift_factor.value_or(0));
  if (cache_) {
    for (int64_t i = 0; i < pictures.size(); ++i) {
      Check(!pictures.varies(i),
            "cache_latents: picture {} of the data set is drawn differently each time; use "
            "center_crop, and no random_flip",
            i);
    }
    moments_.resize(static_cast<size_t>(pictures.size()));
  }
  Check(cache_ || disk.empty(), "latents: a folder to keep them in, but they are not kept");
  if (!disk.empty()) disk_.emplace(disk, *model.vae(), HowOf(backend));
  encoder_ = std::make_unique<GraphRunner>(MomentsGraph(model, pictures.side()), backend);
}

Tensor LatentDataset::image(int64_t index, Random& random) const {
  Tensor picture = pictures_.image(index, random);  // also draws when its moments are there
  return Encode(index, picture, random);
}

Dataset::Drawn LatentDataset::draw(int64_t index, Random& random) const {
  Drawn drawn = pictures_.draw(index, random);
  drawn.image = Encode(index, drawn.image, random);
  return drawn;
}

Tensor LatentDataset::Encode(int64_t index, const Tensor& picture, Random& random) const {
  LatentMoments computed;
  LatentMoments& moments = cache_ ? moments_[static_cast<size_t>(index)] : computed;
  if (!moments.mean.defined()) moments = MomentsOf(picture);
  Tensor latents = random.NormalTensor({channels_, side_, side_});
  const float *mean = moments.mean.data(), *std = moments.std.data();
  for (float& x : latents.values()) x = (*mean++ + *std++ * x - shift_) * scale_;
  return latents;
}

LatentMoments LatentDataset::MomentsOf(const Tensor& picture) const {
  std::filesystem::path entry;
  if (disk_) {
    entry = disk_->PathOf(picture);
    std::string damaged;
    std::optional<LatentMoments> kept = disk_->Read(entry, &damaged);
    if (!damaged.empty() && warn_) warn_(damaged + "; computed anew");
    if (kept) return *kept;
  }
  std::vector<Tensor> inputs{picture.Reshape({1, 3, pictures_.side(), pictures_.side()})};
  std::vector<Tensor> outputs = encoder_->Run(inputs);
  ++encoded_;
  LatentMoments moments{outputs[0], outputs[1]};
  if (disk_) disk_->Write(entry, moments);
  return moments;
}

int64_t LatentDataset::cached() const {
  return std::count_if(moments_.begin(), moments_.end(),
                       [](const LatentMoments& moments) { return moments.mean.defined(); });
}

Tensor EmbedTokens(DiffusionModel& model, const Tensor& tokens, Backend backend) {
  const int64_t rows = tokens.shape()[0], length = tokens.shape()[1];
  GraphRunner encoder(EncoderGraph(model, 1), backend);
  Tensor embeddings({rows, length, model.context_width()});
  const int64_t row_size = length * model.context_width();
  std::map<std::vector<int64_t>, int64_t> computed;  // tokens -> row
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* ids = tokens.data<int64_t>() + row * length;
    auto [first, is_new] = computed.emplace(std::vector<int64_t>(ids, ids + length), row);
    const float* from = embeddings.data() + first->second * row_size;
    Tensor context;
    if (is_new) {
      Tensor one({1, length}, DType::kI64);
      std::copy_n(ids, length, one.data<int64_t>());
      std::vector<Tensor> inputs{one};
      context = encoder.Run(inputs)[0];
      from = context.data();
    }
    std::copy_n(from, row_size, embeddings.data() + row * row_size);
  }
  return embeddings;
}

}  // namespace calotype
