// The pictures of a concept as Custom Diffusion is trained on: smaller and larger than they are,
// with captions that say so, and a mask of where they lie. Kumari et al. 2022, arXiv:2212.04488;
// the numbers are those of diffusers' script train_custom_diffusion.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/dataset.h"

namespace calotype {

// A draw of a picture of side S: with probability 0.66 scaled to a side in [S / 3, S] and put at a
// random place on gray, else to one in [1.2 S, 1.4 S) and a random part of side S cut out. Captions
// of pictures below 0.6 S begin with "a far away " or "very small ", of those above S with "zoomed
// in " or "close up ". mask [1, S / factor, S / factor] is 1 in the cells of the picture without
// its outermost ones, everywhere in a cut one.
class CustomDiffusionDataset : public Dataset {
 public:
  // factor: pixels of a side for each of the mask's. Without `augment` every picture is drawn as it
  // is: scale S. Keeps a reference. Errors: ValueError for pictures whose smallest scale may have
  // no cell in the mask.
  CustomDiffusionDataset(const Dataset& pictures, int64_t factor, bool augment);

  int64_t size() const override { return pictures_.size(); }
  int side() const override { return pictures_.side(); }
  int channels() const override { return pictures_.channels(); }
  std::string caption(int64_t index) const override { return pictures_.caption(index); }
  // The captions of the picture, and with `augment` the same behind each of the beginnings.
  std::vector<std::string> captions(int64_t index) const override;
  // As they are: for validation.
  Tensor image(int64_t index, Random& random) const override {
    return pictures_.image(index, random);
  }
  Drawn draw(int64_t index, Random& random) const override;
  bool masked() const override { return true; }
  bool varies(int64_t index) const override { return augment_ || pictures_.varies(index); }

 private:
  const Dataset& pictures_;
  int factor_;
  bool augment_;
};

}  // namespace calotype
