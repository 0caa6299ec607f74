// Pictures: PNG in and out, conversion to tensors, grids, resampling.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/random.h"
#include "io/file.h"
#include "io/image.h"
#include "io/jpeg.h"
#include "io/png.h"
#include "io/resample.h"
#include "tests/expect_error.h"
#include "tests/png_builder.h"
#include "tests/random_image.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

using test::BuildPng;
using test::PngChunk;
using test::PngSpec;
using test::RandomImage;
using test::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;

// What the picture of `spec` looks like, from the PNG specification and our rules (scaled to 8
// bits, then on white).
Image Expected(const PngSpec& spec) {
  Image image{spec.width, spec.height, {}};
  double maximum = (1 << spec.depth) - 1;
  auto scaled = [&](int v) { return static_cast<int>(std::lround(v * 255.0 / maximum)); };
  auto field = [&](size_t i) {
    return static_cast<uint8_t>(spec.transparency[2 * i]) << 8 |
           static_cast<uint8_t>(spec.transparency[2 * i + 1]);
  };
  for (int i = 0; i < spec.width * spec.height; ++i) {
    const uint16_t* s = &spec.samples[i * spec.Channels()];
    int color[3], alpha = 255;
    for (int c = 0; c < 3; ++c) {
      color[c] = spec.color == 3 ? static_cast<uint8_t>(spec.palette[3 * s[0] + c])
                                 : scaled(s[spec.Channels() >= 3 ? c : 0]);
    }
    if (spec.color == 3 && s[0] < spec.transparency.size()) {
      alpha = static_cast<uint8_t>(spec.transparency[s[0]]);
    } else if (spec.color == 0 && !spec.transparency.empty()) {
      alpha = s[0] == field(0) ? 0 : 255;
    } else if (spec.color == 2 && !spec.transparency.empty()) {
      alpha = s[0] == field(0) && s[1] == field(1) && s[2] == field(2) ? 0 : 255;
    } else if (spec.color >= 4) {
      alpha = scaled(s[spec.Channels() - 1]);
    }
    for (int v : color) {
      image.rgb.push_back(
          static_cast<uint8_t>(std::lround((v * alpha + 255.0 * (255 - alpha)) / 255)));
    }
  }
  return image;
}

TEST(Png, EveryKind) {
  Random random(5, "png kinds");
  int kinds = 0;
  for (int color : {0, 2, 3, 4, 6}) {
    for (int depth : {1, 2, 4, 8, 16}) {
      if ((color == 3 && depth == 16) || (color != 0 && color != 3 && depth < 8)) continue;
      for (bool interlaced : {false, true}) {
        for (bool transparency : {false, true}) {
          if (transparency && color >= 4) continue;
          for (auto [width, height] : {std::pair{1, 1}, {13, 9}, {3, 11}}) {
            PngSpec spec{width, height, depth, color, interlaced, {}, {}, {}, {}, {}};
            int entries = color == 3 ? std::min(1 << depth, 50) : 1 << depth;
            for (int i = 0; i < width * height * spec.Channels(); ++i) {
              spec.samples.push_back(static_cast<uint16_t>(random.Integer(entries)));
            }
            for (int i = 0; color == 3 && i < 3 * entries; ++i) {
              spec.palette += static_cast<char>(random.Next());
            }
            for (int c = 0; transparency && color != 3 && c < spec.Channels(); ++c) {
              spec.transparency += static_cast<char>(spec.samples[c] >> 8);
              spec.transparency += static_cast<char>(spec.samples[c]);
            }
            for (int i = 0; transparency && color == 3 && i < entries - 1; ++i) {
              spec.transparency += static_cast<char>(random.Next());
            }
            EXPECT_EQ(DecodePng(BuildPng(spec), "x"), Expected(spec))
                << "color " << color << " depth " << depth << " interlaced " << interlaced
                << " transparency " << transparency << ' ' << width << 'x' << height;
            ++kinds;
          }
        }
      }
    }
  }
  EXPECT_EQ(kinds, (5 * 2 * 2 + 2 * 2 * 2 + 4 * 2 * 2 + 2 * 2 + 2 * 2) * 3);
}

TEST(Png, RoundTripWithTexts) {
  TempFolder folder;
  Random random(6, "png round trip");
  std::vector<PngText> texts = {
      {"parameters", "a red circle\nNegative prompt: none\nSteps: 25, Sampler: DDIM, Seed: 7"},
      {"Latin", "caf\xc3\xa9 \xc2\xb1"},
      {"Unicode", "\xe2\x82\xac \xf0\x9f\x98\x80"},
      {"Empty", ""},
      {"Long", std::string(100'000, 'x')}};
  for (auto [width, height] : {std::pair{1, 1}, {17, 5}, {64, 64}}) {
    Image image = RandomImage(width, height, random);
    WritePng(folder / "a.png", image, texts);
    std::vector<PngText> back;
    EXPECT_EQ(ReadPng(folder / "a.png", &back), image);
    EXPECT_EQ(back, texts);
    EXPECT_EQ(ReadFile(folder / "a.png"), EncodePng(image, texts));
  }
  EXPECT_EQ(folder.Entries(), 1);
  // A text that is Latin-1 is stored as such in tEXt, others as UTF-8 in iTXt.
  std::string bytes = ReadFile(folder / "a.png");
  EXPECT_THAT(bytes, HasSubstr(PngChunk("tEXt", std::string("Latin\0caf\xe9 \xb1", 12))));
  EXPECT_THAT(bytes,
              HasSubstr(PngChunk(
                  "iTXt", std::string("Unicode\0\0\0\0\0\xe2\x82\xac \xf0\x9f\x98\x80", 20))));
}

TEST(Png, TextsAreFoundBehindThePixelsToo) {
  PngSpec spec{1, 1, 8, 0, false, {7}, {}, {}, {}, {}};
  spec.before = PngChunk("tEXt", std::string("a\0b\xe9", 4));
  spec.behind = PngChunk("tEXt", std::string("c\0d", 3));
  std::vector<PngText> texts;
  EXPECT_EQ(DecodePng(BuildPng(spec), "x", &texts).rgb, std::vector<uint8_t>(3, 7));
  EXPECT_EQ(texts, (std::vector<PngText>{{"a", "b\xc3\xa9"}, {"c", "d"}}));
}

TEST(Png, RefusesWhatCannotBeWritten) {
  Image image{1, 1, {1, 2, 3}};
  for (std::string keyword :
       {std::string(), std::string(80, 'k'), std::string(" a"), std::string("a "),
        std::string("a  b"), std::string("caf\xc3\xa9"), std::string("a\n")}) {
    EXPECT_THROW(EncodePng(image, std::vector<PngText>{{keyword, "x"}}), ValueError) << keyword;
  }
  EXPECT_THROW(EncodePng(image, std::vector<PngText>{{"a", "\xff"}}), ValueError);
  EXPECT_THROW(EncodePng(image, std::vector<PngText>{{"a", std::string("b\0c", 3)}}), ValueError);
  EXPECT_THROW(EncodePng(Image{2, 1, {1, 2, 3}}), ValueError);
  EXPECT_THROW(EncodePng(Image{}), ValueError);
  TempFolder folder;
  EXPECT_THROW(WritePng(folder / "no/a.png", image), FileError);
}

TEST(Png, PathsAreCheckedBeforeTheWork) {
  TempFolder folder;
  CheckPngPath(folder / "a.png");
  EXPECT_EQ(folder.Entries(), 0);
  test::WriteText(folder / "old.png", "old");
  CheckPngPath(folder / "old.png");
  EXPECT_EQ(ReadFile(folder / "old.png"), "old");
  EXPECT_THAT(MessageOf<ValueError>([&] { CheckPngPath(folder / "a.JPG"); }), HasSubstr("PNG"));
  EXPECT_THAT(MessageOf<FileError>([&] { CheckPngPath(folder / "no/a.png"); }),
              HasSubstr("No such file"));
}

TEST(Png, DamageIsAFileErrorAndSilent) {
  testing::internal::CaptureStderr();
  testing::internal::CaptureStdout();
  PngSpec spec{5, 4, 8, 2, false, std::vector<uint16_t>(60, 99), {}, {}, {}, {}};
  std::string bytes = BuildPng(spec);
  EXPECT_EQ(DecodePng(bytes, "x").rgb, std::vector<uint8_t>(60, 99));
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_THROW(DecodePng(bytes.substr(0, n), "x"), FileError) << n;
  }
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    EXPECT_THROW(DecodePng(flipped, "x"), FileError) << bit;
  }
  // Damage in optional chunks is no reason to refuse the picture, and brings up warnings in libpng.
  spec.before = PngChunk("gAMA", "123") + PngChunk("sRGB", "\x09") + PngChunk("tIME", "x");
  EXPECT_EQ(DecodePng(BuildPng(spec), "x").rgb, std::vector<uint8_t>(60, 99));
  // Random bytes behind the signature, and random mutations of a file with many chunks.
  Random random(8, "png damage");
  spec.before = PngChunk("tEXt", std::string("a\0b", 3)) + PngChunk("gAMA", test::BigEndian(45455));
  std::string rich = BuildPng(spec);
  int errors = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    std::string mutated = rich;
    for (int64_t n = random.Integer(4) + 1; n > 0; --n) {
      mutated[random.Integer(static_cast<int64_t>(mutated.size()))] =
          static_cast<char>(random.Next());
    }
    try {
      DecodePng(mutated, "x");
    } catch (const FileError&) {
      ++errors;
    }
  }
  EXPECT_GT(errors, 2000);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
}

TEST(Png, LimitsAndMessages) {
  PngSpec spec{1, 1, 8, 2, false, {1, 2, 3}, {}, {}, {}, {}};
  std::string bytes = BuildPng(spec);
  auto sized = [&](uint32_t width, uint32_t height) {
    std::string header =
        test::BigEndian(width) + test::BigEndian(height) + std::string("\x08\x02\0\0\0", 5);
    return bytes.substr(0, 8) + PngChunk("IHDR", header) + bytes.substr(8 + 25);
  };
  EXPECT_EQ(DecodePng(sized(1, 1), "x").rgb, std::vector<uint8_t>({1, 2, 3}));
  EXPECT_THAT(MessageOf<FileError>([&] { DecodePng(sized(16384, 16384), "big.png"); }),
              AllOf(HasSubstr("big.png"), HasSubstr("16384 x 16384 pixels")));
  EXPECT_THAT(MessageOf<FileError>([&] { DecodePng(sized(16385, 1), "x"); }),
              HasSubstr("damaged PNG"));
  EXPECT_THAT(MessageOf<FileError>([&] { DecodePng(sized(0, 1), "x"); }), HasSubstr("damaged PNG"));
  // A chunk that claims more than the file has.
  EXPECT_THAT(MessageOf<FileError>([&] {
                DecodePng(
                    bytes.substr(0, 33) + test::BigEndian(0x7fffffff) + "tEXt" + bytes.substr(33),
                    "x");
              }),
              HasSubstr("the chunk at byte 33 of 80 claims 2147483647 bytes"));
  EXPECT_THAT(MessageOf<FileError>([&] { DecodePng("\xff\xd8\xff\xe0 JFIF", "a.jpg"); }),
              HasSubstr("a.jpg: not a PNG file"));
}

TEST(Image, TensorsAndBack) {
  Image image{256, 1, {}};
  for (int i = 0; i < 256; ++i) {
    for (int c = 0; c < 3; ++c) image.rgb.push_back(static_cast<uint8_t>(i * (c + 1)));
  }
  Tensor x = ImageToTensor(image);
  ASSERT_EQ(x.shape(), Shape({3, 1, 256}));
  EXPECT_EQ(x.data()[0], -1);
  EXPECT_EQ(x.data()[255], 1);
  EXPECT_FLOAT_EQ(x.data()[256 + 7], 14 / 127.5f - 1);  // green of pixel 7
  EXPECT_EQ(TensorToImage(x), image);
  EXPECT_EQ(TensorToImage(x.Reshape({1, 3, 1, 256})), image);
  // Clamped; rounded to the nearest, to even on ties: (0.5 + x / 2) * 255 is 127.5 at 0.
  Tensor edges = Tensor::From<float>(
      {3, 1, 2}, std::vector<float>{-INFINITY, INFINITY, -1.1f, 1.1f, 0, .004f});
  EXPECT_EQ(TensorToImage(edges).rgb, (std::vector<uint8_t>{0, 0, 128, 255, 255, 128}));
  edges.data()[3] = NAN;
  EXPECT_THAT(MessageOf<NumericError>([&] { TensorToImage(edges); }),
              HasSubstr("channel 1 at x = 1, y = 0"));
  EXPECT_THROW(TensorToImage(Tensor({1, 4, 4})), ShapeError);
  EXPECT_THROW(TensorToImage(Tensor({2, 3, 4, 4})), ShapeError);
  EXPECT_EQ(TensorToImages(Tensor::Zeros({2, 3, 4, 5})).size(), 2u);
}

TEST(Image, Grid) {
  Image red{2, 1, {255, 0, 0, 255, 0, 0}}, blue{2, 1, {0, 0, 255, 0, 0, 255}};
  Image grid = ImageGrid(std::vector<Image>{red, blue, red}, 2, 1);
  EXPECT_EQ(grid.width, 7);
  EXPECT_EQ(grid.height, 5);
  std::string text;
  for (int i = 0; i < grid.width * grid.height; ++i) {
    const uint8_t* p = &grid.rgb[3 * i];
    text += p[0] && p[1] && p[2] ? '.' : p[0] ? 'r' : 'b';
  }
  EXPECT_EQ(text, "........rr.bb.........rr...........");
  EXPECT_EQ(ImageGrid(std::vector<Image>{red}, 8, 0), red);
  EXPECT_THROW(ImageGrid({}, 2), ValueError);
  EXPECT_THROW(ImageGrid(std::vector<Image>{red, Image{1, 1, {0, 0, 0}}}, 2), ValueError);
}

// The green channel (c = 1) of the pattern, resized by
// torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False) of
// PyTorch 2.15 in double.
TEST(Image, ResizeEqualsTorch) {
  struct Case {
    int height, width, new_height, new_width;
    std::vector<double> expected;
  };
  const Case cases[] = {
      {7,
       5,
       4,
       3,
       {119.361, 89.471, 132.531, 103.063, 101.907, 103.189, 159.451, 92.671, 129.429, 149.075,
        121.09, 160.83}},
      {5, 9, 5, 4, {91.486,  103.707, 129.22,  176.229, 139.257, 121.61,  89.512,
                    145.543, 77.314,  64.585,  81.024,  180.686, 125.086, 138.683,
                    166.195, 106.114, 121.657, 87.902,  145.22,  185.143}},
      {3, 2, 5, 7, {59.0,    59.0,  80.643,  109.5,   138.357, 160.0,   160.0, 73.8,    73.8,
                    96.557,  126.9, 157.243, 180.0,   180.0,   96.0,    96.0,  120.429, 153.0,
                    185.571, 210.0, 210.0,   118.2,   118.2,   111.386, 102.3, 93.214,  86.4,
                    86.4,    133.0, 133.0,   105.357, 68.5,    31.643,  4.0,   4.0}},
      {16,
       16,
       3,
       3,
       {115.501, 140.301, 140.903, 142.223, 142.993, 130.623, 143.44, 140.727, 114.846}}};
  for (const Case& c : cases) {
    Image image{c.width, c.height, {}};
    for (int y = 0; y < c.height; ++y) {
      for (int x = 0; x < c.width; ++x) {
        for (int k = 0; k < 3; ++k) {
          image.rgb.push_back(static_cast<uint8_t>((37 * y + 101 * x + 59 * k + 13 * y * x) % 256));
        }
      }
    }
    Image small = Resize(image, c.new_width, c.new_height);
    ASSERT_EQ(small.rgb.size(), 3 * c.expected.size());
    for (size_t i = 0; i < c.expected.size(); ++i) {
      // Rounding, and float32 sums of weights where the exact value is a tie.
      EXPECT_LE(std::abs(small.rgb[3 * i + 1] - c.expected[i]), .5005) << i;
    }
  }
  Image same{3, 2, std::vector<uint8_t>(18, 77)};
  EXPECT_EQ(Resize(same, 3, 2), same);
  EXPECT_EQ(Resize(same, 9, 1).rgb, std::vector<uint8_t>(27, 77));
  EXPECT_THROW(Resize(same, 0, 1), ValueError);
  EXPECT_THROW(Resize(Image{}, 1, 1), ValueError);
}

TEST(Image, ResizeAndCropTakesTheCentre) {
  // Columns 0..9 of brightness 10 x; at size 4 the height of 4 stays, columns 3 to 6 are the
  // centre.
  Image wide{10, 4, {}};
  for (int i = 0; i < 40; ++i)
    wide.rgb.insert(wide.rgb.end(), 3, static_cast<uint8_t>(i % 10 * 10));
  Image square = ResizeAndCrop(wide, 4);
  ASSERT_EQ(square.width, 4);
  ASSERT_EQ(square.height, 4);
  for (int i = 0; i < 16; ++i) EXPECT_EQ(square.rgb[3 * i], (i % 4 + 3) * 10);
  // torchvision: Resize(4) of 10 x 8 gives 5 x 4; the corner is round-half-even(0.5) = 0.
  Image half = Resize(Image{10, 8, std::vector<uint8_t>(240, 9)}, 5, 4);
  Image left{10, 8, {}};
  for (int i = 0; i < 80; ++i)
    left.rgb.insert(left.rgb.end(), 3, static_cast<uint8_t>(i % 10 < 8 ? 0 : 200));
  EXPECT_EQ(half.rgb, std::vector<uint8_t>(60, 9));
  EXPECT_EQ(ResizeAndCrop(left, 4).rgb[3 * 3], Resize(left, 5, 4).rgb[3 * 3]);
  EXPECT_EQ(ResizeAndCrop(Image{1, 3, {0, 0, 0, 50, 50, 50, 0, 0, 0}}, 1).rgb[0], 50);
}

// ---------------------------------------------------------------- JPEG and Pillow's arithmetic
// fixtures/pictures/make.py says how Pillow made the files.

std::filesystem::path PictureFixture(const std::string& name) {
  return std::filesystem::path(CALOTYPE_TEST_DATA) / "fixtures/pictures" / name;
}

TEST(JpegTest, ReadsWhatPillowReads) {
  for (const char* name : {"baseline", "progressive", "gray", "cmyk"}) {
    SCOPED_TRACE(name);
    const Image jpeg = ReadJpeg(PictureFixture(fmt::format("{}.jpg", name)));
    const Image expected = ReadPng(PictureFixture(fmt::format("{}.png", name)));
    ASSERT_EQ(jpeg.width, 37);
    ASSERT_EQ(jpeg.height, 29);
    EXPECT_EQ(jpeg, expected);
    EXPECT_EQ(ReadPicture(PictureFixture(fmt::format("{}.jpg", name))), expected);
  }
  EXPECT_EQ(ReadPicture(PictureFixture("source.png")), ReadPng(PictureFixture("source.png")));
}

TEST(JpegTest, ArePutUpright) {
  for (int orientation = 2; orientation <= 8; ++orientation) {
    const Image image = ReadJpeg(PictureFixture(fmt::format("turned-{}.jpg", orientation)));
    EXPECT_EQ(image, ReadPng(PictureFixture(fmt::format("turned-{}.png", orientation))))
        << orientation;
    EXPECT_EQ(image.width, orientation < 5 ? 21 : 13);
  }
}

TEST(JpegTest, DamagedFilesAreErrors) {
  TempFolder folder;
  for (const char* name : {"baseline.jpg", "progressive.jpg", "cmyk.jpg", "turned-6.jpg"}) {
    const std::string bytes = ReadFile(PictureFixture(name));
    // Every prefix lacks something, down to the marker of the end.
    for (size_t size = 0; size < bytes.size(); ++size) {
      SCOPED_TRACE(fmt::format("{} cut to {} bytes", name, size));
      EXPECT_THAT(MessageOf<FileError>([&] { DecodeJpeg(bytes.substr(0, size), "a.jpg"); }),
                  HasSubstr("a.jpg"));
    }
    // Changed bytes give an error or a picture of the size that the header says; never more.
    Random random(1);
    for (int i = 0; i < 400; ++i) {
      std::string damaged = bytes;
      damaged[static_cast<size_t>(random.Integer(static_cast<int64_t>(bytes.size())))] =
          static_cast<char>(random.Integer(256));
      try {
        CheckImage(DecodeJpeg(damaged, "a.jpg"), "damaged");
      } catch (const FileError&) {
      }
    }
  }
  folder.Write("text.jpg", "no picture");
  EXPECT_THAT(MessageOf<FileError>([&] { ReadPicture(folder / "text.jpg"); }),
              AllOf(HasSubstr("text.jpg"), HasSubstr("neither")));
  EXPECT_THAT(MessageOf<FileError>([&] { ReadJpeg(PictureFixture("source.png")); }),
              HasSubstr("not a JPEG"));
  // 65,500 x 65,500 pixels in the header: no memory is taken for them.
  std::string huge = ReadFile(PictureFixture("baseline.jpg"));
  const size_t frame = huge.find("\xff\xc0");
  ASSERT_NE(frame, huge.npos);
  for (size_t k : {5, 7}) huge[frame + k] = '\xff', huge[frame + k + 1] = '\xdc';
  EXPECT_THAT(MessageOf<FileError>([&] { DecodeJpeg(huge, "a.jpg"); }), HasSubstr("65500"));
}

TEST(ResampleTest, LanczosIsPillowsToTheByte) {
  const Image noise = ReadPng(PictureFixture("noise.png"));
  for (auto [width, height] : {std::pair{64, 40},
                               {16, 23},
                               {31, 7},
                               {5, 3},
                               // Along y first; on both sides of the limit.
                               {40, 15},
                               {28, 16},
                               {28, 17}}) {
    EXPECT_EQ(ResizeLanczos(noise, width, height),
              ReadPng(PictureFixture(fmt::format("noise-{}x{}.png", width, height))))
        << width << " x " << height;
  }
  EXPECT_EQ(ResizeLanczos(noise, noise.width, noise.height), noise);
  EXPECT_THROW(ResizeLanczos(noise, 0, 3), ValueError);
}

TEST(ResampleTest, LuminanceIsPillows) {
  const Image gray = ReadPng(PictureFixture("luminance.png"));
  const std::vector<uint8_t> values = Luminance(ReadPng(PictureFixture("source.png")));
  ASSERT_EQ(values.size() * 3, gray.rgb.size());
  for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], gray.rgb[3 * i]) << i;
}

}  // namespace
}  // namespace calotype
