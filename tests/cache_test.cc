// The compile cache: every damage is found, no strange file or folder is trusted, several writers
// and full disks do no harm, the second compilation hits.
#include "jit/cache.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>

#include "core/error.h"
#include "core/random.h"
#include "core/sha256.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "jit/compile.h"
#include "jit/lower.h"
#include "jit/object_check.h"
#include "jit/orc.h"
#include "tests/expect_error.h"
#include "tests/temp_folder.h"

namespace calotype::jit {
namespace {

namespace fs = std::filesystem;
using test::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;

// Sets an environment variable (null: unsets it) for the life of the object.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    Set(value);
  }
  ~Environment() { Set(old_ ? old_->c_str() : nullptr); }
  Environment(const Environment&) = delete;

 private:
  void Set(const char* value) {
    if (value) {
      setenv(name_, value, 1);
    } else {
      unsetenv(name_);
    }
  }
  const char* name_;
  std::optional<std::string> old_;
};

std::string Bytes(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void Put(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::vector<fs::path> Files(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

fs::path EntryOf(const fs::path& folder, const std::string& key) {
  return folder / (Sha256Of(key) + ".entry");
}

// y = exp(-x x) and a product: two kernels at least.
ComputationGraph SmallGraph(int64_t rows = 24) {
  ComputationGraph graph;
  Value x = graph.Input("x", {rows, 40}), w = graph.Input("w", {40, 24});
  graph.Output("e", Exp(x * x * -1.0f));
  graph.Output("y", MatMul(x, w));
  return graph;
}

std::vector<Tensor> SmallInputs() {
  Random random(4);
  return {random.NormalTensor({24, 40}), random.NormalTensor({40, 24})};
}

void ExpectRight(Executable& compiled) {
  std::vector<Tensor> inputs = SmallInputs(), is = compiled.Run(inputs),
                      should = Interpreter(SmallGraph()).Run(inputs);
  for (size_t o = 0; o < is.size(); ++o) {
    for (int64_t i = 0; i < is[o].elements(); ++i) {
      ASSERT_NEAR(is[o].data()[i], should[o].data()[i], 2e-5) << o << " " << i;
    }
  }
}

TEST(CompileCache, FindsWhatWasStored) {
  TempFolder temp;
  fs::path folder = temp / "a" / "calotype";
  std::string data = "data";
  data += '\0';
  data += '\n';
  {
    CompileCache cache(folder);
    EXPECT_EQ(cache.Find("key"), std::nullopt);
    cache.Store("key", data);
    cache.Store("empty", "");
    EXPECT_EQ(cache.Find("key"), data);
    EXPECT_EQ(cache.Find("empty"), "");
    EXPECT_EQ(cache.Find("ke"), std::nullopt);
    CacheStats stats = cache.Stats();
    EXPECT_EQ(stats.hits, 2);
    EXPECT_EQ(stats.misses, 2);
    EXPECT_EQ(stats.stored, 2);
    EXPECT_EQ(stats.refused + stats.unstored + stats.evicted, 0);
    EXPECT_EQ(stats.problem, "");
  }
  CompileCache cache(folder);
  EXPECT_EQ(cache.Find("key"), data);
  cache.Store("key", "new");
  EXPECT_EQ(cache.Find("key"), "new");
  EXPECT_EQ(Files(folder).size(), 2u);
  struct stat info;
  ASSERT_EQ(stat(folder.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700u);
  ASSERT_EQ(stat(EntryOf(folder, "key").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
}

TEST(CompileCache, FindsEveryBitFlipAndEveryTruncation) {
  TempFolder temp;
  CompileCache cache(temp / "cache");
  const std::string key = "build 1\nllvm 19\nloop [3 4] in ( f32@0+0[1] )\n";
  std::string data;
  for (int i = 0; i < 256; ++i) data += static_cast<char>(i * 7);
  cache.Store(key, data);
  const fs::path path = EntryOf(cache.folder(), key);
  const std::string whole = Bytes(path);
  ASSERT_EQ(cache.Find(key), data);
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  auto write = [&](size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
  };
  int64_t accepted = 0;
  for (size_t byte = 0; byte < whole.size(); ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      write(byte, static_cast<char>(whole[byte] ^ (1 << bit)));
      accepted += cache.Find(key).has_value();
    }
    write(byte, whole[byte]);
  }
  EXPECT_EQ(accepted, 0);
  EXPECT_EQ(cache.Stats().refused, static_cast<int64_t>(8 * whole.size()));
  EXPECT_THAT(cache.Stats().problem, HasSubstr("SHA-256"));
  ASSERT_EQ(cache.Find(key), data);
  for (size_t length = 0; length < whole.size(); ++length) {
    Put(path, whole.substr(0, length));
    accepted += cache.Find(key).has_value();
  }
  for (const std::string& more : {std::string(1, '\0'), std::string("0"), whole}) {
    Put(path, whole + more);
    accepted += cache.Find(key).has_value();
  }
  EXPECT_EQ(accepted, 0);
  cache.Store(key, data);
  EXPECT_EQ(cache.Find(key), data);
}

TEST(CompileCache, EntriesOfOtherKeysMiss) {
  TempFolder temp;
  CompileCache cache(temp / "cache");
  cache.Store("llvm 19\nloop 1", "one");
  cache.Store("llvm 19\nloop 2", "two");
  fs::path one = EntryOf(cache.folder(), "llvm 19\nloop 1"),
           two = EntryOf(cache.folder(), "llvm 19\nloop 2");
  fs::rename(one, temp / "kept");
  fs::rename(two, one);
  fs::rename(temp / "kept", two);
  EXPECT_EQ(cache.Find("llvm 19\nloop 1"), std::nullopt);
  EXPECT_EQ(cache.Find("llvm 19\nloop 2"), std::nullopt);
  EXPECT_EQ(cache.Stats().refused, 2);
  EXPECT_THAT(cache.Stats().problem, HasSubstr("another key"));
  // A later format of the file, rightly hashed.
  std::string later = Bytes(two);
  later.resize(later.size() - 64);
  later.replace(later.find(" 1\n"), 3, " 2\n");
  Put(two, later + Sha256Of(later));
  EXPECT_EQ(cache.Find("llvm 19\nloop 1"), std::nullopt);
}

TEST(CompileCache, FoldersThatOthersCouldChangeAreErrors) {
  TempFolder temp;
  auto message = [&](const fs::path& folder) {
    return MessageOf<FileError>([&] { CompileCache cache(folder); });
  };
  fs::create_directory(temp / "real");
  chmod((temp / "real").c_str(), 0700);
  EXPECT_NO_THROW(CompileCache(temp / "real"));
  fs::create_directory_symlink(temp / "real", temp / "link");
  EXPECT_THAT(message(temp / "link"), AllOf(HasSubstr("link"), HasSubstr("CALOTYPE_CACHE")));
  Put(temp / "file", "x");
  EXPECT_THAT(message(temp / "file"), HasSubstr("not a folder"));
  EXPECT_THAT(message(temp / "file" / "below"), HasSubstr("cannot be made"));
  for (mode_t mode : {0777, 0770, 0702, 0720}) {
    fs::path folder = temp / fmt::format("mode {:o}", mode);
    fs::create_directory(folder);
    chmod(folder.c_str(), mode);
    EXPECT_THAT(message(folder), HasSubstr("written by other users"));
  }
  for (mode_t mode : {0500, 0555}) {
    fs::path folder = temp / fmt::format("mode {:o}", mode);
    fs::create_directory(folder);
    chmod(folder.c_str(), mode);
    EXPECT_THAT(message(folder), HasSubstr("read-only"));
    // Compile says so before it does anything.
    Environment place("CALOTYPE_CACHE", folder.c_str());
    EXPECT_THAT(MessageOf<FileError>([] { Compile(SmallGraph()); }),
                AllOf(HasSubstr("read-only"), HasSubstr(folder.string())));
    EXPECT_EQ(Files(folder).size(), 0u);
  }
  if (geteuid() == 0) {
    fs::create_directory(temp / "other");
    chmod((temp / "other").c_str(), 0700);
    ASSERT_EQ(chown((temp / "other").c_str(), 12345, 12345), 0);
    EXPECT_THAT(message(temp / "other"), HasSubstr("belongs to user 12345"));
  }
}

TEST(CompileCache, FilesThatOthersCouldChangeMiss) {
  TempFolder temp;
  CompileCache cache(temp / "cache");
  const fs::path path = EntryOf(cache.folder(), "key");
  auto refused = [&](const char* what) {
    SCOPED_TRACE(what);
    int64_t before = cache.Stats().refused;
    EXPECT_EQ(cache.Find("key"), std::nullopt);
    EXPECT_EQ(cache.Stats().refused, before + 1);
    cache.Store("key", "data");
    EXPECT_EQ(cache.Find("key"), "data");
  };
  cache.Store("key", "data");
  for (mode_t mode : {0602, 0620, 0666}) {
    chmod(path.c_str(), mode);
    refused("mode");
  }
  fs::rename(path, temp / "moved");
  fs::create_symlink(temp / "moved", path);
  refused("link");
  EXPECT_FALSE(fs::is_symlink(path));
  fs::remove(path);
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  refused("FIFO");
  if (geteuid() == 0) {
    ASSERT_EQ(chown(path.c_str(), 12345, 12345), 0);
    refused("owner");
  }
  // A folder cannot be replaced; nothing is left behind.
  fs::remove(path);
  fs::create_directory(path);
  EXPECT_EQ(cache.Find("key"), std::nullopt);
  cache.Store("key", "data");
  EXPECT_EQ(cache.Stats().unstored, 1);
  EXPECT_EQ(Files(cache.folder()).size(), 1u);
}

TEST(CompileCache, AFullDiskOrAVanishedFolderOnlyCounts) {
  TempFolder temp;
  std::string folder = temp / "cache";
  Environment place("CALOTYPE_CACHE", folder.c_str());
  // The limit of file sizes stands for the full disk: writing stops in the middle.
  rlimit old, small;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  small = old;
  small.rlim_cur = 300;
  auto handler = signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  auto compiled = Compile(SmallGraph());
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, handler);
  EXPECT_EQ(compiled->Stats().cache_unstored, compiled->Stats().kernels);
  EXPECT_THAT(compiled->Stats().cache_problem, HasSubstr("cannot write"));
  EXPECT_EQ(Files(folder).size(), 0u);
  ExpectRight(*compiled);

  CompileCache cache(folder);
  cache.Store("key", "data");
  fs::remove_all(folder);
  EXPECT_EQ(cache.Find("key"), std::nullopt);
  cache.Store("key", "data");
  cache.Trim();
  EXPECT_EQ(cache.Stats().unstored, 1);
}

// Trimming reads the whole folder, so small entries are bounded by their number.
TEST(CompileCache, HasAMostNumberOfEntries) {
  TempFolder temp;
  CompileCache cache(temp / "cache");
  const std::string suffix = EntryOf(cache.folder(), "key").extension().string();
  for (int i = 0; i < 8192; ++i) Put(cache.folder() / fmt::format("{}{}", i, suffix), "x");
  cache.Trim();
  EXPECT_EQ(cache.Stats().evicted, 0);
  cache.Store("key", "data");
  cache.Trim();
  EXPECT_EQ(cache.Stats().evicted, 8193 - 7680);
  EXPECT_EQ(cache.Find("key"), "data") << "the newest stays";
}

TEST(CompileCache, TheLeastRecentlyUsedGoFirst) {
  TempFolder temp;
  const std::string data(1000, 'x');
  CompileCache cache(temp / "cache", 12000);
  auto key = [](int i) { return fmt::format("key {}", i); };
  auto age = [](const fs::path& path, int seconds) {
    timespec times[2];
    clock_gettime(CLOCK_REALTIME, &times[0]);
    times[0].tv_sec -= seconds;
    times[1] = times[0];
    ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), times, 0), 0);
  };
  for (int i = 0; i < 10; ++i) {
    cache.Store(key(i), data);
    age(EntryOf(cache.folder(), key(i)), 1000 - i);  // 0 is the oldest
  }
  cache.Trim();
  EXPECT_EQ(cache.Stats().evicted, 0);
  EXPECT_TRUE(cache.Find(key(1)));  // used now
  for (int i = 10; i < 14; ++i) cache.Store(key(i), data);
  // What a killed process left, and what a living one is writing.
  Put(cache.folder() / ".a.1.1.tmp", "x");
  Put(cache.folder() / ".b.1.1.tmp", "x");
  age(cache.folder() / ".a.1.1.tmp", 7200);
  cache.Trim();
  EXPECT_FALSE(fs::exists(cache.folder() / ".a.1.1.tmp"));
  EXPECT_TRUE(fs::exists(cache.folder() / ".b.1.1.tmp"));
  int64_t total = 0;
  for (const fs::path& path : Files(cache.folder())) total += fs::file_size(path);
  EXPECT_LE(total, 12000);
  EXPECT_GE(total, 9000);
  for (int i = 0; i < 14; ++i) {
    bool old = i == 0 || (i >= 2 && i <= 4);
    EXPECT_EQ(cache.Find(key(i)).has_value(), !old) << i;
  }
  EXPECT_EQ(cache.Stats().evicted, 4);
  // An entry that could never stay is not written.
  cache.Store("large", std::string(12000, 'x'));
  EXPECT_EQ(cache.Stats().unstored, 1);
}

TEST(CompileCache, SeveralWritersShareAFolder) {
  TempFolder temp;
  auto data_of = [](int i) { return std::string(5000 + 100 * i, static_cast<char>('a' + i)); };
  // Returns the number of wrong answers.
  auto work = [&](int writer) {
    CompileCache cache(temp / "cache", 40000);
    int wrong = 0;
    for (int round = 0; round < 60; ++round) {
      int i = (writer + 3 * round) % 7;
      std::string key = fmt::format("key {}", i);
      std::optional<std::string> found = cache.Find(key);
      wrong += found && *found != data_of(i);
      cache.Store(key, data_of(i));
      if (round % 10 == 0) cache.Trim();
    }
    return wrong + static_cast<int>(cache.Stats().refused + cache.Stats().unstored);
  };
  std::vector<pid_t> processes;
  for (int writer = 0; writer < 4; ++writer) {
    pid_t process = fork();
    if (process == 0) _exit(work(writer) == 0 ? 0 : 1);
    processes.push_back(process);
  }
  for (pid_t process : processes) {
    int status = 0;
    waitpid(process, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  for (const fs::path& path : Files(temp / "cache")) EXPECT_EQ(path.extension(), ".entry");
}

TEST(CompileCache, PlaceComesFromTheEnvironment) {
  TempFolder temp;
  Environment home("HOME", (temp / "home").c_str());
  fs::create_directory(temp / "home");
  auto place = [] {
    auto cache = CompileCache::FromEnvironment();
    return cache ? cache->folder() : fs::path("none");
  };
  {
    Environment own("CALOTYPE_CACHE", nullptr), base("XDG_CACHE_HOME", nullptr);
    EXPECT_EQ(place(), temp / "home" / ".cache" / "calotype");
    Environment nowhere("HOME", nullptr);
    EXPECT_EQ(place(), "none");
  }
  {
    Environment own("CALOTYPE_CACHE", nullptr), base("XDG_CACHE_HOME", (temp / "xdg").c_str());
    EXPECT_EQ(place(), temp / "xdg" / "calotype");
    Environment relative("XDG_CACHE_HOME", "relative");
    EXPECT_EQ(place(), temp / "home" / ".cache" / "calotype");
  }
  Environment base("XDG_CACHE_HOME", (temp / "xdg").c_str());
  {
    Environment own("CALOTYPE_CACHE", (temp / "own").c_str());
    EXPECT_EQ(place(), temp / "own");
  }
  Environment off("CALOTYPE_CACHE", "off");
  EXPECT_EQ(place(), "none");
  auto compiled = Compile(SmallGraph());
  EXPECT_EQ(compiled->Stats().cache_hits + compiled->Stats().cache_misses, 0);
  ExpectRight(*compiled);
}

TEST(CompileCache, TheSecondCompilationHits) {
  TempFolder temp;
  Environment place("CALOTYPE_CACHE", (temp / "cache").c_str());
  auto first = Compile(SmallGraph());
  ASSERT_GE(first->Stats().kernels, 2);
  EXPECT_EQ(first->Stats().cache_hits, 0);
  EXPECT_EQ(first->Stats().cache_misses, first->Stats().kernels);
  auto second = Compile(SmallGraph());
  EXPECT_EQ(second->Stats().cache_hits, first->Stats().kernels);
  EXPECT_EQ(second->Stats().cache_misses, 0);
  EXPECT_EQ(second->Stats().code_bytes, first->Stats().code_bytes);
  ExpectRight(*first);
  ExpectRight(*second);
  std::vector<Tensor> inputs = SmallInputs(), a = first->Run(inputs), b = second->Run(inputs);
  for (size_t o = 0; o < a.size(); ++o) {
    EXPECT_EQ(std::memcmp(a[o].raw(), b[o].raw(), a[o].bytes()), 0);
  }
  EXPECT_EQ(Compile(SmallGraph(25))->Stats().cache_hits, 0);  // other shapes, other kernels
}

std::vector<NamedSpec> SmallSpecs() {
  std::vector<NamedSpec> specs;
  for (const Step& step : Lower(SmallGraph()).steps) specs.push_back({step.spec, step.label});
  return specs;
}

TEST(CompileCache, ProcessorsDoNotShareEntries) {
  TempFolder temp;
  Environment place("CALOTYPE_CACHE", (temp / "cache").c_str());
  std::vector<NamedSpec> specs = SmallSpecs();
  for (const char* level : {"x86-64-v2", "x86-64-v3", "native"}) {
    SCOPED_TRACE(level);
    if (ToString(MakeTarget(level)) == ToString(MakeTarget("native")) &&
        std::string_view(level) != "native") {
      continue;  // this machine is no better
    }
    CompiledKernels first = CompileKernels(specs, MakeTarget(level));
    EXPECT_EQ(first.cache().hits, 0);
    EXPECT_EQ(first.compiled(), first.different());
    CompiledKernels second = CompileKernels(specs, MakeTarget(level));
    EXPECT_EQ(second.cache().hits, second.different());
    EXPECT_EQ(second.compiled(), 0);
  }
  const std::string key = CacheKey(specs[0].spec, HostTarget());
  EXPECT_THAT(key, AllOf(HasSubstr(kBuildId), HasSubstr("llvm "), HasSubstr(HostTarget().cpu),
                         HasSubstr(HostTarget().features), HasSubstr(ToString(specs[0].spec))));
}

TEST(CompileCache, DamagedCodeIsNeverRun) {
  TempFolder temp;
  Environment place("CALOTYPE_CACHE", (temp / "cache").c_str());
  const std::string key = CacheKey(SmallSpecs()[0].spec, HostTarget());
  const fs::path path = EntryOf(temp / "cache", key);
  ExpectRight(*Compile(SmallGraph()));
  const std::string whole = Bytes(path);
  ASSERT_FALSE(whole.empty());
  CompileCache cache(temp / "cache");
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  auto write = [&](size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
  };
  Random random(7, "flips");
  int64_t accepted = 0;
  for (int i = 0; i < 10000; ++i) {
    auto byte = static_cast<size_t>(random.Integer(static_cast<int64_t>(whole.size())));
    write(byte, static_cast<char>(whole[byte] ^ (1 << random.Integer(8))));
    accepted += cache.Find(key).has_value();
    write(byte, whole[byte]);
  }
  EXPECT_EQ(accepted, 0);
  EXPECT_TRUE(cache.Find(key));
  for (int i = 0; i < 12; ++i) {
    auto byte = static_cast<size_t>(random.Integer(static_cast<int64_t>(whole.size())));
    std::string damaged = whole;
    damaged[byte] = static_cast<char>(damaged[byte] ^ (1 << random.Integer(8)));
    Put(path, damaged);
    auto compiled = Compile(SmallGraph());
    EXPECT_EQ(compiled->Stats().cache_misses, 1);
    ExpectRight(*compiled);
    EXPECT_EQ(Bytes(path), whole);  // replaced
  }
}

TEST(ObjectCheck, RefusesWhatIsMoreThanAFunction) {
  const std::string harmless = Bytes(HARMLESS_OBJECT);
  ASSERT_FALSE(harmless.empty());
  EXPECT_EQ(ObjectProblem(harmless, "kernel"), "");
  EXPECT_THAT(ObjectProblem(harmless, "other"), HasSubstr("it defines kernel"));
  EXPECT_THAT(ObjectProblem(Bytes(CALLS_OBJECT), "kernel"), HasSubstr("refers to system"));
  EXPECT_THAT(ObjectProblem(Bytes(STARTS_OBJECT), "kernel"), HasSubstr("section .init_array"));
  EXPECT_THAT(ObjectProblem(Bytes(WRITES_OBJECT), "kernel"), HasSubstr("section .data"));
  EXPECT_THAT(ObjectProblem(Bytes(TWO_OBJECT), "kernel"), HasSubstr("it defines other"));
  EXPECT_NE(ObjectProblem("", "kernel"), "");
  EXPECT_NE(ObjectProblem("text", "kernel"), "");
}

TEST(ObjectCheck, GuardsTheCache) {
  TempFolder temp;
  Environment place("CALOTYPE_CACHE", (temp / "cache").c_str());
  const std::string key = CacheKey(SmallSpecs()[0].spec, HostTarget());
  for (const char* object : {HARMLESS_OBJECT, CALLS_OBJECT, STARTS_OBJECT}) {
    CompileCache(temp / "cache").Store(key, Bytes(object));  // rightly hashed
    auto compiled = Compile(SmallGraph());
    EXPECT_GE(compiled->Stats().cache_misses, 1);
    EXPECT_NE(compiled->Stats().cache_problem, "");
    ExpectRight(*compiled);
    EXPECT_EQ(Compile(SmallGraph())->Stats().cache_misses, 0);  // replaced
  }
}

TEST(CompiledCode, IsNeverWritableAndExecutable) {
  TempFolder temp;
  Environment place("CALOTYPE_CACHE", (temp / "cache").c_str());
  auto mappings = [](const char* mode) {
    std::ifstream maps("/proc/self/maps");
    std::set<std::string> lines;
    for (std::string line; std::getline(maps, line);) {
      if (line.find(mode) != std::string::npos) lines.insert(line);
    }
    return lines;
  };
  // oneDNN's code, which the interpreter of other tests runs, is both.
  std::set<std::string> before = mappings(" rwxp "), executable = mappings(" r-xp ");
  auto fresh = Compile(SmallGraph()), cached = Compile(SmallGraph());
  EXPECT_EQ(mappings(" rwxp "), before);
  EXPECT_GT(mappings(" r-xp ").size(), executable.size());
}

TEST(Budget, TooLittleMemoryIsAnErrorThatNamesTheBytes) {
  ComputationGraph graph = SmallGraph();
  Value x = graph.Input("big", {1 << 10, 1 << 10});
  graph.Output("z", MatMul(Exp(x), Exp(x)));
  auto compiled = Compile(graph);
  const int64_t needed = compiled->Stats().arena_bytes + compiled->Stats().persistent_bytes;
  ASSERT_GE(needed, 1 << 22);
  EXPECT_NO_THROW(Compile(graph, {.memory_bytes = needed}));
  std::string message =
      MessageOf<OutOfMemoryError>([&] { Compile(graph, {.memory_bytes = needed - 1}); });
  EXPECT_THAT(message, AllOf(HasSubstr(fmt::format("{} bytes", needed)),
                             HasSubstr(fmt::format("{} bytes", needed - 1))));
  // Without a budget: what the machine has.
  ComputationGraph huge;
  Value y = huge.Input("y", {1 << 20, 1 << 20});
  huge.Output("z", MatMul(Exp(y), Exp(y)));
  EXPECT_THAT(MessageOf<OutOfMemoryError>([&] { Compile(huge); }), HasSubstr("bytes"));
  EXPECT_THAT(MessageOf<ValueError>([&] { Compile(graph, {.memory_bytes = -1}); }),
              HasSubstr("-1"));
}

}  // namespace
}  // namespace calotype::jit
