#include "app/options.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

namespace calotype::app {

Validator NotNegative() {
  return std::make_shared<const CLI::Validator>(
      [](std::string& text) {
        return text.rfind('-', 0) == 0 ? text + " is negative" : std::string();
      },
      "");
}
Validator Range(int low, int high) {
  return std::make_shared<const CLI::Validator>(CLI::Range(low, high));
}
Validator Range(double low, double high) {
  return std::make_shared<const CLI::Validator>(CLI::Range(low, high));
}
Validator IsMember(std::initializer_list<const char*> texts) {
  return std::make_shared<const CLI::Validator>(
      CLI::IsMember(std::vector<std::string>(texts.begin(), texts.end())));
}

Option* Option::required() {
  option_->required();
  return this;
}
Option* Option::capture_default_str() {
  option_->capture_default_str();
  return this;
}
Option* Option::take_all() {
  option_->take_all();
  return this;
}
Option* Option::delimiter(char between) {
  option_->delimiter(between);
  return this;
}
Option* Option::check(const Validator& validator) {
  option_->check(*validator);
  return this;
}
Option* Option::needs(const std::string& option) {
  option_->needs(option);
  return this;
}
Option* Option::excludes(const std::string& option) {
  option_->excludes(option);
  return this;
}
size_t Option::count() const { return option_->count(); }

struct Options::Impl {
  CLI::App* app;
  std::deque<Option> options;  // addresses stay
  std::deque<Options> commands;
};

Options::Options(CLI::App* app) : impl_(std::make_unique<Impl>()) { impl_->app = app; }
Options::~Options() = default;

template <class T>
Option* Options::add_option(const std::string& names, T& value, const std::string& help) {
  return &impl_->options.emplace_back(impl_->app->add_option(names, value, help));
}
#define CALOTYPE_OPTION(...) \
  template Option* Options::add_option(const std::string&, __VA_ARGS__&, const std::string&);
CALOTYPE_OPTION(std::string)
CALOTYPE_OPTION(std::filesystem::path)
CALOTYPE_OPTION(int)
CALOTYPE_OPTION(int64_t)
CALOTYPE_OPTION(uint64_t)
CALOTYPE_OPTION(float)
CALOTYPE_OPTION(double)
CALOTYPE_OPTION(std::optional<int>)
CALOTYPE_OPTION(std::optional<int64_t>)
CALOTYPE_OPTION(std::optional<double>)
CALOTYPE_OPTION(std::optional<std::string>)
CALOTYPE_OPTION(std::vector<std::string>)
CALOTYPE_OPTION(std::vector<std::filesystem::path>)
CALOTYPE_OPTION(std::vector<int>)
CALOTYPE_OPTION(std::vector<int64_t>)
CALOTYPE_OPTION(std::vector<double>)
#undef CALOTYPE_OPTION

Option* Options::add_flag(const std::string& names, bool& value, const std::string& help) {
  return &impl_->options.emplace_back(impl_->app->add_flag(names, value, help));
}
Options* Options::add_subcommand(const std::string& name, const std::string& help) {
  return &impl_->commands.emplace_back(impl_->app->add_subcommand(name, help));
}
Options* Options::require_subcommand(int count) {
  impl_->app->require_subcommand(count);
  return this;
}
Options* Options::footer(const std::string& text) {
  impl_->app->footer(text);
  return this;
}
Options* Options::callback(std::function<void()> named) {
  impl_->app->callback(std::move(named));
  return this;
}

}  // namespace calotype::app
