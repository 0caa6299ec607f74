#include "app/progress.h"

#include <fmt/format.h>

namespace calotype::app {

ProgressBar& TrainingView::Bar() {
  if (!bar_) bar_.emplace(title_, quiet_);
  return *bar_;
}

TrainCallbacks TrainingView::Callbacks() {
  TrainCallbacks callbacks;
  callbacks.progress = [this](const TrainProgress& p) {
    Bar().Update(p.step, p.steps,
                 fmt::format("loss {:.4f}, lr {:.1e}", p.mean_loss, p.learning_rate), p.first_step);
  };
  callbacks.message = [this](const std::string& text) { Bar().Message(text); };
  callbacks.cancelled = [] { return CaughtSignal() != 0; };
  return callbacks;
}

ProgressBar& SamplingView::Bar() {
  if (!bar_) bar_.emplace(title_, quiet_);
  return *bar_;
}

GenerateCallbacks SamplingView::Callbacks() {
  GenerateCallbacks callbacks;
  callbacks.progress = [this](int64_t done, int64_t total) { Bar().Update(done, total, ""); };
  callbacks.warn = [this](const std::string& text) { Bar().Message("warning: " + text); };
  callbacks.cancelled = [] { return CaughtSignal() != 0; };
  return callbacks;
}

}  // namespace calotype::app
