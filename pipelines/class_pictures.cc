#include "pipelines/class_pictures.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>
#include <vector>

#include "io/image.h"
#include "io/image_folder.h"
#include "io/jpeg.h"
#include "io/png.h"
#include "pipelines/text_to_image.h"

namespace calotype {

namespace {

// Drawn together: the parts of the model are read once for as many.
constexpr size_t kTogether = 4;

}  // namespace

void DrawClassPictures(const TrainOptions& options, const TrainCallbacks& callbacks) {
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
  auto pipeline = TextToImagePipeline::Open(options.model, ParseBackend(options.backend));
  const GenerateCallbacks drawing{
      .progress = {}, .cancelled = callbacks.cancelled, .warn = [&](const std::string& text) {
        message("warning: " + text);
      }};
  for (int64_t i = 0; there < options.num_class_images;) {
    GenerateOptions together;
    together.width = together.height = options.resolution;
    std::vector<fs::path> paths;
    const int64_t missing = options.num_class_images - there;
    for (; paths.size() < std::min(kTogether, static_cast<size_t>(missing)); ++i) {
      const fs::path path = folder / fmt::format("class-{:08}.png", i);
      if (fs::exists(path, error)) continue;
      paths.push_back(path);
      together.prompts.push_back(options.class_prompt);
      together.seeds.push_back(options.seed + static_cast<uint64_t>(i));
    }
    std::vector<Image> pictures;
    try {
      pictures = TensorToImages(pipeline->Generate(together, drawing));
    } catch (const CancelledError&) {
      Fail<CancelledError>("stopped after {} of {} pictures of the class; the next call goes on",
                           there, options.num_class_images);
    }
    for (size_t k = 0; k < paths.size(); ++k, ++there) WritePng(paths[k], pictures[k], {});
  }
}

}  // namespace calotype
