// Trainer: trains a DiffusionModel on captioned pictures: U-Net and caption encoder together, or
// the U-Net of Stable Diffusion on the latents and embeddings of its frozen autoencoder and text
// encoder. One step is one graph from the samples to the new weights, interpreted or compiled.
// Everything that
// a step depends on is in the checkpoint, so a run that was killed continues bit for bit.
//
// The run folder: model_index.json, unet/, caption_encoder/, scheduler/ (the averaged weights,
// written at the end and at each checkpoint), train.json (the options), metrics.jsonl (a line a
// step), samples/step-00000250.png, checkpoints/.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "diffusion/noise_schedule.h"
#include "io/dataset.h"
#include "optim/ema.h"
#include "optim/learning_rate.h"
#include "optim/optimizer.h"
#include "pipelines/batch_source.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"
#include "pipelines/latent_dataset.h"
#include "pipelines/model_graphs.h"
#include "pipelines/text_to_image.h"
#include "pipelines/train_options.h"

namespace calotype {

struct TrainProgress {
  int64_t step = 0, steps = 0;     // done, of how many
  double loss = 0, mean_loss = 0;  // of this step, and of the last 50
  double learning_rate = 0, gradient_norm = 0;
  double seconds = 0;  // since this run began
};

struct TrainCallbacks {
  std::function<void(const TrainProgress&)> progress;
  std::function<void(const std::string&)> message;  // validation losses, warnings
  std::function<bool()> cancelled;                  // asked before each step
};

// Mean losses on the held-out captions; see LossGraph.
struct ValidationLosses {
  double loss = 0;
  std::optional<double> noise_loss;
  std::string ToString() const;
};

// What of the model trains, and how the result gets into the run folder. The rest of the model is
// frozen: it has no gradient, no optimizer state and no average, and is not in the checkpoints.
struct TrainTarget {
  // Empty: all trainable parameters of the model except those of its autoencoder.
  std::vector<ParameterPtr> parameters;
  // Writes the result, called while the parameters hold their averages. Undefined: model.Save.
  std::function<void(const std::filesystem::path& folder)> save;
  // What of train.json is not TrainOptions: whose run it is, and the JSON of its own options.
  TrainingKind kind = kTrain;
  std::string own_options = {};
  double learning_rate_factor = 1;  // of the options' rate
  // Files that `save` writes. One of them is there: a run without checkpoints has lost them.
  std::vector<std::filesystem::path> results = {};
};

struct TrainResult {
  int64_t steps = 0;
  double final_loss = 0;                       // mean of the last 50 steps
  std::optional<ValidationLosses> validation;  // if captions are held out
  double seconds = 0, compile_seconds = 0;
};

// True if `folder` holds a run, finished or not.
bool HoldsRun(const std::filesystem::path& folder);

// What is wrong with a run whatever its data and model are: the options and the learning rate's
// schedule; a folder that holds a run already, or a model if the run writes one; with `resume`, one
// that holds none. Errors: as Trainer's.
void CheckRun(const TrainOptions& options, const std::filesystem::path& folder, bool resume,
              bool writes_model);

class Trainer {
 public:
  // Starts a run in `folder`, which is made. Keeps references to model and data. Errors: ValueError
  // for options, or if `resume` is false and the folder already holds a run, or a model that the
  // run would overwrite.
  // With `resume`, continues from the newest whole checkpoint, or begins again if the run was
  // stopped before the first; FileError if there should be one, as the run's own train.json and
  // metrics.jsonl or its results say; ValueError if an option differs from the run's that may not
  // change.
  Trainer(DiffusionModel& model, const Dataset& data, const TrainOptions& options,
          std::filesystem::path folder, bool resume = false, TrainCallbacks callbacks = {},
          TrainTarget target = {});
  ~Trainer();

  // Trains up to options.max_train_steps, writes checkpoints on the way and the model at the end.
  // Errors: CancelledError after writing a checkpoint; NumericError at the first loss or gradient
  // that is not finite, the last checkpoint kept; FileError.
  TrainResult Run();

  int64_t step() const { return step_; }
  // Losses on the held-out captions with fixed noise and timesteps, with the averaged weights.
  ValidationLosses Validate();

 private:
  struct StepResult {
    double loss, gradient_norm, learning_rate;
  };
  std::vector<Tensor> NextBatch();
  std::map<std::string, uint64_t> Streams() const;
  StepResult Step();
  void Compile();
  void Resume();
  void WriteState();
  void WriteModel();
  void WriteSamples();
  void OpenMetrics();
  void Message(const std::string& text) const;
  double MeanLoss() const;
  std::string LastCheckpoint() const;  // for messages

  DiffusionModel& model_;
  const Dataset& data_;
  TrainOptions options_;
  std::filesystem::path folder_;
  TrainCallbacks callbacks_;
  TrainTarget target_;
  Backend backend_;
  NoiseSchedule schedule_;
  std::unique_ptr<Dataset> class_data_;  // with options.class_data
  LossInputs inputs_;
  std::unique_ptr<LatentDataset> latents_, class_latents_;  // if the model works on latents
  BatchSource batches_;
  std::unique_ptr<BatchSource> class_batches_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Ema> ema_;
  LearningRateSchedule rate_;
  // The step; with gradient accumulation the batches' gradients and the step from their sums.
  std::unique_ptr<GraphRunner> step_runner_, gradient_runner_;
  std::vector<ParameterPtr> sums_;  // zero between steps, so not in checkpoints
  std::map<int64_t, std::unique_ptr<GraphRunner>> validation_;  // by batch size
  std::unique_ptr<TextToImagePipeline> sampler_;
  std::shared_ptr<void> lock_;  // of the folder
  std::FILE* metrics_ = nullptr;
  int64_t step_ = 0, first_step_ = 0;  // done; done when this run began
  std::vector<double> recent_losses_;  // at most 50
  double compile_seconds_ = 0;
};

}  // namespace calotype
