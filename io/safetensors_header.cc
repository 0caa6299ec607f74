#include "io/safetensors_header.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>

#include "core/error.h"
#include "io/file.h"

namespace calotype {

namespace {

constexpr uint64_t kMaxElements = uint64_t{1} << 48;

// Accepts exactly the grammar of the format, event by event, so that no other structure (depth,
// duplicates) is ever built in memory.
class HeaderHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderHandler(const std::string& file) : file_(file) {}

  TensorFileHeader Take() && { return std::move(header_); }

  bool null() override {
    // The reference takes "__metadata__": null for no metadata.
    return Skipped() || (state_ == State::kRoot && key_ == "__metadata__") || Unexpected("null");
  }
  bool boolean(bool) override { return Skipped() || Unexpected("a boolean"); }
  bool number_integer(number_integer_t) override {
    return Skipped() || Unexpected("a negative number");
  }
  bool number_float(number_float_t, const string_t& text) override {
    return Skipped() || Unexpected(fmt::format("the number {}", Quoted(text)));
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (Skipped()) return true;
    if (state_ == State::kShape) {
      Check<FileError>(dims_->size() < Shape::kMaxRank, "{}: tensor {}: rank above {}", file_,
                       Quoted(key_), Shape::kMaxRank);
      Check<FileError>(value <= kMaxElements, "{}: tensor {}: a size of {} is above the limit {}",
                       file_, Quoted(key_), value, kMaxElements);
      dims_->push_back(static_cast<int64_t>(value));
      return true;
    }
    if (state_ == State::kOffsets) {
      Check<FileError>(offsets_->size() < 2, "{}: tensor {}: more than two data_offsets", file_,
                       Quoted(key_));
      offsets_->push_back(value);
      return true;
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) override {
    if (Skipped()) return true;
    if (state_ == State::kMetadata) {
      header_.metadata[key_] = value;
    } else if (state_ == State::kTensor && field_ == "dtype") {
      dtype_ = value;
    } else {
      return Unexpected("a string");
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (Skipped()) return Deeper();
    if (state_ == State::kStart) {
      state_ = State::kRoot;
    } else if (state_ == State::kRoot) {
      state_ = key_ == "__metadata__" ? State::kMetadata : State::kTensor;
      field_.clear();
      dtype_.reset(), dims_.reset(), offsets_.reset();
    } else {
      return Unexpected("an object");
    }
    return true;
  }

  bool key(string_t& name) override {
    if (skip_depth_ > 0) return true;
    if (state_ == State::kRoot) {
      key_ = name;
      Check<FileError>(names_.insert(name).second, "{}: duplicate name {}", file_, Quoted(name));
      Check<FileError>(name.size() <= kMaxTensorName, "{}: tensor name {} is too long", file_,
                       Quoted(name));
      Check<FileError>(name.find('\0') == std::string::npos, "{}: tensor name {} has a NUL", file_,
                       Quoted(name));
    } else if (state_ == State::kMetadata) {
      key_ = name;
      Check<FileError>(!header_.metadata.contains(name), "{}: duplicate metadata key {}", file_,
                       Quoted(name));
    } else {
      field_ = name;
      bool seen = (name == "dtype" && dtype_) || (name == "shape" && dims_) ||
                  (name == "data_offsets" && offsets_);
      Check<FileError>(!seen, "{}: tensor {}: duplicate field {}", file_, Quoted(key_), name);
    }
    return true;
  }

  bool end_object() override {
    if (skip_depth_ > 0) return Shallower();
    if (state_ == State::kTensor) FinishTensor();
    state_ = state_ == State::kRoot ? State::kEnd : State::kRoot;
    return true;
  }

  bool start_array(std::size_t) override {
    if (Skipped()) return Deeper();
    if (state_ == State::kTensor && field_ == "shape") {
      state_ = State::kShape;
      dims_.emplace();
    } else if (state_ == State::kTensor && field_ == "data_offsets") {
      state_ = State::kOffsets;
      offsets_.emplace();
    } else {
      return Unexpected("an array");
    }
    return true;
  }

  bool end_array() override {
    if (skip_depth_ > 0) return Shallower();
    state_ = State::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    std::string_view text = error.what();
    size_t start = text.find("syntax error");
    if (start != std::string_view::npos) text.remove_prefix(start);
    Fail<FileError>("{}: header is not valid JSON at byte {}: {}", file_, position + 7,
                    Quoted(text));
  }

 private:
  // What the next value belongs to.
  enum class State { kStart, kRoot, kMetadata, kTensor, kShape, kOffsets, kEnd };

  // True if the value belongs to a field of a tensor that the format does not have (yet); those are
  // ignored, as the reference does, down to a limited depth.
  bool Skipped() const {
    return skip_depth_ > 0 || (state_ == State::kTensor && field_ != "dtype" && field_ != "shape" &&
                               field_ != "data_offsets");
  }
  bool Deeper() {
    constexpr int kMaxDepth = 32;
    Check<FileError>(++skip_depth_ <= kMaxDepth, "{}: tensor {}: nesting deeper than {}", file_,
                     Quoted(key_), kMaxDepth);
    return true;
  }
  bool Shallower() {
    --skip_depth_;
    return true;
  }

  [[noreturn]] bool Unexpected(const std::string& what) const {
    const char* where = state_ == State::kStart      ? "as the header (an object is expected)"
                        : state_ == State::kMetadata ? "in __metadata__ (strings are expected)"
                        : state_ == State::kShape    ? "in a shape (unsigned integers are expected)"
                        : state_ == State::kOffsets
                            ? "in data_offsets (two unsigned integers are expected)"
                        : state_ == State::kTensor ? "in a tensor's description"
                                                   : "instead of a tensor's description";
    Fail<FileError>("{}: {}: unexpected {} {}", file_, Quoted(key_), what, where);
  }

  void FinishTensor() {
    std::string tensor = Quoted(key_);
    Check<FileError>(dtype_.has_value(), "{}: tensor {}: no dtype", file_, tensor);
    Check<FileError>(dims_.has_value(), "{}: tensor {}: no shape", file_, tensor);
    Check<FileError>(offsets_.has_value(), "{}: tensor {}: no data_offsets", file_, tensor);
    Check<FileError>(offsets_->size() == 2, "{}: tensor {}: {} data_offsets instead of two", file_,
                     tensor, offsets_->size());
    uint64_t item = StoredSize(*dtype_);
    Check<FileError>(item != 0, "{}: tensor {}: dtype {} is not supported", file_, tensor,
                     Quoted(*dtype_));
    // Zeros count as ones, so that the order of the sizes cannot hide an overflow; all factors are
    // at most 2^48 here, the quotient keeps the product there too.
    uint64_t product = 1;
    bool empty = false;
    for (int64_t dim : *dims_) {
      uint64_t size = std::max<uint64_t>(static_cast<uint64_t>(dim), 1);
      Check<FileError>(product <= kMaxElements / size,
                       "{}: tensor {}: the shape has more than {} elements", file_, tensor,
                       kMaxElements);
      product *= size;
      empty |= dim == 0;
    }
    uint64_t bytes = empty ? 0 : product * item;
    uint64_t begin = (*offsets_)[0], end = (*offsets_)[1];
    Check<FileError>(begin <= end && end - begin == bytes,
                     "{}: tensor {}: data_offsets [{}, {}) do not hold the {} bytes of {} {}",
                     file_, tensor, begin, end, bytes, *dtype_, Shape(*dims_).ToString());
    header_.entries.push_back({key_, *dtype_, Shape(*dims_), begin, end});
  }

  const std::string& file_;
  TensorFileHeader header_;
  State state_ = State::kStart;
  std::set<std::string> names_;
  std::string key_, field_;
  int skip_depth_ = 0;
  std::optional<std::string> dtype_;
  std::optional<std::vector<int64_t>> dims_;
  std::optional<std::vector<uint64_t>> offsets_;
};

}  // namespace

uint64_t StoredSize(std::string_view dtype) {
  if (dtype == "BOOL" || dtype == "U8" || dtype == "I8") return 1;
  if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") return 2;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  return 0;
}

uint64_t CheckSafetensorsHeaderLength(uint64_t length, uint64_t file_size,
                                      const std::string& file) {
  Check<FileError>(length <= kMaxSafetensorsHeader, "{}: header length {} is above the limit {}",
                   file, length, kMaxSafetensorsHeader);
  Check<FileError>(length <= file_size - 8,
                   "{}: header of {} bytes does not fit the file of {} bytes", file, length,
                   file_size);
  Check<FileError>(length >= 2, "{}: header length {}, at least 2 is needed", file, length);
  return length;
}

TensorFileHeader ParseSafetensorsHeader(std::string_view header, uint64_t data_size,
                                        const std::string& file) {
  // The JSON parser would skip a byte order mark, stop at NUL and allow nothing else below space
  // outside strings; say where.
  Check<FileError>(!header.starts_with("\xef\xbb\xbf"), "{}: byte order mark at byte 8", file);
  for (size_t i = 0; i < header.size(); ++i) {
    unsigned char c = static_cast<unsigned char>(header[i]);
    if (c < 0x20 && c != '\t' && c != '\n' && c != '\r') [[unlikely]] {
      Fail<FileError>("{}: control character 0x{:02x} in the header at byte {}", file, c, i + 8);
    }
  }
  HeaderHandler handler(file);
  nlohmann::json::sax_parse(header.begin(), header.end(), &handler);
  TensorFileHeader result = std::move(handler).Take();
  auto& entries = result.entries;
  std::stable_sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  uint64_t position = 0;
  for (const TensorEntry& entry : entries) {
    Check<FileError>(entry.begin == position,
                     "{}: tensor {} starts at data byte {}, expected {} ({})", file,
                     Quoted(entry.name), entry.begin, position,
                     entry.begin > position ? "a hole" : "an overlap");
    position = entry.end;
  }
  Check<FileError>(position == data_size, "{}: the tensors end at data byte {}, the file has {}",
                   file, position, data_size);
  result.data_begin = 8 + header.size();
  return result;
}

}  // namespace calotype
