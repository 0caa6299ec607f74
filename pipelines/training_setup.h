// From options to what a Trainer needs: the data set and a fresh model for its captions; what all
// training commands begin with.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "io/dataset.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/train_options.h"

namespace calotype {

struct TrainCallbacks;

// Errors: FileError if `folder` holds no run; ValueError, naming the command, if it is of another
// kind; those of ParseTrainOptions and ParseTrainingKind.
void CheckResumes(const TrainingKind& kind, const std::filesystem::path& folder);

// What a run trains on.
struct TrainingParts {
  std::unique_ptr<Dataset> data;
  std::unique_ptr<DiffusionModel> model;
};
// Checks the options and the folder (CheckRun), opens the data, for a new run draws the pictures of
// the class that options.num_class_images asks for (DrawClassPictures), and makes the model.
// `results` are files that a new run writes; none of them may be there; empty: it writes the model.
// Drawing can take hours, so all that is quick and can be wrong is checked before: `check` is
// called with the model, whose text encoder alone has its weights. Errors: ValueError; those of
// CheckChosen, OpenDataset, DrawClassPictures, MakeModel and `check`.
TrainingParts BeginTraining(const TrainOptions& options, const std::set<std::string>& chosen,
                            const std::filesystem::path& folder, bool resume,
                            std::span<const std::filesystem::path> results,
                            const TrainCallbacks& callbacks,
                            const std::function<void(DiffusionModel&, const Dataset&)>& check = {});

// The preset of that name, or the diffusers config.json at that path. Errors: ValueError; those of
// ReadUNetConfig.
UNet2DConditionConfig UNetOf(const std::string& name);
// The data set that options.data names. Errors: those of the data sets.
std::unique_ptr<Dataset> OpenDataset(const TrainOptions& options, const WarningCallback& warn);
// The data set that options.class_data names, its pictures as large as those of `data` unless
// options.resolution says otherwise; nullptr if it names none.
std::unique_ptr<Dataset> OpenClassDataset(const TrainOptions& options, const Dataset& data,
                                          const WarningCallback& warn);
// The model that options.model names, or one with random weights as the options say, its vocabulary
// made from the captions of the data set and of class_data. An autoencoder and CLIP are frozen:
// their parameters are not trainable. Errors: those of DiffusionModel::Load and its constructor;
// those of CheckUNetInputs; ValueError for pictures whose side is no multiple of the
// autoencoder's factor, and for options without effect on the given model.
std::unique_ptr<DiffusionModel> MakeModel(const TrainOptions& options, const Dataset& data,
                                          const WarningCallback& warn = {});

// All captions of all pictures, in order.
std::vector<std::string> Captions(const Dataset& data);

}  // namespace calotype
