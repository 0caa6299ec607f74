// A data set from a folder in the ImageFolder convention: pictures and a file `metadata.jsonl` with
// one JSON object a line, {"file_name": "a.png", "text": "its caption"}, where `text` may also be a
// list of captions (other fields are ignored).
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "io/dataset.h"
#include "io/image.h"

namespace calotype {

class ImageFolder : public Dataset {
 public:
  struct Options {
    int side = 64;
    bool center_crop = false;  // else each draw of a picture that is not square cuts another part
    bool random_flip = false;  // each draw is mirrored with probability 1/2
    // Not empty: the caption of every picture. The pictures are then all .png, .jpg and .jpeg files
    // of the folder, by name, and metadata.jsonl is not read.
    std::string caption = "";
  };
  // Reads all pictures now: PNG or JPEG, the short side resized to `side`, kept in memory at 8 bits
  // a channel. A picture that is missing, damaged or longer than 32 times its short side is
  // reported to `warn` and left out. Errors:
  // ValueError for a side outside [1, 4096]; FileError naming the file (and line) if the folder or
  // metadata.jsonl is missing, a line is not such an object, a file_name leads out of the folder
  // (absolute, "..", or through a link), or no picture is usable.
  ImageFolder(const std::filesystem::path& folder, const Options& options,
              const WarningCallback& warn);

  int64_t size() const override { return static_cast<int64_t>(entries_.size()); }
  int side() const override { return options_.side; }
  std::string caption(int64_t index) const override { return At(index).captions[0]; }
  std::vector<std::string> captions(int64_t index) const override { return At(index).captions; }
  bool varies(int64_t index) const override;
  // Draws two numbers, for the part and for the mirror.
  Tensor image(int64_t index, Random& random) const override;

  // The file_name of a picture, and how many pictures were left out.
  const std::string& file_name(int64_t index) const { return At(index).file_name; }
  int64_t skipped() const { return skipped_; }

 private:
  struct Entry {
    std::string file_name;
    std::vector<std::string> captions;
    Image image;  // the short side resized; square with center_crop
  };
  const Entry& At(int64_t index) const;
  // The steps of the constructor: captions and paths from metadata.jsonl, then the pictures.
  void ReadList(const std::filesystem::path& folder, const std::filesystem::path& root,
                std::vector<std::filesystem::path>& paths);
  void ReadPictures(const std::filesystem::path& folder,
                    const std::vector<std::filesystem::path>& paths, const WarningCallback& warn);

  Options options_;
  int64_t skipped_ = 0;
  std::vector<Entry> entries_;
};

// The .png, .jpg and .jpeg files of a folder (not of those in it, no hidden ones), by name. Errors:
// FileError.
std::vector<std::filesystem::path> PicturesIn(const std::filesystem::path& folder);

// A line of metadata.jsonl, with the newline.
std::string ImageFolderLine(std::string_view file_name, std::string_view text);

}  // namespace calotype
