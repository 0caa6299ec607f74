// Callbacks of the pipelines that show progress on a bar, which must outlive them, and ask to stop
// once a signal was caught.
#pragma once

#include "app/terminal.h"
#include "pipelines/text_to_image.h"
#include "pipelines/trainer.h"

namespace calotype::app {

TrainCallbacks ShowTraining(ProgressBar& bar);
GenerateCallbacks ShowSampling(ProgressBar& bar);

}  // namespace calotype::app
