// The options of what a run trains besides TrainOptions (LoRA, Custom Diffusion), in a file of the
// run folder: a struct with a Visit(options, f) that calls f(name, field, help) for each field.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "core/error.h"
#include "io/file.h"
#include "pipelines/train_options.h"
#include "pipelines/training_setup.h"

namespace calotype {

template <class Options>
std::string TargetOptionsToJson(const Options& options) {
  nlohmann::ordered_json document;
  Options::Visit(options,
                 [&](const char* name, const auto& field, const char*) { document[name] = field; });
  return document.dump(2) + "\n";
}

// Errors: FileError naming the file and a missing, wrong or unknown field.
template <class Options>
Options ReadTargetOptions(const std::filesystem::path& path) {
  Options options;
  try {
    auto document = nlohmann::ordered_json::parse(ReadFile(path, 1 << 20));
    Check<FileError>(document.is_object(), "{}: not the options of a run", path.string());
    std::set<std::string> known;
    Options::Visit(options, [&](const char* name, auto& field, const char*) {
      known.insert(name);
      Check<FileError>(document.contains(name),
                       "{}: the field `{}` is missing; a run of an earlier version of the program "
                       "cannot be continued",
                       path.string(), name);
      try {
        document.at(name).get_to(field);
      } catch (const nlohmann::json::exception&) {
        Fail<FileError>("{}: the field `{}` is {}, of the wrong type", path.string(), name,
                        document.at(name).dump());
      }
    });
    for (const auto& [name, value] : document.items()) {
      Check<FileError>(known.count(name) == 1, "{}: unknown field {}", path.string(), Quoted(name));
    }
  } catch (const nlohmann::json::exception& e) {
    Fail<FileError>("{}: not the options of a run: {}", path.string(), e.what());
  }
  return options;
}

// For a continued run of that kind: both kinds of options as its files have them, with
// TrainOptions' resumable fields as given. Errors: ValueError naming a chosen field that differs
// and may not, and as CheckResumes; FileError.
template <class Options>
void OptionsForResume(const std::filesystem::path& folder, const TrainingKind& kind, Options& own,
                      TrainOptions& options, const std::set<std::string>& chosen) {
  CheckResumes(kind, folder);
  const auto stored = ReadTargetOptions<Options>(folder / kind.options_file);
  std::map<std::string, nlohmann::ordered_json> given;
  Options::Visit(own,
                 [&](const char* name, const auto& field, const char*) { given[name] = field; });
  Options::Visit(stored, [&](const char* name, const auto& field, const char*) {
    Check(chosen.count(name) == 0 || given[name] == nlohmann::ordered_json(field),
          "resume: {} is {} here and {} in the run; a continued run keeps it", name,
          given[name].dump(), nlohmann::ordered_json(field).dump());
  });
  own = stored;
  const std::filesystem::path path = folder / "train.json";
  options = MergeForResume(ParseTrainOptions(ReadFile(path), path), options, chosen);
}

}  // namespace calotype
