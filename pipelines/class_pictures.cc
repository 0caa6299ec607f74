#include "pipelines/class_pictures.h"

#include <filesystem>
#include <system_error>

#include "io/image.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "pipelines/text_to_image.h"

namespace calotype {

void DrawClassPictures(const TrainOptions& options, const TrainCallbacks& callbacks) {
  namespace fs = std::filesystem;
  if (options.num_class_images == 0) return;
  Check(!options.model.empty(), "training: num_class_images has no effect without model");
  const fs::path folder = options.class_data;
  std::error_code error;
  fs::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  auto there = static_cast<int64_t>(PicturesIn(folder).size());
  if (there >= options.num_class_images) return;
  if (callbacks.message) {
    callbacks.message(fmt::format("drawing {} pictures of \"{}\" into {}",
                                  options.num_class_images - there, options.class_prompt,
                                  folder.string()));
  }
  auto pipeline = TextToImagePipeline::Load(options.model, ParseBackend(options.backend));
  for (int64_t i = 0; there < options.num_class_images; ++i) {
    const fs::path path = folder / fmt::format("class-{:08}.png", i);
    if (fs::exists(path, error)) continue;
    if (callbacks.cancelled && callbacks.cancelled()) {
      Fail<CancelledError>("stopped after {} of {} pictures of the class; the next call goes on",
                           there, options.num_class_images);
    }
    GenerateOptions picture;
    picture.prompts = {options.class_prompt};
    picture.seeds = {options.seed + static_cast<uint64_t>(i)};
    picture.width = picture.height = options.resolution;
    WritePng(path, TensorToImage(pipeline->Generate(picture)), {});
    ++there;
  }
}

}  // namespace calotype
