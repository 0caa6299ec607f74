// 95 safetensors files, well-formed and malformed, each with the verdict of our reader: 82
// rejected, 13 accepted. `reference` is the verdict of the Rust reference implementation (version
// 0.8.0), which accepts 9 more.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace calotype::test {

struct SafetensorsCase {
  std::string name;
  std::string bytes;
  bool accept = false;
  bool reference = false;
};

inline std::string WithLength(uint64_t length, const std::string& rest) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + rest;
}

// A file of a header and `data_size` zero bytes of data.
inline std::string FileOf(const std::string& header, size_t data_size = 0) {
  return WithLength(header.size(), header) + std::string(data_size, '\0');
}

// {"x": {...}} with the given pieces of JSON.
inline std::string OneTensor(const std::string& dtype, const std::string& shape,
                             const std::string& offsets) {
  return R"({"x":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

inline std::vector<SafetensorsCase> SafetensorsCorpus() {
  std::vector<SafetensorsCase> cases;
  auto bad = [&](const char* name, std::string bytes) {
    cases.push_back({name, bytes, false, false});
  };
  auto good = [&](const char* name, std::string bytes) {
    cases.push_back({name, bytes, true, true});
  };
  // Rejected by us, accepted by the reference.
  auto strict = [&](const char* name, std::string bytes) {
    cases.push_back({name, bytes, false, true});
  };
  const std::string f32 = R"("F32")";
  const std::string plain = OneTensor(f32, "[2]", "[0,8]");
  const std::string data8(8, '\0');
  auto two = [](const std::string& shape_a, const std::string& offsets_a,
                const std::string& shape_b, const std::string& offsets_b) {
    return R"({"a":{"dtype":"U8","shape":)" + shape_a + R"(,"data_offsets":)" + offsets_a +
           R"(},"b":{"dtype":"U8","shape":)" + shape_b + R"(,"data_offsets":)" + offsets_b + "}}";
  };

  // The length field (11).
  bad("length: empty file", "");
  bad("length: 7 bytes", std::string(7, '\0'));
  bad("length: zero", WithLength(0, "{}"));
  bad("length: one more", WithLength(plain.size() + 1, plain + data8));
  bad("length: one less", WithLength(plain.size() - 1, plain + data8));
  bad("length: 10^8 in a small file", WithLength(100'000'000, plain + data8));
  bad("length: 10^8 + 1", WithLength(100'000'001, plain + data8));
  bad("length: 2^32 + 2", WithLength((uint64_t{1} << 32) + 2, "{}"));
  bad("length: 2^63", WithLength(uint64_t{1} << 63, "{}"));
  bad("length: 2^64 - 8", WithLength(~uint64_t{0} - 7, "{}"));
  bad("length: 2^64 - 1", WithLength(~uint64_t{0}, "{}"));

  // JSON (23).
  bad("json: array", FileOf("[]"));
  bad("json: null", FileOf("null"));
  bad("json: string", FileOf(R"("x")"));
  bad("json: byte order mark", FileOf("\xef\xbb\xbf" + plain, 8));
  good("json: leading space", FileOf(" " + plain, 8));
  good("json: trailing space", FileOf(plain + "   ", 8));
  bad("json: trailing NUL", FileOf(plain + std::string(1, '\0'), 8));
  bad("json: trailing 0x0b", FileOf(plain + "\x0b", 8));
  bad("json: two documents", FileOf(plain + plain, 8));
  bad("json: trailing comma", FileOf(plain.substr(0, plain.size() - 1) + ",}", 8));
  bad("json: comment", FileOf("/* c */" + plain, 8));
  bad("json: unterminated", FileOf(plain.substr(0, plain.size() - 1), 8));
  bad("json: invalid UTF-8",
      FileOf("{\"\xff\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8));
  bad("json: overlong UTF-8",
      FileOf("{\"\xc0\x80\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8));
  bad("json: raw control character",
      FileOf("{\"a\x01\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8));
  bad("json: lone surrogate",
      FileOf(R"({"\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  good("json: surrogate pair",
       FileOf(R"({"\ud83d\ude00":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  bad("json: bad escape", FileOf(R"({"\q":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  bad("json: nested 100,000 deep",
      FileOf(R"({"x":)" + std::string(100'000, '[') + std::string(100'000, ']') + "}"));
  bad("json: NaN", FileOf(OneTensor(f32, "[NaN]", "[0,8]"), 8));
  bad("json: 02", FileOf(OneTensor(f32, "[02]", "[0,8]"), 8));
  bad("json: -0", FileOf(OneTensor(f32, "[2]", "[-0,8]"), 8));
  bad("json: +2", FileOf(OneTensor(f32, "[+2]", "[0,8]"), 8));

  // Duplicates (5).
  const std::string info = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  strict("duplicate: name", FileOf(R"({"x":)" + info + R"(,"x":)" + info + "}", 8));
  strict("duplicate: name by escape", FileOf(R"({"a":)" + info + R"(,"\u0061":)" + info + "}", 8));
  bad("duplicate: field",
      FileOf(R"({"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  bad("duplicate: __metadata__",
      FileOf(R"({"__metadata__":{"a":"b"},"__metadata__":{"a":"b"},"x":)" + info + "}", 8));
  strict("duplicate: metadata key",
         FileOf(R"({"__metadata__":{"a":"b","a":"c"},"x":)" + info + "}", 8));

  // Fields (20).
  bad("field: no dtype", FileOf(R"({"x":{"shape":[2],"data_offsets":[0,8]}})", 8));
  bad("field: no shape", FileOf(R"({"x":{"dtype":"F32","data_offsets":[0,8]}})", 8));
  bad("field: no data_offsets", FileOf(R"({"x":{"dtype":"F32","shape":[2]}})", 8));
  good("field: unknown",
       FileOf(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":1}})", 8));
  bad("field: null tensor", FileOf(R"({"x":null})"));
  bad("field: string tensor", FileOf(R"({"x":"y"})"));
  bad("field: dtype number", FileOf(OneTensor("32", "[2]", "[0,8]"), 8));
  bad("field: dtype lower case", FileOf(OneTensor(R"("f32")", "[2]", "[0,8]"), 8));
  bad("field: dtype unknown", FileOf(OneTensor(R"("F128")", "[2]", "[0,32]"), 32));
  bad("field: odd number of F4", FileOf(OneTensor(R"("F4")", "[3]", "[0,2]"), 2));
  bad("field: shape null", FileOf(OneTensor(f32, "null", "[0,8]"), 8));
  bad("field: shape nested", FileOf(OneTensor(f32, "[[2]]", "[0,8]"), 8));
  bad("field: shape string", FileOf(OneTensor(f32, R"("2")", "[0,8]"), 8));
  bad("field: size -1", FileOf(OneTensor(f32, "[-1]", "[0,8]"), 8));
  bad("field: size 2.0", FileOf(OneTensor(f32, "[2.0]", "[0,8]"), 8));
  bad("field: size 2e0", FileOf(OneTensor(f32, "[2e0]", "[0,8]"), 8));
  bad("field: size 2^64", FileOf(OneTensor(f32, "[18446744073709551616]", "[0,8]"), 8));
  good("field: rank 0", FileOf(OneTensor(f32, "[]", "[0,4]"), 4));
  strict("field: rank 9", FileOf(OneTensor(f32, "[1,1,1,1,1,1,1,1,2]", "[0,8]"), 8));
  std::string ones = "1";
  for (int i = 1; i < 4096; ++i) ones += ",1";
  strict("field: rank 4096", FileOf(OneTensor(f32, "[" + ones + "]", "[0,4]"), 4));

  // Overflow (6). M = 2^64 - 1.
  const std::string m = "18446744073709551615";
  bad("overflow: 2 x (2^64 - 2)", FileOf(OneTensor(f32, "[2,18446744073709551614]", "[0,8]"), 8));
  bad("overflow: 2^62 x 4 bytes", FileOf(OneTensor(f32, "[4611686018427387904]", "[0,0]")));
  bad("overflow: 2^32 x 2^32", FileOf(OneTensor(f32, "[4294967296,4294967296]", "[0,0]")));
  strict("overflow: 0 x M x M", FileOf(OneTensor(f32, "[0," + m + "," + m + "]", "[0,0]")));
  bad("overflow: M x M x 0", FileOf(OneTensor(f32, "[" + m + "," + m + ",0]", "[0,0]")));
  bad("overflow: 65536^2 without data", FileOf(OneTensor(f32, "[65536,65536]", "[0,17179869184]")));

  // Offsets (18).
  bad("offsets: one number", FileOf(OneTensor(f32, "[2]", "[8]"), 8));
  bad("offsets: three numbers", FileOf(OneTensor(f32, "[2]", "[0,8,8]"), 8));
  bad("offsets: string", FileOf(OneTensor(f32, "[2]", R"("0,8")"), 8));
  bad("offsets: negative", FileOf(OneTensor(f32, "[2]", "[-8,0]"), 8));
  bad("offsets: begin > end", FileOf(OneTensor(f32, "[2]", "[8,0]"), 8));
  bad("offsets: past the end", FileOf(OneTensor(f32, "[4]", "[0,16]"), 8));
  bad("offsets: end 2^64 - 1", FileOf(OneTensor(f32, "[2]", "[0," + m + "]"), 8));
  bad("offsets: begin = end = 2^64 - 1", FileOf(OneTensor(f32, "[0]", "[" + m + "," + m + "]")));
  bad("offsets: not at 0", FileOf(OneTensor(f32, "[2]", "[4,12]"), 12));
  bad("offsets: hole", FileOf(two("[2]", "[0,2]", "[2]", "[4,6]"), 6));
  bad("offsets: full overlap", FileOf(two("[4]", "[0,4]", "[4]", "[0,4]"), 4));
  bad("offsets: partial overlap", FileOf(two("[4]", "[0,4]", "[4]", "[2,6]"), 6));
  bad("offsets: empty tensor inside", FileOf(two("[4]", "[0,4]", "[0]", "[2,2]"), 4));
  good("offsets: empty tensor at the begin", FileOf(two("[4]", "[0,4]", "[0]", "[0,0]"), 4));
  bad("offsets: size mismatch", FileOf(OneTensor(f32, "[3]", "[0,8]"), 8));
  bad("offsets: trailing bytes", FileOf(plain, 9));
  bad("offsets: one byte short", FileOf(plain, 7));
  good("offsets: F32 at an odd offset",
       FileOf(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
              R"("b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})",
              5));

  // Names and payload (12).
  auto named = [&](const std::string& name) {
    return FileOf("{\"" + name + "\":" + info + "}", 8);
  };
  good("name: empty", named(""));
  strict("name: NUL", named("a\\u0000b"));
  good("name: path", named("../../etc/passwd"));
  strict("name: 1 MiB", named(std::string(1 << 20, 'n')));
  bad("metadata: integer", FileOf(R"({"__metadata__":{"a":1},"x":)" + info + "}", 8));
  bad("metadata: nested", FileOf(R"({"__metadata__":{"a":{"b":"c"}},"x":)" + info + "}", 8));
  good("metadata: null", FileOf(R"({"__metadata__":null,"x":)" + info + "}", 8));
  bad("metadata: tensor", FileOf(R"({"__metadata__":)" + info + "}", 8));
  std::string many = "{";
  for (int i = 0; i < 100'000; ++i) {
    many += (i ? ",\"t" : "\"t") + std::to_string(i) +
            R"(":{"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  }
  good("payload: 100,000 empty tensors", FileOf(many + "}"));
  strict("payload: boolean 2", WithLength(OneTensor(R"("BOOL")", "[1]", "[0,1]").size(),
                                          OneTensor(R"("BOOL")", "[1]", "[0,1]") + "\x02"));
  good("payload: NaN",
       WithLength(plain.size(), plain + std::string("\x01\x00\xc0\x7f\xff\xff\xff\xff", 8)));
  good("payload: no tensors", FileOf("{}"));
  return cases;
}

}  // namespace calotype::test
