// The header of a safetensors file: parsing and checking, without touching the data. Private to io.
#pragma once

#include <string>
#include <string_view>

#include "io/safetensors.h"

namespace calotype {

constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;
constexpr size_t kMaxTensorName = 65'535;

// Bytes of one element of a dtype of the format that we load; 0 for every other.
uint64_t StoredSize(std::string_view dtype);

// The length field. Errors: FileError unless 2 <= length <= min(limit, file_size - 8).
uint64_t CheckSafetensorsHeaderLength(uint64_t length, uint64_t file_size, const std::string& file);

// `header` is the JSON text, `data_size` the number of bytes behind it. Errors: FileError.
TensorFileHeader ParseSafetensorsHeader(std::string_view header, uint64_t data_size,
                                        const std::string& file);

}  // namespace calotype
