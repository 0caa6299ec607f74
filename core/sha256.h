// SHA-256 (FIPS 180-4), to detect damaged files. Not used for secrets.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace calotype {

class Sha256 {
 public:
  Sha256();
  void Update(const void* data, uint64_t size);  // appends to what is hashed
  void Update(std::string_view bytes) { Update(bytes.data(), bytes.size()); }
  // The digest as 64 lower-case hexadecimal digits. Call once, last.
  std::string Finish();

 private:
  void Block(const uint8_t* data);

  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> buffer_{};
  uint64_t total_ = 0;  // bytes so far
};

std::string Sha256Of(std::string_view bytes);  // as Finish, of these bytes alone

}  // namespace calotype
