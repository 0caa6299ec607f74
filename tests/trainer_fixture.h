// A run of a tiny model on the shapes, for tests of training and of what reads a run's folder.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "core/json.h"
#include "core/parallel.h"
#include "pipelines/trainer.h"
#include "pipelines/training_setup.h"
#include "tests/run_program.h"
#include "tests/temp_folder.h"
#include "tests/tiny_unet.h"

namespace calotype::test {

// The values of a field in the lines of metrics.jsonl that have it.
inline std::vector<double> Losses(const std::string& metrics, const char* field) {
  std::vector<double> values;
  std::istringstream lines(metrics);
  for (std::string line; std::getline(lines, line);) {
    auto record = ParseJsonObject(line, "metrics.jsonl");
    if (record.contains(field)) values.push_back(record[field].get<double>());
  }
  return values;
}

class TrainerTest : public ::testing::Test {
 protected:
  TrainerTest() {
    SetThreads(1);  // threads would cost more than they give at this size
    folder_.Write("unet.json", kTinyUNet);
    options_.unet = folder_ / "unet.json";
    options_.train_batch_size = 8;
    options_.max_train_steps = 12;
    options_.lr_warmup_steps = 2;
    options_.checkpointing_steps = 5;
    options_.validation_steps = 6;
    options_.sample_steps = 0;
  }
  std::filesystem::path Folder(const std::string& name) const { return folder_ / name; }
  TrainResult Train(const std::string& name, bool resume = false,
                    TrainCallbacks callbacks = {}) const {
    auto data = OpenDataset(options_, {});
    auto model = MakeModel(options_, *data);
    return Trainer(*model, *data, options_, Folder(name), resume, std::move(callbacks)).Run();
  }
  // The lines of metrics.jsonl without times.
  std::string Metrics(const std::string& name) const {
    std::string result;
    std::istringstream lines(ReadText(Folder(name) / "metrics.jsonl"));
    for (std::string line; std::getline(lines, line);) {
      auto record = ParseJsonObject(line, "metrics.jsonl");
      record.erase("seconds");
      result += JsonText(record) + "\n";
    }
    return result;
  }
  std::string Weights(const std::string& name) const {
    return ReadText(Folder(name) / "unet/diffusion_pytorch_model.safetensors") +
           ReadText(Folder(name) / "caption_encoder/model.safetensors");
  }

  // Everything that a step can have at once.
  void SwitchOnTheRecipe() {
    options_.snr_gamma = 5;
    options_.noise_offset = 0.1;
    options_.input_perturbation = 0.1;
    options_.caption_dropout = 0.2;
    options_.train_batch_size = 4;
    options_.gradient_accumulation_steps = 2;
    options_.gradient_checkpointing = true;
    options_.lr_scheduler = "cosine_with_restarts";
    options_.lr_num_cycles = 2;
    options_.scale_lr = true;
    options_.learning_rate = 2e-4;
    options_.use_ema_warmup = true;
    options_.ema_update_after_step = 1;
  }

  TempFolder folder_;
  TrainOptions options_;
};

}  // namespace calotype::test
