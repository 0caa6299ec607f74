// The `calotype` program: parses options, calls the pipelines, turns errors into exit codes.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "app/commands.h"
#include "app/terminal.h"
#include "core/error.h"
#include "core/parallel.h"
#include "io/file.h"

namespace calotype::app {
namespace {

constexpr const char* kFooter = R"(Examples:
  calotype demo --out demo                       train, compile and sample the demo (minutes)
  calotype data emoji --out emoji --size 32      render captioned pictures from the emoji font
  calotype train --data emoji --out run          train on a folder of captioned pictures
  calotype train --data emoji --out run --resume continue after an interruption
  calotype sample --model run --prompt "a red heart" --seed 7 --out heart.png

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a file is missing, damaged, of a kind that is not
supported, or cannot be written, 4 numbers went wrong (NaN), 5 out of memory, 130 and 143 stopped by Ctrl-C or SIGTERM.)";

// Option names are accepted with - and with _, as diffusers' and kohya's scripts spell them.
std::vector<std::string> Arguments(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  for (std::string& argument : arguments) {
    if (argument.rfind("--", 0) != 0) continue;
    auto end = std::find(argument.begin(), argument.end(), '=');
    std::replace(argument.begin() + 2, end, '_', '-');
  }
  // Commands of their own: options of `train` are not all options of `train lora`.
  auto train = std::find(arguments.begin(), arguments.end(), "train");
  if (train != arguments.end() && train + 1 != arguments.end() &&
      (train[1] == "lora" || train[1] == "custom-diffusion")) {
    *train += "-" + train[1];
    arguments.erase(train + 1);
  }
  std::reverse(arguments.begin(), arguments.end());  // the order that CLI11 takes
  return arguments;
}

int Report(int code, const char* text) {
  fmt::print(stderr, "calotype: {}\n", text);
  return code;
}

// OpenMP's threads wait for each other at the end of every eager operation, by default spinning for
// milliseconds: on a machine that also does other work, whole time slices are lost there and a call
// takes up to 500 times as long. A short spin costs an idle machine nothing. OpenMP reads its
// settings before main, so the program starts itself once more.
void LimitSpinning(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") || std::getenv("OMP_WAIT_POLICY")) return;
  setenv("GOMP_SPINCOUNT", "2000", 0);
  execv("/proc/self/exe", argv);  // If that fails the program goes on as it is.
}

int Main(int argc, char** argv) {
  CLI::App app{"Trains text-to-image denoisers and compiles them to fused native code.",
               "calotype"};
  app.set_version_flag("--version", std::string("calotype " CALOTYPE_VERSION));
  app.footer(kFooter);
  app.require_subcommand(1);
  app.option_defaults()->take_last();  // of an option given twice, as in other trainers
  app.fallthrough();
  int threads = 0;
  Selected selected;
  Options options(&app);
  options.add_option("-t,--threads", threads, "Threads to use [all processors of this process]")
      ->check(Range(1, 1024));
  options.add_flag("-q,--quiet", selected.quiet, "No progress on stderr");
  AddDemo(options, selected);
  AddTrain(options, selected);
  AddTrainLora(options, selected);
  AddTrainCustomDiffusion(options, selected);
  AddSample(options, selected);
  AddEdit(options, selected);
  AddLora(options, selected);
  AddData(options, selected);
  AddConvert(options, selected);
  AddBench(options, selected);
  AddInfo(options, selected);
  AddGraph(options, selected);
  AddUNet(options, selected);
  try {
    app.parse(Arguments(argc, argv));
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    std::vector<std::string> rest = app.remaining();
    std::string unknown = rest.empty() ? "" : fmt::format(" (unknown: {})", fmt::join(rest, " "));
    fmt::print(stderr, "calotype: {}{}\nRun with --help for the options.\n", e.what(), unknown);
    return 2;
  }
  try {
    if (threads > 0) SetThreads(threads);
    CatchSignals();
    selected.run();
    return 0;
  } catch (const CancelledError& e) {
    return Report(CaughtSignal() > 0 ? 128 + CaughtSignal() : 1, e.what());
  } catch (const UnsupportedFileError& e) {
    return Report(3, e.what());
  } catch (const ValueError& e) {
    return Report(2, e.what());
  } catch (const FileError& e) {
    return Report(3, e.what());
  } catch (const NumericError& e) {
    return Report(4, e.what());
  } catch (const OutOfMemoryError& e) {
    return Report(5, e.what());
  } catch (const std::bad_alloc&) {
    return Report(5, "out of memory");
  } catch (const std::exception& e) {
    return Report(1, e.what());
  }
}

}  // namespace
}  // namespace calotype::app

int main(int argc, char** argv) {
  calotype::app::LimitSpinning(argv);
  return calotype::app::Main(argc, argv);
}
