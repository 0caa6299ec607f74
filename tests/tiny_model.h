// A text-to-image model of kTinyUNet and eight words, with random weights.
#pragma once

#include <memory>
#include <string>

#include "core/parallel.h"
#include "pipelines/diffusion_model.h"
#include "tests/tiny_unet.h"

namespace calotype::test {

struct TinyModelOptions {
  float sharpness =
      1;               // factor of queries and keys: 2 for probabilities that are not next to equal
  bool start = false;  // rows begin with <start>; 8 tokens either way
};
inline std::unique_ptr<DiffusionModel> TinyModel(const TinyModelOptions& options = {}) {
  SetThreads(1);
  CaptionEncoderConfig encoder;
  encoder.vocabulary = {"<pad>", "<unk>", "a", "blue", "circle", "large", "red", "square"};
  if (options.start) encoder.vocabulary.insert(encoder.vocabulary.begin() + 2, "<start>");
  encoder.hidden_size = 8;
  encoder.num_attention_heads = 2;
  SchedulerConfig scheduler;
  scheduler.type = "DDIMScheduler";
  scheduler.prediction_type = "v_prediction";  // the first steps do not multiply rounding errors
  auto model = std::make_unique<DiffusionModel>(UNet2DConditionConfig::FromJson(kTinyUNet), encoder,
                                                scheduler);
  model->Initialize(5);
  for (const ParameterPtr& p : model->NamedParameters()) {
    if (p->name().find("to_q") != std::string::npos ||
        p->name().find("to_k") != std::string::npos) {
      for (float& w : p->Write().values()) w *= options.sharpness;
    }
  }
  model->SetTrainingMode(false);
  return model;
}

}  // namespace calotype::test
