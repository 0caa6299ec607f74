// Files: safetensors, atomic writing, SHA-256, checkpoints.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>

#include "core/error.h"
#include "core/random.h"
#include "core/sha256.h"
#include "io/atomic_file.h"
#include "io/checkpoint.h"
#include "io/file.h"
#include "io/half.h"
#include "io/safetensors.h"
#include "tests/expect_error.h"
#include "tests/safetensors_corpus.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

using test::FileOf;
using test::OneTensor;
using test::TempFolder;
using test::WithLength;
using test::WriteText;
using ::testing::HasSubstr;

// One tensor of one stored dtype from its elements in memory.
template <class T>
std::string FileWith(const std::string& dtype, const std::vector<T>& values) {
  size_t bytes = values.size() * sizeof(T);
  std::string header = OneTensor("\"" + dtype + "\"", "[" + std::to_string(values.size()) + "]",
                                 "[0," + std::to_string(bytes) + "]");
  std::string data(bytes, '\0');
  std::memcpy(data.data(), values.data(), bytes);
  return WithLength(header.size(), header + data);
}

bool SameBits(const Tensor& a, const Tensor& b) {
  return a.type() == b.type() && (a.bytes() == 0 || std::memcmp(a.raw(), b.raw(), a.bytes()) == 0);
}

void ExpectSame(const TensorFile& a, const TensorFile& b) {
  ASSERT_EQ(a.tensors.size(), b.tensors.size());
  for (const auto& [name, tensor] : a.tensors) {
    ASSERT_TRUE(b.tensors.contains(name)) << name;
    EXPECT_TRUE(SameBits(tensor, b.tensors.at(name))) << name;
  }
  EXPECT_EQ(a.metadata, b.metadata);
}

TEST(Safetensors, MalformedCorpus) {
  int accepted = 0, rejected = 0, reference = 0;
  for (const test::SafetensorsCase& c : test::SafetensorsCorpus()) {
    bool accept = true;
    try {
      ParseSafetensors(c.bytes, "corpus");
    } catch (const FileError& error) {
      accept = false;
      EXPECT_THAT(error.what(), HasSubstr("corpus: ")) << c.name;
    }
    EXPECT_EQ(accept, c.accept) << c.name;
    ++(accept ? accepted : rejected);
    reference += c.reference;
  }
  EXPECT_EQ(accepted, 13);
  EXPECT_EQ(rejected, 82);
  EXPECT_EQ(reference, 22);
}

TEST(Safetensors, MessagesNameFileTensorAndByte) {
  auto message = [](const std::string& bytes) {
    return MessageOf<FileError>([&] { ParseSafetensors(bytes, "model.safetensors"); });
  };
  EXPECT_EQ(
      message(FileOf(OneTensor("\"F32\"", "[3]", "[0,8]"), 8)),
      "model.safetensors: tensor 'x': data_offsets [0, 8) do not hold the 12 bytes of F32 [3]");
  EXPECT_THAT(message(FileOf(OneTensor("\"F8_E4M3\"", "[3]", "[0,3]"), 3)),
              HasSubstr("tensor 'x': dtype 'F8_E4M3' is not supported"));
  EXPECT_THAT(message(FileWith<uint8_t>("BOOL", {0, 1, 2})),
              HasSubstr("tensor 'x': boolean with value 2 at byte 65"));
  EXPECT_THAT(message(FileWith<uint64_t>("U64", {uint64_t{1} << 63})), HasSubstr("above 2^63 - 1"));
  TempFolder folder;
  EXPECT_THAT(MessageOf<FileError>([&] { ReadSafetensors(folder / "none.safetensors"); }),
              testing::AllOf(HasSubstr("none.safetensors"), HasSubstr("No such file")));
  EXPECT_THAT(MessageOf<FileError>([&] { ReadSafetensors(folder.path()); }),
              HasSubstr("not a regular file"));
  ASSERT_EQ(mkfifo((folder / "fifo").c_str(), 0600), 0);
  EXPECT_THAT(MessageOf<FileError>([&] { ReadSafetensors(folder / "fifo"); }),
              HasSubstr("not a regular file"));
}

// A field the format does not have is skipped whatever it holds, but not to any depth.
TEST(Safetensors, UnknownFields) {
  auto with = [](const std::string& value) {
    return FileOf(
        R"({"x":{"dtype":"F32","extra":)" + value + R"(,"shape":[2],"data_offsets":[0,8]}})", 8);
  };
  for (const char* value : {"1", "-1", "1.5", "null", "true", "\"s\"", "[1,{\"a\":[]}]",
                            R"({"dtype":"I8","shape":[{"b":null}]})"}) {
    EXPECT_EQ(ParseSafetensors(with(value), "f").tensors.at("x").shape(), Shape({2})) << value;
  }
  EXPECT_EQ(ParseSafetensors(with(std::string(32, '[') + std::string(32, ']')), "f").tensors.size(),
            1u);
  EXPECT_THAT(MessageOf<FileError>([&] {
                ParseSafetensors(with(std::string(33, '[') + std::string(33, ']')), "f");
              }),
              HasSubstr("nesting deeper than 32"));
}

TEST(Safetensors, HalfPrecisionIsExact) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  Tensor half = ParseSafetensors(FileWith("F16", all), "f").tensors.at("x");
  Tensor brain = ParseSafetensors(FileWith("BF16", all), "f").tensors.at("x");
  ASSERT_EQ(half.dtype(), DType::kF32);
  ASSERT_EQ(brain.dtype(), DType::kF32);
  for (size_t i = 0; i < all.size(); ++i) {
    // By definition: sign, 5 (8) bits of exponent with bias 15 (127), 10 (7) bits of fraction.
    auto value = [&](int exponent_bits, int fraction_bits) {
      int bits = all[i], exponent_max = (1 << exponent_bits) - 1, bias = exponent_max / 2;
      int exponent = bits >> fraction_bits & exponent_max;
      double fraction = std::ldexp(bits & ((1 << fraction_bits) - 1), -fraction_bits);
      double magnitude = exponent == 0             ? std::ldexp(fraction, 1 - bias)
                         : exponent < exponent_max ? std::ldexp(1 + fraction, exponent - bias)
                         : fraction == 0           ? INFINITY
                                                   : NAN;
      return std::copysign(magnitude, bits & 0x8000 ? -1.0 : 1.0);
    };
    auto same = [](float actual, double expected) {
      return std::isnan(expected)
                 ? std::isnan(actual)
                 : actual == expected && std::signbit(actual) == std::signbit(expected);
    };
    ASSERT_TRUE(same(half.data()[i], value(5, 10))) << i;
    ASSERT_TRUE(same(brain.data()[i], value(8, 7))) << i;
  }
}

// float, F16 and BF16 bits; those of NumPy 2 and PyTorch 2.15.
struct Rounding {
  uint32_t x;
  uint16_t half, brain;
};
constexpr Rounding kRoundings[] = {
    {0x00000000, 0x0000, 0x0000}, {0x80000000, 0x8000, 0x8000}, {0x3f800000, 0x3c00, 0x3f80},
    {0xc0200000, 0xc100, 0xc020}, {0x3eaaaaab, 0x3555, 0x3eab}, {0x477fe000, 0x7bff, 0x4780},
    {0x477feffd, 0x7bff, 0x4780}, {0x477ff000, 0x7c00, 0x4780}, {0xc77ff000, 0xfc00, 0xc780},
    {0x47800000, 0x7c00, 0x4780}, {0x501502f9, 0x7c00, 0x5015}, {0x7f800000, 0x7c00, 0x7f80},
    {0xff800000, 0xfc00, 0xff80}, {0x33800000, 0x0001, 0x3380}, {0x33000000, 0x0000, 0x3300},
    {0x33000001, 0x0001, 0x3300}, {0x33c00000, 0x0002, 0x33c0}, {0x38800000, 0x0400, 0x3880},
    {0x387fe000, 0x0400, 0x3880}, {0x387fd000, 0x03ff, 0x3880}, {0x3f801000, 0x3c00, 0x3f80},
    {0x3f803000, 0x3c02, 0x3f80}, {0x3f801008, 0x3c01, 0x3f80}, {0x322bcc77, 0x0000, 0x322c},
    {0x337ffae5, 0x0001, 0x3380}, {0x000116c2, 0x0000, 0x0001}, {0x80000001, 0x8000, 0x8000},
    {0x3f808000, 0x3c04, 0x3f80}, {0x3f818000, 0x3c0c, 0x3f82}, {0x3f808008, 0x3c04, 0x3f81},
    {0x7f7f0000, 0x7c00, 0x7f7f}, {0x7f7fc99e, 0x7c00, 0x7f80}, {0xff7fffff, 0xfc00, 0xff80},
    {0x3dcccccd, 0x2e66, 0x3dcd}, {0x45001000, 0x6800, 0x4500}, {0x45003000, 0x6802, 0x4500},
    {0x437f8000, 0x5bfc, 0x4380}, {0x43808000, 0x5c04, 0x4380}};

TEST(Half, RoundsToNearestEven) {
  for (const Rounding& r : kRoundings) {
    float x = std::bit_cast<float>(r.x);
    EXPECT_EQ(FloatToHalf(x), r.half) << x;
    EXPECT_EQ(FloatToBrain(x), r.brain) << x;
  }
  // NaN stays one, also if its fraction is in the lost bits only.
  for (uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff801000u, 0x7fffffffu}) {
    float x = std::bit_cast<float>(bits);
    EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(x)))) << bits;
    EXPECT_TRUE(std::isnan(BrainToFloat(FloatToBrain(x)))) << bits;
    EXPECT_EQ(FloatToHalf(x) >> 15, bits >> 31);
    EXPECT_EQ(FloatToBrain(x) >> 15, bits >> 31);
  }
  // By definition: no number of the format is nearer, and of two equally near ones it is the even.
  auto check = [](float x, uint16_t bits, auto to_float) {
    double value = to_float(bits), distance = std::abs(value - x);
    for (int step : {-1, 1}) {
      auto next = static_cast<uint16_t>(bits + step);
      if ((bits & 0x7fff) == 0 && step < 0) next = bits ^ 0x8001;  // the other side of zero
      double other = to_float(next);
      if (!std::isfinite(other)) continue;
      ASSERT_GE(std::abs(other - x), distance) << x;
      ASSERT_TRUE(std::abs(other - x) > distance || bits % 2 == 0) << x;
    }
  };
  Random random(5, "halves");
  for (int trial = 0; trial < 200'000; ++trial) {
    // Many are half-way cases, where the bits behind those that stay are 1000...
    auto bits = static_cast<uint32_t>(random.Next());
    if (trial % 4 == 0) bits = (bits & 0xffffe000u) | 0x1000u;
    if (trial % 4 == 1) bits = (bits & 0xffff0000u) | 0x8000u;
    if (trial % 4 == 2) bits = (bits & 0x87ffffffu) | 0x30000000u;  // the range of F16
    float x = std::bit_cast<float>(bits);
    if (std::abs(x) < 65504) check(x, FloatToHalf(x), HalfToFloat);
    if (std::abs(x) < 3.3e38f) check(x, FloatToBrain(x), BrainToFloat);
  }
}

// Every bit pattern of both formats comes back, NaNs included.
TEST(Safetensors, HalvesAreWrittenAsTheyWere) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (const char* dtype : {"F16", "BF16"}) {
    std::string bytes = FileWith(dtype, all);
    TensorFile file = ParseSafetensors(bytes, "f");
    EXPECT_EQ(file.formats.size(), 1u);
    std::string again = FormatSafetensors(file);
    EXPECT_EQ(again.substr(again.size() - 2 * all.size()),
              bytes.substr(bytes.size() - 2 * all.size()));
    ASSERT_THAT(again, HasSubstr("\"dtype\":\"" + std::string(dtype) + "\""));
  }
}

// Header and digest are those of the file that the Python package safetensors 0.8.0 writes.
TEST(Safetensors, MixedFormats) {
  TensorFile file;
  file.tensors["a"] = Tensor::From<float>({2}, std::vector<float>{1, 1.0f / 3});
  file.tensors["b"] = Tensor::From<float>({3}, std::vector<float>{0.1f, -65520, 1e-8f});
  file.tensors["c"] = Tensor::From<float>({1}, std::vector<float>{0.1f});
  file.tensors["n"] = Tensor::From<int64_t>({1}, std::vector<int64_t>{3});
  file.SetFormat(FloatFormat::kF16);
  EXPECT_EQ(file.formats.size(), 3u);  // not of the integers
  file.formats["b"] = FloatFormat::kBF16;
  file.formats.erase("c");
  std::string bytes = FormatSafetensors(file);
  EXPECT_EQ(Sha256Of(bytes), "3de4a3681506e013209f20a88088c3785548091e33bdd7eb6531fa6767fd8d58");
  TempFolder folder;
  WriteSafetensors(folder / "m.safetensors", file);
  EXPECT_EQ(ReadFile(folder / "m.safetensors"), bytes);
  TensorFile back = ReadSafetensors(folder / "m.safetensors");
  EXPECT_EQ(back.formats, file.formats);
  EXPECT_EQ(FormatSafetensors(back), bytes);
  file.SetFormat(FloatFormat::kF32);
  EXPECT_TRUE(file.formats.empty());
  // Only what is wanted is read.
  TensorFile part = ReadSafetensors(folder / "m.safetensors",
                                    [](const TensorEntry& entry) { return entry.name == "b"; });
  EXPECT_EQ(part.tensors.size(), 1u);
  EXPECT_EQ(part.formats.size(), 1u);

  file.formats["n"] = FloatFormat::kF16;
  EXPECT_THAT(MessageOf<ValueError>([&] { FormatSafetensors(file); }), HasSubstr("'n'"));
  file.formats = {{"gone", FloatFormat::kF16}};
  EXPECT_THAT(MessageOf<ValueError>([&] { FormatSafetensors(file); }), HasSubstr("'gone'"));
  EXPECT_EQ(ParseFloatFormat("bfloat16"), FloatFormat::kBF16);
  EXPECT_EQ(ParseFloatFormat("fp16"), FloatFormat::kF16);
  EXPECT_THAT(MessageOf<ValueError>([] { ParseFloatFormat("f8"); }), HasSubstr("bfloat16"));
}

TEST(Safetensors, IntegerTypesWiden) {
  auto i32 = [](const std::string& bytes) {
    Tensor x = ParseSafetensors(bytes, "f").tensors.at("x");
    auto values = std::as_const(x).values<int32_t>();
    return std::vector<int64_t>(values.begin(), values.end());
  };
  auto i64 = [](const std::string& bytes) {
    Tensor x = ParseSafetensors(bytes, "f").tensors.at("x");
    auto values = std::as_const(x).values<int64_t>();
    return std::vector<int64_t>(values.begin(), values.end());
  };
  using V = std::vector<int64_t>;
  EXPECT_EQ(i32(FileWith<uint8_t>("BOOL", {0, 1})), V({0, 1}));
  EXPECT_EQ(i32(FileWith<uint8_t>("U8", {0, 255})), V({0, 255}));
  EXPECT_EQ(i32(FileWith<int8_t>("I8", {-128, 127})), V({-128, 127}));
  EXPECT_EQ(i32(FileWith<uint16_t>("U16", {0, 65535})), V({0, 65535}));
  EXPECT_EQ(i32(FileWith<int16_t>("I16", {-32768, 32767})), V({-32768, 32767}));
  EXPECT_EQ(i32(FileWith<int32_t>("I32", {INT32_MIN, INT32_MAX})), V({INT32_MIN, INT32_MAX}));
  EXPECT_EQ(i64(FileWith<uint32_t>("U32", {0, UINT32_MAX})), V({0, UINT32_MAX}));
  EXPECT_EQ(i64(FileWith<uint64_t>("U64", {0, INT64_MAX})), V({0, INT64_MAX}));
  EXPECT_EQ(i64(FileWith<int64_t>("I64", {INT64_MIN, INT64_MAX})), V({INT64_MIN, INT64_MAX}));
  // More elements than one piece of the converting reader.
  std::vector<uint8_t> many(200'001);
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<uint8_t>(i * 7);
  Tensor wide = ParseSafetensors(FileWith("U8", many), "f").tensors.at("x");
  for (size_t i = 0; i < many.size(); ++i) ASSERT_EQ(wide.data<int32_t>()[i], many[i]);
}

// Header and digest are those of the file that the Python package safetensors 0.8.0 writes.
TEST(Safetensors, WriterEqualsTheReference) {
  TensorFile file;
  file.tensors["b.weight"] = Tensor::From<float>({2, 3}, std::vector<float>{0, 1, 2, 3, 4, 5});
  file.tensors["a"] = Tensor::From<double>({2}, std::vector<double>{1.5, -2});
  file.tensors["z"] = Tensor::From<int64_t>({2}, std::vector<int64_t>{7, 8});
  file.tensors["i"] = Tensor::From<int32_t>({3, 1}, std::vector<int32_t>{1, 2, 3});
  file.tensors["A \"q\"\\ \xc3\xa9\n"] = Tensor({0, 4});
  file.tensors["s"] = Tensor::Scalar(3.25f);
  std::string bytes = FormatSafetensors(file);
  EXPECT_EQ(
      bytes.substr(8, bytes.size() - 80),
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},)"
      R"("a":{"dtype":"F64","shape":[2],"data_offsets":[16,32]},)"
      "\"A \\\"q\\\"\\\\ \xc3\xa9\\n\""
      R"(:{"dtype":"F32","shape":[0,4],"data_offsets":[32,32]},)"
      R"("b.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[32,56]},)"
      R"("s":{"dtype":"F32","shape":[],"data_offsets":[56,60]},)"
      R"("i":{"dtype":"I32","shape":[3,1],"data_offsets":[60,72]}}      )");
  EXPECT_EQ(Sha256Of(bytes), "7e9a94c30058d680466779f509f65a608b9b0244014252be5afd6dfceb1916a1");
  TempFolder folder;
  WriteSafetensors(folder / "m.safetensors", file);
  EXPECT_EQ(ReadFile(folder / "m.safetensors"), bytes);
  file.metadata["format"] = "pt";
  ExpectSame(ReadSafetensors(folder / "m.safetensors"), file);
  TensorFileHeader header = ReadSafetensorsHeader(folder / "m.safetensors");
  ASSERT_EQ(header.entries.size(), 6u);
  EXPECT_EQ(header.entries[3].name, "b.weight");
  EXPECT_EQ(header.entries[3].dtype, "F32");
  EXPECT_EQ(header.entries[3].shape, Shape({2, 3}));
  EXPECT_EQ(header.data_begin + header.entries.back().end, bytes.size());
}

TEST(Safetensors, WriterRefusesWhatTheReaderWould) {
  auto message = [](const std::string& name, Tensor tensor, const std::string& metadata = "") {
    TensorFile file{{{name, tensor}}, {{"note", metadata}}};
    return MessageOf<ValueError>([&] { FormatSafetensors(file); });
  };
  Tensor x({1});
  EXPECT_THAT(message("x", Tensor()), HasSubstr("'x' is undefined"));
  EXPECT_THAT(message("__metadata__", x), HasSubstr("cannot name a tensor"));
  EXPECT_THAT(message(std::string("a\0b", 3), x), HasSubstr("cannot name a tensor"));
  EXPECT_THAT(message(std::string(65'536, 'n'), x), HasSubstr("cannot name a tensor"));
  EXPECT_THAT(message("\xff", x), HasSubstr("not UTF-8"));
  EXPECT_THAT(message("x", x, "\xc0\x80"), HasSubstr("not UTF-8"));
  EXPECT_NO_THROW(FormatSafetensors({{{std::string(65'535, 'n'), x}}, {}}));
}

std::string RandomText(Random& random) {
  const char* pieces[] = {"a",
                          "weight",
                          ".",
                          "/",
                          "\"",
                          "\\",
                          "\n",
                          "\x01",
                          "\x7f",
                          " ",
                          "\xc3\xa9",
                          "\xe2\x82\xac",
                          "\xf0\x9f\x98\x80",
                          "0",
                          "-"};
  std::string text;
  for (int64_t n = random.Integer(8); n > 0; --n) text += pieces[random.Integer(std::size(pieces))];
  return text;
}

TEST(Safetensors, RandomRoundTripsAreCanonical) {
  Random random(3, "safetensors round trip");
  for (int trial = 0; trial < 2000; ++trial) {
    TensorFile file;
    for (int64_t n = random.Integer(6); n > 0; --n) {
      std::vector<int64_t> dims;
      for (int64_t rank = random.Integer(5); rank > 0; --rank) dims.push_back(random.Integer(4));
      DType dtypes[] = {DType::kF32, DType::kF64, DType::kI32, DType::kI64};
      Tensor tensor(Shape(dims), dtypes[random.Integer(4)]);
      auto* bytes = static_cast<uint8_t*>(tensor.raw());
      for (int64_t i = 0; i < tensor.bytes(); ++i) bytes[i] = static_cast<uint8_t>(random.Next());
      file.tensors[RandomText(random)] = tensor;
    }
    for (int64_t n = random.Integer(4); n > 0; --n)
      file.metadata[RandomText(random)] = RandomText(random);
    std::string bytes = FormatSafetensors(file);
    TensorFile back = ParseSafetensors(bytes, "round trip");
    file.metadata.emplace("format", "pt");
    ASSERT_NO_FATAL_FAILURE(ExpectSame(back, file)) << "trial " << trial;
    ASSERT_EQ(FormatSafetensors(back), bytes) << "trial " << trial;
  }
}

// Every truncation is an error; every flipped bit is an error or gives a well-formed set of
// tensors.
TEST(Safetensors, TruncationsAndBitFlips) {
  TensorFile small;
  small.tensors["w"] = Tensor::From<float>({2, 2}, std::vector<float>{1, -2, 3, 4});
  small.tensors["empty"] = Tensor({0, 3});
  small.tensors["n"] = Tensor::From<int64_t>({1}, std::vector<int64_t>{-5});
  small.metadata["note"] = "caf\xc3\xa9 \"quoted\"";
  std::string booleans = FileWith<uint8_t>("BOOL", {1, 0, 1, 1});
  for (const std::string& bytes : {FormatSafetensors(small), booleans, FileOf("{}")}) {
    for (size_t n = 0; n < bytes.size(); ++n) {
      EXPECT_THROW(ParseSafetensors(std::string_view(bytes).substr(0, n), "f"), FileError) << n;
    }
    uint64_t length;
    std::memcpy(&length, bytes.data(), 8);
    for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      std::string flipped = bytes;
      flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
      try {
        TensorFile file = ParseSafetensors(flipped, "f");
        EXPECT_GE(bit / 8, 8u) << "another header length was accepted";
        file.metadata.emplace("format", "pt");
        ExpectSame(ParseSafetensors(FormatSafetensors(file), "again"), file);
      } catch (const FileError&) {
        // Only booleans can be wrong in the data.
        EXPECT_TRUE(bit / 8 < 8 + length || bytes == booleans) << bit;
      }
    }
  }
}

TEST(Sha256, KnownAnswers) {  // FIPS 180-4 examples
  EXPECT_EQ(Sha256Of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256Of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  Sha256 pieces;
  std::string a(1'000'000, 'a');
  for (size_t at = 0, n = 0; at < a.size(); at += n, n = n % 131 + 1) {
    n = std::min(n, a.size() - at);
    pieces.Update(a.data() + at, n);
  }
  EXPECT_EQ(pieces.Finish(), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Utf8, AcceptsExactlyWellFormedText) {
  for (const char* good : {"", "a", "\xc2\x80", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80",
                           "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(IsUtf8(good));
  }
  for (const char* bad :
       {"\x80", "\xc0\x80", "\xc1\xbf", "\xc2", "\xc2\x41", "\xe0\x9f\xbf", "\xed\xa0\x80",
        "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\xe2\x82"}) {
    EXPECT_FALSE(IsUtf8(bad)) << testing::PrintToString(std::string(bad));
  }
}

TEST(AtomicFile, ReplacesAndLeavesNothingBehind) {
  TempFolder folder;
  std::filesystem::path path = folder / "a.bin";
  for (Durability durability : {Durability::kSynced, Durability::kRenamed}) {
    WriteFile(path, "one", durability);
    EXPECT_EQ(ReadFile(path), "one");
    {
      AtomicFile file(path, durability);
      file.Write("two");
      EXPECT_EQ(ReadFile(path), "one") << "visible before Commit";
      EXPECT_EQ(folder.Entries(), 2);
    }
    EXPECT_EQ(ReadFile(path), "one") << "kept without Commit";
    EXPECT_EQ(folder.Entries(), 1);
  }
}

TEST(AtomicFile, FoldersThatCannotBeWritten) {
  TempFolder folder;
  EXPECT_THAT(MessageOf<FileError>([&] { WriteFile(folder / "no/such/a.bin", "x"); }),
              HasSubstr("No such file"));
  WriteText(folder / "file", "x");
  EXPECT_THAT(MessageOf<FileError>([&] { WriteFile(folder / "file/a.bin", "x"); }),
              HasSubstr("Not a directory"));
  std::filesystem::create_directory(folder / "taken");
  EXPECT_THAT(MessageOf<FileError>([&] { WriteFile(folder / "taken", "x"); }),
              HasSubstr("it is a folder"));
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(MessageOf<FileError>([&] { WriteFile(folder / "pipe", "x"); }),
              HasSubstr("not a regular file"));
  EXPECT_TRUE(std::filesystem::is_fifo(folder / "pipe"));
  EXPECT_EQ(folder.Entries(), 3);

  std::filesystem::path closed = folder / "closed";
  std::filesystem::create_directory(closed);
  WriteText(closed / "a.bin", "old");
  ASSERT_EQ(chmod(folder.path().c_str(), 0755), 0);
  ASSERT_EQ(chmod(closed.c_str(), 0555), 0);
  bool root = geteuid() == 0;  // root may write everywhere: become nobody for a moment
  if (root) {
    ASSERT_EQ(seteuid(65534), 0);
  }
  std::string message = MessageOf<FileError>([&] { WriteFile(closed / "a.bin", "new"); });
  if (root) {
    ASSERT_EQ(seteuid(0), 0);
  }
  ASSERT_EQ(chmod(closed.c_str(), 0755), 0);
  EXPECT_THAT(message, HasSubstr("Permission denied"));
  EXPECT_EQ(ReadFile(closed / "a.bin"), "old");
}

// Runs f with files limited to `bytes`, the portable stand-in for a full disk.
template <class F>
void WithFileLimit(rlim_t bytes, F f) {
  auto old_handler = signal(SIGXFSZ, SIG_IGN);
  rlimit old_limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  rlimit limit{bytes, old_limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  f();
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  signal(SIGXFSZ, old_handler);
}

TEST(AtomicFile, FailedWritesKeepTheOldFile) {
  TempFolder folder;
  WriteFile(folder / "a.bin", "old");
  for (rlim_t limit : {0, 1, 4095, 4096, 65536}) {
    std::string message;
    WithFileLimit(limit, [&] {
      message = MessageOf<FileError>([&] { WriteFile(folder / "a.bin", std::string(65537, 'x')); });
    });
    EXPECT_THAT(message, testing::AllOf(HasSubstr("a.bin"), HasSubstr("File too large"))) << limit;
    EXPECT_EQ(ReadFile(folder / "a.bin"), "old");
    EXPECT_EQ(folder.Entries(), 1) << "temporary file left";
  }
}

TEST(AtomicFile, StaleTemporariesGoLivingOnesStay) {
  TempFolder folder;
  WriteText(folder / ".a.bin.tmp.12345.0", "stale");
  WriteText(folder / ".a.bin.tmp.12345.0x", "not ours");
  WriteText(folder / "a.tmp.1.2", "not ours");
  AtomicFile living(folder / "b.bin");
  living.Write("b");
  EXPECT_EQ(RemoveStaleTemporaries(folder.path()), 1);
  living.Commit();
  EXPECT_EQ(ReadFile(folder / "b.bin"), "b");
  EXPECT_FALSE(std::filesystem::exists(folder / ".a.bin.tmp.12345.0"));
  EXPECT_EQ(folder.Entries(), 3);
}

TEST(ReadFile, Limits) {
  TempFolder folder;
  WriteText(folder / "a", std::string(100, 'x'));
  EXPECT_EQ(ReadFile(folder / "a", 100).size(), 100u);
  EXPECT_THAT(MessageOf<FileError>([&] { ReadFile(folder / "a", 99); }), HasSubstr("100 bytes"));
  InputFile file(folder / "a");
  char byte;
  EXPECT_THAT(MessageOf<FileError>([&] { file.ReadAt(100, &byte, 1); }),
              HasSubstr("ends at byte 100"));
}

Checkpoint MakeCheckpoint(int64_t step, int64_t elements = 10) {
  Checkpoint checkpoint{step, {}, {{"trainer", R"({"loss": 0.5})"}}};
  checkpoint.tensors["unet.w"] = Random(7, static_cast<uint64_t>(step)).NormalTensor({elements});
  checkpoint.tensors["step"] = Tensor::From<int64_t>({1}, std::vector<int64_t>{step});
  return checkpoint;
}

void ExpectSame(const Checkpoint& a, const Checkpoint& b) {
  EXPECT_EQ(a.step, b.step);
  ExpectSame(TensorFile{a.tensors, a.metadata}, TensorFile{b.tensors, b.metadata});
}

TEST(Checkpoint, RoundTripAndPrune) {
  TempFolder folder;
  EXPECT_FALSE(ReadLatestCheckpoint(folder.path(), {}));
  EXPECT_FALSE(ReadLatestCheckpoint(folder / "none", {}));
  for (int64_t step : {100, 20, 300, 9}) WriteCheckpoint(folder.path(), MakeCheckpoint(step));
  EXPECT_EQ(ListCheckpoints(folder.path()), (std::vector<int64_t>{9, 20, 100, 300}));
  ExpectSame(*ReadLatestCheckpoint(folder.path(), {}), MakeCheckpoint(300));
  ExpectSame(ReadCheckpoint(CheckpointPath(folder.path(), 20)), MakeCheckpoint(20));
  // Any reader of safetensors can open it.
  EXPECT_EQ(ReadSafetensors(folder / "checkpoint-20.safetensors").metadata.at("format"), "pt");
  WriteText(folder / ".checkpoint-7.safetensors.tmp.1.2", "left by a killed writer");
  WriteText(folder / "checkpoint-05.safetensors", "not our spelling");
  WriteCheckpoint(folder.path(), MakeCheckpoint(200), 2);
  EXPECT_EQ(ListCheckpoints(folder.path()), (std::vector<int64_t>{100, 200, 300}));
  WriteCheckpoint(folder.path(), MakeCheckpoint(400), 1);
  EXPECT_EQ(ListCheckpoints(folder.path()), (std::vector<int64_t>{400}));
  EXPECT_EQ(folder.Entries(), 2);
  Checkpoint taken = MakeCheckpoint(1);
  taken.metadata["calotype.step"] = "2";
  EXPECT_THROW(WriteCheckpoint(folder.path(), taken), ValueError);
  EXPECT_THROW(CheckpointPath(folder.path(), -1), ValueError);
}

TEST(Checkpoint, EveryBitFlipAndTruncationIsFound) {
  TempFolder folder;
  WriteCheckpoint(folder.path(), MakeCheckpoint(5, 3));
  std::filesystem::path path = CheckpointPath(folder.path(), 5), bad = folder / "bad";
  std::string bytes = ReadFile(path);
  // In place: creating a file for each would wait for the disk.
  WriteText(bad, bytes);
  int descriptor = open(bad.c_str(), O_WRONLY);
  ASSERT_GE(descriptor, 0);
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    off_t at = static_cast<off_t>(bit / 8);
    char flipped = static_cast<char>(bytes[at] ^ (1 << bit % 8));
    ASSERT_EQ(pwrite(descriptor, &flipped, 1, at), 1);
    ASSERT_THROW(ReadCheckpoint(bad), FileError) << "bit " << bit;
    ASSERT_EQ(pwrite(descriptor, &bytes[at], 1, at), 1);
  }
  ASSERT_NO_THROW(ReadCheckpoint(bad));
  for (size_t n = bytes.size(); n-- > 0;) {
    ASSERT_EQ(ftruncate(descriptor, static_cast<off_t>(n)), 0);
    ASSERT_THROW(ReadCheckpoint(bad), FileError) << n << " bytes";
  }
  close(descriptor);
  WriteText(bad, bytes + '\0');
  EXPECT_THROW(ReadCheckpoint(bad), FileError);
  WriteText(bad, FormatSafetensors({}));
  EXPECT_THAT(MessageOf<FileError>([&] { ReadCheckpoint(bad); }), HasSubstr("not a checkpoint"));
}

TEST(Checkpoint, DamagedNewestFallsBack) {
  TempFolder folder;
  for (int64_t step : {1, 2, 3}) WriteCheckpoint(folder.path(), MakeCheckpoint(step));
  std::string bytes = ReadFile(CheckpointPath(folder.path(), 3));
  bytes.back() ^= 1;
  WriteText(CheckpointPath(folder.path(), 3), bytes);
  std::vector<std::string> warnings;
  auto warn = [&](const std::string& text) { warnings.push_back(text); };
  ExpectSame(*ReadLatestCheckpoint(folder.path(), warn), MakeCheckpoint(2));
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_THAT(warnings[0],
              testing::AllOf(HasSubstr("checkpoint-3.safetensors"), HasSubstr("damaged")));
  // A file under another step's name is not taken for that step.
  std::filesystem::copy_file(CheckpointPath(folder.path(), 1), CheckpointPath(folder.path(), 9));
  ExpectSame(*ReadLatestCheckpoint(folder.path(), warn), MakeCheckpoint(2));
  EXPECT_THAT(warnings[1], HasSubstr("holds step 1"));
  for (int64_t step : {1, 2, 3, 9}) WriteText(CheckpointPath(folder.path(), step), "");
  EXPECT_THAT(MessageOf<FileError>([&] { ReadLatestCheckpoint(folder.path(), warn); }),
              HasSubstr("none of the 4 checkpoints is whole"));
}

TEST(Checkpoint, FullDiskKeepsTheOldOnes) {
  TempFolder folder;
  for (int64_t step : {1, 2}) WriteCheckpoint(folder.path(), MakeCheckpoint(step, 10'000));
  for (rlim_t limit : {0, 100, 4096, 30'000, 40'000}) {
    WithFileLimit(limit, [&] {
      EXPECT_THROW(WriteCheckpoint(folder.path(), MakeCheckpoint(3, 10'000), 1), FileError)
          << limit;
    });
    EXPECT_EQ(folder.Entries(), 2);
  }
  ExpectSame(*ReadLatestCheckpoint(folder.path(), {}), MakeCheckpoint(2, 10'000));
}

// kill -9 at random moments of a process that writes checkpoints without pause.
TEST(Checkpoint, KilledWriterLosesNothing) {
  TempFolder folder;
  Random random(11, "kill");
  int64_t last = 0;
  for (int kill_number = 0; kill_number < 30; ++kill_number) {
    int progress[2];
    ASSERT_EQ(pipe(progress), 0);
    pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (int64_t step = last + 1;; ++step) {
        WriteCheckpoint(folder.path(), MakeCheckpoint(step, 20'000), 2);
        if (write(progress[1], &step, sizeof(step)) != sizeof(step)) _exit(1);
      }
    }
    close(progress[1]);
    // After the first report, so that each round writes at least once.
    int64_t reported = 0, step;
    ASSERT_EQ(read(progress[0], &step, sizeof(step)), ssize_t{sizeof(step)});
    reported = step;
    std::this_thread::sleep_for(std::chrono::microseconds(random.Integer(15'000)));
    kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    while (read(progress[0], &step, sizeof(step)) == sizeof(step)) reported = step;
    close(progress[0]);
    // Whatever was reported as written is there; at most one more step may have made it.
    int warnings = 0;
    auto latest = ReadLatestCheckpoint(folder.path(), [&](const std::string&) { ++warnings; });
    ASSERT_TRUE(latest);
    EXPECT_EQ(warnings, 0);
    EXPECT_GE(latest->step, reported);
    EXPECT_LE(latest->step, reported + 1);
    ExpectSame(*latest, MakeCheckpoint(latest->step, 20'000));
    EXPECT_LE(folder.Entries(), 4) << "at most keep + 1 checkpoints and one temporary file";
    last = latest->step;
  }
  WriteCheckpoint(folder.path(), MakeCheckpoint(last + 1), 2);
  EXPECT_EQ(folder.Entries(), 2) << "temporary files of killed writers are removed";
}

}  // namespace
}  // namespace calotype
