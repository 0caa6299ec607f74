#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>

#include "core/error.h"

namespace calotype {

namespace {

// close() that keeps errno, for use on error paths. Never retried: after EINTR the descriptor is
// gone on Linux.
void CloseQuietly(int descriptor) {
  int saved = errno;
  close(descriptor);
  errno = saved;
}

std::filesystem::path FolderOf(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

// ".NAME.tmp.PID.COUNT" with decimal PID and COUNT.
bool IsTemporaryName(const std::string& name) {
  size_t mark = name.rfind(".tmp.");
  if (name.empty() || name[0] != '.' || mark == std::string::npos) return false;
  std::string tail = name.substr(mark + 5);
  size_t dot = tail.find('.');
  return dot != std::string::npos && dot > 0 && dot + 1 < tail.size() &&
         std::all_of(tail.begin(), tail.end(),
                     [](char c) { return c == '.' || (c >= '0' && c <= '9'); }) &&
         std::count(tail.begin(), tail.end(), '.') == 1;
}

}  // namespace

AtomicFile::AtomicFile(const std::filesystem::path& path, Durability durability)
    : path_(path), durability_(durability) {
  static std::atomic<uint64_t> counter{0};
  Check<FileError>(path_.has_filename(), "{}: cannot write, the path names no file",
                   path_.string());
  // The renaming at the end would replace a device or a pipe, too.
  std::error_code unknown;
  const std::filesystem::file_status status = std::filesystem::status(path_, unknown);
  Check<FileError>(!std::filesystem::exists(status) || std::filesystem::is_regular_file(status),
                   "{}: cannot write: {}", path_.string(),
                   std::filesystem::is_directory(status) ? "it is a folder" : "not a regular file");
  for (int attempt = 0; attempt < 100; ++attempt) {
    temporary_ = FolderOf(path_) /
                 fmt::format(".{}.tmp.{}.{}", path_.filename().string(), getpid(), counter++);
    descriptor_ =
        open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (descriptor_ < 0 && (errno == EEXIST || errno == EINTR)) continue;
    if (descriptor_ < 0) {
      Fail<FileError>("{}: cannot write in folder {}: {}", path_.string(), FolderOf(path_).string(),
                      std::generic_category().message(errno));
    }
    // The lock tells RemoveStaleTemporaries that the writer lives. If that function came between
    // open and flock, the name is gone: take another one.
    struct stat info;
    if (flock(descriptor_, LOCK_EX) == 0 && fstat(descriptor_, &info) == 0 && info.st_nlink > 0) {
      return;
    }
    Discard();
  }
  Fail<FileError>("{}: cannot create a temporary file in {}", path_.string(),
                  FolderOf(path_).string());
}

AtomicFile::~AtomicFile() { Discard(); }

void AtomicFile::Discard() noexcept {
  if (descriptor_ < 0) return;
  int saved = errno;
  unlink(temporary_.c_str());
  CloseQuietly(descriptor_);
  descriptor_ = -1;
  errno = saved;
}

void AtomicFile::FailWith(const char* action, int error) {
  Discard();
  Fail<FileError>("{}: {}: {}; the previous file, if any, is unchanged", path_.string(), action,
                  std::generic_category().message(error));
}

void AtomicFile::Write(const void* data, uint64_t size) {
  Check<InternalError>(descriptor_ >= 0, "{}: write after commit or failure", path_.string());
  constexpr uint64_t kChunk = uint64_t{1} << 30;
  const char* from = static_cast<const char*>(data);
  while (size > 0) {
    ssize_t n = write(descriptor_, from, std::min(size, kChunk));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) FailWith("cannot write", errno);
    if (n == 0) FailWith("cannot write", ENOSPC);
    from += n;
    size -= static_cast<uint64_t>(n);
  }
}

void AtomicFile::Commit() {
  Check<InternalError>(descriptor_ >= 0, "{}: commit after commit or failure", path_.string());
  // A failed fsync may have dropped the dirty pages, so it is never retried: the save has failed.
  if (durability_ == Durability::kSynced && fsync(descriptor_) != 0) FailWith("cannot sync", errno);
  if (rename(temporary_.c_str(), path_.c_str()) != 0) FailWith("cannot rename", errno);
  int descriptor = descriptor_;
  descriptor_ = -1;
  bool closed = close(descriptor) == 0 || errno == EINTR;
  Check<FileError>(closed, "{}: cannot close: {}", path_.string(),
                   std::generic_category().message(errno));
  if (durability_ != Durability::kSynced) return;
  int folder = open(FolderOf(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  bool synced = folder >= 0 && fsync(folder) == 0;
  int error = errno;
  if (folder >= 0) CloseQuietly(folder);
  Check<FileError>(synced, "{}: written, but its folder cannot be synced: {}", path_.string(),
                   std::generic_category().message(error));
}

void WriteFile(const std::filesystem::path& path, std::string_view bytes, Durability durability) {
  AtomicFile file(path, durability);
  file.Write(bytes);
  file.Commit();
}

int RemoveStaleTemporaries(const std::filesystem::path& folder) {
  int removed = 0;
  std::error_code error;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    if (!IsTemporaryName(it->path().filename().string())) continue;
    int descriptor = open(it->path().c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (descriptor < 0) continue;
    struct stat info;
    if (fstat(descriptor, &info) == 0 && S_ISREG(info.st_mode) &&
        flock(descriptor, LOCK_EX | LOCK_NB) == 0 && unlink(it->path().c_str()) == 0) {
      ++removed;
    }
    CloseQuietly(descriptor);
  }
  return removed;
}

}  // namespace calotype
