// The commands of the program. Each Add... function declares one subcommand with its options and
// returns nothing; when the command line names it, `Selected::run` is set to what carries it out.
#pragma once

#include <functional>

#include "app/options.h"

namespace calotype::app {

struct Selected {
  std::function<void()> run;
  bool quiet = false;
};

void AddDemo(Options& app, Selected& selected);
void AddTrain(Options& app, Selected& selected);
void AddTrainLora(Options& app, Selected& selected);
void AddTrainCustomDiffusion(Options& app, Selected& selected);
void AddSample(Options& app, Selected& selected);
void AddEdit(Options& app, Selected& selected);
void AddLora(Options& app, Selected& selected);
void AddData(Options& app, Selected& selected);
void AddConvert(Options& app, Selected& selected);
void AddBench(Options& app, Selected& selected);
void AddInfo(Options& app, Selected& selected);
void AddGraph(Options& app, Selected& selected);
void AddUNet(Options& app, Selected& selected);

}  // namespace calotype::app
