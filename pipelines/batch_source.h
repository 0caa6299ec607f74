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
  Tensor images;     // [B, 3, side, side] in [-1, 1]
  Tensor noise;      // as images, N(0, 1)
  Tensor timesteps;  // i64 [B], uniform in [0, T)
  Tensor tokens;     // i64 [B, L]
};

class BatchSource {
 public:
  struct Options {
    int64_t batch_size = 64;
    int64_t timesteps = 1000;        // T
    double caption_dropout = 0;      // probability of the empty caption
    double validation_fraction = 0;  // share of the captions that training never sees
    uint64_t seed = 0;
  };
  // `tokens`: i64 [data.size() + 1, L], the token rows of the captions and, last, of the empty
  // caption. Keeps a reference to `data`. Errors: ValueError if an option is out of range or no
  // caption is left for training.
  BatchSource(const Dataset& data, Tensor tokens, const Options& options);

  // The next batch. Captions come in shuffled rounds: each once before any comes again.
  Batch Next();

  // The held-out captions as fixed batches (the last may be smaller): each caption several times,
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
  void TokensInto(Tensor& tokens, int64_t row, int64_t caption) const;

  const Dataset& data_;
  Tensor tokens_;
  Options options_;
  std::vector<int64_t> training_, held_out_;
  std::vector<int64_t> order_;  // of the round that is being drawn
  uint64_t order_round_ = ~uint64_t{0};
  uint64_t drawn_ = 0;  // captions drawn so far
  Random pictures_, noise_, timesteps_, dropout_;
  std::vector<Batch> validation_;
};

}  // namespace calotype
