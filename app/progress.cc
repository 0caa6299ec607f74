#include "app/progress.h"

#include <fmt/format.h>

namespace calotype::app {

TrainCallbacks ShowTraining(ProgressBar& bar) {
  TrainCallbacks callbacks;
  callbacks.progress = [&bar](const TrainProgress& p) {
    bar.Update(p.step, p.steps,
               fmt::format("loss {:.4f}, lr {:.1e}", p.mean_loss, p.learning_rate));
  };
  callbacks.message = [&bar](const std::string& text) { bar.Message(text); };
  callbacks.cancelled = [] { return CaughtSignal() != 0; };
  return callbacks;
}

GenerateCallbacks ShowSampling(ProgressBar& bar) {
  GenerateCallbacks callbacks;
  callbacks.progress = [&bar](int64_t done, int64_t total) { bar.Update(done, total, ""); };
  callbacks.warn = [&bar](const std::string& text) { bar.Message("warning: " + text); };
  callbacks.cancelled = [] { return CaughtSignal() != 0; };
  return callbacks;
}

std::string Summary(const TrainResult& result) {
  std::string text = fmt::format("{} steps in {}, loss {:.4f}", result.steps,
                                 FormatDuration(result.seconds), result.final_loss);
  if (result.validation) text += ", " + result.validation->ToString();
  return text;
}

}  // namespace calotype::app
