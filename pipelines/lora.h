// LoRA on a model: merged into its weights, and out of them again bit for bit, or as low-rank terms
// beside its layers, which train and whose weight may change without compiling anew. Hu et al.
// 2021, arXiv:2106.09685.
//
//   LoraModel model{unet, &text_encoder};
//   MergedLora merged = MergeLora(model, {{{LoadLora("style.safetensors"), 0.8}}});
//   ...
//   merged.Unmerge();
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/parameter.h"
#include "layers/lora.h"
#include "pipelines/lora_file.h"

namespace calotype {

class DiffusionModel;

// What LoRAs apply to; in files the paths of the layers follow "unet." and "text_encoder.".
struct LoraModel {
  Layer* unet = nullptr;
  Layer* text_encoder = nullptr;  // null: files with terms for one do not fit
};
// The U-Net and whichever text encoder the model has.
LoraModel LoraModelOf(DiffusionModel& model);

// The layers that take low-rank terms, by their paths as in files.
struct LoraTarget {
  const Layer* part;  // of LoraModel
  std::string path;
  nn::LoRACompatible* layer;
  Shape weight;  // [out, in] or [out, in, k, k]
};
// Errors: ValueError for a model with fused projections (Attention::FuseProjections), which would
// not see a change of those that they replace.
std::vector<LoraTarget> LoraTargets(const LoraModel& model);

// How the modules of a file meet a model's layers.
struct LoraReport {
  int64_t modules = 0, matched = 0;
  std::vector<std::string> unmatched;    // modules without a layer, tensors without a module
  std::vector<std::string> wrong_shape;  // "module: down [..], up [..], weight [..]"
  std::vector<std::string> twice;        // modules whose layer another one has, too
  bool complete() const { return unmatched.empty() && wrong_shape.empty() && twice.empty(); }
  // What did not match, one line for layers that differ in their numbers alone, with their count.
  std::string ToString() const;
};
LoraReport CheckLora(const LoraModel& model, const LoraFile& lora);

struct LoraOptions {
  // Modules without a layer are left out. Otherwise they are an error, as are in any case modules
  // whose shapes do not fit and files of which nothing fits.
  bool allow_unmatched = false;
  // Of MergeLora. only: the part of the model whose weights are changed, if not all are;
  // the files must fit the whole model all the same. keep_originals: false to save the memory, if
  // it will not be undone.
  const Layer* only = nullptr;
  bool keep_originals = true;
};

// The file with its modules named by the model's paths, as SaveLora needs them. Errors of this and
// all below: FileError naming the file, with the report; nothing is changed then.
LoraFile ResolveLora(const LoraModel& model, const LoraFile& lora, const LoraOptions& options = {});
// The paths of Stable Diffusion 1.x and 2.x, for files without a model at hand. (Shapes are not
// looked at.)
LoraFile ResolveLora(const LoraFile& lora);

struct WeightedLora {
  LoraFile file;
  double weight = 1;
};
// "style.safetensors" or "style.safetensors:0.8". Errors: ValueError for a weight that is no finite
// number; those of LoadLora.
WeightedLora LoadWeightedLora(std::string_view file_and_weight);

// Weights with LoRAs merged in.
class MergedLora {
 public:
  MergedLora() = default;
  // Every weight gets the bits back that it had before. Of several merges the last is undone first.
  // Errors: ValueError if a weight is not what the merge made of it, or nothing was kept; nothing
  // is changed then. A second call does nothing.
  void Unmerge();
  // That are merged now.
  size_t weights() const { return weights_; }
  const std::vector<LoraReport>& reports() const { return reports_; }  // one for each file

 private:
  friend MergedLora MergeLora(const LoraModel&, std::span<const WeightedLora>, const LoraOptions&);
  struct Original {
    ParameterPtr parameter;
    Tensor value;
    uint64_t merged;  // hash of the merged value
  };
  bool kept_ = true;
  size_t weights_ = 0;
  std::vector<Original> originals_;
  std::vector<LoraReport> reports_;
};
// W += sum over files of weight alpha / rank up down, summed in float64 and rounded once, so the
// order of the files makes no difference beyond that. Keeps a copy of each weight that changes
// unless told otherwise.
// Errors: see ResolveLora; ValueError for a weight that is not finite.
MergedLora MergeLora(const LoraModel& model, std::span<const WeightedLora> loras,
                     const LoraOptions& options = {});

// ---- low-rank terms beside the layers; `name` tells several apart and appears in the paths of
// their parameters: "unet...attn1.to_q.lora.down.weight". They are part of what
// Layer::SaveParameters gives; detach them before the model itself is written.

constexpr const char* kLoraName = "lora";

// Terms with the values of a file, which count `weight` times. Errors: see ResolveLora.
LoraReport AttachLora(const LoraModel& model, const WeightedLora& lora,
                      const std::string& name = kLoraName, const LoraOptions& options = {});

struct LoraConfig {
  int64_t rank = 4;
  std::optional<double> alpha;  // none: rank
  // Layers of the U-Net that get terms: paths or their ends.
  std::vector<std::string> targets = {"to_q", "to_k", "to_v", "to_out.0"};
  // The same of the text encoder.
  std::vector<std::string> text_encoder_targets = {};
  uint64_t seed = 0;
};
// Fresh terms: down from N(0, 1/rank^2), up 0. Returns how many. Errors: ValueError for a target
// that is the end of no path, or without a target.
int64_t AddLora(const LoraModel& model, const LoraConfig& config,
                const std::string& name = kLoraName);

// Their weight. Compiled code and graphs stay valid. Errors: ValueError if there are no such terms.
void SetLoraWeight(const LoraModel& model, double weight, const std::string& name = kLoraName);
// Removes them; returns how many there were.
int64_t DetachLora(const LoraModel& model, const std::string& name = kLoraName);
// Their parameters, to be trained.
std::vector<ParameterPtr> LoraParameters(const LoraModel& model,
                                         const std::string& name = kLoraName);
// Their values (shared, not copied) as a file's. The weight is not part of it.
LoraFile CollectLora(const LoraModel& model, const std::string& name = kLoraName);

}  // namespace calotype
