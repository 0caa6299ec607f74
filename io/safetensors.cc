#include "io/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>

#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/half.h"
#include "io/safetensors_header.h"

namespace calotype {

namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

// Where the bytes come from: ReadAt(offset, data, size) of a file or of memory.
struct Source {
  std::string name;
  uint64_t size;
  std::function<void(uint64_t, void*, uint64_t)> read;
};

// Reads the range of `entry` in pieces and stores convert(element) for each stored element, so that
// the peak stays at the tensor plus one piece.
template <class Stored, class Result, class F>
Tensor Convert(const Source& source, const TensorEntry& entry, uint64_t data_begin, F convert) {
  Tensor result(entry.shape, DTypeOf<Result>());
  constexpr uint64_t kPiece = 1 << 16;
  std::vector<Stored> piece;
  uint64_t count = (entry.end - entry.begin) / sizeof(Stored);
  Result* to = result.data<Result>();
  for (uint64_t start = 0; start < count; start += kPiece) {
    piece.resize(std::min(kPiece, count - start));
    uint64_t offset = data_begin + entry.begin + start * sizeof(Stored);
    source.read(offset, piece.data(), piece.size() * sizeof(Stored));
    for (size_t i = 0; i < piece.size(); ++i) {
      to[start + i] = convert(piece[i], offset + i * sizeof(Stored));
    }
  }
  return result;
}

Tensor ReadPlain(const Source& source, const TensorEntry& entry, uint64_t data_begin, DType dtype) {
  Tensor result(entry.shape, dtype);
  source.read(data_begin + entry.begin, result.raw(), entry.end - entry.begin);
  return result;
}

template <class Stored, class Result>
Tensor Widen(const Source& source, const TensorEntry& entry, uint64_t data_begin) {
  return Convert<Stored, Result>(source, entry, data_begin,
                                 [](Stored x, uint64_t) { return static_cast<Result>(x); });
}

Tensor ReadTensor(const Source& s, const TensorEntry& entry, uint64_t data_begin) {
  const std::string& dtype = entry.dtype;
  if (dtype == "F32") return ReadPlain(s, entry, data_begin, DType::kF32);
  if (dtype == "F64") return ReadPlain(s, entry, data_begin, DType::kF64);
  if (dtype == "I32") return ReadPlain(s, entry, data_begin, DType::kI32);
  if (dtype == "I64") return ReadPlain(s, entry, data_begin, DType::kI64);
  if (dtype == "U8") return Widen<uint8_t, int32_t>(s, entry, data_begin);
  if (dtype == "I8") return Widen<int8_t, int32_t>(s, entry, data_begin);
  if (dtype == "U16") return Widen<uint16_t, int32_t>(s, entry, data_begin);
  if (dtype == "I16") return Widen<int16_t, int32_t>(s, entry, data_begin);
  if (dtype == "U32") return Widen<uint32_t, int64_t>(s, entry, data_begin);
  if (dtype == "F16") {
    return Convert<uint16_t, float>(s, entry, data_begin,
                                    [](uint16_t x, uint64_t) { return HalfToFloat(x); });
  }
  if (dtype == "BF16") {
    return Convert<uint16_t, float>(s, entry, data_begin,
                                    [](uint16_t x, uint64_t) { return BrainToFloat(x); });
  }
  if (dtype == "BOOL") {
    return Convert<uint8_t, int32_t>(s, entry, data_begin, [&](uint8_t x, uint64_t byte) {
      if (x > 1) {
        Fail<FileError>("{}: tensor {}: boolean with value {} at byte {}", s.name,
                        Quoted(entry.name), x, byte);
      }
      return int32_t{x};
    });
  }
  if (dtype == "U64") {
    return Convert<uint64_t, int64_t>(s, entry, data_begin, [&](uint64_t x, uint64_t byte) {
      if (x > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        Fail<FileError>("{}: tensor {}: value {} at byte {} is above 2^63 - 1", s.name,
                        Quoted(entry.name), x, byte);
      }
      return static_cast<int64_t>(x);
    });
  }
  Fail<InternalError>("{}: dtype {} passed the header check but cannot be loaded", s.name, dtype);
}

TensorFileHeader ReadHeader(const Source& source) {
  Check<FileError>(source.size >= 8, "{}: {} bytes, too short for a safetensors file", source.name,
                   source.size);
  uint64_t length;
  source.read(0, &length, 8);
  CheckSafetensorsHeaderLength(length, source.size, source.name);
  std::string json(length, '\0');
  source.read(8, json.data(), length);
  return ParseSafetensorsHeader(json, source.size - 8 - length, source.name);
}

TensorFile ReadAll(const Source& source,
                   const std::function<bool(const TensorEntry&)>& wanted = {}) {
  TensorFileHeader header = ReadHeader(source);
  TensorFile result;
  for (const TensorEntry& entry : header.entries) {
    if (wanted && !wanted(entry)) continue;
    result.tensors.emplace(entry.name, ReadTensor(source, entry, header.data_begin));
    if (entry.dtype == "F16") result.formats.emplace(entry.name, FloatFormat::kF16);
    if (entry.dtype == "BF16") result.formats.emplace(entry.name, FloatFormat::kBF16);
  }
  result.metadata = std::move(header.metadata);
  return result;
}

Source FileSource(const InputFile& file) {
  return {file.name(), file.size(),
          [&file](uint64_t offset, void* data, uint64_t size) { file.ReadAt(offset, data, size); }};
}

// The file's name of a dtype and its place among the tensors: the reference writer orders by
// alignment first, within it by the order of its list of dtypes.
struct StoredType {
  std::string_view name;
  int order;
  int64_t size;
};
StoredType StoredTypeOf(DType dtype, FloatFormat format) {
  switch (dtype) {
    case DType::kI64:
      return {"I64", 0, 8};
    case DType::kF64:
      return {"F64", 1, 8};
    case DType::kF32:
      if (format == FloatFormat::kBF16) return {"BF16", 4, 2};
      if (format == FloatFormat::kF16) return {"F16", 5, 2};
      return {"F32", 2, 4};
    case DType::kI32:
      return {"I32", 3, 4};
  }
  Fail<InternalError>("safetensors: dtype number {}", static_cast<int>(dtype));
}

std::string JsonString(const std::string& text, const char* what) {
  Check(IsUtf8(text), "safetensors: {} {} is not UTF-8", what, Quoted(text));
  return JsonText(text);
}

}  // namespace

TensorFile ReadSafetensors(const std::filesystem::path& path) {
  InputFile file(path);
  return ReadAll(FileSource(file));
}

TensorFile ReadSafetensors(const std::filesystem::path& path,
                           const std::function<bool(const TensorEntry&)>& wanted) {
  InputFile file(path);
  return ReadAll(FileSource(file), wanted);
}

TensorFileHeader ReadSafetensorsHeader(const std::filesystem::path& path) {
  InputFile file(path);
  return ReadHeader(FileSource(file));
}

TensorFile ParseSafetensors(std::string_view bytes, const std::string& name) {
  return ReadAll({name, bytes.size(), [&](uint64_t offset, void* data, uint64_t size) {
                    Check<InternalError>(offset <= bytes.size() && size <= bytes.size() - offset,
                                         "safetensors: read past the end");
                    if (size > 0) std::memcpy(data, bytes.data() + offset, size);
                  }});
}

FloatFormat ParseFloatFormat(std::string_view name) {
  for (auto [known, format] :
       {std::pair("float32", FloatFormat::kF32), std::pair("fp32", FloatFormat::kF32),
        std::pair("float16", FloatFormat::kF16), std::pair("fp16", FloatFormat::kF16),
        std::pair("half", FloatFormat::kF16), std::pair("bfloat16", FloatFormat::kBF16),
        std::pair("bf16", FloatFormat::kBF16)}) {
    if (name == known) return format;
  }
  Fail("dtype `{}` is not known; there are float32, float16 and bfloat16", name);
}

void TensorFile::SetFormat(FloatFormat format) {
  formats.clear();
  if (format == FloatFormat::kF32) return;
  for (const auto& [name, tensor] : tensors) {
    if (tensor.dtype() == DType::kF32) formats[name] = format;
  }
}

SafetensorsLayout LayOutSafetensors(const TensorFile& file) {
  std::map<std::string, std::string> metadata = file.metadata;
  metadata.emplace("format", "pt");
  std::string json = "{\"__metadata__\":{";
  const char* comma = "";
  for (const auto& [key, value] : metadata) {
    json += fmt::format("{}{}:{}", comma, JsonString(key, "metadata key"),
                        JsonString(value, "metadata value"));
    comma = ",";
  }
  json += "}";
  for (const auto& [name, format] : file.formats) {
    auto tensor = file.tensors.find(name);
    Check(tensor != file.tensors.end() && tensor->second.dtype() == DType::kF32,
          "safetensors: a format is given for {}, which is no f32 tensor of the file",
          Quoted(name));
  }
  struct Stored {
    std::string name;
    Tensor tensor;
    FloatFormat format;
    StoredType type;
  };
  std::vector<Stored> order;
  for (const auto& [name, tensor] : file.tensors) {
    Check(tensor.defined(), "safetensors: tensor {} is undefined", Quoted(name));
    auto found = file.formats.find(name);
    FloatFormat format = found == file.formats.end() ? FloatFormat::kF32 : found->second;
    order.push_back({name, tensor, format, StoredTypeOf(tensor.dtype(), format)});
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const Stored& a, const Stored& b) { return a.type.order < b.type.order; });
  SafetensorsLayout layout;
  int64_t position = 0;
  for (const auto& [name, tensor, format, type] : order) {
    Check(name != "__metadata__" && name.size() <= kMaxTensorName &&
              name.find('\0') == std::string::npos,
          "safetensors: {} cannot name a tensor", Quoted(name));
    int64_t end = CheckedAdd(position, CheckedMul(tensor.elements(), type.size, "safetensors file"),
                             "safetensors file");
    std::string dims;
    for (int64_t dim : tensor.shape()) dims += fmt::format("{}{}", dims.empty() ? "" : ",", dim);
    json += fmt::format(",{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        JsonString(name, "tensor name"), type.name, dims, position, end);
    position = end;
    layout.data.push_back(tensor);
    layout.formats.push_back(format);
  }
  json += "}";
  json.resize((json.size() + 7) / 8 * 8, ' ');
  Check(json.size() <= kMaxSafetensorsHeader,
        "safetensors: the header would have {} bytes, limit {}", json.size(),
        kMaxSafetensorsHeader);
  uint64_t length = json.size();
  layout.header.assign(reinterpret_cast<const char*>(&length), 8);
  layout.header += json;
  return layout;
}

void SafetensorsLayout::WriteData(const std::function<void(const void*, uint64_t)>& sink) const {
  constexpr int64_t kPiece = 1 << 16;
  std::vector<uint16_t> piece;
  for (size_t i = 0; i < data.size(); ++i) {
    const Tensor& tensor = data[i];
    if (formats[i] == FloatFormat::kF32) {
      sink(tensor.raw(), static_cast<uint64_t>(tensor.bytes()));
      continue;
    }
    auto convert = formats[i] == FloatFormat::kF16 ? FloatToHalf : FloatToBrain;
    for (int64_t start = 0; start < tensor.elements(); start += kPiece) {
      piece.resize(static_cast<size_t>(std::min(kPiece, tensor.elements() - start)));
      const float* from = tensor.data() + start;
      for (size_t k = 0; k < piece.size(); ++k) piece[k] = convert(from[k]);
      sink(piece.data(), piece.size() * sizeof(uint16_t));
    }
  }
}

void WriteSafetensors(const std::filesystem::path& path, const TensorFile& file) {
  SafetensorsLayout layout = LayOutSafetensors(file);
  AtomicFile out(path);
  out.Write(layout.header);
  layout.WriteData([&](const void* data, uint64_t size) { out.Write(data, size); });
  out.Commit();
}

std::string FormatSafetensors(const TensorFile& file) {
  SafetensorsLayout layout = LayOutSafetensors(file);
  std::string bytes = std::move(layout.header);
  layout.WriteData([&](const void* data, uint64_t size) {
    bytes.append(static_cast<const char*>(data), static_cast<size_t>(size));
  });
  return bytes;
}

}  // namespace calotype
