// The commands of the program. Each Add... function declares one subcommand with its options and
// returns nothing; when the command line names it, `Selected::run` is set to what carries it out.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace calotype::app {

struct Selected {
  std::function<void()> run;
  bool quiet = false;
};

void AddDemo(CLI::App& app, Selected& selected);
void AddTrain(CLI::App& app, Selected& selected);
void AddSample(CLI::App& app, Selected& selected);
void AddData(CLI::App& app, Selected& selected);
void AddBench(CLI::App& app, Selected& selected);
void AddInfo(CLI::App& app, Selected& selected);
void AddGraph(CLI::App& app, Selected& selected);
void AddUNet(CLI::App& app, Selected& selected);

}  // namespace calotype::app
