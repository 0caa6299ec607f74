// What attention editing and heat maps do on the demo's model, in figures: a classifier reads the
// pictures (io/shapes.h), so that nobody has to look at 480 of them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "io/shapes.h"
#include "pipelines/attention_editing.h"
#include "pipelines/attention_maps.h"
#include "pipelines/text_to_image.h"

namespace calotype {

struct AttentionDemoOptions {
  std::filesystem::path folder = "demo";  // of a trained demo
  uint64_t seed = 0;                      // of the picture of each caption
  int64_t sampling_steps = 25;
  int64_t captions = kShapeCaptions;  // how many of them, spread evenly
  StepRange n_cross_replace = {0, 0.4}, n_self_replace = {0, 0.4};
  bool local_blend = false;
};

// Shares in [0, 1] over the captions and the 5 other colours of each.
struct EditAccuracy {
  double color = 0;    // the new colour is seen
  double kept = 0;     // shape, size and background are those of the source picture
  double overlap = 0;  // of what is not background in both, of what is in either; the mean
  int64_t pictures = 0;
};

// Share of a heat map that lies inside of the shape, over the share of the picture that the shape
// takes.
struct HeatShare {
  double median = 0, least = 0;  // over the captions
};

struct AttentionDemoSummary {
  EditAccuracy edited;
  EditAccuracy redrawn;  // the new prompt from the same noise, without editing
  // Maps of the word of the shape, of that of the colour, of both ("red circle"), and of that of
  // the background.
  HeatShare shape, color, color_and_shape, background;
  std::string ToJson() const;
};

// Draws the captions, edits and maps them; writes into the folder edit.png (rows: source, edited in
// 5 colours) and heat.png (rows: picture, map of the shape's word, of the colour's, of the
// background's), and edit.json. Errors: those of TextToImagePipeline.
AttentionDemoSummary RunAttentionDemo(const AttentionDemoOptions& options,
                                      const GenerateCallbacks& callbacks = {});

// Pixels of a picture [3, H, W] that differ from the background of a caption, [H, W] of 0 and 1.
Tensor ForegroundMask(const Tensor& picture, int64_t caption);

}  // namespace calotype
