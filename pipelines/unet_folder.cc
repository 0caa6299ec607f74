#include "pipelines/unet_folder.h"

#include "core/error.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/safetensors.h"

namespace calotype {

namespace fs = std::filesystem;

UNet2DConditionConfig ReadUNetConfig(const fs::path& path) {
  std::string text = ReadFile(path, 1 << 20);
  try {
    return UNet2DConditionConfig::FromJson(text);
  } catch (const UnsupportedError& e) {
    Fail<UnsupportedError>("{}: {}", path.string(), e.what());
  } catch (const ValueError& e) {
    Fail("{}: {}", path.string(), e.what());
  }
}

void LoadWeights(Layer& layer, const fs::path& path) {
  TensorFile file = ReadSafetensors(path);
  try {
    layer.LoadParameters(file.tensors);
  } catch (const ValueError& e) {
    Fail<FileError>("{}: {}", path.string(), e.what());
  }
}

std::unique_ptr<UNet2DConditionModel> LoadUNet(const fs::path& folder) {
  auto unet = std::make_unique<UNet2DConditionModel>(ReadUNetConfig(folder / "config.json"));
  LoadWeights(*unet, folder / "diffusion_pytorch_model.safetensors");
  return unet;
}

void SaveUNet(const fs::path& folder, UNet2DConditionModel& unet) {
  std::error_code error;
  fs::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  WriteSafetensors(folder / "diffusion_pytorch_model.safetensors", {unet.SaveParameters(), {}});
  WriteFile(folder / "config.json", unet.config().ToJson());
}

}  // namespace calotype
