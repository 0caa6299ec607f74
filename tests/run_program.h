// Running a built program from a test: its exit code, standard output and standard error.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "tests/temp_folder.h"

namespace calotype::test {

struct ProgramResult {
  int code = -1;  // exit code, or 128 + signal
  std::string out, err;
};

// Starts `arguments[0]` with its output in files of `folder`; returns the process.
inline pid_t StartProgram(const std::vector<std::string>& arguments, const TempFolder& folder) {
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

inline ProgramResult FinishProgram(pid_t process, const TempFolder& folder) {
  int status = 0;
  waitpid(process, &status, 0);
  ProgramResult result;
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.out = ReadText(folder / "out");
  result.err = ReadText(folder / "err");
  return result;
}

inline ProgramResult RunProgram(const std::vector<std::string>& arguments) {
  TempFolder folder;
  return FinishProgram(StartProgram(arguments, folder), folder);
}

}  // namespace calotype::test
