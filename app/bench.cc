// calotype bench: the speed of models, kernels and layers on this machine, eager beside compiled.
#include <fmt/format.h>

#include <cstdio>
#include <memory>

#include "app/bench_report.h"
#include "app/commands.h"
#include "core/error.h"
#include "core/parallel.h"
#include "io/atomic_file.h"
#include "pipelines/kernel_cases.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path model, json, trace;
  std::vector<std::string> unets;
  std::vector<int64_t> batches{1, 64};
  int64_t tokens = 8;
  double seconds = 2;
  bool train = false, kernels = false, profile = false, tune = false;
  std::string winograd = "auto", only;
};

class Bench {
 public:
  explicit Bench(const Command& command)
      : command_(command),
        options_{.seconds = command.seconds, .profile = command.profile || !command.trace.empty()} {
    options_.compile.winograd = jit::ParseWinograd(command.winograd);
    options_.compile.tune = command.tune;
    report_.processor = ProcessorName();
    report_.threads = Threads();
    report_.winograd = command.winograd;
    report_.peaks = MeasureFmaPeak();
    fmt::print("{}", HeadText(report_));
  }

  void RunModel(const std::string& name, DiffusionModel& model) {
    for (int64_t batch : command_.batches) {
      Add("unet", name, batch, [&] { return CompareUNet(model, batch, options_); });
      if (!command_.train) continue;
      Add("train", name, batch, [&] { return CompareTrainingStep(model, batch, options_); });
    }
  }
  void RunCases(const char* what, std::vector<KernelCase> cases) {
    for (KernelCase& kernel : cases) {
      Add(what, kernel.name, 1, [&] { return Compare(kernel.graph, kernel.inputs, options_); });
      kernel = {};  // its weights go
    }
  }
  void Finish() {
    Check(!report_.rows.empty(), "bench: no row contains \"{}\" (--only)", command_.only);
    fmt::print("{}", PeakText(report_));
    if (!command_.json.empty()) WriteFile(command_.json, ToJson(report_));
    if (!command_.trace.empty()) WriteFile(command_.trace, ToTrace(report_));
  }

 private:
  template <class F>
  void Add(const char* what, const std::string& name, int64_t batch, const F& compare) {
    BenchRow row{what, name, batch, {}};
    if ((row.what + " " + name).find(command_.only) == std::string::npos) return;
    KeepFastest(report_.peaks, MeasureFmaPeak(0.02));
    row.comparison = compare();
    fmt::print("{}", RowText(report_, row));
    if (command_.profile) fmt::print("{}", ProfileText(report_, row));
    std::fflush(stdout);
    report_.rows.push_back(std::move(row));
  }

  const Command& command_;
  BenchmarkOptions options_;
  BenchReport report_;
};

void Run(const Command& command) {
  std::vector<std::string> unets = command.unets;
  if (unets.empty() && command.model.empty() && !command.kernels) unets.push_back("toy16");
  Bench bench(command);
  if (!command.model.empty())
    bench.RunModel(command.model.string(), *DiffusionModel::Load(command.model));
  for (const std::string& unet : unets) bench.RunModel(unet, *RandomModel(unet, command.tokens));
  if (command.kernels) {
    bench.RunCases("kernel", KernelCases());
    bench.RunCases("layer", LayerCases());
  }
  bench.Finish();
}

}  // namespace

void AddBench(Options& app, Selected& selected) {
  Options* bench = app.add_subcommand(
      "bench", "Time models, kernels and layers, eager beside compiled, beside the FMA peak");
  bench->footer(
      "Examples: calotype bench --unet toy16,attn32 --batch 1,64 --train\n"
      "          calotype bench --kernels --threads 1 --json kernels.json\n"
      "          calotype bench --unet toy16 --batch 1 --profile --trace trace.json\n"
      "A trace opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.");
  auto command = std::make_shared<Command>();
  bench->add_option("-m,--model", command->model, "Run folder to time");
  bench
      ->add_option("--unet,--preset", command->unets,
                   "Presets (toy16, small32, attn32, sd15) or diffusers' U-Net config.json, with "
                   "random weights [toy16 if nothing else is asked for]")
      ->delimiter(',')
      ->take_all();
  bench->add_option("--batch,--batch-size", command->batches, "Batch sizes")
      ->delimiter(',')
      ->take_all()
      ->check(Range(1, 4096))
      ->capture_default_str();
  bench->add_option("--tokens", command->tokens, "Length of the contexts of --unet")
      ->capture_default_str()
      ->check(Range(1, 4096));
  bench->add_option("--seconds", command->seconds, "Time for each measurement")
      ->capture_default_str()
      ->check(Range(0.0, 3600.0));
  bench->add_flag("--train", command->train, "Also the training step (AdamW)");
  bench->add_flag("--kernels", command->kernels,
                  "Also single kernels and layers in the sizes of Stable Diffusion 1.5");
  bench->add_option("--only", command->only, "Only rows whose name contains this text");
  bench->add_option("--winograd", command->winograd, "auto (where it pays) or off")
      ->capture_default_str();
  bench->add_flag("--tune", command->tune,
                  "Measure which algorithms are fastest here instead of estimating it");
  bench->add_flag("--profile", command->profile, "Also the time of each step of the compiled form");
  bench->add_option("--json", command->json, "File for all figures");
  bench->add_option("--trace", command->trace, "File for a Chrome trace of one call of each row");
  bench->callback([command, &selected] { selected.run = [command] { Run(*command); }; });
}

}  // namespace calotype::app
