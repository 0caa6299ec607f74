// The options of a command line: CLI11 behind a header that costs nothing to include (CLI11's own
// takes three seconds in every file). Methods have CLI11's names and meaning.
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <string>

namespace CLI {
class App;
class Option;
class Validator;
}  // namespace CLI

namespace calotype::app {

// Refuses a text on the command line, with a message (exit code 2).
using Validator = std::shared_ptr<const CLI::Validator>;
// For unsigned options: CLI11 would take -1 for the largest number.
Validator NotNegative();
// low <= number <= high.
Validator Range(int low, int high);
Validator Range(double low, double high);
Validator IsMember(std::initializer_list<const char*> texts);

class Option {
 public:
  explicit Option(CLI::Option* option) : option_(option) {}

  Option* required();
  Option* capture_default_str();  // --help shows the value that the variable has now
  Option* take_all();             // given several times: a list of all, instead of the last
  Option* delimiter(char between);
  Option* check(const Validator& validator);
  Option* needs(const std::string& option);
  Option* excludes(const std::string& option);
  // How often it is on the command line.
  size_t count() const;

 private:
  CLI::Option* option_;
};

// A command, or the program: what can follow its name.
class Options {
 public:
  // `app` must outlive this and every command added.
  explicit Options(CLI::App* app);
  ~Options();
  Options(const Options&) = delete;

  // `value` is set when the command line is read. T: std::string, std::filesystem::path, int,
  // int64_t, uint64_t, float, double, std::optional and std::vector of some; others do not link.
  template <class T>
  Option* add_option(const std::string& names, T& value, const std::string& help);
  Option* add_flag(const std::string& names, bool& value, const std::string& help);
  Options* add_subcommand(const std::string& name, const std::string& help);
  Options* require_subcommand(int count);
  Options* footer(const std::string& text);
  Options* callback(std::function<void()> named);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace calotype::app
