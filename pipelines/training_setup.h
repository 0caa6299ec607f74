// From options to what a Trainer needs: the data set and a fresh model for its captions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "io/dataset.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/train_options.h"

namespace calotype {

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
// their parameters are not trainable. Errors: those of DiffusionModel::Load and its constructor.
std::unique_ptr<DiffusionModel> MakeModel(const TrainOptions& options, const Dataset& data,
                                          const WarningCallback& warn = {});

std::vector<std::string> Captions(const Dataset& data);

}  // namespace calotype
