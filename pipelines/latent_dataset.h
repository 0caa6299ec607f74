// What a frozen autoencoder and a frozen text encoder make of a data set, computed once and before
// the training step, which then holds the U-Net only.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/dataset.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"
#include "pipelines/latent_cache.h"

namespace calotype {

// The latents of the pictures of another set, drawn anew each time from the encoder's distribution:
// scaling_factor (mean + std N(0, 1) - shift_factor).
class LatentDataset : public Dataset {
 public:
  // Keeps references to both. With `cache`, mean and std of a picture are computed when it is drawn
  // first and kept in memory (2 C side^2 numbers a picture), with the same latents as without.
  // With `disk`, a folder, they are also kept there, see LatentCache; entries that are damaged are
  // computed anew, of which `warn` hears. Errors: ValueError if the model has no autoencoder, if
  // the side of the pictures is no multiple of model.factor(), or if `cache` is on and a picture is
  // drawn differently each time; FileError if `disk` cannot be written.
  LatentDataset(const Dataset& pictures, DiffusionModel& model, Backend backend, bool cache,
                const std::filesystem::path& disk = {}, WarningCallback warn = {});

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
  int64_t cached() const;                       // pictures whose distribution is kept
  int64_t encoded() const { return encoded_; }  // calls of the autoencoder so far

 private:
  Tensor Encode(int64_t index, const Tensor& picture, Random& random) const;
  LatentMoments MomentsOf(const Tensor& picture) const;

  const Dataset& pictures_;
  int side_, channels_;
  float scale_, shift_;
  bool cache_;
  std::unique_ptr<GraphRunner> encoder_;
  std::optional<LatentCache> disk_;
  WarningCallback warn_;
  mutable std::vector<LatentMoments> moments_;  // undefined: not there yet
  mutable int64_t encoded_ = 0;
};

// The embeddings [rows, L, D] of token rows i64 [rows, L]; equal rows are computed once.
Tensor EmbedTokens(DiffusionModel& model, const Tensor& tokens, Backend backend);

}  // namespace calotype
