// Progress bars for training and sampling: callbacks of the pipelines, shown by a ProgressBar.
#pragma once

#include <optional>
#include <string>

#include "app/terminal.h"
#include "pipelines/text_to_image.h"
#include "pipelines/trainer.h"

namespace calotype::app {

class TrainingView {
 public:
  TrainingView(std::string title, bool quiet) : title_(std::move(title)), quiet_(quiet) {}
  TrainCallbacks Callbacks();

 private:
  ProgressBar& Bar();
  std::string title_;
  bool quiet_;
  std::optional<ProgressBar> bar_;  // made at the first report, so that its clock starts there
};

class SamplingView {
 public:
  SamplingView(std::string title, bool quiet) : title_(std::move(title)), quiet_(quiet) {}
  GenerateCallbacks Callbacks();

 private:
  ProgressBar& Bar();
  std::string title_;
  bool quiet_;
  std::optional<ProgressBar> bar_;
};

}  // namespace calotype::app
