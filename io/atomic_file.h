// Writing files so that a reader sees the old content or the new one, never a part. The data goes
// to a temporary file in the same folder, which is renamed over the target. With
// Durability::kSynced the file and then the folder are synced: once Commit returns, the new content
// survives kill -9 and loss of power on a file system that honours fsync. On any failure the
// temporary file is removed and the old file is as it was.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace calotype {

enum class Durability {
  kSynced,   // fsync of file and folder: checkpoints, weights
  kRenamed,  // rename only: pictures, which can be made again
};

class AtomicFile {
 public:
  // Opens a temporary file `.NAME.tmp.PID.COUNT` beside `path`. Errors: FileError, for example if
  // the folder is missing or read-only, or if there is a folder, device or pipe of that name.
  explicit AtomicFile(const std::filesystem::path& path,
                      Durability durability = Durability::kSynced);
  // Without Commit the temporary file is removed and `path` is untouched.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Appends. Errors: FileError, for example if the disk is full.
  void Write(const void* data, uint64_t size);
  void Write(std::string_view bytes) { Write(bytes.data(), bytes.size()); }
  // Makes the content appear under the path. Errors: FileError.
  void Commit();

 private:
  void Discard() noexcept;
  [[noreturn]] void FailWith(const char* action, int error);

  std::filesystem::path path_, temporary_;
  Durability durability_;
  int descriptor_ = -1;
};

// AtomicFile with these bytes, committed. Errors: FileError.
void WriteFile(const std::filesystem::path& path, std::string_view bytes,
               Durability durability = Durability::kSynced);

// Removes the temporary files that killed processes left in `folder`; those of living writers are
// locked and stay. Returns how many were removed.
int RemoveStaleTemporaries(const std::filesystem::path& folder);

}  // namespace calotype
