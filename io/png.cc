#include "io/png.h"

#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include "core/error.h"
#include "io/atomic_file.h"
#include "io/file.h"

namespace calotype {

namespace {

// libpng leaves by longjmp on errors. Each function below that calls it after setjmp holds only
// trivial objects; everything with a destructor lives in Reader or Writer, outside.
struct Message {
  char text[200] = "unknown error";
};

void OnError(png_structp png, png_const_charp text) {
  auto* message = static_cast<Message*>(png_get_error_ptr(png));
  std::strncpy(message->text, text, sizeof(message->text) - 1);
  png_longjmp(png, 1);
}

void OnWarning(png_structp, png_const_charp) {}

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}
  ~Reader() { png_destroy_read_struct(&png_, &info_, nullptr); }

  bool Header();  // up to the first IDAT; sets width, height
  bool Pixels();  // fills the rows
  const char* error() const { return message_.text; }
  std::vector<PngText> Texts() const;

  uint32_t width = 0, height = 0;
  std::vector<uint8_t> rgba;
  std::vector<png_bytep> rows;

 private:
  static void Read(png_structp png, png_bytep to, size_t size) {
    auto* self = static_cast<Reader*>(png_get_io_ptr(png));
    if (size > self->bytes_.size() - self->position_) png_error(png, "the file ends too early");
    std::memcpy(to, self->bytes_.data() + self->position_, size);
    self->position_ += size;
  }

  std::string_view bytes_;
  size_t position_ = 0;
  Message message_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
};

bool Reader::Header() {
  png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, &message_, OnError, OnWarning);
  info_ = png_ ? png_create_info_struct(png_) : nullptr;
  if (!info_) return false;
  if (setjmp(png_jmpbuf(png_))) return false;
  png_set_read_fn(png_, this, Read);
  png_set_user_limits(png_, kMaxPngSide, kMaxPngSide);
  png_set_chunk_malloc_max(png_, 8 << 20);  // a compressed text or profile may not unpack to more
  png_set_chunk_cache_max(png_, 1000);
  png_read_info(png_, info_);
  width = png_get_image_width(png_, info_);
  height = png_get_image_height(png_, info_);
  return true;
}

bool Reader::Pixels() {
  if (setjmp(png_jmpbuf(png_))) return false;
  png_set_expand(png_);  // palette and 1, 2, 4 bits to 8, transparent colour to alpha
  png_set_scale_16(png_);
  png_set_gray_to_rgb(png_);
  png_set_add_alpha(png_, 255, PNG_FILLER_AFTER);
  png_set_interlace_handling(png_);
  png_read_update_info(png_, info_);
  if (png_get_rowbytes(png_, info_) != size_t{4} * width) png_error(png_, "unexpected row size");
  png_read_image(png_, rows.data());
  png_read_end(png_, info_);  // checks the rest and collects the texts behind the pixels
  return true;
}

// libpng takes memory for the length that a chunk claims before it reads it (up to 2 GiB), so the
// lengths are checked first.
void CheckChunkLengths(std::string_view bytes, const std::string& name) {
  for (size_t at = 8; at < bytes.size();) {
    Check<FileError>(bytes.size() - at >= 12, "{}: damaged PNG: the file ends at byte {}", name,
                     bytes.size());
    auto byte = [&](size_t i) { return uint32_t{static_cast<unsigned char>(bytes[at + i])}; };
    uint32_t length = byte(0) << 24 | byte(1) << 16 | byte(2) << 8 | byte(3);
    Check<FileError>(length <= bytes.size() - at - 12,
                     "{}: damaged PNG: the chunk at byte {} of {} claims {} bytes", name, at,
                     bytes.size(), length);
    if (bytes.substr(at + 4, 4) == "IEND") return;
    at += 12 + size_t{length};
  }
  Fail<FileError>("{}: damaged PNG: the file ends without IEND", name);
}

// UTF-8 of Latin-1 and back; the latter returns false if a character does not fit.
std::string FromLatin1(std::string_view text) {
  std::string result;
  for (unsigned char c : text) {
    if (c < 0x80) {
      result += static_cast<char>(c);
    } else {
      result += static_cast<char>(0xc0 | c >> 6);
      result += static_cast<char>(0x80 | (c & 0x3f));
    }
  }
  return result;
}

bool ToLatin1(std::string_view utf8, std::string* result) {
  for (size_t i = 0; i < utf8.size(); ++i) {
    unsigned char c = static_cast<unsigned char>(utf8[i]);
    if (c >= 0x80) {
      if (c > 0xc3) return false;
      c = static_cast<unsigned char>(c << 6 | (static_cast<unsigned char>(utf8[++i]) & 0x3f));
    }
    // tEXt allows printable Latin-1 and line feeds.
    if ((c < 0x20 && c != '\n') || (c >= 0x7f && c < 0xa0)) return false;
    *result += static_cast<char>(c);
  }
  return true;
}

std::vector<PngText> Reader::Texts() const {
  png_textp chunks = nullptr;
  int count = 0;
  png_get_text(png_, info_, &chunks, &count);
  std::vector<PngText> result;
  for (int i = 0; i < count; ++i) {
    bool international = chunks[i].compression >= PNG_ITXT_COMPRESSION_NONE;
    size_t length = international ? chunks[i].itxt_length : chunks[i].text_length;
    std::string text(chunks[i].text ? chunks[i].text : "", chunks[i].text ? length : 0);
    if (!international) text = FromLatin1(text);
    if (IsUtf8(text)) result.push_back({FromLatin1(chunks[i].key), text});
  }
  return result;
}

class Writer {
 public:
  ~Writer() { png_destroy_write_struct(&png_, &info_); }
  bool Encode(const Image& image);
  const char* error() const { return message_.text; }

  std::vector<png_text> texts;
  std::vector<png_bytep> rows;
  std::string out;

 private:
  static void Write(png_structp png, png_bytep data, size_t size) {
    static_cast<Writer*>(png_get_io_ptr(png))->out.append(reinterpret_cast<char*>(data), size);
  }

  Message message_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
};

bool Writer::Encode(const Image& image) {
  png_ = png_create_write_struct(PNG_LIBPNG_VER_STRING, &message_, OnError, OnWarning);
  info_ = png_ ? png_create_info_struct(png_) : nullptr;
  if (!info_) return false;
  if (setjmp(png_jmpbuf(png_))) return false;
  png_set_write_fn(png_, this, Write, nullptr);
  png_set_IHDR(png_, info_, image.width, image.height, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  if (!texts.empty()) png_set_text(png_, info_, texts.data(), static_cast<int>(texts.size()));
  png_write_info(png_, info_);
  png_write_image(png_, rows.data());
  png_write_end(png_, info_);
  return true;
}

}  // namespace

Image DecodePng(std::string_view bytes, const std::string& name, std::vector<PngText>* texts) {
  Check<FileError>(bytes.starts_with("\x89PNG\r\n\x1a\n"), "{}: not a PNG file", name);
  CheckChunkLengths(bytes, name);
  Reader reader(bytes);
  Check<FileError>(reader.Header(), "{}: damaged PNG: {}", name, reader.error());
  int64_t pixels = int64_t{reader.width} * reader.height;
  Check<FileError>(pixels <= kMaxPngPixels, "{}: {} x {} pixels, more than the limit of {}", name,
                   reader.width, reader.height, kMaxPngPixels);
  reader.rgba.resize(4 * static_cast<size_t>(pixels));
  for (uint32_t y = 0; y < reader.height; ++y) {
    reader.rows.push_back(reader.rgba.data() + size_t{4} * y * reader.width);
  }
  Check<FileError>(reader.Pixels(), "{}: damaged PNG: {}", name, reader.error());
  Image image{static_cast<int>(reader.width), static_cast<int>(reader.height), {}};
  image.rgb.resize(3 * static_cast<size_t>(pixels));
  for (size_t i = 0; i < static_cast<size_t>(pixels); ++i) {
    const uint8_t* from = reader.rgba.data() + 4 * i;
    for (size_t c = 0; c < 3; ++c) {
      int mixed = from[c] * from[3] + 255 * (255 - from[3]);
      image.rgb[3 * i + c] = static_cast<uint8_t>((mixed + 127) / 255);
    }
  }
  if (texts) *texts = reader.Texts();
  return image;
}

Image ReadPng(const std::filesystem::path& path, std::vector<PngText>* texts) {
  return DecodePng(ReadFile(path), path.string(), texts);
}

std::string EncodePng(const Image& image, std::span<const PngText> texts) {
  CheckImage(image, "png");
  Check(image.width <= kMaxPngSide && image.height <= kMaxPngSide &&
            int64_t{image.width} * image.height <= kMaxPngPixels,
        "png: {} x {} is larger than the limit of {} a side and {} pixels", image.width,
        image.height, kMaxPngSide, kMaxPngPixels);
  std::vector<PngText> stored(texts.begin(), texts.end());
  Writer writer;
  for (PngText& text : stored) {
    bool plain = !text.keyword.empty() && text.keyword.size() <= 79 &&
                 text.keyword.front() != ' ' && text.keyword.back() != ' ' &&
                 text.keyword.find("  ") == std::string::npos &&
                 std::all_of(text.keyword.begin(), text.keyword.end(),
                             [](char c) { return c >= 0x20 && c < 0x7f; });
    Check(plain, "png: {} cannot be a keyword", Quoted(text.keyword));
    Check(IsUtf8(text.text) && text.text.find('\0') == std::string::npos,
          "png: the text of {} is not UTF-8 or has a NUL", text.keyword);
    std::string latin;
    bool fits = ToLatin1(text.text, &latin);
    if (fits) text.text = latin;
    png_text chunk{};
    chunk.compression = fits ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE;
    chunk.key = text.keyword.data();
    chunk.text = text.text.data();
    (fits ? chunk.text_length : chunk.itxt_length) = text.text.size();
    writer.texts.push_back(chunk);
  }
  for (int y = 0; y < image.height; ++y) {
    writer.rows.push_back(const_cast<png_bytep>(image.rgb.data()) + size_t{3} * y * image.width);
  }
  Check<InternalError>(writer.Encode(image), "png: cannot encode: {}", writer.error());
  return std::move(writer.out);
}

void CheckPngPath(const std::filesystem::path& path) {
  std::string ending = path.extension().string();
  for (char& c : ending) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  for (const char* other : {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}) {
    Check(ending != other, "{}: pictures are written as PNG: choose a name that ends in .png",
          path.string());
  }
  AtomicFile probe(path, Durability::kRenamed);
}

void WritePng(const std::filesystem::path& path, const Image& image,
              std::span<const PngText> texts) {
  WriteFile(path, EncodePng(image, texts), Durability::kRenamed);
}

}  // namespace calotype
