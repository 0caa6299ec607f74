// JPEG files through libjpeg-turbo, read only. A damaged file is a FileError; nothing is printed.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "io/image.h"

namespace calotype {

// Decodes a baseline or progressive picture, gray, YCbCr, RGB or CMYK, as Pillow does: accurate
// integer DCT, smooth upsampling of the colours; then turned upright as the camera notes in Exif's
// orientation (Pillow's exif_transpose). Profiles and comments are ignored. Sizes are limited as
// for PNG. Errors: FileError naming the file, also where libjpeg would go on with a warning: data
// that ends early or is corrupt.
Image ReadJpeg(const std::filesystem::path& path);
// The same for a file in memory; `name` stands for the path in messages.
Image DecodeJpeg(std::string_view bytes, const std::string& name);

// PNG or JPEG, whichever the first bytes say. Errors: FileError.
Image ReadPicture(const std::filesystem::path& path);

}  // namespace calotype
