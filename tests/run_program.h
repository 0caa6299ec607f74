// Running a built program from a test: its exit code, standard output and standard error.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace calotype::testing {

// A fresh folder that is removed at the end of its life.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "calotype-test-XXXXXX").string();
    path = mkdtemp(name.data());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path / name).string(); }
  void Write(const std::filesystem::path& name, const std::string& text) const {
    std::filesystem::create_directories((path / name).parent_path());
    std::ofstream(path / name, std::ios::binary) << text;
  }
  std::filesystem::path path;
};

inline std::string ReadText(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

struct ProgramResult {
  int code = -1;  // exit code, or 128 + signal
  std::string out, err;
};

// Starts `arguments[0]` with its output in files of `folder`; returns the process.
inline pid_t StartProgram(const std::vector<std::string>& arguments,
                          const TemporaryFolder& folder) {
  pid_t process = fork();
  if (process == 0) {
    if (!freopen((folder / "out").c_str(), "w", stdout) ||
        !freopen((folder / "err").c_str(), "w", stderr))
      _exit(126);
    std::vector<char*> argv;
    for (const std::string& argument : arguments)
      argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(127);
  }
  return process;
}

inline ProgramResult FinishProgram(pid_t process, const TemporaryFolder& folder) {
  int status = 0;
  waitpid(process, &status, 0);
  ProgramResult result;
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.out = ReadText(folder / "out");
  result.err = ReadText(folder / "err");
  return result;
}

inline ProgramResult RunProgram(const std::vector<std::string>& arguments) {
  TemporaryFolder folder;
  return FinishProgram(StartProgram(arguments, folder), folder);
}

}  // namespace calotype::testing
