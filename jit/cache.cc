#include "jit/cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <vector>

#include "core/error.h"
#include "core/sha256.h"

namespace calotype::jit {

namespace {

namespace fs = std::filesystem;

// An entry: this line, the key, a line end, the data, and the SHA-256 of all before it as 64
// hexadecimal digits. The reader knows the key, so nothing in the file has to be parsed.
constexpr std::string_view kMagic = "calotype compile cache 1\n";
constexpr size_t kDigest = 64;
constexpr std::string_view kSuffix = ".entry", kTemporary = ".tmp";
constexpr int64_t kMaxEntryBytes = int64_t{256} << 20;
// A temporary file this old belongs to no living writer.
constexpr int64_t kStaleSeconds = 3600;

std::string Reason(int error) { return std::generic_category().message(error); }

struct File {
  explicit File(int descriptor) : descriptor(descriptor) {}
  ~File() {
    if (descriptor >= 0) close(descriptor);
  }
  File(const File&) = delete;
  int descriptor;
};

[[noreturn]] void FailFolder(const fs::path& folder, const std::string& problem) {
  Fail<FileError>(
      "compile cache: {} {}; correct it, or set CALOTYPE_CACHE to a folder of your own or to off",
      folder.string(), problem);
}

std::string Start(std::string_view key) {
  std::string start(kMagic);
  start += key;
  return start += '\n';
}

std::string NameOf(std::string_view key) { return Sha256Of(key) + std::string(kSuffix); }

bool WriteAll(int descriptor, std::string_view bytes) {
  while (!bytes.empty()) {
    ssize_t n = write(descriptor, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

}  // namespace

CompileCache::CompileCache(const fs::path& folder, int64_t max_bytes)
    : folder_(folder), max_bytes_(max_bytes) {
  std::error_code error;
  if (folder_.has_parent_path()) fs::create_directories(folder_.parent_path(), error);
  if (mkdir(folder_.c_str(), 0700) != 0 && errno != EEXIST) {
    FailFolder(folder_, fmt::format("cannot be made: {}", Reason(errno)));
  }
  File opened(open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (opened.descriptor < 0) {
    FailFolder(folder_, errno == ELOOP || errno == ENOTDIR
                            ? "is not a folder of its own (a link or a file)"
                            : fmt::format("cannot be opened: {}", Reason(errno)));
  }
  struct stat info;
  if (fstat(opened.descriptor, &info) != 0) FailFolder(folder_, Reason(errno));
  if (info.st_uid != geteuid()) {
    FailFolder(folder_, fmt::format("belongs to user {}, not to {}", info.st_uid, geteuid()));
  }
  if ((info.st_mode & 022) != 0) {
    FailFolder(folder_,
               fmt::format("may be written by other users (mode {:o})", info.st_mode & 07777));
  }
  // The mode counts for root too, whom the system would let write.
  if ((info.st_mode & 0700) != 0700) {
    FailFolder(folder_, fmt::format("is read-only (mode {:o})", info.st_mode & 07777));
  }
  if (faccessat(opened.descriptor, ".", W_OK | X_OK, AT_EACCESS) != 0) {
    FailFolder(folder_, fmt::format("is read-only: {}", Reason(errno)));
  }
  descriptor_ = std::exchange(opened.descriptor, -1);
}

CompileCache::~CompileCache() { close(descriptor_); }

std::unique_ptr<CompileCache> CompileCache::FromEnvironment() {
  auto value = [](const char* name) {
    const char* text = std::getenv(name);
    return std::string(text ? text : "");
  };
  std::string place = value("CALOTYPE_CACHE"), base = value("XDG_CACHE_HOME");
  if (place == "off") return nullptr;
  if (!place.empty()) return std::make_unique<CompileCache>(place);
  if (!base.starts_with("/")) {  // relative ones are to be ignored
    std::string home = value("HOME");
    if (!home.starts_with("/")) return nullptr;
    base = home + "/.cache";
  }
  return std::make_unique<CompileCache>(fs::path(base) / "calotype");
}

std::optional<std::string> CompileCache::Read(const std::string& name, std::string_view key,
                                              std::string& problem) const {
  // Without O_NONBLOCK, opening a FIFO would wait for a writer.
  File file(openat(descriptor_, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (file.descriptor < 0) {
    if (errno != ENOENT) problem = Reason(errno);
    return std::nullopt;
  }
  struct stat info;
  if (fstat(file.descriptor, &info) != 0) {
    problem = Reason(errno);
    return std::nullopt;
  }
  const std::string start = Start(key);
  const auto least = static_cast<int64_t>(start.size() + kDigest);
  if (!S_ISREG(info.st_mode) || info.st_uid != geteuid() || (info.st_mode & 022) != 0) {
    problem = "not a file of this user alone";
  } else if (info.st_size < least || info.st_size > kMaxEntryBytes) {
    problem = fmt::format("{} bytes", info.st_size);
  }
  if (!problem.empty()) return std::nullopt;
  std::string bytes(static_cast<size_t>(info.st_size), '\0');
  for (size_t at = 0; at < bytes.size();) {
    ssize_t n = read(file.descriptor, bytes.data() + at, bytes.size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      problem = n < 0 ? Reason(errno) : "ends early";
      return std::nullopt;
    }
    at += static_cast<size_t>(n);
  }
  std::string_view all = bytes, hashed = all.substr(0, all.size() - kDigest);
  if (!all.starts_with(start)) {
    problem = "of another key";
    return std::nullopt;
  }
  if (Sha256Of(hashed) != all.substr(hashed.size())) {
    problem = "damaged: its SHA-256 does not match";
    return std::nullopt;
  }
  futimens(file.descriptor, nullptr);  // used now; if that fails it is only removed sooner
  return std::string(hashed.substr(start.size()));
}

std::optional<std::string> CompileCache::Find(std::string_view key) {
  std::string problem, name = NameOf(key);
  std::optional<std::string> data = Read(name, key, problem);
  std::lock_guard lock(mutex_);
  ++(data ? stats_.hits : stats_.misses);
  if (!problem.empty()) {
    ++stats_.refused;
    stats_.problem = fmt::format("{}: {}", (folder_ / name).string(), problem);
  }
  return data;
}

void CompileCache::Refuse(const std::string& problem) {
  std::lock_guard lock(mutex_);
  --stats_.hits;
  ++stats_.misses;
  ++stats_.refused;
  stats_.problem = problem;
}

void CompileCache::Store(std::string_view key, std::string_view data) {
  static std::atomic<uint64_t> counter = 0;
  std::string start = Start(key), name = NameOf(key), problem;
  std::string temporary =
      fmt::format(".{}.{}.{}{}", name.substr(0, 16), getpid(), counter++, kTemporary);
  const auto size = static_cast<int64_t>(start.size() + data.size() + kDigest);
  if (size > std::min(max_bytes_, kMaxEntryBytes)) {
    problem = fmt::format("{} bytes are over the limit", size);
  } else {
    Sha256 hash;
    hash.Update(start);
    hash.Update(data);
    File file(openat(descriptor_, temporary.c_str(),
                     O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    bool written = file.descriptor >= 0 && WriteAll(file.descriptor, start) &&
                   WriteAll(file.descriptor, data) && WriteAll(file.descriptor, hash.Finish());
    // close() reports what a network file system could not write. Without a sync a crash of the
    // machine may leave a damaged entry, which the hash finds.
    if (written) written = close(std::exchange(file.descriptor, -1)) == 0;
    if (written) {
      written = renameat(descriptor_, temporary.c_str(), descriptor_, name.c_str()) == 0;
    }
    if (!written) {
      problem = Reason(errno);
      unlinkat(descriptor_, temporary.c_str(), 0);
    }
  }
  std::lock_guard lock(mutex_);
  ++(problem.empty() ? stats_.stored : stats_.unstored);
  if (!problem.empty()) {
    stats_.problem = fmt::format("{}: cannot write: {}", (folder_ / name).string(), problem);
  }
}

void CompileCache::Trim() {
  struct Entry {
    timespec used;
    int64_t bytes;
    std::string name;
  };
  std::vector<Entry> entries;
  int64_t total = 0;
  std::error_code error;
  for (fs::directory_iterator it(folder_, error), end; !error && it != end; it.increment(error)) {
    std::string name = it->path().filename().string();
    struct stat info;
    if (fstatat(descriptor_, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0 ||
        !S_ISREG(info.st_mode)) {
      continue;
    }
    if (name.ends_with(kTemporary) && info.st_mtim.tv_sec + kStaleSeconds < time(nullptr)) {
      unlinkat(descriptor_, name.c_str(), 0);
    } else if (name.ends_with(kSuffix)) {
      total += info.st_size;
      entries.push_back({info.st_mtim, info.st_size, name});
    }
  }
  int64_t count = static_cast<int64_t>(entries.size());
  if (total <= max_bytes_ && count <= kMaxEntries) return;
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.used.tv_sec, a.used.tv_nsec) < std::tie(b.used.tv_sec, b.used.tv_nsec);
  });
  // A little below the limit, so that the folder is not sorted anew for each entry.
  const int64_t target = max_bytes_ - max_bytes_ / 16;
  const int64_t target_count = kMaxEntries - kMaxEntries / 16;
  int64_t removed = 0;
  for (const Entry& entry : entries) {
    if (total <= target && count <= target_count) break;
    total -= entry.bytes;
    --count;
    removed += unlinkat(descriptor_, entry.name.c_str(), 0) == 0;
  }
  std::lock_guard lock(mutex_);
  stats_.evicted += removed;
}

CacheStats CompileCache::Stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace calotype::jit
