// What a frozen autoencoder and a frozen text encoder make of a data set, computed once and before
// the training step, which then holds the U-Net only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/dataset.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"

namespace calotype {

// The latents of the pictures of another set, drawn anew each time from the encoder's distribution:
// scaling_factor (mean + std N(0, 1) - shift_factor).
class LatentDataset : public Dataset {
 public:
  // Keeps references to both. With `cache`, mean and std of a picture are computed when it is drawn
  // first and kept in memory (2 C side^2 numbers a picture), with the same latents as without.
  // Errors: ValueError if the model has no autoencoder, if the side of the pictures is no multiple
  // of model.factor(), or if `cache` is on and a picture is drawn differently each time.
  LatentDataset(const Dataset& pictures, DiffusionModel& model, Backend backend, bool cache);

  int64_t size() const override { return pictures_.size(); }
  int side() const override { return side_; }
  int channels() const override { return channels_; }
  std::string caption(int64_t index) const override { return pictures_.caption(index); }
  std::vector<std::string> captions(int64_t index) const override {
    return pictures_.captions(index);
  }
  Tensor image(int64_t index, Random& random) const override;
  Drawn draw(int64_t index, Random& random) const override;
  bool masked() const override { return pictures_.masked(); }
  int64_t cached() const;  // pictures whose distribution is kept

 private:
  Tensor Encode(int64_t index, const Tensor& picture, Random& random) const;

  const Dataset& pictures_;
  int side_, channels_;
  float scale_, shift_;
  bool cache_;
  std::unique_ptr<GraphRunner> encoder_;
  struct Moments {
    Tensor mean, std;
  };
  mutable std::vector<Moments> moments_;  // undefined: not there yet
};

// The embeddings [rows, L, D] of token rows i64 [rows, L]; equal rows are computed once.
Tensor EmbedTokens(DiffusionModel& model, const Tensor& tokens, Backend backend);

}  // namespace calotype
