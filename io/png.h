// PNG files through libpng: every kind in, 8-bit RGB out; text chunks both ways. A damaged file is
// a FileError; libpng's warnings are dropped and nothing is printed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/image.h"

namespace calotype {

// A text chunk: keyword of 1 to 79 printable ASCII characters (e.g. "parameters"), text in UTF-8.
struct PngText {
  std::string keyword, text;
  bool operator==(const PngText&) const = default;
};

// Larger pictures are refused before memory is taken.
constexpr int kMaxPngSide = 16384;
constexpr int64_t kMaxPngPixels = int64_t{1} << 25;

// Decodes a picture of 1 to 16 bits, gray, palette or colour, interlaced or not, to 8-bit RGB. 16
// bits are scaled by 255 / 65535; transparency is composited on white in stored values; gamma,
// profiles and further frames are ignored, as Pillow does. Fills *texts with the tEXt, zTXt and
// iTXt chunks. Errors: FileError naming the file.
Image ReadPng(const std::filesystem::path& path, std::vector<PngText>* texts = nullptr);
// The same for a file in memory; `name` stands for the path in messages.
Image DecodePng(std::string_view bytes, const std::string& name,
                std::vector<PngText>* texts = nullptr);

// Encodes as 8-bit RGB; texts as tEXt if Latin-1 suffices, else as iTXt. The bytes depend on the
// arguments alone. Errors: ValueError for a bad picture, keyword or text (not UTF-8, NUL).
std::string EncodePng(const Image& image, std::span<const PngText> texts = {});
// For programs that work for minutes before they write: errors if a PNG cannot be written to
// `path`. Errors: FileError as WritePng; ValueError if the name ends as another picture format's.
void CheckPngPath(const std::filesystem::path& path);
// Written atomically, without waiting for the disk. Errors: as EncodePng; FileError.
void WritePng(const std::filesystem::path& path, const Image& image,
              std::span<const PngText> texts = {});

}  // namespace calotype
