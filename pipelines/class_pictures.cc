#include "pipelines/class_pictures.h"

#include <filesystem>
#include <set>
#include <system_error>

#include "io/image.h"
#include "io/image_folder.h"
#include "io/jpeg.h"
#include "io/png.h"
#include "pipelines/text_to_image.h"

namespace calotype {

void DrawClassPictures(const TrainOptions& options, DiffusionModel& model,
                       const TrainCallbacks& callbacks) {
  namespace fs = std::filesystem;
  if (options.num_class_images == 0) return;
  const fs::path folder = options.class_data;
  std::error_code error;
  fs::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  std::set<std::string> said;  // once, not for each picture
  auto message = [&](const std::string& text) {
    if (callbacks.message && said.insert(text).second) callbacks.message(text);
  };
  int64_t there = 0;
  for (const fs::path& path : PicturesIn(folder)) {
    try {
      ReadPicture(path);
      ++there;
    } catch (const Error& e) {
      message(fmt::format("warning: not counted as a picture of the class: {}", e.what()));
    }
  }
  if (there >= options.num_class_images) return;
  message(fmt::format("drawing {} pictures of \"{}\" into {}", options.num_class_images - there,
                      options.class_prompt, folder.string()));
  TextToImagePipeline pipeline(model, ParseBackend(options.backend));
  const GenerateCallbacks drawing{
      .progress = {}, .cancelled = callbacks.cancelled, .warn = [&](const std::string& text) {
        message("warning: " + text);
      }};
  for (int64_t i = 0; there < options.num_class_images; ++i) {
    const fs::path path = folder / fmt::format("class-{:08}.png", i);
    if (fs::exists(path, error)) continue;
    GenerateOptions picture;
    picture.prompts = {options.class_prompt};
    picture.seeds = {options.seed + static_cast<uint64_t>(i)};
    picture.width = picture.height = options.resolution;
    try {
      WritePng(path, TensorToImage(pipeline.Generate(picture, drawing)), {});
    } catch (const CancelledError&) {
      Fail<CancelledError>("stopped after {} of {} pictures of the class; the next call goes on",
                           there, options.num_class_images);
    }
    ++there;
  }
}

}  // namespace calotype
