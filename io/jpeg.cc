#include "io/jpeg.h"

#include <csetjmp>
#include <cstdio>
// Needs <cstdio>.
#include <jpeglib.h>
// Needs <jpeglib.h>.
#include <jerror.h>

#include "core/error.h"
#include "io/file.h"
#include "io/png.h"

namespace calotype {
namespace {

constexpr int kMostScans = 200;  // a small file can ask for endless work

// libjpeg leaves by longjmp on errors. Decoder's functions that call it after setjmp hold only
// trivial objects.
struct ErrorManager {
  jpeg_error_mgr base;
  std::jmp_buf leave;
  char text[JMSG_LENGTH_MAX] = "unknown error";
};

[[noreturn]] void Leave(j_common_ptr info) {
  auto* errors = reinterpret_cast<ErrorManager*>(info->err);
  errors->base.format_message(info, errors->text);
  std::longjmp(errors->leave, 1);
}

// Level -1 is a warning: the data is corrupt, and what follows is invented. Stray bytes between two
// markers, which many cameras write, are none.
void OnMessage(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code != JWRN_EXTRANEOUS_DATA) Leave(info);
}

void OnProgress(j_common_ptr info) {
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > kMostScans) {
    auto* errors = reinterpret_cast<ErrorManager*>(info->err);
    std::snprintf(errors->text, sizeof errors->text, "more than %d scans", kMostScans);
    std::longjmp(errors->leave, 1);
  }
}

// The orientation, 1 to 8, that an Exif marker gives; 1 (upright) if it gives none.
int OrientationOf(std::string_view exif) {
  constexpr std::string_view kStart("Exif\0\0", 6);
  if (!exif.starts_with(kStart)) return 1;
  const std::string_view tiff = exif.substr(kStart.size());
  const bool little = tiff.starts_with("II");
  auto number = [&](size_t at, size_t bytes) -> size_t {
    if (at > tiff.size() || tiff.size() - at < bytes) return 0;
    size_t value = 0;
    for (size_t i = 0; i < bytes; ++i) {
      value = value << 8 | static_cast<unsigned char>(tiff[at + (little ? bytes - 1 - i : i)]);
    }
    return value;
  };
  const size_t directory = number(4, 4), entries = number(directory, 2);
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + 12 * i;
    constexpr size_t kOrientation = 0x112, kShort = 3;
    if (number(entry, 2) != kOrientation || number(entry + 2, 2) != kShort) continue;
    const size_t value = number(entry + 8, 2);
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

// The picture that a camera held in this orientation has taken, upright.
Image Upright(const Image& image, int orientation) {
  if (orientation == 1) return image;
  const bool turned = orientation >= 5;
  const int W = image.width, H = image.height;
  Image result{turned ? H : W, turned ? W : H, {}};
  result.rgb.reserve(image.rgb.size());
  const bool mirror = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool flip = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  for (int y = 0; y < result.height; ++y) {
    for (int x = 0; x < result.width; ++x) {
      const int u = turned ? y : x, v = turned ? x : y;
      const int column = mirror ? W - 1 - u : u, row = flip ? H - 1 - v : v;
      const uint8_t* p = &image.rgb[size_t{3} * (size_t{1} * row * W + column)];
      result.rgb.insert(result.rgb.end(), p, p + 3);
    }
  }
  return result;
}

class Decoder {
 public:
  Decoder() {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = Leave;
    errors_.base.emit_message = OnMessage;
    errors_.base.output_message = [](j_common_ptr) {};
    progress_.progress_monitor = OnProgress;
  }
  ~Decoder() { jpeg_destroy_decompress(&info_); }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  bool Header(std::string_view bytes);  // sets the sizes
  bool Start();                         // sets components
  bool Row(uint8_t* row);
  bool Finish();
  const char* error() const { return errors_.text; }
  // Adobe's files hold 255 - ink.
  bool inverted() const { return info_.saw_Adobe_marker; }
  int orientation() const {
    for (const jpeg_marker_struct* m = info_.marker_list; m; m = m->next) {
      const std::string_view data(reinterpret_cast<const char*>(m->data), m->data_length);
      if (m->marker == JPEG_APP0 + 1 && data.starts_with("Exif")) return OrientationOf(data);
    }
    return 1;
  }
  uint32_t width() const { return info_.image_width; }
  uint32_t height() const { return info_.image_height; }
  int components() const { return info_.output_components; }

 private:
  ErrorManager errors_;
  jpeg_progress_mgr progress_{};
  jpeg_decompress_struct info_{};
};

bool Decoder::Header(std::string_view bytes) {
  if (setjmp(errors_.leave)) return false;
  jpeg_create_decompress(&info_);
  info_.progress = &progress_;
  jpeg_mem_src(&info_, reinterpret_cast<const unsigned char*>(bytes.data()),
               static_cast<unsigned long>(bytes.size()));
  jpeg_save_markers(&info_, JPEG_APP0 + 1, 0xffff);
  jpeg_read_header(&info_, TRUE);
  return true;
}

bool Decoder::Start() {
  if (setjmp(errors_.leave)) return false;
  const bool inks = info_.jpeg_color_space == JCS_CMYK || info_.jpeg_color_space == JCS_YCCK;
  info_.out_color_space = inks ? JCS_CMYK : JCS_RGB;
  jpeg_start_decompress(&info_);
  return true;
}

bool Decoder::Row(uint8_t* row) {
  if (setjmp(errors_.leave)) return false;
  JSAMPROW rows[1] = {row};
  return jpeg_read_scanlines(&info_, rows, 1) == 1;
}

bool Decoder::Finish() {
  if (setjmp(errors_.leave)) return false;
  jpeg_finish_decompress(&info_);
  return true;
}

}  // namespace

Image DecodeJpeg(std::string_view bytes, const std::string& name) {
  Check<FileError>(bytes.size() >= 3 && bytes.substr(0, 3) == "\xff\xd8\xff", "{}: not a JPEG file",
                   name);
  Decoder decoder;
  auto check = [&](bool ok) {
    Check<FileError>(ok, "{}: damaged JPEG: {}", name, decoder.error());
  };
  check(decoder.Header(bytes));
  const int orientation = decoder.orientation();  // its bytes are gone after Finish
  const int64_t width = decoder.width(), height = decoder.height();
  Check<FileError>(width >= 1 && height >= 1 && width <= kMaxPngSide && height <= kMaxPngSide &&
                       width * height <= kMaxPngPixels,
                   "{}: {} x {} pixels; at most {} a side and {} in all are read", name, width,
                   height, kMaxPngSide, kMaxPngPixels);
  check(decoder.Start());
  const int components = decoder.components();
  Check<FileError>(components == 3 || components == 4, "{}: a JPEG of {} components", name,
                   components);
  Image image{static_cast<int>(width), static_cast<int>(height), {}};
  image.rgb.resize(static_cast<size_t>(3 * width * height));
  std::vector<uint8_t> row(static_cast<size_t>(components * width));
  uint8_t* to = image.rgb.data();
  for (int64_t y = 0; y < height; ++y) {
    check(decoder.Row(row.data()));
    for (size_t x = 0; x < static_cast<size_t>(width); ++x) {
      const uint8_t* p = &row[x * static_cast<size_t>(components)];
      for (int c = 0; c < 3; ++c) {
        if (components == 3) {
          *to++ = p[c];
        } else {
          // The share of the light that black lets through, less what ink c takes of it.
          const int ink = decoder.inverted() ? 255 - p[c] : p[c];
          const int light = decoder.inverted() ? p[3] : 255 - p[3];
          const int product = ink * light + 128;
          *to++ = static_cast<uint8_t>(light - ((product + (product >> 8)) >> 8));
        }
      }
    }
  }
  check(decoder.Finish());
  return Upright(image, orientation);
}

Image ReadJpeg(const std::filesystem::path& path) {
  return DecodeJpeg(ReadFile(path), path.string());
}

Image ReadPicture(const std::filesystem::path& path) {
  const std::string bytes = ReadFile(path);
  const std::string name = path.string();
  if (bytes.starts_with("\xff\xd8\xff")) return DecodeJpeg(bytes, name);
  Check<FileError>(bytes.starts_with("\x89PNG"), "{}: neither a PNG nor a JPEG picture", name);
  return DecodePng(bytes, name);
}

}  // namespace calotype
