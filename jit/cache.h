// The compile cache: a folder of machine code from earlier compilations. An entry is found by a
// text that says everything it depends on (the structure of the kernel, the processor, the
// versions of LLVM and of the code generator) and is accepted only if that whole text and a SHA-256
// over all of the file are right; anything else counts as missing and is written anew. Entries are
// made in a temporary file and renamed, so processes may share the folder. The hash finds damage;
// it is no signature: whoever may write to the folder can make this program run code, so a folder
// that other users may write to is an error.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

namespace calotype::jit {

// Names the version of Calotype and the sources of the code generator: entries of another build are
// never used.
extern const char* const kBuildId;

struct CacheStats {
  int64_t hits = 0;
  int64_t misses = 0;   // no entry, or one that was refused
  int64_t refused = 0;  // damaged, of another key, of another owner, or writable for others
  int64_t stored = 0;
  int64_t unstored = 0;  // could not be written, for example because the disk is full
  int64_t evicted = 0;   // removed to keep the folder within its size and number of entries
  std::string problem;   // why the last of `refused` and `unstored` happened
};

class CompileCache {
 public:
  static constexpr int64_t kMaxBytes = int64_t{2} << 30;
  static constexpr int64_t kMaxEntries = 8192;  // reading the folder takes time with each

  // Makes the folder, for this user alone, if it is missing. Errors: FileError, naming what to do,
  // if it cannot be made or opened, is no folder but a link, belongs to another user, may be
  // written by other users, or is read-only.
  explicit CompileCache(const std::filesystem::path& folder, int64_t max_bytes = kMaxBytes);
  // In the folder CALOTYPE_CACHE; without the variable in $XDG_CACHE_HOME/calotype or
  // ~/.cache/calotype. Null with CALOTYPE_CACHE=off, or if neither those variables nor HOME name a
  // folder. Errors: as above.
  static std::unique_ptr<CompileCache> FromEnvironment();
  ~CompileCache();
  CompileCache(const CompileCache&) = delete;
  CompileCache& operator=(const CompileCache&) = delete;

  // The data stored under `key`; marks the entry as used now. Threads may call Find and Store at
  // once.
  std::optional<std::string> Find(std::string_view key);
  // Replaces what is stored under `key`. A failure only counts: the cache saves time and nothing
  // depends on it.
  void Store(std::string_view key, std::string_view data);
  // Counts data that Find returned as refused, because its content is not acceptable.
  void Refuse(const std::string& problem);
  // Removes the entries that were not used for longest until the folder is within its size and
  // kMaxEntries, and what killed processes left behind. Call after storing.
  void Trim();

  CacheStats Stats() const;
  const std::filesystem::path& folder() const { return folder_; }

 private:
  std::optional<std::string> Read(const std::string& name, std::string_view key,
                                  std::string& problem) const;

  std::filesystem::path folder_;
  int64_t max_bytes_;
  int descriptor_ = -1;
  mutable std::mutex mutex_;
  CacheStats stats_;
};

}  // namespace calotype::jit
