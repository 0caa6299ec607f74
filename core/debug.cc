#include "core/debug.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "core/error.h"

namespace calotype {

namespace {

std::set<std::string, std::less<>> ReadTopics() {
  constexpr std::array<std::string_view, 4> kTopics = {"pass", "fuse", "time", "mem"};
  std::set<std::string, std::less<>> topics;
  const char* text = std::getenv("CALOTYPE_DEBUG");
  std::istringstream list(text ? text : "");
  for (std::string topic; std::getline(list, topic, ',');) {
    bool known = false;
    for (std::string_view name : kTopics) known |= name == topic;
    Check(known, "CALOTYPE_DEBUG: \"{}\" is unknown; the topics are {}", topic,
          fmt::join(kTopics, ", "));
    topics.insert(topic);
  }
  return topics;
}

}  // namespace

bool DebugEnabled(std::string_view topic) {
  static const auto topics = ReadTopics();
  return topics.contains(topic);
}

void DebugLine(std::string_view text) {
  std::fprintf(stderr, "calotype: %.*s\n", static_cast<int>(text.size()), text.data());
}

const std::string& DumpFolder() {
  static const std::string folder = [] {
    const char* text = std::getenv("CALOTYPE_DUMP");
    std::string path = text ? text : "";
    if (!path.empty()) {
      std::error_code error;
      std::filesystem::create_directories(path, error);
      Check<FileError>(!error, "CALOTYPE_DUMP: cannot create {}: {}", path, error.message());
    }
    return path;
  }();
  return folder;
}

void Dump(std::string_view name, std::string_view text) {
  static std::atomic<int> counter{0};
  if (DumpFolder().empty()) return;
  std::string path = fmt::format("{}/{:03}-{}", DumpFolder(), counter++, name);
  std::ofstream file(path);
  file << text;
  Check<FileError>(file.good(), "CALOTYPE_DUMP: cannot write {}", path);
}

}  // namespace calotype
