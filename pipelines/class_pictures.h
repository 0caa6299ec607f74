// Dreambooth's pictures of the class, drawn with the model itself before it is trained.
#pragma once

#include "pipelines/train_options.h"
#include "pipelines/trainer.h"

namespace calotype {

// With options.num_class_images: makes the folder options.class_data if needed and draws pictures
// of options.class_prompt with options.model until it holds as many that can be read,
// class-00000000.png and so on; each depends on the seed and its number alone. One part of the
// model is in memory at a time (TextToImagePipeline::Open). What a run that was stopped has drawn
// is kept, except for the last few, which are drawn together. Errors: CancelledError; those of
// TextToImagePipeline and WritePng.
void DrawClassPictures(const TrainOptions& options, const TrainCallbacks& callbacks);

}  // namespace calotype
