#include "pipelines/batch_source.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
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

// x as row `row` of `batch`.
void CopyInto(const Tensor& x, Tensor& batch, size_t row) {
  const int64_t size = batch.elements() / batch.shape()[0];
  Check<InternalError>(x.elements() == size, "data set: {} numbers for a row of {}", x.elements(),
                       batch.shape());
  std::copy_n(x.data(), size, batch.data() + static_cast<int64_t>(row) * size);
}

}  // namespace

BatchSource::BatchSource(const Dataset& data, Tensor text, const Options& options)
    : data_(data),
      text_(std::move(text)),
      options_(options),
      pictures_(options.seed, "train.pictures"),
      noise_(options.seed, "train.noise"),
      timesteps_(options.seed, "train.timesteps"),
      dropout_(options.seed, "train.dropout"),
      choices_(options.seed, "train.caption_choice"),
      offsets_(options.seed, "train.noise_offset"),
      perturbations_(options.seed, "train.input_perturbation") {
  Check(options.batch_size >= 1, "training: the batch size is {}, must be at least 1",
        options.batch_size);
  Check(options.timesteps >= 1, "training: {} timesteps, must be at least 1", options.timesteps);
  Check(options.caption_dropout >= 0 && options.caption_dropout <= 1,
        "training: caption_dropout is {}, must be in [0, 1]", options.caption_dropout);
  Check(options.validation_fraction >= 0 && options.validation_fraction < 1,
        "training: validation_fraction is {}, must be in [0, 1)", options.validation_fraction);
  for (double value : {options.noise_offset, options.input_perturbation}) {
    Check(std::isfinite(value) && value >= 0,
          "training: noise_offset or input_perturbation is {}, must be at least 0", value);
  }
  first_row_.push_back(0);
  for (int64_t i = 0; i < data.size(); ++i)
    first_row_.push_back(first_row_.back() + static_cast<int64_t>(data.captions(i).size()));
  Check<ShapeError>(text_.shape().rank() >= 2 && text_.shape()[0] == first_row_.back() + 1,
                    "training: the text has shape {}, the data set has {} captions", text_.shape(),
                    first_row_.back());
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

Tensor BatchSource::TextOf(int64_t size) const {
  std::vector<int64_t> dims = {size};
  for (int axis = 1; axis < text_.shape().rank(); ++axis) dims.push_back(text_.shape()[axis]);
  return Tensor(Shape(dims), text_.dtype());
}

void BatchSource::TextInto(Tensor& text, int64_t row, int64_t from) const {
  auto bytes = static_cast<size_t>(text_.bytes() / text_.shape()[0]);
  std::memcpy(static_cast<std::byte*>(text.raw()) + static_cast<size_t>(row) * bytes,
              static_cast<const std::byte*>(text_.raw()) + static_cast<size_t>(from) * bytes,
              bytes);
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
  std::vector<int64_t> captions(indices.size());  // that the draws show
  batch.images = Tensor({size, data_.channels(), data_.side(), data_.side()});
  if (data_.masked()) batch.mask = Tensor({size, 1, data_.side(), data_.side()});
  for (size_t i = 0; i < indices.size(); ++i) {
    Dataset::Drawn drawn = data_.draw(indices[i], pictures_);
    captions[i] = drawn.caption;
    CopyInto(drawn.image, batch.images, i);
    if (data_.masked()) CopyInto(drawn.mask, batch.mask, i);
  }
  batch.noise = noise_.NormalTensor(batch.images.shape());
  if (options_.noise_offset > 0) {
    int64_t planes = size * batch.images.shape()[1], pixels = batch.noise.elements() / planes;
    auto scale = static_cast<float>(options_.noise_offset);
    float* noise = batch.noise.data();
    for (int64_t plane = 0; plane < planes; ++plane) {
      float offset = scale * offsets_.Normal();
      for (int64_t i = 0; i < pixels; ++i) *noise++ += offset;
    }
  }
  if (options_.input_perturbation > 0) {
    auto scale = static_cast<float>(options_.input_perturbation);
    batch.input_noise = batch.noise.Clone();
    for (float& n : batch.input_noise.values()) n += scale * perturbations_.Normal();
  }
  batch.timesteps = Tensor({size}, DType::kI64);
  batch.text = TextOf(size);
  for (int64_t i = 0; i < size; ++i) {
    batch.timesteps.data<int64_t>()[i] = timesteps_.Integer(options_.timesteps);
    auto picture = static_cast<size_t>(indices[static_cast<size_t>(i)]);
    int64_t count = first_row_[picture + 1] - first_row_[picture];
    int64_t caption = captions[static_cast<size_t>(i)];
    if (caption < 0) caption = count > 1 ? choices_.Integer(count) : 0;
    Check<InternalError>(caption < count, "data set: caption {} of {}", caption, count);
    int64_t row = first_row_[picture] + caption;
    bool drop = dropout_.Uniform() < options_.caption_dropout;
    TextInto(batch.text, i, drop ? first_row_.back() : row);
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
    batch.text = TextOf(size);
    for (int64_t i = 0; i < size; ++i) {
      auto [caption, timestep] = tasks[begin + static_cast<size_t>(i)];
      indices.push_back(caption);
      batch.timesteps.data<int64_t>()[i] = timestep;
      TextInto(batch.text, i, first_row_[static_cast<size_t>(caption)]);
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
          {"dropout", dropout_.position()},
          {"caption_choice", choices_.position()},
          {"noise_offset", offsets_.position()},
          {"input_perturbation", perturbations_.position()}};
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
  choices_.set_position(at("caption_choice"));
  offsets_.set_position(at("noise_offset"));
  perturbations_.set_position(at("input_perturbation"));
}

}  // namespace calotype
