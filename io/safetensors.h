// safetensors files: named tensors and string metadata, the exchange format with PyTorch and
// diffusers. Layout: u64 length n (little-endian), n bytes of JSON header, then the data; the
// header gives dtype, shape and byte range of each tensor.
//
// The reader trusts nothing. It refuses: a header longer than 100,000,000 bytes or than the file;
// JSON that is not exactly the format's (duplicate names or keys, numbers that are
// not plain unsigned integers, control characters, byte order mark); names with NUL or longer than
// 65,535 bytes; ranks above 8 and sizes that overflow (zeros count as ones there); byte ranges that
// do not fit shape and dtype or do not tile the data exactly, without hole, overlap or trailing
// bytes; booleans other than 0 and 1. This is stricter than the Rust reference in nine of the 95
// cases of tests/io_test.cc. No memory is taken from a number that has not been checked against the
// file's size.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace calotype {

// How floating-point tensors stand in a file; in memory they are f32.
enum class FloatFormat : uint8_t { kF32, kF16, kBF16 };
// PyTorch's names float32, float16 and bfloat16, also fp32, fp16, half and bf16. Errors:
// ValueError.
FloatFormat ParseFloatFormat(std::string_view name);

struct TensorFile {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
  // Of f32 tensors that stand in the file in another format than F32.
  std::map<std::string, FloatFormat> formats = {};

  // All f32 tensors in this format.
  void SetFormat(FloatFormat format);
};

// What a header says of one tensor, before conversion.
struct TensorEntry {
  std::string name;
  std::string dtype;  // the file's name, "F16"
  Shape shape;
  uint64_t begin = 0, end = 0;  // byte range, counted from the start of the data
};

struct TensorFileHeader {
  std::vector<TensorEntry> entries;  // in order of their data
  std::map<std::string, std::string> metadata;
  uint64_t data_begin = 0;  // byte of the file where the data starts
};

// Loads every tensor. F32, F64, I32 and I64 are kept; F16 and BF16 become f32 (exactly); BOOL, U8,
// I8, U16 and I16 become i32; U32 and U64 become i64. Errors: FileError naming the file and the
// tensor or byte, also for other dtypes and for U64 values above 2^63 - 1.
TensorFile ReadSafetensors(const std::filesystem::path& path);
// Only the tensors that `wanted` says; the others' data is not read.
TensorFile ReadSafetensors(const std::filesystem::path& path,
                           const std::function<bool(const TensorEntry&)>& wanted);
// The same for a file in memory; `name` stands for the path in messages.
TensorFile ParseSafetensors(std::string_view bytes, const std::string& name);
// Only the header: names, dtypes and shapes without the data.
TensorFileHeader ReadSafetensorsHeader(const std::filesystem::path& path);

// A file as it will be written: the first bytes (length and header), then the tensors' bytes in
// order. The form is canonical, byte for byte that of the reference writer: metadata first, tensors
// by dtype (I64, F64, F32, I32, BF16, F16) and name, header padded with spaces to 8 bytes. Metadata
// gets "format": "pt" unless it has a format. Errors: ValueError for a name or metadata that the
// reader would refuse, an undefined tensor, or a format of a tensor that is not there or not f32.
struct SafetensorsLayout {
  std::string header;
  std::vector<Tensor> data;
  std::vector<FloatFormat> formats;  // of the data
  // Passes the bytes of all data to `sink` in order, halves rounded as io/half.h says.
  void WriteData(const std::function<void(const void*, uint64_t)>& sink) const;
};
SafetensorsLayout LayOutSafetensors(const TensorFile& file);

// Writes atomically and synced. Errors: as LayOutSafetensors; FileError.
void WriteSafetensors(const std::filesystem::path& path, const TensorFile& file);
// The bytes that WriteSafetensors writes.
std::string FormatSafetensors(const TensorFile& file);

}  // namespace calotype
