// Data sets: shapes and their classifier, folders of pictures, emoji.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "core/error.h"
#include "core/random.h"
#include "io/emoji.h"
#include "io/image.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "io/shapes.h"
#include "tests/expect_error.h"
#include "tests/random_image.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

using test::RandomImage;
using test::TempFolder;
using test::WriteText;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Shapes, Captions) {
  std::set<std::string> captions;
  for (int i = 0; i < kShapeCaptions; ++i) captions.insert(ShapeCaption(i));
  EXPECT_EQ(captions.size(), 96u);
  EXPECT_EQ(ShapeCaption(0), "a small red circle on a black background");
  EXPECT_TRUE(captions.contains("a large blue cross on a gray background"));
  EXPECT_EQ(ShapeAttributesOf(95), (ShapeAttributes{3, 5, 1, 1}));
  EXPECT_THROW(ShapeCaption(96), ValueError);
  EXPECT_THROW(ShapeCaption(-1), ValueError);
}

// Areas, extents and colours against the formulas of the header.
TEST(Shapes, Geometry) {
  constexpr int kSide = 128;
  for (int i = 0; i < kShapeCaptions; ++i) {
    ShapeAttributes a = ShapeAttributesOf(i);
    Tensor picture = RenderShape(i, 0.03f, -0.05f, kSide);
    double r = a.size ? .42 : .24;
    double areas[] = {M_PI * r * r, 4 * .95 * .95 * r * r, 1.8 * r * r,
                      4 * r * r * (2 * .32 - .32 * .32)};
    double grounds[] = {-1, -.1};
    double colors[6][3] = {{1, .1, .1}, {.1, .8, .1}, {.15, .25, 1},
                           {1, .9, .1}, {.6, .1, .8}, {1, 1, 1}};
    double area = 0, x_sum = 0;
    const float* channel = nullptr;
    double inside = 0, ground = grounds[a.background];
    for (int c = 0; c < 3 && !channel; ++c) {  // a channel in which shape and background differ
      inside = 2 * colors[a.color][c] - 1;
      if (std::abs(inside - ground) > .1) channel = picture.data() + c * kSide * kSide;
    }
    for (int p = 0; p < kSide * kSide; ++p) {
      double cover = (channel[p] - ground) / (inside - ground);
      ASSERT_TRUE(cover > -1e-5 && cover < 1 + 1e-5);
      area += cover / (kSide * kSide);
      x_sum += cover * (p % kSide + .5) / kSide / (kSide * kSide);
    }
    EXPECT_NEAR(area / areas[a.shape], 1, .01) << ShapeCaption(i);
    EXPECT_NEAR(x_sum / area, .53, .002) << ShapeCaption(i);
    for (int c = 0; c < 3; ++c) {
      const float* plane = picture.data() + c * kSide * kSide;
      EXPECT_FLOAT_EQ(plane[0], static_cast<float>(ground));
      int middle = static_cast<int>(.45 * kSide) * kSide + static_cast<int>(.53 * kSide);
      EXPECT_FLOAT_EQ(plane[middle], static_cast<float>(2 * colors[a.color][c] - 1));
    }
  }
}

TEST(Shapes, DatasetJittersAndRepeats) {
  ShapesDataset set;
  Random a(1, "shapes"), b(1, "shapes");
  std::set<std::vector<float>> different;
  for (int i = 0; i < 20; ++i) {
    Tensor x = set.image(40, a), y = set.image(40, b);
    ASSERT_EQ(x.shape(), Shape({3, 16, 16}));
    std::vector<float> values(x.data(), x.data() + x.elements());
    EXPECT_EQ(values, std::vector<float>(y.data(), y.data() + y.elements()));
    different.insert(values);
  }
  EXPECT_GT(different.size(), 15u);
  EXPECT_EQ(a.position(), 40u);
  Tensor batch = set.images(std::vector<int64_t>{3, 95}, a);
  ASSERT_EQ(batch.shape(), Shape({2, 3, 16, 16}));
  Tensor second = set.image(3, b);
  second = set.image(95, b);
  EXPECT_TRUE(std::equal(second.data(), second.data() + 768, std::as_const(batch).data() + 768));
  EXPECT_EQ(set.sample(0, a).caption, ShapeCaption(0));
  EXPECT_THROW(set.image(96, a), ValueError);
}

TEST(Shapes, ClassifierReadsCaptionsBack) {
  ShapesDataset set;
  ShapeClassifier classifier;
  Random random(2, "classifier");
  std::vector<int64_t> captions;
  for (int64_t i = 0; i < kShapeCaptions; ++i) captions.push_back(i);
  Tensor clean = set.images(captions, random);
  CaptionAccuracy all = classifier.Evaluate(clean, captions);
  EXPECT_EQ(all.caption, 1);
  EXPECT_EQ(all.samples, 96);
  Tensor noisy = clean.Clone();
  for (float& v : noisy.values()) v += .2f * random.Normal();
  EXPECT_EQ(classifier.Evaluate(noisy, captions).caption, 1);
  // Captions turned by one shape: only the shape is wrong, everywhere; likewise the other
  // attributes.
  auto turned = [&](int by) {
    std::vector<int64_t> wrong = captions;
    std::rotate(wrong.begin(), wrong.begin() + by, wrong.end());
    return classifier.Evaluate(clean, wrong);
  };
  CaptionAccuracy shape = turned(24);
  EXPECT_EQ(std::make_tuple(shape.caption, shape.shape, shape.color, shape.size, shape.background),
            std::make_tuple(0., 0., 1., 1., 1.));
  for (int64_t& caption : captions) caption ^= 1;
  CaptionAccuracy ground = classifier.Evaluate(clean, captions);
  EXPECT_EQ(
      std::make_tuple(ground.caption, ground.shape, ground.color, ground.size, ground.background),
      std::make_tuple(0., 1., 1., 1., 0.));
  for (int64_t& caption : captions) caption ^= 3;
  CaptionAccuracy size = classifier.Evaluate(clean, captions);
  EXPECT_EQ(std::make_tuple(size.caption, size.shape, size.color, size.size, size.background),
            std::make_tuple(0., 1., 1., 0., 1.));
  // A picture of nothing in particular has some caption; one that is not finite is an error.
  Tensor gray = Tensor::Zeros({3, 16, 16});
  EXPECT_GE(classifier.Classify(gray), 0);
  gray.data()[5] = INFINITY;
  EXPECT_THROW(classifier.Classify(gray), NumericError);
  EXPECT_THROW(classifier.Classify(Tensor({3, 8, 8})), ShapeError);
}

TEST(ImageFolder, LoadsResizesAndSkips) {
  TempFolder folder;
  Random random(3, "folder");
  std::filesystem::create_directory(folder / "sub");
  Image square = RandomImage(8, 8, random), wide = RandomImage(30, 20, random);
  WritePng(folder / "a.png", square);
  WritePng(folder / "sub/b.png", wide);
  WriteText(folder / "broken.png", EncodePng(wide).substr(0, 300));
  WriteText(folder / "photo.jpg", "\xff\xd8\xff\xe0");
  WriteText(folder / "metadata.jsonl",
            ImageFolderLine("a.png", "a \"quoted\" caption") + ImageFolderLine("broken.png", "x") +
                "\n" +
                R"({"text": "caf\u00e9", "extra": [1, {"a": 2}], "file_name": "sub/b.png"})" +
                "\r\n" + ImageFolderLine("photo.jpg", "y") + ImageFolderLine("missing.png", "z") +
                R"({"file_name": "a.png", "text": "again"})");  // no newline at the end
  std::vector<std::string> warnings;
  ImageFolder set(folder.path(), {.side = 8, .center_crop = true},
                  [&](const std::string& text) { warnings.push_back(text); });
  ASSERT_EQ(set.size(), 3);
  EXPECT_EQ(set.side(), 8);
  EXPECT_EQ(set.caption(0), "a \"quoted\" caption");
  EXPECT_EQ(set.caption(1), "caf\xc3\xa9");
  EXPECT_EQ(set.caption(2), "again");
  EXPECT_EQ(set.file_name(1), "sub/b.png");
  EXPECT_EQ(set.skipped(), 3);
  EXPECT_EQ(TensorToImage(set.image(0, random)), square);
  EXPECT_EQ(TensorToImage(set.image(1, random)), ResizeAndCrop(wide, 8));
  ASSERT_EQ(warnings.size(), 3u);
  EXPECT_THAT(warnings[0], AllOf(HasSubstr("broken.png"), HasSubstr("damaged PNG")));
  EXPECT_THAT(warnings[1], AllOf(HasSubstr("photo.jpg"), HasSubstr("JPEG")));
  EXPECT_THAT(warnings[2], AllOf(HasSubstr("missing.png"), HasSubstr("No such file")));
  EXPECT_THROW(set.caption(3), ValueError);
  EXPECT_THROW(ImageFolder(folder.path(), {.side = 0}, {}), ValueError);
}

// Pictures whose colours say where a pixel was: red its column, green its row.
Image Coordinates(int width, int height) {
  Image image{width, height, {}};
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x)
      image.rgb.insert(image.rgb.end(), {static_cast<uint8_t>(x), static_cast<uint8_t>(y), 0});
  }
  return image;
}

// The corner and the direction of a part of such a picture.
struct Part {
  int left, top;
  bool mirrored;
  auto operator<=>(const Part&) const = default;  // NOLINT: clang-tidy 14 sees a null pointer
};
Part PartOf(const Tensor& x, int side) {
  auto byte = [&](int channel, int row, int column) {
    return static_cast<int>(
        std::lround((x.data()[(channel * side + row) * side + column] + 1) * 127.5));
  };
  bool mirrored = byte(0, 0, 0) > byte(0, 0, side - 1);
  int left = mirrored ? byte(0, 0, side - 1) : byte(0, 0, 0), top = byte(1, 0, 0);
  for (int row = 0; row < side; ++row) {
    for (int column = 0; column < side; ++column) {
      EXPECT_EQ(byte(0, row, column), left + (mirrored ? side - 1 - column : column));
      EXPECT_EQ(byte(1, row, column), top + row);
    }
  }
  return {left, top, mirrored};
}

TEST(ImageFolder, CutsAndMirrorsAtRandom) {
  test::TempFolder folder;
  WritePng(folder / "wide.png", Coordinates(12, 8));
  WritePng(folder / "tall.png", Coordinates(8, 10));
  folder.Write("metadata.jsonl",
               ImageFolderLine("wide.png", "w") + ImageFolderLine("tall.png", "t"));
  auto parts = [&](const ImageFolder::Options& options, int64_t picture) {
    ImageFolder set(folder.path(), options, {});
    std::map<Part, int> count;
    Random random(4);
    for (int i = 0; i < 2000; ++i) ++count[PartOf(set.image(picture, random), 8)];
    EXPECT_EQ(random.position(), 4000u);  // two numbers each
    return count;
  };
  // Each of the places as often as the others, within five deviations.
  auto expect_even = [](const std::map<Part, int>& count, size_t places) {
    ASSERT_EQ(count.size(), places);
    double expected = 2000.0 / static_cast<double>(places);
    for (const auto& [part, times] : count)
      EXPECT_NEAR(times, expected, 5 * std::sqrt(expected)) << part.left << " " << part.top;
  };
  EXPECT_THAT(parts({.side = 8, .center_crop = true}, 0),
              testing::ElementsAre(testing::Pair(Part{2, 0, false}, 2000)));
  EXPECT_THAT(parts({.side = 8, .center_crop = true}, 1),
              testing::ElementsAre(testing::Pair(Part{0, 1, false}, 2000)));
  expect_even(parts({.side = 8}, 0), 5);
  expect_even(parts({.side = 8}, 1), 3);
  expect_even(parts({.side = 8, .center_crop = true, .random_flip = true}, 0), 2);
  expect_even(parts({.side = 8, .random_flip = true}, 1), 6);
}

TEST(ImageFolder, ReadsJpegToo) {
  const std::filesystem::path fixtures =
      std::filesystem::path(CALOTYPE_TEST_DATA) / "fixtures/pictures";
  test::TempFolder folder;
  std::filesystem::copy(fixtures / "baseline.jpg", folder / "a.jpg");
  folder.Write("metadata.jsonl", ImageFolderLine("a.jpg", "a"));
  ImageFolder set(folder.path(), {.side = 29, .center_crop = true}, {});
  Random random(1);
  EXPECT_EQ(TensorToImage(set.image(0, random)),
            ResizeAndCrop(ReadPng(fixtures / "baseline.png"), 29));
}

TEST(ImageFolder, LeavesOutStripes) {
  test::TempFolder folder;
  WritePng(folder / "long.png", Coordinates(64, 2));
  WritePng(folder / "longer.png", Coordinates(65, 2));
  WritePng(folder / "tall.png", Coordinates(1, 33));
  folder.Write("metadata.jsonl", ImageFolderLine("long.png", "a") +
                                     ImageFolderLine("longer.png", "b") +
                                     ImageFolderLine("tall.png", "c"));
  for (bool center_crop : {false, true}) {
    std::vector<std::string> warnings;
    ImageFolder set(folder.path(), {.side = 4, .center_crop = center_crop},
                    [&](const std::string& text) { warnings.push_back(text); });
    EXPECT_EQ(set.size(), 1);
    ASSERT_EQ(warnings.size(), 2u);
    EXPECT_THAT(warnings[0], AllOf(HasSubstr("longer.png"), HasSubstr("65 x 2")));
    EXPECT_THAT(warnings[1], AllOf(HasSubstr("tall.png"), HasSubstr("1 x 33")));
  }
}

TEST(ImageFolder, SeveralCaptionsOfAPicture) {
  test::TempFolder folder;
  WritePng(folder / "a.png", Coordinates(4, 4));
  folder.Write("metadata.jsonl", "{\"file_name\": \"a.png\", \"text\": [\"one\", \"two\"]}\n" +
                                     ImageFolderLine("a.png", "three"));
  ImageFolder set(folder.path(), {.side = 4}, {});
  EXPECT_THAT(set.captions(0), testing::ElementsAre("one", "two"));
  EXPECT_EQ(set.caption(0), "one");
  EXPECT_THAT(set.captions(1), testing::ElementsAre("three"));
  for (const char* text : {"[]", "[1]", "7"}) {
    folder.Write("metadata.jsonl",
                 fmt::format("{{\"file_name\": \"a.png\", \"text\": {}}}\n", text));
    EXPECT_THAT(MessageOf<FileError>([&] { ImageFolder(folder.path(), {.side = 4}, {}); }),
                HasSubstr("text"))
        << text;
  }
}

TEST(ImageFolder, BadFolders) {
  TempFolder folder;
  auto open = [&](const std::string& metadata) {
    WriteText(folder / "metadata.jsonl", metadata);
    ImageFolder(folder.path(), {.side = 8}, {});
  };
  auto message = [&](const std::string& metadata) {
    return MessageOf<FileError>([&] { open(metadata); });
  };
  EXPECT_THAT(MessageOf<FileError>([&] { ImageFolder(folder / "none", {.side = 8}, {}); }),
              AllOf(HasSubstr("none"), HasSubstr("not a folder")));
  EXPECT_THAT(MessageOf<FileError>([&] { ImageFolder(folder.path(), {.side = 8}, {}); }),
              HasSubstr("metadata.jsonl: missing"));
  EXPECT_THAT(message(""), HasSubstr("no pictures are listed"));
  EXPECT_THAT(message("\n \r\n"), HasSubstr("no pictures are listed"));
  Random random(4, "bad folders");
  WritePng(folder / "a.png", RandomImage(4, 4, random));
  std::string good = ImageFolderLine("a.png", "a");
  EXPECT_NO_THROW(open(good));
  EXPECT_THAT(message(good + "{\"file_name\":"), HasSubstr("metadata.jsonl:2: not a JSON object"));
  EXPECT_THAT(message(good + "{\"file_name\":"), Not(HasSubstr("line 1")));
  EXPECT_THAT(message(good + good + "[]"), HasSubstr("metadata.jsonl:3: not a JSON object"));
  EXPECT_THAT(message(good + good.substr(0, good.size() - 1) + good),
              HasSubstr(":2: not a JSON object"));
  EXPECT_THAT(message("\"\xff\""), HasSubstr("metadata.jsonl:1: not a JSON object"));
  EXPECT_THAT(message(R"({"text":"a"})"), HasSubstr(":1: no string field \"file_name\""));
  EXPECT_THAT(message(R"({"file_name":"a.png","text":3})"), HasSubstr("no string field \"text\""));
  EXPECT_THAT(message(std::string(200'000, '[') + std::string(200'000, ']')),
              HasSubstr(":1: not a JSON object"));
  EXPECT_THAT(message(ImageFolderLine("b.png", "b")),
              HasSubstr("none of the 1 pictures is usable"));
  // Names do not lead elsewhere.
  for (const char* name : {"../a.png", "sub/../../a.png", "/etc/passwd", ".."}) {
    EXPECT_THAT(message(good + ImageFolderLine(name, "x")), HasSubstr(":2: file_name")) << name;
    EXPECT_THAT(message(good + ImageFolderLine(name, "x")), HasSubstr("out of the folder")) << name;
  }
  EXPECT_THAT(message(R"({"file_name":"","text":"x"})"), HasSubstr("not a file name"));
  EXPECT_THAT(message(R"({"file_name":"a\u0000.png","text":"x"})"), HasSubstr("not a file name"));
  TempFolder outside;
  WritePng(outside / "secret.png", RandomImage(4, 4, random));
  std::filesystem::create_symlink(outside / "secret.png", folder / "link.png");
  std::filesystem::create_directory_symlink(outside.path(), folder / "links");
  EXPECT_THAT(message(ImageFolderLine("link.png", "x")), HasSubstr("through a link"));
  EXPECT_THAT(message(ImageFolderLine("links/secret.png", "x")), HasSubstr("through a link"));
  std::filesystem::create_symlink("a.png", folder / "inside.png");
  EXPECT_NO_THROW(open(ImageFolderLine("inside.png", "x")));
}

TEST(Emoji, ReadsTheListOfNames) {
  TempFolder folder;
  WriteText(folder / "list.txt",
            "# group: Smileys\n\n"
            "1F600 ; fully-qualified     # \xf0\x9f\x98\x80 E1.0 grinning face\n"
            "263A  ; unqualified         # \xe2\x98\xba E0.6 smiling face\n"
            "0023 FE0F 20E3 ; fully-qualified # #\xef\xb8\x8f\xe2\x83\xa3 E0.6 keycap: #\r\n"
            "1F44B 1F3FB ; fully-qualified # x E1.0 waving hand: light skin tone\n"
            "1F1E6 1F1FD ; fully-qualified # x E2.0 flag: \xc3\x85land Islands\n"
            "1F3FB ; component # x E1.0 light skin tone\n");
  auto names = [&](bool tones) {
    std::vector<std::string> result;
    for (const EmojiName& e : ReadEmojiNames(folder / "list.txt", tones)) result.push_back(e.name);
    return result;
  };
  EXPECT_THAT(names(false),
              testing::ElementsAre("grinning face", "keycap: #", "flag: \xc3\xa5land islands"));
  EXPECT_EQ(names(true).size(), 4u);
  EXPECT_EQ(ReadEmojiNames(folder / "list.txt", false)[1].code_points,
            (std::vector<uint32_t>{0x23, 0xfe0f, 0x20e3}));
  for (const char* bad : {"1F600 fully-qualified # x E1.0 a", "XYZ ; fully-qualified # x E1.0 a",
                          "1F600- ; fully-qualified # x E1.0 a", "; fully-qualified # x E1.0 a",
                          "1F600 ; fully-qualified # x a", "1F600 ; fully-qualified # x E1.0",
                          "1F600 ; fully-qualified", "110000 ; fully-qualified # x E1.0 a"}) {
    WriteText(folder / "bad.txt", std::string("# comment\n") + bad);
    EXPECT_THAT(MessageOf<FileError>([&] { ReadEmojiNames(folder / "bad.txt", false); }),
                HasSubstr("bad.txt:2: "))
        << bad;
  }
  WriteText(folder / "bad.txt", "# nothing\n");
  EXPECT_THAT(MessageOf<FileError>([&] { ReadEmojiNames(folder / "bad.txt", false); }),
              HasSubstr("no fully-qualified emoji"));
  EXPECT_THAT(MessageOf<FileError>([&] { ReadEmojiNames(folder / "none", false); }),
              HasSubstr("unicode-data"));
}

TEST(Emoji, MissingOrBadFont) {
  TempFolder folder;
  WriteText(folder / "list.txt", "1F600 ; fully-qualified # x E1.0 grinning face\n");
  EmojiOptions options{folder / "none.ttf", folder / "list.txt", 32, false};
  auto message = [&] {
    return MessageOf<FileError>([&] { WriteEmojiFolder(folder / "out", options); });
  };
  EXPECT_THAT(message(), AllOf(HasSubstr("none.ttf"), HasSubstr("fonts-noto-color-emoji")));
  WriteText(folder / "bad.ttf", "not a font");
  options.font = folder / "bad.ttf";
  EXPECT_THAT(message(), HasSubstr("not a font that FreeType reads"));
  options.size = 4;
  EXPECT_THROW(WriteEmojiFolder(folder / "out", options), ValueError);
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
}

TEST(Emoji, DrawsTheDebianFont) {
  EmojiOptions options;
  if (!std::filesystem::exists(options.font) || !std::filesystem::exists(options.names)) {
    FAIL() << "needs the packages fonts-noto-color-emoji and unicode-data (./dev setup)";
  }
  TempFolder folder;
  // One of each kind: plain, variation selector, ZWJ, flag, keycap, tag sequence, skin tone; and
  // three that are no single glyph.
  WriteText(folder / "list.txt",
            "1F534 ; fully-qualified # x E0.6 red circle\n"
            "1F7E6 ; fully-qualified # x E12.0 blue square\n"
            "2764 FE0F ; fully-qualified # x E0.6 red heart\n"
            "1F468 200D 1F469 200D 1F467 ; fully-qualified # x E2.0 family\n"
            "1F1EF 1F1F5 ; fully-qualified # x E0.6 flag: Japan\n"
            "0023 FE0F 20E3 ; fully-qualified # x E0.6 keycap: #\n"
            "1F3F4 E0067 E0062 E0073 E0063 E0074 E007F ; fully-qualified # x E5.0 flag: Scotland\n"
            "1F44B 1F3FF ; fully-qualified # x E1.0 waving hand: dark skin tone\n"
            "1F600 1F600 ; fully-qualified # x E1.0 two faces\n"
            "1F468 200D 1F600 ; fully-qualified # x E1.0 man with no such thing\n"
            "4E00 ; fully-qualified # x E1.0 not an emoji\n");
  options.names = folder / "list.txt";
  options.size = 24;
  options.skin_tones = true;
  int64_t calls = 0, total = 0;
  EmojiReport report = WriteEmojiFolder(folder / "out", options, [&](int64_t done, int64_t all) {
    EXPECT_EQ(done, ++calls);
    total = all;
    return true;
  });
  EXPECT_EQ(calls, 11);
  EXPECT_EQ(total, 11);
  EXPECT_EQ(report.written, 8);
  EXPECT_THAT(report.skipped,
              testing::ElementsAre("two faces", "man with no such thing", "not an emoji"));
  ImageFolder set(folder / "out", {.side = 24},
                  [](const std::string& text) { ADD_FAILURE() << text; });
  ASSERT_EQ(set.size(), 8);
  EXPECT_EQ(set.caption(4), "flag: japan");
  EXPECT_EQ(set.file_name(4), "1f1ef-1f1f5.png");
  Random random(1);
  std::set<std::string> different;
  for (int i = 0; i < 8; ++i) {
    Image image = TensorToImage(set.image(i, random));
    different.emplace(image.rgb.begin(), image.rgb.end());
    // White corners; something else within.
    for (int corner : {0, 23, 24 * 23, 24 * 24 - 1})
      EXPECT_GE(image.rgb[3 * corner], 250) << set.caption(i);
    EXPECT_LT(*std::min_element(image.rgb.begin(), image.rgb.end()), 150) << set.caption(i);
  }
  EXPECT_EQ(different.size(), 8u);
  // Channels in the right order: the centre of the red circle is red, of the blue square blue.
  auto centre = [&](int i, int c) {
    return TensorToImage(set.image(i, random)).rgb[3 * (12 * 24 + 12) + c];
  };
  EXPECT_GT(centre(0, 0), centre(0, 2) + 80);
  EXPECT_GT(centre(1, 2), centre(1, 0) + 80);
  EXPECT_THROW(
      WriteEmojiFolder(folder / "out2", options, [](int64_t done, int64_t) { return done < 3; }),
      CancelledError);
  EXPECT_FALSE(std::filesystem::exists(folder / "out2/metadata.jsonl"));
}

// The whole list: the counts that the documentation names.
TEST(Emoji, WholeList) {
  EmojiOptions options;
  if (!std::filesystem::exists(options.font) || !std::filesystem::exists(options.names)) {
    FAIL() << "needs the packages fonts-noto-color-emoji and unicode-data (./dev setup)";
  }
  TempFolder folder;
  EmojiReport report = WriteEmojiFolder(folder / "out", options);
  EXPECT_GE(report.written, 1800);
  EXPECT_LE(report.skipped.size(), 50u);
  ImageFolder set(folder / "out", {.side = 32},
                  [](const std::string& text) { ADD_FAILURE() << text; });
  EXPECT_EQ(set.size(), report.written);
  std::set<std::string> captions;
  for (int64_t i = 0; i < set.size(); ++i) captions.insert(set.caption(i));
  EXPECT_EQ(static_cast<int64_t>(captions.size()), set.size()) << "captions repeat";
}

}  // namespace
}  // namespace calotype
