#include "pipelines/trainer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>

#include "core/json.h"
#include "core/parallel.h"
#include "io/atomic_file.h"
#include "io/checkpoint.h"
#include "io/file.h"
#include "io/image.h"
#include "io/png.h"
#include "optim/parameter_values.h"
#include "pipelines/model_graphs.h"
#include "pipelines/rows.h"
#include "pipelines/training_graph.h"
#include "pipelines/training_setup.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr std::string_view kClassStream = "class.";
constexpr size_t kMeanSteps = 50;  // steps of the loss that is shown
constexpr int64_t kSamples = 16;   // pictures of a sample grid
constexpr int64_t kSampleSteps = 25;

// Exchanges weights and averages for the life of the object.
class AveragedWeights {
 public:
  explicit AveragedWeights(Ema* ema) : ema_(ema) {
    if (ema_) ema_->Swap();
  }
  ~AveragedWeights() {
    if (ema_) ema_->Swap();
  }
  AveragedWeights(const AveragedWeights&) = delete;

 private:
  Ema* ema_;
};

void MakeFolder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
}

// Holds `folder` for this process as long as the result lives. Errors: FileError if another one
// does.
std::shared_ptr<void> LockFolder(const fs::path& folder) {
  fs::path path = folder / ".lock";
  int file = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644);
  Check<FileError>(file >= 0, "{}: cannot be opened: {}", path.string(), std::strerror(errno));
  std::shared_ptr<void> lock(nullptr, [file](void*) { close(file); });
  Check<FileError>(flock(file, LOCK_EX | LOCK_NB) == 0,
                   "{}: another process is training in this folder", folder.string());
  return lock;
}

Optimizer::Rule RuleOf(const TrainOptions& o) {
  if (o.optimizer == "sgd") return Sgd{.momentum = o.momentum, .weight_decay = o.weight_decay};
  if (o.optimizer == "adam") {
    return Adam{.beta1 = o.adam_beta1,
                .beta2 = o.adam_beta2,
                .eps = o.adam_epsilon,
                .weight_decay = o.weight_decay};
  }
  return AdamW{.beta1 = o.adam_beta1,
               .beta2 = o.adam_beta2,
               .eps = o.adam_epsilon,
               .weight_decay = o.weight_decay};
}

LearningRateSchedule RateOf(const TrainOptions& o, double factor) {
  int64_t warmup = o.lr_warmup_steps;
  if (warmup < 0) {
    bool none = o.lr_scheduler == "constant" || o.lr_scheduler == "piecewise_constant";
    warmup = none ? 0 : std::min<int64_t>(100, o.max_train_steps / 10);
  }
  return {.name = o.lr_scheduler,
          .learning_rate = PeakLearningRate(o) * factor,
          .warmup_steps = warmup,
          .total_steps = o.max_train_steps,
          .num_cycles = o.lr_num_cycles,
          .power = o.lr_power,
          .step_rules = o.lr_step_rules};
}

EmaOptions EmaOf(const TrainOptions& o) {
  return {.decay = o.ema_decay,
          .min_decay = o.ema_min_decay,
          .update_after_step = o.ema_update_after_step,
          .use_ema_warmup = o.use_ema_warmup,
          .inv_gamma = o.ema_inv_gamma,
          .power = o.ema_power};
}

// Embeddings of more than this are computed in the step.
constexpr int64_t kMostEmbeddingBytes = int64_t{2} << 30;

std::vector<ParameterPtr> TrainedParameters(DiffusionModel& model, const TrainTarget& target) {
  if (!target.parameters.empty()) return target.parameters;
  std::vector<ParameterPtr> parameters = model.NamedParameters(), frozen;
  if (model.vae()) frozen = model.vae()->NamedParameters();
  std::erase_if(parameters, [&](const ParameterPtr& parameter) {
    return !parameter->trainable() || std::ranges::find(frozen, parameter) != frozen.end();
  });
  return parameters;
}

// True if the text encoder is CLIP, none of it trains, and the embeddings of all captions fit.
bool EmbedsBefore(DiffusionModel& model, const Dataset& data,
                  const std::vector<ParameterPtr>& trained) {
  if (!model.text_encoder()) return false;
  std::vector<ParameterPtr> parameters = model.text_encoder()->NamedParameters();
  std::ranges::copy(model.text_encoder()->added_tokens(), std::back_inserter(parameters));
  for (const ParameterPtr& parameter : parameters) {
    if (std::ranges::find(trained, parameter) != trained.end()) return false;
  }
  const auto rows = static_cast<int64_t>(Captions(data).size()) + 1;
  return rows * model.caption_tokens() * model.context_width() * 4 <= kMostEmbeddingBytes;
}

// `source`: what `data` was opened from.
std::unique_ptr<LatentDataset> LatentsOf(DiffusionModel& model, const Dataset& data,
                                         const std::string& source, const TrainOptions& o,
                                         const TrainCallbacks& callbacks) {
  if (!model.vae()) return nullptr;
  fs::path disk;
  if (o.cache_latents_to_disk && source != "shapes") disk = fs::path(source) / ".latents";
  return std::make_unique<LatentDataset>(data, model, ParseBackend(o.backend),
                                         o.cache_latents || o.cache_latents_to_disk, disk,
                                         [message = callbacks.message](const std::string& text) {
                                           if (message) message("warning: " + text);
                                         });
}

// What the captions of `data`, which is called `name`, are to the model. Words that it does not
// know and captions that it does not read to the end are one warning.
Tensor CaptionText(DiffusionModel& model, const Dataset& data, const std::string& name, bool embed,
                   Backend backend, const TrainCallbacks& callbacks) {
  constexpr size_t kShown = 3;
  std::vector<std::string> captions = Captions(data);
  captions.push_back("");  // the row that a dropped caption takes
  std::vector<std::string> shown;
  size_t warnings = 0;
  Tensor tokens = model.Tokens(captions, [&](const std::string& text) {
    if (++warnings <= kShown) shown.push_back(text);
  });
  if (warnings > 0 && callbacks.message) {
    callbacks.message(fmt::format("warning: {} remark{} on the captions of {}: {}{}", warnings,
                                  warnings == 1 ? "" : "s", name, fmt::join(shown, "; "),
                                  warnings > kShown ? "; ..." : ""));
  }
  return embed ? EmbedTokens(model, tokens, backend) : tokens;
}

// The lines of a metrics.jsonl, if it is there, that are whole, with their steps.
std::vector<std::pair<int64_t, std::string>> MetricsLines(const fs::path& path) {
  std::vector<std::pair<int64_t, std::string>> lines;
  if (!fs::exists(path)) return lines;
  const std::string text = ReadFile(path);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;
    std::string line = text.substr(begin, end + 1 - begin);
    const auto record = ParseJson(line);
    if (record.is_object() && record.contains("step") && record["step"].is_number_integer())
      lines.emplace_back(record["step"].get<int64_t>(), std::move(line));
    begin = end + 1;
  }
  return lines;
}

BatchSource::Options BatchOptions(const TrainOptions& o, const NoiseSchedule& schedule) {
  return {.batch_size = o.train_batch_size,
          .timesteps = schedule.size(),
          .caption_dropout = o.caption_dropout,
          .noise_offset = o.noise_offset,
          .input_perturbation = o.input_perturbation,
          .validation_fraction = o.validation_fraction,
          .seed = o.seed};
}

std::vector<Tensor> InputsOf(const Batch& batch) {
  std::vector<Tensor> inputs{batch.images, batch.noise, batch.timesteps, batch.text};
  if (batch.input_noise.defined()) inputs.push_back(batch.input_noise);
  if (batch.mask.defined()) inputs.push_back(batch.mask);
  return inputs;
}

}  // namespace

bool HoldsRun(const fs::path& folder) {
  std::error_code ignored;  // a folder that cannot be looked into is an error where it is written
  return fs::exists(folder / "train.json", ignored);
}

void CheckRun(const TrainOptions& options, const fs::path& folder, bool resume, bool writes_model) {
  Validate(options);
  RateOf(options, 1).At(0);
  if (resume) {
    Check<FileError>(HoldsRun(folder), "{}: there is no run to resume", folder.string());
    return;
  }
  Check(!HoldsRun(folder),
        "{} already holds a run; continue it with --resume, or choose another folder",
        folder.string());
  std::error_code ignored;  // as for HoldsRun
  Check(!writes_model || !fs::exists(folder / "model_index.json", ignored),
        "{} holds a model, which the run would overwrite; choose another folder", folder.string());
}

Trainer::Trainer(DiffusionModel& model, const Dataset& data, const TrainOptions& options,
                 fs::path folder, bool resume, TrainCallbacks callbacks, TrainTarget target)
    : model_(model),
      data_(data),
      options_((model.CheckInputs(), CheckRun(options, folder, resume, !target.save), options)),
      folder_(std::move(folder)),
      callbacks_(std::move(callbacks)),
      target_{
          TrainedParameters(model, target), std::move(target.save),      target.kind,
          std::move(target.own_options),    target.learning_rate_factor, std::move(target.results)},
      backend_(ParseBackend(options.backend)),
      schedule_(model.scheduler()),
      class_data_(OpenClassDataset(
          options, data, [this](const std::string& text) { Message("warning: " + text); })),
      inputs_{
          .side = data.side() / model.factor(),
          .embeddings = EmbedsBefore(model, data, target_.parameters) &&
                        (!class_data_ || EmbedsBefore(model, *class_data_, target_.parameters))},
      latents_(LatentsOf(model, data, options.data, options, callbacks_)),
      batches_(latents_ ? *latents_ : data,
               CaptionText(model, data, options.data, inputs_.embeddings, backend_, callbacks_),
               BatchOptions(options, schedule_)),
      rate_(RateOf(options, target.learning_rate_factor)) {
  if (class_data_) {
    Check(class_data_->side() == data.side(),
          "training: the pictures of the data have {} pixels a side, those of class_data {}",
          data.side(), class_data_->side());
    class_latents_ = LatentsOf(model, *class_data_, options.class_data, options, callbacks_);
    BatchSource::Options batches = BatchOptions(options, schedule_);
    batches.validation_fraction = 0;
    batches.seed = ~batches.seed;  // other noise than that of the data
    class_batches_ =
        std::make_unique<BatchSource>(class_latents_ ? *class_latents_ : *class_data_,
                                      CaptionText(model, *class_data_, options_.class_data,
                                                  inputs_.embeddings, backend_, callbacks_),
                                      batches);
  }
  // A bad prompt is an error before the folder is made, not in the middle of the run.
  if (options_.sample_steps > 0) {
    model_.Tokens(std::vector{options_.validation_prompt},
                  [&](const std::string& text) { Message("warning: " + text); });
  }
  optimizer_ =
      std::make_unique<Optimizer>(RuleOf(options_), target_.parameters, options_.max_grad_norm);
  if (options_.ema_decay > 0) ema_ = std::make_unique<Ema>(EmaOf(options_), target_.parameters);
  if (resume) {
    lock_ = LockFolder(folder_);
    Resume();
  } else {
    // Once more: what is above can take minutes.
    CheckRun(options_, folder_, resume, !target_.save);
    MakeFolder(folder_ / "checkpoints");
    lock_ = LockFolder(folder_);
    WriteFile(folder_ / "train.json", ToJson(options_, target_.kind, target_.own_options));
  }
  OpenMetrics();
}

Trainer::~Trainer() {
  if (metrics_) std::fclose(metrics_);
}

void Trainer::Message(const std::string& text) const {
  if (callbacks_.message) callbacks_.message(text);
}

void Trainer::Resume() {
  fs::path path = folder_ / "train.json";
  std::set<std::string> all;
  TrainOptions::Visit(options_,
                      [&](const char* name, const auto&, const char*, bool) { all.insert(name); });
  const TrainOptions stored = ParseTrainOptions(ReadFile(path), path);
  MergeForResume(stored, options_, all);
  auto checkpoint = ReadLatestCheckpoint(folder_ / "checkpoints",
                                         [&](const std::string& text) { Message(text); });
  if (!checkpoint) {
    // Killed before the first one, as the options that the run began with place it; those given
    // now say nothing about it. Weights and streams are those of the beginning.
    int64_t last = 0, first = stored.checkpointing_steps;
    if (first == 0) first = stored.max_train_steps;
    for (const auto& [step, line] : MetricsLines(folder_ / "metrics.jsonl"))
      last = std::max(last, step);
    Check<FileError>(last <= first && last < stored.max_train_steps,
                     "{}: no checkpoint to resume from, although the run was at step {} of {}",
                     (folder_ / "checkpoints").string(), last, stored.max_train_steps);
    std::vector<fs::path> results = target_.results;
    if (!target_.save) results.push_back(folder_ / "model_index.json");
    for (const fs::path& result : results) {
      std::error_code ignored;  // what cannot be looked at is an error where it is written
      Check<FileError>(!fs::exists(result, ignored),
                       "{}: no checkpoint to resume from, although the run has written {}",
                       (folder_ / "checkpoints").string(), result.string());
    }
    Message("the run was stopped before its first checkpoint and begins again");
    return;
  }
  std::map<std::string, Tensor> parameters, state, averages;
  for (const auto& [name, tensor] : checkpoint->tensors) {
    auto& target = name.rfind("optimizer.", 0) == 0 ? state
                   : name.rfind("ema.", 0) == 0     ? averages
                                                    : parameters;
    target[name] = tensor;
  }
  try {
    SetValuesByName(optimizer_->parameters(), parameters);
    SetValuesByName(optimizer_->state(), state);
    SetValuesByName(ema_ ? std::span(ema_->state()) : std::span<const ParameterPtr>(), averages);
    auto streams =
        ParseJson(checkpoint->metadata.at("streams")).get<std::map<std::string, uint64_t>>();
    batches_.SetState(streams);
    if (class_batches_) {
      std::map<std::string, uint64_t> of_class;
      for (const auto& [name, position] : streams) {
        if (name.starts_with(kClassStream)) of_class[name.substr(kClassStream.size())] = position;
      }
      class_batches_->SetState(of_class);
    }
    recent_losses_ = ParseJson(checkpoint->metadata.at("recent_losses")).get<std::vector<double>>();
    int threads = std::stoi(checkpoint->metadata.at("threads"));
    if (threads != Threads()) {
      Message(
          fmt::format("the checkpoint was made with {} threads, this run has {}: results can "
                      "differ in the last bits",
                      threads, Threads()));
    }
  } catch (const ValueError& e) {
    Fail<FileError>("{}: the checkpoint does not fit the run: {}", folder_.string(), e.what());
  } catch (const std::logic_error& e) {  // a missing key, a bad number
    Fail<FileError>("{}: the checkpoint is not one of this program: {}", folder_.string(),
                    e.what());
  } catch (const nlohmann::json::exception& e) {
    Fail<FileError>("{}: the checkpoint is not one of this program: {}", folder_.string(),
                    e.what());
  }
  step_ = first_step_ = checkpoint->step;
}

void Trainer::OpenMetrics() {
  fs::path path = folder_ / "metrics.jsonl";
  std::string kept;
  if (first_step_ > 0) {
    // Lines behind the checkpoint come again.
    for (const auto& [step, line] : MetricsLines(path)) {
      if (step <= first_step_) kept += line;
    }
  }
  WriteFile(path, kept, Durability::kRenamed);
  metrics_ = std::fopen(path.c_str(), "a");
  Check<FileError>(metrics_ != nullptr, "{}: cannot be written", path.string());
}

void Trainer::Compile() {
  const int64_t batches = options_.gradient_accumulation_steps;
  model_.unet().EnableGradientCheckpointing(options_.gradient_checkpointing);
  const int64_t prior = class_batches_ ? options_.train_batch_size : 0;
  const int64_t rows = options_.train_batch_size + prior;
  TrainingGraphOptions options{.inputs = inputs_,
                               .snr_gamma = options_.snr_gamma,
                               .input_noise = options_.input_perturbation > 0,
                               .prior_rows = prior,
                               .prior_loss_weight = options_.prior_loss_weight,
                               .mask = data_.masked()};
  if (batches > 1) sums_ = GradientSums(*optimizer_);
  auto compile = [&](ComputationGraph graph) {
    auto runner = std::make_unique<GraphRunner>(std::move(graph), backend_);
    compile_seconds_ += runner->compile_seconds();
    return runner;
  };
  if (batches == 1) {
    step_runner_ =
        compile(TrainingStepGraph(model_, schedule_, rows, *optimizer_, ema_.get(), options));
  } else {
    gradient_runner_ =
        compile(GradientSumGraph(model_, schedule_, rows, *optimizer_, sums_, batches, options));
    ComputationGraph step;
    ExportStepFromSums(step, *optimizer_, ema_.get(), sums_);
    step_runner_ = compile(std::move(step));
  }
  const GraphRunner& batch = gradient_runner_ ? *gradient_runner_ : *step_runner_;
  Message(fmt::format("values and gradients of a batch take {:.1f} MB",
                      static_cast<double>(batch.value_bytes()) * 1e-6));
}

std::vector<Tensor> Trainer::NextBatch() {
  std::vector<Tensor> inputs = InputsOf(batches_.Next());
  if (!class_batches_) return inputs;
  std::vector<Tensor> of_class = InputsOf(class_batches_->Next());
  for (size_t i = 0; i < of_class.size(); ++i)  // pictures of the class have no mask
    inputs[i] = StackRows(std::array{inputs[i], of_class[i]});
  return inputs;
}

std::map<std::string, uint64_t> Trainer::Streams() const {
  std::map<std::string, uint64_t> streams = batches_.State();
  if (!class_batches_) return streams;
  for (const auto& [name, position] : class_batches_->State())
    streams[std::string(kClassStream) + name] = position;
  return streams;
}

Trainer::StepResult Trainer::Step() {
  if (!step_runner_) Compile();
  double rate = rate_.At(step_);
  std::vector<Tensor> updates = optimizer_->Inputs(step_ + 1, rate);
  if (ema_) {
    for (Tensor& input : ema_->Inputs(step_ + 1)) updates.push_back(std::move(input));
  }
  if (!gradient_runner_) {
    std::vector<Tensor> inputs = NextBatch();
    inputs.insert(inputs.end(), updates.begin(), updates.end());
    std::vector<Tensor> outputs = step_runner_->Run(inputs);
    return {outputs[0].Item(), outputs[1].Item(), rate};
  }
  double loss = 0;
  for (int64_t i = 0; i < options_.gradient_accumulation_steps; ++i)
    loss += gradient_runner_->Run(NextBatch())[0].Item();
  double norm = step_runner_->Run(updates)[0].Item();
  return {loss / static_cast<double>(options_.gradient_accumulation_steps), norm, rate};
}

std::string Trainer::LastCheckpoint() const {
  std::vector<int64_t> steps = ListCheckpoints(folder_ / "checkpoints");
  return steps.empty() ? "there is no checkpoint yet"
                       : fmt::format("the checkpoint of step {} is kept", steps.back());
}

double Trainer::MeanLoss() const {
  double sum = 0;
  for (double loss : recent_losses_) sum += loss;
  return recent_losses_.empty() ? 0 : sum / static_cast<double>(recent_losses_.size());
}

std::string ValidationLosses::ToString() const {
  std::string noise = noise_loss ? fmt::format(", of the noise {:.4f}", *noise_loss) : "";
  return fmt::format("validation loss {:.4f}{}", loss, noise);
}

TrainResult Trainer::Run() {
  auto start = std::chrono::steady_clock::now();
  auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  auto due = [&](int64_t interval) {
    return interval > 0 && step_ % interval == 0 && step_ < options_.max_train_steps;
  };
  TrainResult result;
  auto line = [&](const ordered_json& record) {
    std::string text = JsonText(record) + "\n";
    Check<FileError>(std::fputs(text.c_str(), metrics_) >= 0 && std::fflush(metrics_) == 0,
                     "{}: cannot be written", (folder_ / "metrics.jsonl").string());
  };
  auto validate = [&] {
    if (batches_.validation_captions() == 0) return;
    result.validation = Validate();
    ordered_json record = {{"step", step_}, {"validation_loss", result.validation->loss}};
    if (result.validation->noise_loss)
      record["validation_noise_loss"] = *result.validation->noise_loss;
    line(record);
    Message(fmt::format("step {}: {}", step_, result.validation->ToString()));
  };

  while (step_ < options_.max_train_steps) {
    if (callbacks_.cancelled && callbacks_.cancelled()) {
      WriteState();
      WriteModel();
      Fail<CancelledError>(
          "training stopped at step {} of {}; the checkpoint is in {}, --resume continues", step_,
          options_.max_train_steps, folder_.string());
    }
    StepResult step = Step();
    Check<NumericError>(std::isfinite(step.loss) && std::isfinite(step.gradient_norm),
                        "training: {} at step {} is not finite; stopped before it changed the "
                        "weights, {}. A lower learning rate than {} may help",
                        std::isfinite(step.loss) ? "the gradient" : "the loss", step_ + 1,
                        LastCheckpoint(), step.learning_rate);
    ++step_;
    recent_losses_.push_back(step.loss);
    if (recent_losses_.size() > kMeanSteps) recent_losses_.erase(recent_losses_.begin());
    line({{"step", step_},
          {"loss", step.loss},
          {"learning_rate", step.learning_rate},
          {"gradient_norm", step.gradient_norm},
          {"seconds", seconds()}});
    if (callbacks_.progress) {
      callbacks_.progress({step_, options_.max_train_steps, step.loss, MeanLoss(),
                           step.learning_rate, step.gradient_norm, seconds()});
    }
    if (due(options_.checkpointing_steps)) {
      WriteState();
      WriteModel();
    }
    if (due(options_.validation_steps)) validate();
    if (due(options_.sample_steps)) WriteSamples();
  }
  validate();
  if (options_.sample_steps > 0) WriteSamples();
  WriteState();
  WriteModel();
  result.steps = step_;
  result.final_loss = MeanLoss();
  result.seconds = seconds();
  result.compile_seconds = compile_seconds_ + (sampler_ ? sampler_->compile_seconds() : 0);
  return result;
}

ValidationLosses Trainer::Validate() {
  AveragedWeights averaged(ema_.get());
  double loss = 0, noise_loss = 0, count = 0;
  for (const Batch& batch : batches_.ValidationBatches()) {
    int64_t size = batch.images.shape()[0];
    auto& runner = validation_[size];
    if (!runner) {
      runner = std::make_unique<GraphRunner>(LossGraph(model_, schedule_, size, inputs_), backend_);
      compile_seconds_ += runner->compile_seconds();
    }
    std::vector<Tensor> outputs = runner->Run(InputsOf(batch));
    loss += outputs[0].Item() * static_cast<double>(size);
    noise_loss += outputs.size() > 1 ? outputs[1].Item() * static_cast<double>(size) : NAN;
    count += static_cast<double>(size);
  }
  ValidationLosses losses{.loss = loss / count, .noise_loss = std::nullopt};
  if (!std::isnan(noise_loss)) losses.noise_loss = noise_loss / count;
  return losses;
}

void Trainer::WriteState() {
  Checkpoint checkpoint;
  checkpoint.step = step_;
  for (auto& [name, value] : ValuesByName(optimizer_->parameters()))
    checkpoint.tensors[name] = value;
  for (auto& [name, value] : ValuesByName(optimizer_->state())) checkpoint.tensors[name] = value;
  if (ema_) {
    for (auto& [name, value] : ValuesByName(ema_->state())) checkpoint.tensors[name] = value;
  }
  checkpoint.metadata["streams"] = JsonText(nlohmann::json(Streams()));
  checkpoint.metadata["recent_losses"] = JsonText(nlohmann::json(recent_losses_));
  checkpoint.metadata["threads"] = std::to_string(Threads());
  WriteCheckpoint(folder_ / "checkpoints", checkpoint,
                  static_cast<int>(options_.checkpoints_total_limit));
}

void Trainer::WriteModel() {
  AveragedWeights averaged(ema_.get());
  if (target_.save) {
    target_.save(folder_);
  } else {
    model_.Save(folder_);
  }
}

void Trainer::WriteSamples() {
  if (!sampler_) sampler_ = std::make_unique<TextToImagePipeline>(model_, backend_);
  AveragedWeights averaged(ema_.get());
  GenerateOptions options;
  options.steps = std::min(kSampleSteps, schedule_.size());
  int64_t count = options_.validation_prompt.empty() ? std::min(kSamples, data_.size()) : kSamples;
  for (int64_t i = 0; i < count; ++i) {
    options.prompts.push_back(options_.validation_prompt.empty()
                                  ? data_.caption(i * data_.size() / count)
                                  : options_.validation_prompt);
    options.seeds.push_back(options_.seed + static_cast<uint64_t>(i));
  }
  std::vector<Image> pictures = TensorToImages(sampler_->Generate(options));
  std::string text;
  for (size_t i = 0; i < pictures.size(); ++i)
    text += GenerationParameters(model_, options, i) + "\n";
  std::vector<PngText> chunks{{"parameters", text}};
  MakeFolder(folder_ / "samples");
  WritePng(folder_ / "samples" / fmt::format("step-{:08}.png", step_), ImageGrid(pictures, 4),
           chunks);
}

}  // namespace calotype
