// The commands of the program. Each Add... function declares one subcommand with its options and
// returns nothing; when the command line names it, `Selected::run` is set to what carries it out.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

namespace calotype::app {

struct Selected {
  std::function<void()> run;
  bool quiet = false;
};

// For unsigned options: CLI11 would take -1 for the largest number.
inline CLI::Validator NotNegative() {
  return {[](std::string& text) {
            return text.rfind('-', 0) == 0 ? text + " is negative" : std::string();
          },
          ""};
}

void AddDemo(CLI::App& app, Selected& selected);
void AddTrain(CLI::App& app, Selected& selected);
void AddTrainLora(CLI::App& app, Selected& selected);
void AddSample(CLI::App& app, Selected& selected);
void AddEdit(CLI::App& app, Selected& selected);
void AddLora(CLI::App& app, Selected& selected);
void AddData(CLI::App& app, Selected& selected);
void AddConvert(CLI::App& app, Selected& selected);
void AddBench(CLI::App& app, Selected& selected);
void AddInfo(CLI::App& app, Selected& selected);
void AddGraph(CLI::App& app, Selected& selected);
void AddUNet(CLI::App& app, Selected& selected);

}  // namespace calotype::app
