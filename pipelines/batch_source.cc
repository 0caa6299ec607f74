#include "pipelines/batch_source.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/error.h"

namespace calotype {
namespace {

// Timesteps at which each held-out caption is judged.
constexpr int64_t kValidationTimesteps = 10;

// Fisher-Yates.
void ShuffleIndices(std::vector<int64_t>& indices, Random random) {
  for (size_t i = indices.size(); i > 1; --i) {
    std::swap(indices[i - 1],
              indices[static_cast<size_t>(random.Integer(static_cast<int64_t>(i)))]);
  }
}

}  // namespace

BatchSource::BatchSource(const Dataset& data, Tensor tokens, const Options& options)
    : data_(data),
      tokens_(std::move(tokens)),
      options_(options),
      pictures_(options.seed, "train.pictures"),
      noise_(options.seed, "train.noise"),
      timesteps_(options.seed, "train.timesteps"),
      dropout_(options.seed, "train.dropout") {
  Check(options.batch_size >= 1, "training: the batch size is {}, must be at least 1",
        options.batch_size);
  Check(options.timesteps >= 1, "training: {} timesteps, must be at least 1", options.timesteps);
  Check(options.caption_dropout >= 0 && options.caption_dropout <= 1,
        "training: caption_dropout is {}, must be in [0, 1]", options.caption_dropout);
  Check(options.validation_fraction >= 0 && options.validation_fraction < 1,
        "training: validation_fraction is {}, must be in [0, 1)", options.validation_fraction);
  Check<ShapeError>(tokens_.shape().rank() == 2 && tokens_.shape()[0] == data.size() + 1,
                    "training: tokens have shape {}, the data set has {} captions", tokens_.shape(),
                    data.size());
  std::vector<int64_t> all(static_cast<size_t>(data.size()));
  std::iota(all.begin(), all.end(), 0);
  ShuffleIndices(all, Random(options.seed, "train.split"));
  auto held_out = static_cast<int64_t>(
      std::ceil(options.validation_fraction * static_cast<double>(data.size())));
  Check(held_out < data.size(),
        "training: {} captions, {} of them held out, leave none to train on", data.size(),
        held_out);
  held_out_.assign(all.begin(), all.begin() + held_out);
  training_.assign(all.begin() + held_out, all.end());
  std::sort(training_.begin(), training_.end());
}

void BatchSource::Shuffle(uint64_t round) {
  if (round == order_round_) return;
  order_ = training_;
  ShuffleIndices(order_, Random(options_.seed, StreamOf("train.order") + round));
  order_round_ = round;
}

void BatchSource::TokensInto(Tensor& tokens, int64_t row, int64_t caption) const {
  int64_t length = tokens_.shape()[1];
  const int64_t* source = tokens_.data<int64_t>() + caption * length;
  std::copy(source, source + length, tokens.data<int64_t>() + row * length);
}

Batch BatchSource::Next() {
  int64_t size = options_.batch_size;
  std::vector<int64_t> indices(static_cast<size_t>(size));
  for (int64_t& index : indices) {
    Shuffle(drawn_ / training_.size());
    index = order_[drawn_ % training_.size()];
    ++drawn_;
  }
  Batch batch;
  batch.images = data_.images(indices, pictures_);
  batch.noise = noise_.NormalTensor(batch.images.shape());
  batch.timesteps = Tensor({size}, DType::kI64);
  batch.tokens = Tensor({size, tokens_.shape()[1]}, DType::kI64);
  for (int64_t i = 0; i < size; ++i) {
    batch.timesteps.data<int64_t>()[i] = timesteps_.Integer(options_.timesteps);
    bool drop = dropout_.Uniform() < options_.caption_dropout;
    TokensInto(batch.tokens, i, drop ? data_.size() : indices[static_cast<size_t>(i)]);
  }
  return batch;
}

const std::vector<Batch>& BatchSource::ValidationBatches() {
  if (!validation_.empty()) return validation_;
  Random pictures(options_.seed, "validation.pictures"), noise(options_.seed, "validation.noise");
  std::vector<std::pair<int64_t, int64_t>> tasks;  // caption, timestep
  for (size_t i = 0; i < held_out_.size(); ++i) {
    for (int64_t k = 0; k < kValidationTimesteps; ++k) {
      // Midpoints of equal parts of [0, T), shifted from caption to caption.
      double place = (static_cast<double>(k) +
                      (static_cast<double>(i) + 0.5) / static_cast<double>(held_out_.size())) /
                     kValidationTimesteps;
      tasks.emplace_back(held_out_[i],
                         static_cast<int64_t>(place * static_cast<double>(options_.timesteps)));
    }
  }
  for (size_t begin = 0; begin < tasks.size(); begin += static_cast<size_t>(options_.batch_size)) {
    size_t end = std::min(tasks.size(), begin + static_cast<size_t>(options_.batch_size));
    auto size = static_cast<int64_t>(end - begin);
    Batch batch;
    std::vector<int64_t> indices;
    batch.timesteps = Tensor({size}, DType::kI64);
    batch.tokens = Tensor({size, tokens_.shape()[1]}, DType::kI64);
    for (int64_t i = 0; i < size; ++i) {
      auto [caption, timestep] = tasks[begin + static_cast<size_t>(i)];
      indices.push_back(caption);
      batch.timesteps.data<int64_t>()[i] = timestep;
      TokensInto(batch.tokens, i, caption);
    }
    batch.images = data_.images(indices, pictures);
    batch.noise = noise.NormalTensor(batch.images.shape());
    validation_.push_back(std::move(batch));
  }
  return validation_;
}

std::map<std::string, uint64_t> BatchSource::State() const {
  return {{"captions", drawn_},
          {"pictures", pictures_.position()},
          {"noise", noise_.position()},
          {"timesteps", timesteps_.position()},
          {"dropout", dropout_.position()}};
}

void BatchSource::SetState(const std::map<std::string, uint64_t>& state) {
  auto at = [&](const char* name) {
    auto found = state.find(name);
    Check<FileError>(found != state.end(), "checkpoint: the position of the stream `{}` is missing",
                     name);
    return found->second;
  };
  drawn_ = at("captions");
  pictures_.set_position(at("pictures"));
  noise_.set_position(at("noise"));
  timesteps_.set_position(at("timesteps"));
  dropout_.set_position(at("dropout"));
}

}  // namespace calotype
