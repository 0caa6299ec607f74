// Writes PNG files of every kind byte by byte (RFC 2083, deflate in stored blocks), independent of
// libpng.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace calotype::test {

inline std::string BigEndian(uint32_t value) {
  return {static_cast<char>(value >> 24), static_cast<char>(value >> 16),
          static_cast<char>(value >> 8), static_cast<char>(value)};
}

inline std::string PngChunk(const std::string& type, const std::string& data) {
  uint32_t crc = ~0u;
  for (unsigned char byte : type + data) {
    crc ^= byte;
    for (int k = 0; k < 8; ++k) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return BigEndian(static_cast<uint32_t>(data.size())) + type + data + BigEndian(~crc);
}

struct PngSpec {
  int width = 0, height = 0, depth = 8;
  int color = 2;  // 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGB and alpha
  bool interlaced = false;
  std::vector<uint16_t> samples;      // row by row, pixel by pixel, channel by channel
  std::string palette, transparency;  // PLTE and tRNS
  std::string before, behind;         // whole chunks around the pixels
  int Channels() const { return color == 2 ? 3 : color == 4 ? 2 : color == 6 ? 4 : 1; }
};

inline std::string BuildPng(const PngSpec& spec) {
  struct Pass {
    int x, y, dx, dy;
  };
  std::vector<Pass> passes = {{0, 0, 1, 1}};
  if (spec.interlaced) {
    passes = {{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4},
              {0, 2, 2, 4}, {1, 0, 2, 2}, {0, 1, 1, 2}};
  }
  std::string raw;
  for (const Pass& pass : passes) {
    if (pass.x >= spec.width) continue;
    for (int y = pass.y; y < spec.height; y += pass.dy) {
      raw += '\0';  // filter: none
      uint32_t bits = 0;
      int count = 0;
      for (int x = pass.x; x < spec.width; x += pass.dx) {
        for (int c = 0; c < spec.Channels(); ++c) {
          bits = bits << spec.depth | spec.samples[(y * spec.width + x) * spec.Channels() + c];
          for (count += spec.depth; count >= 8; count -= 8)
            raw += static_cast<char>(bits >> (count - 8));
        }
      }
      if (count > 0) raw += static_cast<char>(bits << (8 - count));
    }
  }
  std::string zlib = "\x78\x01";
  for (size_t at = 0; at < raw.size(); at += 65535) {
    size_t n = std::min<size_t>(65535, raw.size() - at);
    zlib += static_cast<char>(at + n == raw.size());
    for (size_t field : {n, ~n}) {
      zlib += static_cast<char>(field);
      zlib += static_cast<char>(field >> 8);
    }
    zlib += raw.substr(at, n);
  }
  uint32_t a = 1, b = 0;
  for (unsigned char byte : raw) a = (a + byte) % 65521, b = (b + a) % 65521;
  zlib += BigEndian(b << 16 | a);
  std::string header =
      BigEndian(static_cast<uint32_t>(spec.width)) + BigEndian(static_cast<uint32_t>(spec.height));
  for (int byte : {spec.depth, spec.color, 0, 0, spec.interlaced ? 1 : 0})
    header += static_cast<char>(byte);
  std::string file = "\x89PNG\r\n\x1a\n" + PngChunk("IHDR", header) + spec.before;
  if (!spec.palette.empty()) file += PngChunk("PLTE", spec.palette);
  if (!spec.transparency.empty()) file += PngChunk("tRNS", spec.transparency);
  return file + PngChunk("IDAT", zlib) + spec.behind + PngChunk("IEND", "");
}

}  // namespace calotype::test
