#include "io/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <system_error>

#include "core/error.h"
#include "core/sha256.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/safetensors.h"

namespace calotype {

namespace {

constexpr const char* kStepKey = "calotype.step";
constexpr const char* kHashKey = "calotype.sha256";
constexpr size_t kHashDigits = 64;

// Where the digest stands in the first bytes of a file. The pattern has unescaped quotes, so no
// string value of the header can contain it.
size_t DigestPosition(std::string_view head) {
  std::string pattern = fmt::format("\"{}\":\"", kHashKey);
  size_t at = head.find(pattern);
  if (at == std::string_view::npos || head.size() - at < pattern.size() + kHashDigits) {
    return std::string_view::npos;
  }
  return at + pattern.size();
}

std::optional<int64_t> StepOfName(const std::string& name) {
  std::string_view text = name, prefix = "checkpoint-", suffix = ".safetensors";
  if (!text.starts_with(prefix) || !text.ends_with(suffix) ||
      text.size() <= prefix.size() + suffix.size()) {
    return {};
  }
  text = text.substr(prefix.size(), text.size() - prefix.size() - suffix.size());
  int64_t step = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), step);
  // Only the spelling that CheckpointPath gives: no sign, no leading zeros.
  if (error != std::errc() || fmt::format("{}", step) != text || step < 0) return {};
  return step;
}

// The digest of the file with the 64 digits of the digest itself taken as zeros.
void VerifyDigest(const InputFile& file) {
  uint64_t length = 0;
  Check<FileError>(file.size() >= 8, "{}: {} bytes, not a checkpoint", file.name(), file.size());
  file.ReadAt(0, &length, 8);
  Check<FileError>(length <= file.size() - 8, "{}: damaged: header of {} bytes in a file of {}",
                   file.name(), length, file.size());
  std::string head(8 + length, '\0');
  file.ReadAt(0, head.data(), head.size());
  size_t at = DigestPosition(head);
  Check<FileError>(at != std::string::npos, "{}: not a checkpoint (no {})", file.name(), kHashKey);
  std::string stored = head.substr(at, kHashDigits);
  head.replace(at, kHashDigits, kHashDigits, '0');
  Sha256 hash;
  hash.Update(head);
  std::vector<char> piece(1 << 18);
  for (uint64_t offset = head.size(); offset < file.size(); offset += piece.size()) {
    uint64_t n = std::min<uint64_t>(piece.size(), file.size() - offset);
    file.ReadAt(offset, piece.data(), n);
    hash.Update(piece.data(), n);
  }
  std::string actual = hash.Finish();
  Check<FileError>(actual == stored, "{}: damaged: SHA-256 is {}, the file says {}", file.name(),
                   actual, Quoted(stored));
}

}  // namespace

std::filesystem::path CheckpointPath(const std::filesystem::path& folder, int64_t step) {
  Check(step >= 0, "checkpoint: step {} is negative", step);
  return folder / fmt::format("checkpoint-{}.safetensors", step);
}

std::vector<int64_t> ListCheckpoints(const std::filesystem::path& folder) {
  std::vector<int64_t> steps;
  std::error_code error;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    if (auto step = StepOfName(it->path().filename().string())) steps.push_back(*step);
  }
  Check<FileError>(!error || error == std::errc::no_such_file_or_directory,
                   "{}: cannot list checkpoints: {}", folder.string(), error.message());
  std::sort(steps.begin(), steps.end());
  return steps;
}

void WriteCheckpoint(const std::filesystem::path& folder, const Checkpoint& checkpoint, int keep) {
  std::filesystem::path path = CheckpointPath(folder, checkpoint.step);
  Check(keep >= 0, "checkpoint: keep = {}, must be 0 (all) or more", keep);
  TensorFile file{checkpoint.tensors, checkpoint.metadata};
  bool free = file.metadata.emplace(kStepKey, fmt::format("{}", checkpoint.step)).second &&
              file.metadata.emplace(kHashKey, std::string(kHashDigits, '0')).second;
  Check(free, "checkpoint: the metadata keys {} and {} are taken", kStepKey, kHashKey);
  SafetensorsLayout layout = LayOutSafetensors(file);
  Sha256 hash;
  hash.Update(layout.header);
  layout.WriteData([&](const void* data, uint64_t size) { hash.Update(data, size); });
  size_t at = DigestPosition(layout.header);
  Check<InternalError>(at != std::string::npos, "checkpoint: no place for the digest");
  layout.header.replace(at, kHashDigits, hash.Finish());

  AtomicFile out(path);
  out.Write(layout.header);
  layout.WriteData([&](const void* data, uint64_t size) { out.Write(data, size); });
  out.Commit();

  // The new file is durable: only now may older ones go.
  RemoveStaleTemporaries(folder);
  if (keep == 0) return;
  std::vector<int64_t> older = ListCheckpoints(folder);
  std::erase_if(older, [&](int64_t step) { return step >= checkpoint.step; });
  for (size_t i = 0; i + (keep - 1) < older.size(); ++i) {
    std::error_code error;
    std::filesystem::path old = CheckpointPath(folder, older[i]);
    std::filesystem::remove(old, error);
    Check<FileError>(!error, "{}: cannot remove the old checkpoint: {}", old.string(),
                     error.message());
  }
}

Checkpoint ReadCheckpoint(const std::filesystem::path& path) {
  VerifyDigest(InputFile(path));
  TensorFile file = ReadSafetensors(path);
  Checkpoint result;
  const std::string& step = file.metadata[kStepKey];
  auto [end, error] = std::from_chars(step.data(), step.data() + step.size(), result.step);
  Check<FileError>(error == std::errc() && end == step.data() + step.size() && result.step >= 0,
                   "{}: not a checkpoint ({} is {})", path.string(), kStepKey, Quoted(step));
  file.metadata.erase(kStepKey);
  file.metadata.erase(kHashKey);
  file.metadata.erase("format");
  result.tensors = std::move(file.tensors);
  result.metadata = std::move(file.metadata);
  return result;
}

std::optional<Checkpoint> ReadLatestCheckpoint(
    const std::filesystem::path& folder, const std::function<void(const std::string&)>& warn) {
  std::vector<int64_t> steps = ListCheckpoints(folder);
  if (steps.empty()) return {};
  for (size_t i = steps.size(); i-- > 0;) {
    try {
      Checkpoint checkpoint = ReadCheckpoint(CheckpointPath(folder, steps[i]));
      Check<FileError>(checkpoint.step == steps[i], "{}: holds step {}, was it renamed?",
                       CheckpointPath(folder, steps[i]).string(), checkpoint.step);
      return checkpoint;
    } catch (const FileError& error) {
      if (warn) warn(fmt::format("checkpoint skipped: {}", error.what()));
    }
  }
  Fail<FileError>("{}: none of the {} checkpoints is whole", folder.string(), steps.size());
}

}  // namespace calotype
