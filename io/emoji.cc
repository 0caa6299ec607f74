#include "io/emoji.h"

#include <ft2build.h>
#include <hb.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <string_view>
#include <system_error>
#include FT_FREETYPE_H

#include "core/error.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/image.h"
#include "io/image_folder.h"
#include "io/png.h"

namespace calotype {

namespace {

bool IsSkinTone(uint32_t code_point) { return code_point >= 0x1f3fb && code_point <= 0x1f3ff; }

// ASCII and Latin-1 letters, which is all that the names have in upper case.
std::string LowerCase(std::string_view text) {
  std::string result(text);
  for (size_t i = 0; i < result.size(); ++i) {
    unsigned char c = static_cast<unsigned char>(result[i]);
    bool latin = i > 0 && static_cast<unsigned char>(result[i - 1]) == 0xc3 && c >= 0x80 &&
                 c <= 0x9e && c != 0x97;
    if ((c >= 'A' && c <= 'Z') || latin) result[i] = static_cast<char>(c + 0x20);
  }
  return result;
}

std::string_view Trim(std::string_view text) {
  size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

// One font in both libraries; both read the same copy of the file in memory.
class EmojiFont {
 public:
  explicit EmojiFont(const std::filesystem::path& path);
  ~EmojiFont();
  EmojiFont(const EmojiFont&) = delete;
  EmojiFont& operator=(const EmojiFont&) = delete;

  // The picture of a sequence on a white square; nothing unless it is one glyph of the font.
  std::optional<Image> Draw(const std::vector<uint32_t>& code_points) const;

 private:
  void Release();
  std::optional<uint32_t> GlyphOf(const std::vector<uint32_t>& code_points) const;

  std::string name_, bytes_;
  FT_Library library_ = nullptr;
  FT_Face face_ = nullptr;
  hb_blob_t* blob_ = nullptr;
  hb_face_t* shaping_face_ = nullptr;
  hb_font_t* shaping_font_ = nullptr;
};

EmojiFont::EmojiFont(const std::filesystem::path& path) : name_(path.string()) {
  std::error_code error;
  Check<FileError>(std::filesystem::exists(path, error),
                   "{}: font is missing; install the Debian package fonts-noto-color-emoji", name_);
  bytes_ = ReadFile(path, 256 << 20);
  bool opened = FT_Init_FreeType(&library_) == 0 &&
                FT_New_Memory_Face(library_, reinterpret_cast<const FT_Byte*>(bytes_.data()),
                                   static_cast<FT_Long>(bytes_.size()), 0, &face_) == 0;
  bool bitmaps = opened && FT_HAS_COLOR(face_) && face_->num_fixed_sizes > 0;
  if (bitmaps) {
    // The largest strike.
    int best = 0;
    for (int i = 1; i < face_->num_fixed_sizes; ++i) {
      if (face_->available_sizes[i].y_ppem > face_->available_sizes[best].y_ppem) best = i;
    }
    bitmaps = FT_Select_Size(face_, best) == 0;
  }
  if (!bitmaps) {
    Release();
    Fail<FileError>(
        "{}: {}", name_,
        opened ? "not a font of colour bitmaps (CBDT)" : "not a font that FreeType reads");
  }
  blob_ = hb_blob_create(bytes_.data(), static_cast<unsigned>(bytes_.size()),
                         HB_MEMORY_MODE_READONLY, nullptr, nullptr);
  shaping_face_ = hb_face_create(blob_, 0);
  shaping_font_ = hb_font_create(shaping_face_);
}

EmojiFont::~EmojiFont() { Release(); }

void EmojiFont::Release() {
  hb_font_destroy(shaping_font_);
  hb_face_destroy(shaping_face_);
  hb_blob_destroy(blob_);
  if (face_) FT_Done_Face(face_);
  if (library_) FT_Done_FreeType(library_);
}

std::optional<uint32_t> EmojiFont::GlyphOf(const std::vector<uint32_t>& code_points) const {
  std::unique_ptr<hb_buffer_t, decltype(&hb_buffer_destroy)> buffer(hb_buffer_create(),
                                                                    hb_buffer_destroy);
  hb_buffer_add_utf32(buffer.get(), code_points.data(), static_cast<int>(code_points.size()), 0,
                      -1);
  hb_buffer_set_direction(buffer.get(), HB_DIRECTION_LTR);
  hb_buffer_set_script(buffer.get(), HB_SCRIPT_COMMON);
  // Variation selectors have no glyph of their own and must not count.
  hb_buffer_set_flags(buffer.get(), HB_BUFFER_FLAG_REMOVE_DEFAULT_IGNORABLES);
  hb_shape(shaping_font_, buffer.get(), nullptr, 0);
  unsigned count = 0;
  const hb_glyph_info_t* glyphs = hb_buffer_get_glyph_infos(buffer.get(), &count);
  if (count != 1 || glyphs[0].codepoint == 0) return {};
  return glyphs[0].codepoint;
}

std::optional<Image> EmojiFont::Draw(const std::vector<uint32_t>& code_points) const {
  std::optional<uint32_t> glyph = GlyphOf(code_points);
  if (!glyph) return {};
  int error = FT_Load_Glyph(face_, *glyph, FT_LOAD_COLOR);
  Check<FileError>(error == 0, "{}: glyph {} cannot be drawn: FreeType error {}", name_, *glyph,
                   error);
  const FT_Bitmap& bitmap = face_->glyph->bitmap;
  // An empty or monochrome glyph is no picture of an emoji.
  if (bitmap.pixel_mode != FT_PIXEL_MODE_BGRA || bitmap.width == 0 || bitmap.rows == 0) return {};
  int width = static_cast<int>(bitmap.width), height = static_cast<int>(bitmap.rows);
  int side = std::max(width, height), left = (side - width) / 2, top = (side - height) / 2;
  Image image{side, side, std::vector<uint8_t>(size_t{3} * side * side, 255)};
  for (int y = 0; y < height; ++y) {
    const uint8_t* from = bitmap.buffer + static_cast<ptrdiff_t>(y) * bitmap.pitch;
    uint8_t* to = image.rgb.data() + size_t{3} * ((top + y) * side + left);
    for (int x = 0; x < width; ++x, from += 4, to += 3) {
      // Blue, green, red, alpha; colours are already multiplied by alpha.
      for (int c = 0; c < 3; ++c) {
        to[c] = static_cast<uint8_t>(std::min(255, from[2 - c] + 255 - from[3]));
      }
    }
  }
  return image;
}

}  // namespace

std::vector<EmojiName> ReadEmojiNames(const std::filesystem::path& path, bool skin_tones) {
  std::error_code missing;
  Check<FileError>(std::filesystem::exists(path, missing),
                   "{}: list of emoji is missing; install the Debian package unicode-data",
                   path.string());
  std::string text = ReadFile(path, 64 << 20);
  std::vector<EmojiName> result;
  std::string_view rest = text;
  for (int64_t number = 1; !rest.empty(); ++number) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    std::string_view data = Trim(line.substr(0, line.find('#')));
    if (data.empty()) continue;
    auto check = [&](bool good, const char* what) {
      Check<FileError>(good, "{}:{}: {}: {}", path.string(), number, what, Quoted(line));
    };
    // "1F44B 1F3FB ; fully-qualified # <emoji> E1.0 waving hand: light skin tone"
    size_t semicolon = data.find(';');
    check(semicolon != std::string_view::npos, "no status");
    if (Trim(data.substr(semicolon + 1)) != "fully-qualified") continue;
    EmojiName emoji;
    std::string_view codes = Trim(data.substr(0, semicolon));
    while (!codes.empty()) {
      uint32_t code = 0;
      auto [end, error] = std::from_chars(codes.data(), codes.data() + codes.size(), code, 16);
      check(error == std::errc() && code <= 0x10ffff, "bad code point");
      emoji.code_points.push_back(code);
      codes = codes.substr(static_cast<size_t>(end - codes.data()));
      check(codes.empty() || codes[0] == ' ', "bad code point");
      codes = Trim(codes);
    }
    check(!emoji.code_points.empty() && emoji.code_points.size() <= 32, "no code points");
    std::string_view comment =
        line.substr(line.find('#') == std::string_view::npos ? line.size() : line.find('#') + 1);
    size_t version = comment.find(" E");
    check(version != std::string_view::npos, "no version before the name");
    std::string_view name = comment.substr(version + 2);
    name = Trim(name.substr(std::min(name.size(), name.find(' '))));
    check(!name.empty() && IsUtf8(name), "no name");
    emoji.name = LowerCase(name);
    bool toned = std::any_of(emoji.code_points.begin(), emoji.code_points.end(), IsSkinTone);
    if (skin_tones || !toned) result.push_back(std::move(emoji));
  }
  Check<FileError>(!result.empty(), "{}: no fully-qualified emoji", path.string());
  return result;
}

EmojiReport WriteEmojiFolder(const std::filesystem::path& folder, const EmojiOptions& options,
                             const std::function<bool(int64_t, int64_t)>& progress) {
  Check(options.size >= 8 && options.size <= 512, "emoji: size {} is not in [8, 512]",
        options.size);
  std::vector<EmojiName> names = ReadEmojiNames(options.names, options.skin_tones);
  EmojiFont font(options.font);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  EmojiReport report;
  std::string metadata;
  int64_t done = 0;
  for (const EmojiName& emoji : names) {
    std::optional<Image> image = font.Draw(emoji.code_points);
    if (image) {
      std::string file_name;
      for (uint32_t code : emoji.code_points) {
        file_name += fmt::format("{}{:x}", file_name.empty() ? "" : "-", code);
      }
      file_name += ".png";
      WritePng(folder / file_name, Resize(*image, options.size, options.size));
      metadata += ImageFolderLine(file_name, emoji.name);
      ++report.written;
    } else {
      report.skipped.push_back(emoji.name);
    }
    ++done;
    bool go_on = !progress || progress(done, static_cast<int64_t>(names.size()));
    Check<CancelledError>(go_on, "emoji: cancelled after {} of {}", done, names.size());
  }
  Check<FileError>(report.written > 0, "{}: the font has none of the {} emoji",
                   options.font.string(), names.size());
  // Last, so that a folder with this file is complete.
  WriteFile(folder / "metadata.jsonl", metadata);
  return report;
}

}  // namespace calotype
