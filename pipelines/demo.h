// The demo: trains the preset toy16 on the data set `shapes`, compiles it, draws every caption, and
// measures how many pictures show what was asked for and how fast compiled code is beside eager.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "io/shapes.h"
#include "pipelines/benchmark.h"
#include "pipelines/trainer.h"

namespace calotype {

struct DemoOptions {
  std::filesystem::path folder = "demo";
  std::string optimizer = "adamw";  // or sgd: plain settings, judged by the loss
  std::string backend = "eager";    // of training; pictures are drawn by compiled code
  bool resume = false;  // continue the run in the folder; training.seconds counts this part only
  uint64_t seed = 0;
  int64_t steps = 0;              // 0: 1000, or 400 with sgd
  int64_t seeds_per_caption = 4;  // pictures of each of the 96 captions
  int64_t sampling_steps = 25;
};

struct DemoCallbacks {
  TrainCallbacks training;
  GenerateCallbacks sampling;
};

struct DemoSummary {
  CaptionAccuracy accuracy;
  TrainResult training;
  double compile_seconds = 0;  // of the U-Net at batch 1 and 64 and the caption encoder
  Comparison b1, b64;
  std::string ToJson() const;
};

// The options that the demo trains with. Errors: ValueError for another optimizer.
TrainOptions DemoTrainOptions(const DemoOptions& options);

// Writes into the folder: the trained model, pictures/caption-<index>-seed-<seed>.png, grid.png and
// summary.json. Errors: those of Trainer and TextToImagePipeline.
DemoSummary RunDemo(const DemoOptions& options, const DemoCallbacks& callbacks = {});

}  // namespace calotype
