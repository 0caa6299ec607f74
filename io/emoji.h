// Emoji as captioned pictures: the colour glyphs of a bitmap font (Noto Color Emoji), shaped by
// HarfBuzz and drawn by FreeType, with the names of Unicode's emoji-test.txt. Writes a folder in
// the ImageFolder convention: about 1,870 real pairs (3,650 with skin tones) on any Debian machine.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace calotype {

struct EmojiOptions {
  std::filesystem::path font = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf";
  std::filesystem::path names = "/usr/share/unicode/emoji/emoji-test.txt";
  int size = 32;            // width and height of the pictures, in [8, 512]
  bool skin_tones = false;  // also the sequences with a skin tone modifier
};

// A fully-qualified line of emoji-test.txt.
struct EmojiName {
  std::vector<uint32_t> code_points;
  std::string name;  // CLDR short name in lower case, UTF-8
};

struct EmojiReport {
  int64_t written = 0;
  std::vector<std::string> skipped;  // names for which the font has no single glyph
};

// The fully-qualified emoji in the order of the file. Errors: FileError naming file and line.
std::vector<EmojiName> ReadEmojiNames(const std::filesystem::path& path, bool skin_tones);

// Writes `folder`/1f600.png, ... (code points in hexadecimal, joined by "-") and metadata.jsonl;
// makes the folder. Each glyph is centred on a white square of its longer side and resized with
// antialias. `progress`, if set, is called with (done, total) and may return false to cancel.
// Errors: ValueError for the size; FileError (the text names the Debian package if font or names
// are missing); CancelledError.
EmojiReport WriteEmojiFolder(const std::filesystem::path& folder, const EmojiOptions& options,
                             const std::function<bool(int64_t, int64_t)>& progress = {});

}  // namespace calotype
