// BatchSource: the endless stream of training batches. Everything random comes from named Philox
// streams of one seed, so the state of the source is a few counters, and a run that is continued
// from them draws exactly what an unbroken one would have drawn.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/random.h"
#include "core/tensor.h"
#include "io/dataset.h"

namespace calotype {

struct Batch {
  Tensor images;       // [B, C, side, side]: pictures in [-1, 1], or latents
  Tensor noise;        // as images: N(0, 1), plus the offset
  Tensor input_noise;  // what noises the input, if that is another one; else undefined
  Tensor timesteps;    // i64 [B], uniform in [0, T)
  Tensor text;         // i64 [B, L] tokens, or f32 [B, L, D] their embeddings
  Tensor mask;         // of masked data sets: where the loss counts, [B, 1, side, side]
};

class BatchSource {
 public:
  struct Options {
    int64_t batch_size = 64;
    int64_t timesteps = 1000;    // T
    double caption_dropout = 0;  // probability of the empty caption
    // noise += noise_offset N(0, 1) [B, C, 1, 1], so that brightness is learned too.
    double noise_offset = 0;
    // input_noise = noise + input_perturbation N(0, 1); the model's target keeps the noise (Ning et
    // al. 2023, arXiv:2301.11706). Not for validation.
    double input_perturbation = 0;
    double validation_fraction = 0;  // share of the captions that training never sees
    uint64_t seed = 0;
  };
  // `text`: the rows (tokens i64 [L] or embeddings f32 [L, D]) of all captions of the first
  // picture, of the second, and so on, and last of the empty caption. Keeps a reference to `data`.
  // Errors: ValueError if an option is out of range or no caption is left for training.
  BatchSource(const Dataset& data, Tensor text, const Options& options);

  // The next batch. Pictures come in shuffled rounds: each once before any comes again. One of
  // several captions is drawn each time.
  Batch Next();

  // The held-out pictures as fixed batches (the last may be smaller): each several times, with its
  // first caption,
  // with noise and with timesteps spread evenly over [0, T) that depend on the seed alone. Empty
  // without held-out captions.
  const std::vector<Batch>& ValidationBatches();
  int64_t training_captions() const { return static_cast<int64_t>(training_.size()); }
  int64_t validation_captions() const { return static_cast<int64_t>(held_out_.size()); }

  // Positions of the streams by name, for checkpoints. SetState: FileError if one is missing.
  std::map<std::string, uint64_t> State() const;
  void SetState(const std::map<std::string, uint64_t>& state);

 private:
  void Shuffle(uint64_t round);
  // An empty `text` for a batch, and a copy of row `from` of the captions' into it.
  Tensor TextOf(int64_t size) const;
  void TextInto(Tensor& text, int64_t row, int64_t from) const;

  const Dataset& data_;
  Tensor text_;
  Options options_;
  std::vector<int64_t> training_, held_out_;
  std::vector<int64_t> order_;  // of the round that is being drawn
  uint64_t order_round_ = ~uint64_t{0};
  uint64_t drawn_ = 0;              // captions drawn so far
  std::vector<int64_t> first_row_;  // of each picture's captions in text_; last: the empty one's
  Random pictures_, noise_, timesteps_, dropout_, choices_, offsets_, perturbations_;
  std::vector<Batch> validation_;
};

}  // namespace calotype
