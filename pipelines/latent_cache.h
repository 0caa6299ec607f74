// Latent distributions on disk, so that a continued or another run does not encode the same
// pictures again. An entry is named by a hash of all that it is made from: the pixels that the
// autoencoder saw, its weights and configuration, the program's version and what else decides the
// bits (backend, processor, threads). So what has changed of these has another name, and a run that
// reads entries has the bits that it would compute. A damaged one is not used.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "core/tensor.h"
#include "models/autoencoder_kl.h"

namespace calotype {

// Mean and standard deviation of a picture's latents, [1, C, h, w] each.
struct LatentMoments {
  Tensor mean, std;
};

class LatentCache {
 public:
  // Makes the folder if needed. `how` is what else decides the bits: the backend, the processor
  // and, where they count, the threads. Errors: FileError if the folder cannot be written.
  LatentCache(std::filesystem::path folder, AutoencoderKL& vae, std::string_view how);

  // The file of a picture's entry, there or not.
  std::filesystem::path PathOf(const Tensor& picture) const;
  // None if there is no entry, or if it is not whole; then `damaged`, if given, says why.
  std::optional<LatentMoments> Read(const std::filesystem::path& entry,
                                    std::string* damaged = nullptr) const;
  // Replaces the entry. Errors: FileError.
  void Write(const std::filesystem::path& entry, const LatentMoments& moments) const;

 private:
  std::filesystem::path folder_;
  std::string maker_;  // hash of what makes latents of pictures
};

}  // namespace calotype
