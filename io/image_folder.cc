#include "io/image_folder.h"

#include <algorithm>
#include <cctype>
#include <nlohmann/json.hpp>
#include <system_error>

#include "core/error.h"
#include "core/json.h"
#include "core/parallel.h"
#include "io/file.h"
#include "io/jpeg.h"

namespace calotype {

namespace {

// The long side over the short one: a picture of 16384 x 1 would take 200 MB at a side of 64.
constexpr int kMostLong = 32;

// `where` is "FILE:LINE".
std::string StringField(const nlohmann::json& object, const char* field, const std::string& where) {
  auto it = object.find(field);
  Check<FileError>(it != object.end() && it->is_string(),
                   "{}: no string field \"{}\" (expected {{\"file_name\": ..., \"text\": ...}})",
                   where, field);
  return it->get<std::string>();
}

// The string or the list of strings in "text".
std::vector<std::string> CaptionsOf(const nlohmann::json& object, const std::string& where) {
  auto it = object.find("text");
  if (it == object.end() || !it->is_array()) return {StringField(object, "text", where)};
  std::vector<std::string> captions;
  for (const nlohmann::json& caption : *it) {
    Check<FileError>(caption.is_string(), "{}: the list \"text\" holds {}, expected strings", where,
                     Quoted(JsonText(caption)));
    captions.push_back(caption.get<std::string>());
  }
  Check<FileError>(!captions.empty(), "{}: the list \"text\" is empty", where);
  return captions;
}

// The path of `file_name` in `folder`, which is canonical. A file that does not exist passes:
// reading it fails later. Names are data and must not lead elsewhere, not through links either.
std::filesystem::path Inside(const std::filesystem::path& folder, const std::string& file_name,
                             const std::string& where) {
  Check<FileError>(!file_name.empty() && file_name.find('\0') == std::string::npos,
                   "{}: file_name {} is not a file name", where, Quoted(file_name));
  std::filesystem::path relative(file_name);
  bool plain = !relative.is_absolute() &&
               std::find(relative.begin(), relative.end(), "..") == relative.end();
  Check<FileError>(plain, "{}: file_name {} leads out of the folder", where, Quoted(file_name));
  std::filesystem::path path = folder / relative;
  std::error_code error;
  std::filesystem::path real = std::filesystem::weakly_canonical(path, error);
  Check<FileError>(!error, "{}: file_name {}: {}", where, Quoted(file_name), error.message());
  auto [end, other] = std::mismatch(folder.begin(), folder.end(), real.begin(), real.end());
  Check<FileError>(end == folder.end(), "{}: file_name {} leads out of the folder through a link",
                   where, Quoted(file_name));
  return path;
}

}  // namespace

std::vector<std::filesystem::path> PicturesIn(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> paths;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    std::error_code ignored;  // what cannot be looked at is no file
    if (entry.path().filename().string().starts_with('.') || !entry.is_regular_file(ignored))
      continue;
    std::string end = entry.path().extension().string();
    std::ranges::transform(end, end.begin(), [](unsigned char c) { return std::tolower(c); });
    if (end == ".png" || end == ".jpg" || end == ".jpeg") paths.push_back(entry.path());
  }
  Check<FileError>(!error, "{}: cannot be read: {}", folder.string(), error.message());
  std::ranges::sort(paths);
  return paths;
}

ImageFolder::ImageFolder(const std::filesystem::path& folder, const Options& options,
                         const WarningCallback& warn)
    : options_(options) {
  Check(options.side >= 1 && options.side <= 4096, "image folder: side {} is not in [1, 4096]",
        options.side);
  std::error_code error;
  std::filesystem::path root = std::filesystem::canonical(folder, error);
  Check<FileError>(!error && std::filesystem::is_directory(root, error), "{}: not a folder",
                   folder.string());
  std::vector<std::filesystem::path> paths;
  if (!options.caption.empty()) {
    for (const std::filesystem::path& path : PicturesIn(root)) {
      entries_.push_back({path.filename().string(), {options.caption}, {}});
      paths.push_back(path);
    }
    Check<FileError>(!paths.empty(), "{}: there are no .png, .jpg or .jpeg files", folder.string());
  } else {
    ReadList(folder, root, paths);
  }
  ReadPictures(folder, paths, warn);
}

void ImageFolder::ReadList(const std::filesystem::path& folder, const std::filesystem::path& root,
                           std::vector<std::filesystem::path>& paths) {
  std::error_code error;
  std::filesystem::path list = folder / "metadata.jsonl";
  Check<FileError>(std::filesystem::exists(list, error),
                   "{}: missing; a data folder holds pictures and metadata.jsonl with lines "
                   "{{\"file_name\": \"a.png\", \"text\": \"its caption\"}}",
                   list.string());
  std::string text = ReadFile(list);

  std::string_view rest = text;
  for (int64_t number = 1; !rest.empty(); ++number) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    std::string where = fmt::format("{}:{}", list.string(), number);
    nlohmann::json object = ParseJsonObject(line, where);
    Entry entry{StringField(object, "file_name", where), CaptionsOf(object, where), {}};
    paths.push_back(Inside(root, entry.file_name, where));
    entries_.push_back(std::move(entry));
  }
  Check<FileError>(!entries_.empty(), "{}: no pictures are listed", list.string());
}

void ImageFolder::ReadPictures(const std::filesystem::path& folder,
                               const std::vector<std::filesystem::path>& paths,
                               const WarningCallback& warn) {
  std::vector<std::string> failures(entries_.size());
  ParallelFor(size(), 1, [&](int64_t begin, int64_t) {
    try {
      Image picture = ReadPicture(paths[begin]);
      const auto [near, far] = std::minmax(picture.width, picture.height);
      Check<FileError>(far <= kMostLong * near,
                       "{}: a picture of {} x {}; the long side may be {} times the short one",
                       paths[begin].string(), picture.width, picture.height, kMostLong);
      entries_[begin].image = options_.center_crop ? ResizeAndCrop(picture, options_.side)
                                                   : ResizeShortSide(picture, options_.side);
    } catch (const std::exception& failure) {
      failures[begin] = failure.what();
    }
  });
  size_t kept = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (failures[i].empty()) {
      if (kept != i) entries_[kept] = std::move(entries_[i]);
      ++kept;
    } else {
      ++skipped_;
      if (warn) warn(fmt::format("picture skipped: {}", failures[i]));
    }
  }
  entries_.resize(kept);
  Check<FileError>(kept > 0, "{}: none of the {} pictures is usable", folder.string(), skipped_);
}

const ImageFolder::Entry& ImageFolder::At(int64_t index) const {
  Check(index >= 0 && index < size(), "image folder: picture {} is not in [0, {})", index, size());
  return entries_[static_cast<size_t>(index)];
}

bool ImageFolder::varies(int64_t index) const {
  const Image& image = At(index).image;
  return options_.random_flip || image.width != image.height;
}

Tensor ImageFolder::image(int64_t index, Random& random) const {
  const Image& image = At(index).image;
  const float place = random.Uniform(), mirror = random.Uniform();
  if (!varies(index)) return ImageToTensor(image);
  // One of the two is 0: the short side is `side`.
  int left = static_cast<int>(place * static_cast<float>(image.width - options_.side + 1));
  int top = static_cast<int>(place * static_cast<float>(image.height - options_.side + 1));
  Image part = Crop(image, std::min(left, image.width - options_.side),
                    std::min(top, image.height - options_.side), options_.side, options_.side);
  return ImageToTensor(options_.random_flip && mirror < 0.5f ? FlipHorizontally(part) : part);
}

std::string ImageFolderLine(std::string_view file_name, std::string_view text) {
  Check(IsUtf8(file_name) && IsUtf8(text), "image folder: {} or {} is not UTF-8", Quoted(file_name),
        Quoted(text));
  nlohmann::ordered_json line;
  line["file_name"] = file_name;
  line["text"] = text;
  return JsonText(line) + "\n";
}

}  // namespace calotype
