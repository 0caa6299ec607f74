#include "pipelines/convert.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/json.h"
#include "diffusion/noise_schedule.h"
#include "diffusion/scheduler_config.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "models/json_fields.h"
#include "models/original_config.h"
#include "pipelines/model_folder.h"

namespace calotype {

namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxText = 1 << 26;
constexpr const char* kMetadata[] = {"calotype.unet", "calotype.vae", "calotype.text_encoder",
                                     "calotype.scheduler"};

// ---------------------------------------------------------------- the three models

struct Configs : OriginalConfigs {
  SchedulerConfig scheduler;
};

struct Part {
  const char* folder;
  const char* stem;  // of the file with the weights
  std::vector<OriginalKey> keys;
  std::string config;  // the text of config.json
};

std::vector<Part> PartsOf(const Configs& configs) {
  return {
      {"unet", "diffusion_pytorch_model", OriginalUNetKeys(configs.unet), configs.unet.ToJson()},
      {"vae", "diffusion_pytorch_model", OriginalVaeKeys(configs.vae), configs.vae.ToJson()},
      {"text_encoder", "model", OriginalTextKeys(configs.text_encoder, configs.layout),
       configs.text_encoder.ToJson()}};
}

std::string Counted(const Part& part) {
  size_t tensors = 0;
  int64_t elements = 0;
  for (const OriginalKey& key : part.keys) {
    tensors += key.parts.size();
    for (const auto& p : key.parts) elements += p.shape.elements();
  }
  return fmt::format("{}: {} tensors, {} numbers", part.folder, tensors, elements);
}

std::string Join(const auto& names) { return fmt::format("{}", fmt::join(names, ", ")); }

// ---------------------------------------------------------------- from a file

// Tensors that such files have beside the models' and that a folder has no place for.
constexpr std::array kScheduleConstants{"betas",
                                        "alphas_cumprod",
                                        "alphas_cumprod_prev",
                                        "sqrt_alphas_cumprod",
                                        "sqrt_one_minus_alphas_cumprod",
                                        "log_one_minus_alphas_cumprod",
                                        "sqrt_recip_alphas_cumprod",
                                        "sqrt_recipm1_alphas_cumprod",
                                        "posterior_variance",
                                        "posterior_log_variance_clipped",
                                        "posterior_mean_coef1",
                                        "posterior_mean_coef2",
                                        "lvlb_weights",
                                        "logvar"};
constexpr std::array kOpenClipRest{"text_projection", "logit_scale", "attn_mask"};

// Why a tensor that no model has may be left out; empty if it may not.
std::string Reason(const std::string& name, const Configs& configs) {
  if (name.starts_with("model_ema.")) return "averaged weights (model_ema)";
  if (std::ranges::find(kScheduleConstants, name) != kScheduleConstants.end()) {
    return "constants of the noise schedule";
  }
  if (name == std::string(kOriginalText) + "text_model.embeddings.position_ids") {
    return "position_ids";
  }
  if (configs.layout != TextLayout::kOpenClip || !name.starts_with(kOriginalOpenClip)) return "";
  std::string rest = name.substr(kOriginalOpenClip.size());
  if (std::ranges::find(kOpenClipRest, rest) != kOpenClipRest.end()) {
    return "OpenCLIP's projection and constants";
  }
  const std::string last =
      fmt::format("transformer.resblocks.{}.", configs.text_encoder.num_hidden_layers);
  return rest.starts_with(last) ? "the last layer of OpenCLIP, which SD 2.x does not use" : "";
}

SchedulerConfig DefaultScheduler(const Configs& configs, const std::string& prediction_type) {
  const bool v2 = configs.layout == TextLayout::kOpenClip;
  Check(!v2 || !prediction_type.empty(),
        "a file of Stable Diffusion 2.x does not say what the U-Net predicts: give "
        "--prediction-type (v_prediction for 768-pixel models, epsilon for the base model), or "
        "--config");
  SchedulerConfig s;
  s.type = v2 ? "DDIMScheduler" : "PNDMScheduler";
  s.beta_schedule = "scaled_linear";
  s.beta_start = 0.00085;
  s.beta_end = 0.012;
  s.set_alpha_to_one = false;
  s.steps_offset = 1;
  s.skip_prk_steps = true;
  s.clip_sample = false;
  s.prediction_type = prediction_type.empty() ? "epsilon" : prediction_type;
  return s;
}

// Errors: FileError unless the folder of --config has one of the parts that are read from it.
void CheckConfigFolder(const fs::path& folder) {
  if (folder.empty()) return;
  std::error_code ignored;
  Check<FileError>(fs::is_directory(folder, ignored), "{}: not a folder", folder.string());
  constexpr std::array kParts{"unet/config.json", "vae/config.json", "text_encoder/config.json",
                              "scheduler/scheduler_config.json", "tokenizer"};
  Check<FileError>(
      std::ranges::any_of(kParts, [&](auto part) { return fs::exists(folder / part, ignored); }),
      "{}: not a model folder: it has none of {}", folder.string(), fmt::join(kParts, ", "));
}

// The configurations for a file, from the best source for each.
Configs ConfigsFor(const ConvertOptions& options, const TensorFileHeader& header) {
  Configs configs;
  std::map<std::string, Shape> shapes;
  for (const TensorEntry& entry : header.entries) shapes[entry.name] = entry.shape;
  // Always, since it also says what kind of file it is.
  static_cast<OriginalConfigs&>(configs) =
      InFile(options.in, [&] { return DeriveOriginalConfigs(shapes); });
  auto read = [&](const char* folder, const char* name, const char* metadata, const auto& parse) {
    fs::path path = options.config / folder / name;
    if (!options.config.empty() && fs::exists(path)) {
      std::string text = ReadFile(path, kMaxText);
      return InFile(path, [&] { parse(text); }), true;
    }
    auto found = header.metadata.find(metadata);
    if (found == header.metadata.end()) return false;
    return InFile(options.in, [&] { parse(found->second); }), true;
  };
  const bool unet = read("unet", "config.json", kMetadata[0], [&](const std::string& text) {
    configs.unet = UNet2DConditionConfig::FromJson(text);
  });
  const bool vae = read("vae", "config.json", kMetadata[1], [&](const std::string& text) {
    configs.vae = AutoencoderKLConfig::FromJson(text);
  });
  read("text_encoder", "config.json", kMetadata[2],
       [&](const std::string& text) { configs.text_encoder = CLIPTextConfig::FromJson(text); });
  const bool scheduler =
      read("scheduler", "scheduler_config.json", kMetadata[3],
           [&](const std::string& text) { configs.scheduler = ParseSchedulerConfig(text); });
  if (!scheduler) configs.scheduler = DefaultScheduler(configs, options.prediction_type);
  if (!options.prediction_type.empty()) configs.scheduler.prediction_type = options.prediction_type;
  Validate(configs.scheduler);
  // The models of 2.x that predict the velocity are those for 768 pixels.
  if (configs.layout == TextLayout::kOpenClip &&
      configs.scheduler.prediction_type == "v_prediction") {
    if (!unet) configs.unet.sample_size = 96;
    if (!vae) configs.vae.sample_size = 768;
  }
  return configs;
}

// Errors: FileError if the file's own noise schedule is another than that of the scheduler.
void CheckSchedule(const fs::path& path, const SchedulerConfig& scheduler) {
  TensorFile file = ReadSafetensors(
      path, [](const TensorEntry& entry) { return entry.name == "alphas_cumprod"; });
  if (file.tensors.empty()) return;
  Tensor stored = file.tensors.begin()->second;
  if (stored.dtype() == DType::kF64) stored = stored.To(DType::kF32);
  // A half-precision number is rounded: by half a unit in the last of its 11 or 8 bits, which is
  // largest, relative to the number, just above a power of two.
  double rounding = 0;
  if (auto found = file.formats.find("alphas_cumprod"); found != file.formats.end()) {
    rounding = found->second == FloatFormat::kF16    ? 0x1p-11
               : found->second == FloatFormat::kBF16 ? 0x1p-8
                                                     : 0;
  }
  const NoiseSchedule schedule(scheduler);
  std::span<const float> expected = schedule.alphas_cumprod();
  bool same =
      stored.dtype() == DType::kF32 && stored.elements() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) {
    const double exact = expected[i], tolerance = 1e-3 * exact + 1e-5;
    same = std::abs(stored.data()[i] - exact) <= tolerance + rounding * (exact + tolerance);
  }
  Check<FileError>(same,
                   "{}: tensor alphas_cumprod is not the noise schedule of the scheduler's "
                   "configuration ({}, {} to {}); give the right one with --config",
                   path.string(), scheduler.beta_schedule, scheduler.beta_start,
                   scheduler.beta_end);
}

// Errors: FileError listing all that is missing, of a wrong shape or unknown. Returns lines about
// what is left out.
std::vector<std::string> MatchTensors(const ConvertOptions& options, const TensorFileHeader& header,
                                      const Configs& configs, const std::vector<Part>& parts) {
  std::map<std::string, const TensorEntry*> entries;
  for (const TensorEntry& entry : header.entries) entries[entry.name] = &entry;
  std::vector<std::string> missing, wrong, format, unknown, lines;
  for (const Part& part : parts) {
    for (const OriginalKey& key : part.keys) {
      auto node = entries.extract(key.original);
      if (!node) {
        missing.push_back(key.original);
        continue;
      }
      const TensorEntry& entry = *node.mapped();
      if (entry.shape != key.OriginalShape()) {
        wrong.push_back(fmt::format("{} is {}{}, expected {}", entry.name, entry.dtype, entry.shape,
                                    key.OriginalShape()));
      } else if (entry.dtype != "F32" && entry.dtype != "F16" && entry.dtype != "BF16") {
        format.push_back(fmt::format("{} is {}{}, expected F32, F16 or BF16", entry.name,
                                     entry.dtype, entry.shape));
      }
    }
  }
  std::map<std::string, int> left_out;
  for (const auto& [name, entry] : entries) {
    std::string reason = Reason(name, configs);
    if (reason.empty()) {
      unknown.push_back(name);
    } else {
      ++left_out[reason];
    }
  }
  if (options.allow_unmatched && !unknown.empty()) {
    lines.push_back(fmt::format("left out: {} unknown tensors: {}", unknown.size(), Join(unknown)));
    unknown.clear();
  }
  std::string problems;
  for (auto [what, names] :
       {std::pair("missing", &missing), std::pair("of a wrong shape", &wrong),
        std::pair("of a wrong dtype", &format), std::pair("unknown", &unknown)}) {
    if (names->empty()) continue;
    problems +=
        fmt::format("{}{} {}: {}", problems.empty() ? "" : "; ", names->size(), what, Join(*names));
  }
  Check<FileError>(problems.empty(), "{}: the tensors do not fit the model ({}){}",
                   options.in.string(), problems,
                   unknown.empty() ? "" : "; --allow-unmatched leaves the unknown ones out");
  for (const auto& [reason, count] : left_out) {
    lines.push_back(fmt::format("left out: {} tensors, {}", count, reason));
  }
  return lines;
}

// A tensor's parts are stored as it was; what is made of several as they were, if alike.
std::map<std::string, FloatFormat> FormatsOf(const std::vector<OriginalKey>& keys,
                                             const std::map<std::string, FloatFormat>& formats,
                                             bool to_original) {
  auto of = [&](const std::string& name) {
    auto found = formats.find(name);
    return found == formats.end() ? FloatFormat::kF32 : found->second;
  };
  std::map<std::string, FloatFormat> result;
  for (const OriginalKey& key : keys) {
    if (!to_original) {
      for (const auto& part : key.parts) result[part.name] = of(key.original);
      continue;
    }
    const FloatFormat first = of(key.parts[0].name);
    const bool alike =
        std::ranges::all_of(key.parts, [&](const auto& part) { return of(part.name) == first; });
    result[key.original] = alike ? first : FloatFormat::kF32;
  }
  return result;
}

void WritePart(const fs::path& folder, const Part& part, TensorFile tensors) {
  fs::create_directories(folder);
  WriteSafetensors(folder / fmt::format("{}.safetensors", part.stem), tensors);
  WriteFile(folder / "config.json", part.config);
}

// The files of the tokenizer for a folder; none if the options name none. Errors: those of
// MakeCLIPTokenizer; FileError for more tokens than the text encoder has.
std::map<std::string, std::string> TokenizerFiles(const ConvertOptions& options,
                                                  const Configs& configs) {
  fs::path from = options.tokenizer;
  if (from.empty() && !options.config.empty() && fs::exists(options.config / "tokenizer")) {
    from = options.config / "tokenizer";
  }
  if (from.empty()) return {};
  std::map<std::string, std::string> files = ReadTokenizerFiles(from);
  if (!files.contains("tokenizer_config.json")) {
    const CLIPTokenizerConfig defaults;
    const bool v2 = configs.layout == TextLayout::kOpenClip;
    nlohmann::json config = {{"tokenizer_class", "CLIPTokenizer"},
                             {"model_max_length", configs.text_encoder.max_position_embeddings},
                             {"bos_token", defaults.bos_token},
                             {"eos_token", defaults.eos_token},
                             {"unk_token", defaults.unk_token},
                             {"pad_token", v2 ? "!" : defaults.pad_token},
                             {"do_lower_case", true}};
    files["tokenizer_config.json"] = JsonFile(config);
  }
  const int64_t tokens = MakeCLIPTokenizer(files, from).end_of_ids();
  Check<FileError>(tokens <= configs.text_encoder.vocab_size,
                   "{}: the tokenizer has {} tokens, the text encoder's vocab_size is {}",
                   from.string(), tokens, configs.text_encoder.vocab_size);
  if (fs::exists(from / "tokenizer.json")) {
    files["tokenizer.json"] = ReadFile(from / "tokenizer.json", kMaxText);
  }
  return files;
}

std::vector<std::string> FileToFolder(const ConvertOptions& options) {
  Check<UnsupportedFileError>(
      options.in.extension() == ".safetensors",
      "{}: only .safetensors files are read; pickled ones (.ckpt, .bin) can "
      "run any code when they are loaded",
      options.in.string());
  CheckConfigFolder(options.config);
  const TensorFileHeader header = ReadSafetensorsHeader(options.in);
  const Configs configs = ConfigsFor(options, header);
  std::vector<Part> parts = InFile(options.in, [&] { return PartsOf(configs); });
  std::vector<std::string> lines = MatchTensors(options, header, configs, parts);
  CheckSchedule(options.in, configs.scheduler);
  const std::map<std::string, std::string> tokenizer = TokenizerFiles(options, configs);

  // Made under a name that nobody else has, then renamed.
  const fs::path work =
      options.out.parent_path() /
      fmt::format(".{}.part-{}", options.out.filename().string(), static_cast<int64_t>(getpid()));
  const auto pair = [](auto library, auto name) { return nlohmann::json::array({library, name}); };
  const bool inpaint = configs.unet.in_channels != configs.unet.out_channels;
  nlohmann::json index = {
      {"_class_name", inpaint ? "StableDiffusionInpaintPipeline" : "StableDiffusionPipeline"},
      {"_diffusers_version", kDiffusersVersion},
      {"requires_safety_checker", false}};
  for (const char* absent : {"feature_extractor", "image_encoder", "safety_checker"}) {
    index[absent] = pair(nullptr, nullptr);
  }
  index["scheduler"] = pair("diffusers", configs.scheduler.type);
  index["text_encoder"] = pair("transformers", "CLIPTextModel");
  index["tokenizer"] =
      pair("transformers", tokenizer.empty() ? "CLIPTokenizer" : ClassOfTokenizer(tokenizer));
  index["unet"] = pair("diffusers", "UNet2DConditionModel");
  index["vae"] = pair("diffusers", "AutoencoderKL");
  try {
    fs::create_directories(work / "scheduler");
    if (tokenizer.empty()) {
      lines.push_back("tokenizer: the file has none; put vocab.json and merges.txt into " +
                      (options.out / "tokenizer").string() +
                      ", or convert with --tokenizer or --config");
    } else {
      fs::create_directories(work / "tokenizer");
    }
    for (const auto& [name, text] : tokenizer) WriteFile(work / "tokenizer" / name, text);
    for (const Part& part : parts) {
      std::set<std::string> wanted;
      for (const OriginalKey& key : part.keys) wanted.insert(key.original);
      TensorFile file = ReadSafetensors(
          options.in, [&](const TensorEntry& entry) { return wanted.contains(entry.name); });
      TensorFile result{ToDiffusers(part.keys, file.tensors),
                        {},
                        FormatsOf(part.keys, file.formats, /*to_original=*/false)};
      if (options.dtype) result.SetFormat(*options.dtype);
      WritePart(work / part.folder, part, std::move(result));
      lines.push_back(Counted(part));
    }
    WriteFile(work / "scheduler" / "scheduler_config.json", ToJson(configs.scheduler));
    WriteFile(work / "model_index.json", JsonFile(index));
    fs::rename(work, options.out);
  } catch (const fs::filesystem_error& e) {
    std::error_code ignored;
    fs::remove_all(work, ignored);
    Fail<FileError>("{}: cannot be written: {}", options.out.string(), e.what());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(work, ignored);
    throw;
  }
  return lines;
}

// ---------------------------------------------------------------- from a folder

// The formats under the names that `rename` gives the tensors.
template <class F>
std::map<std::string, FloatFormat> Renamed(const std::map<std::string, FloatFormat>& formats,
                                           const F& rename) {
  std::map<std::string, Tensor> numbers;
  for (const auto& [name, format] : formats) {
    numbers[name] = Tensor::Scalar(static_cast<float>(format));
  }
  std::map<std::string, FloatFormat> result;
  for (const auto& [name, number] : rename(std::move(numbers))) {
    result[name] = static_cast<FloatFormat>(static_cast<int>(number.Item()));
  }
  return result;
}

std::vector<std::string> FolderToFile(const ConvertOptions& options) {
  for (const auto& [given, name] : {std::pair(!options.config.empty(), "config"),
                                    {!options.tokenizer.empty(), "tokenizer"},
                                    {!options.prediction_type.empty(), "prediction-type"},
                                    {options.allow_unmatched, "allow-unmatched"}}) {
    Check(!given, "--{} is for converting a file; {} is a folder", name, options.in.string());
  }
  Check(options.out.extension() == ".safetensors", "{}: a folder becomes a .safetensors file",
        options.out.string());
  Configs configs;
  configs.unet = ReadUNetConfig(options.in / "unet" / "config.json");
  configs.vae = ReadAutoencoderKLConfig(options.in / "vae" / "config.json");
  configs.text_encoder = ReadCLIPTextConfig(options.in / "text_encoder" / "config.json");
  // What tells the text encoders of SD 1.x and 2.x apart: CLIP's approximate GELU.
  configs.layout = configs.text_encoder.hidden_act == "quick_gelu" ? TextLayout::kTransformers
                                                                   : TextLayout::kOpenClip;
  fs::path scheduler = options.in / "scheduler" / "scheduler_config.json";
  std::string scheduler_text = ReadFile(scheduler, kMaxText);
  configs.scheduler = InFile(scheduler, [&] { return ParseSchedulerConfig(scheduler_text); });

  TensorFile file;
  std::vector<std::string> lines;
  std::vector<Part> parts = InFile(options.in, [&] { return PartsOf(configs); });
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    auto current = [&](std::map<std::string, Tensor> tensors) {
      if (i == 1) return AutoencoderKL::CurrentNames(std::move(tensors));
      if (i == 2) return CLIPTextModel::CurrentNames(std::move(tensors));
      return tensors;
    };
    fs::path folder = options.in / part.folder;
    TensorFile read = ReadModelFile(folder, part.stem);
    InFile(folder, [&] {
      std::map<std::string, Tensor> tensors = current(std::move(read.tensors));
      file.tensors.merge(ToOriginal(part.keys, tensors));
      std::vector<std::string> rest;
      for (const auto& [name, tensor] : tensors) rest.push_back(name);
      Check(rest.empty(), "{} tensors are unknown: {}", rest.size(), Join(rest));
    });
    file.formats.merge(FormatsOf(part.keys, Renamed(read.formats, current), /*to_original=*/true));
    file.metadata[kMetadata[i]] = JsonText(ParseJson(part.config));
    lines.push_back(Counted(part));
  }
  std::string text = ToJson(configs.scheduler);
  file.metadata[kMetadata[3]] = text;
  if (options.dtype) file.SetFormat(*options.dtype);
  WriteSafetensors(options.out, file);
  return lines;
}

}  // namespace

std::vector<std::string> ConvertModel(const ConvertOptions& given) {
  ConvertOptions options = given;
  if (options.out.filename().empty()) options.out = options.out.parent_path();  // "folder/"
  std::error_code error;
  Check<FileError>(!fs::exists(options.out, error), "{}: exists already", options.out.string());
  Check<FileError>(fs::exists(options.in, error), "{}: no such file or folder",
                   options.in.string());
  return fs::is_directory(options.in, error) ? FolderToFile(options) : FileToFolder(options);
}

}  // namespace calotype
