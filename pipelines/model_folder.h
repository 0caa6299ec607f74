// Models in the folder layout of diffusers and transformers: config.json beside
// diffusion_pytorch_model.safetensors (U-Net, autoencoder) or model.safetensors (text encoder).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "io/safetensors.h"
#include "models/autoencoder_kl.h"
#include "models/clip_text_model.h"
#include "models/clip_tokenizer.h"
#include "models/unet_2d_condition.h"

namespace calotype {

// Errors of all: FileError for a file that is missing or damaged, whose tensors do not fit the
// config (all problems in one text), or with a wrong field; UnsupportedError naming file and field.
// Weights may be split into shards with an index, or be there in half precision only
// ("*.fp16.safetensors").
std::unique_ptr<UNet2DConditionModel> LoadUNet(const std::filesystem::path& folder);
// Also files of diffusers before 0.17 (AutoencoderKL::CurrentNames).
std::unique_ptr<AutoencoderKL> LoadAutoencoderKL(const std::filesystem::path& folder);
// Also files without the prefix "text_model." (CLIPTextModel::CurrentNames).
std::unique_ptr<CLIPTextModel> LoadCLIPTextModel(const std::filesystem::path& folder);
// vocab.json and merges.txt, or the tokenizer.json that transformers writes from version 5 on; and,
// if they are there, tokenizer_config.json and added_tokens.json. Words that were added to the
// vocabulary, as by textual_inversion.py, follow it in the order of their ids; WORD, WORD_1,
// WORD_2 in a row are, as for diffusers, one word of three vectors.
std::unique_ptr<CLIPTokenizer> LoadCLIPTokenizer(const std::filesystem::path& folder);

// Its files as they are, name -> content, for writing them again.
std::map<std::string, std::string> ReadTokenizerFiles(const std::filesystem::path& folder);
CLIPTokenizer MakeCLIPTokenizer(const std::map<std::string, std::string>& files,
                                const std::filesystem::path& folder);

// What transformers calls it: CLIPTokenizer, or CLIPTokenizerFast if only tokenizer.json is there.
const char* ClassOfTokenizer(const std::map<std::string, std::string>& files);

// Makes the folder if needed; each file is replaced atomically. Half precision is rounded to the
// nearest even (io/half.h). Errors: FileError.
void SaveUNet(const std::filesystem::path& folder, UNet2DConditionModel& unet,
              FloatFormat dtype = FloatFormat::kF32);
void SaveAutoencoderKL(const std::filesystem::path& folder, AutoencoderKL& vae,
                       FloatFormat dtype = FloatFormat::kF32);
void SaveCLIPTextModel(const std::filesystem::path& folder, CLIPTextModel& text_encoder,
                       FloatFormat dtype = FloatFormat::kF32);

// The config in a file. Errors: FileError, and those of the config's FromJson with the path.
UNet2DConditionConfig ReadUNetConfig(const std::filesystem::path& path);
AutoencoderKLConfig ReadAutoencoderKLConfig(const std::filesystem::path& path);
CLIPTextConfig ReadCLIPTextConfig(const std::filesystem::path& path);

enum class Weights : uint8_t {
  kLoad,
  kCheck,  // only the headers of the files are read: whether they would load; changes nothing
};
// The weights of a folder into a model that was made from its config.
void LoadWeightsOf(UNet2DConditionModel& unet, const std::filesystem::path& folder,
                   Weights weights = Weights::kLoad);
void LoadWeightsOf(AutoencoderKL& vae, const std::filesystem::path& folder,
                   Weights weights = Weights::kLoad);
void LoadWeightsOf(CLIPTextModel& text_encoder, const std::filesystem::path& folder,
                   Weights weights = Weights::kLoad);

// The tensors of a model in a folder, without metadata: STEM.safetensors, else the shards that
// STEM.safetensors.index.json lists, else STEM.fp16.safetensors. Errors: FileError naming file and
// tensor.
TensorFile ReadModelFile(const std::filesystem::path& folder, std::string_view stem);

// The tensors of a file into a layer. Errors: FileError naming the file and all that does not fit.
void LoadWeights(Layer& layer, const std::filesystem::path& path, Weights weights = Weights::kLoad);

}  // namespace calotype
