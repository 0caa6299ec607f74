// The options of `train` and `train lora`: one for each field that the options' Visit functions
// name, the run folder and --resume.
#pragma once

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <type_traits>

#include "app/commands.h"

namespace calotype::app {

struct TrainFlags {
  std::filesystem::path folder;
  bool resume = false;
  std::string resume_from;
  std::map<std::string, Option*> given;  // by field

  bool Resume() const { return resume || !resume_from.empty(); }
  // The fields whose options are on the command line.
  std::set<std::string> Chosen() const;
};

// --out and --resume with their other spellings; `content` is what the folder holds.
void AddRunFolder(Options& app, TrainFlags& flags, const std::string& content);

// "--learning-rate,--lr" for learning_rate.
std::string SpellingsOf(const std::string& field);

// The option of a field.
template <class Field>
void AddField(Options& app, TrainFlags& flags, const char* name, Field& field, const char* help) {
  Option*& option = flags.given[name];
  if constexpr (std::is_same_v<Field, bool>) {
    option = app.add_flag(SpellingsOf(name), field, help);
  } else {
    option = app.add_option(SpellingsOf(name), field, help)->capture_default_str();
    if (std::is_unsigned_v<Field>) option->check(NotNegative());
  }
}

}  // namespace calotype::app
