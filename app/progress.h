// What the pipelines report, for people: callbacks that show progress on a bar, which must outlive
// them, and ask to stop once a signal was caught.
#pragma once

#include <string>

#include "app/terminal.h"
#include "pipelines/text_to_image.h"
#include "pipelines/trainer.h"

namespace calotype::app {

TrainCallbacks ShowTraining(ProgressBar& bar);
GenerateCallbacks ShowSampling(ProgressBar& bar);

// "200 steps in 3:10, loss 0.0912, validation loss 0.0934".
std::string Summary(const TrainResult& result);

}  // namespace calotype::app
