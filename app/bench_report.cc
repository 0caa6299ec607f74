#include "app/bench_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "core/json.h"

namespace calotype::app {
namespace {

using Json = nlohmann::ordered_json;

double Gflops(double flop, double ms) { return ms > 0 ? 1e-6 * flop / ms : 0; }

double Percent(double part, double whole) { return whole > 0 ? 100 * part / whole : 0; }

// A rate as a number and a share of the peak, blank for work without multiply-adds.
std::string RateText(double flop, double ms, double peak) {
  double gflops = Gflops(flop, ms);
  return flop > 0 ? fmt::format("{:>8.1f} {:>6.1f}", gflops, Percent(gflops, peak))
                  : fmt::format("{:>8} {:>6}", "", "");
}

double TotalMs(const std::vector<ProfiledStep>& steps) {
  double total = 0;
  for (const ProfiledStep& step : steps) total += step.ms;
  return total;
}

Json StepJson(const ProfiledStep& step, double total, double peak) {
  double gflops = Gflops(step.flop, step.ms);
  return {{"step", step.step},
          {"label", step.label},
          {"kind", step.kind},
          {"shape", step.shape},
          {"chunks", step.chunks},
          {"ms", step.ms},
          {"cpu_ms", step.cpu_ms},
          {"percent_of_time", Percent(step.ms, total)},
          {"flop", step.flop},
          {"gflops", gflops},
          {"percent_of_peak", Percent(gflops, peak)}};
}

Json RowJson(const BenchReport& report, const BenchRow& row) {
  const Comparison& c = row.comparison;
  double jit = Gflops(c.flop, c.jit_ms);
  Json json = {{"what", row.what},
               {"name", row.name},
               {"batch", row.batch},
               {"flop", c.flop},
               {"eager_ms", c.eager_ms},
               {"eager_cpu_ms", c.eager_cpu_ms},
               {"eager_gflops", Gflops(c.flop, c.eager_ms)},
               {"jit_ms", c.jit_ms},
               {"jit_cpu_ms", c.jit_cpu_ms},
               {"jit_gflops", jit},
               {"jit_percent_of_peak", Percent(jit, report.peak())},
               {"ratio", c.eager_ms / c.jit_ms},
               {"max_rel_difference", c.max_rel_difference},
               {"compile_seconds", c.compile_seconds},
               {"arena_bytes", c.arena_bytes},
               {"packed_bytes", c.packed_bytes}};
  if (c.steps.empty()) return json;
  json["steps"] = Json::array();
  for (const ProfiledStep& step : c.steps)
    json["steps"].push_back(StepJson(step, TotalMs(c.steps), report.peak()));
  return json;
}

}  // namespace

std::string PeakText(const BenchReport& report) {
  std::string text = "FMA peak in GFLOP/s, threads x floats in a vector:";
  for (const FmaPeak& peak : report.peaks) {
    text += fmt::format(" {}x{}{} {:.1f}", peak.threads, peak.width, peak.fused ? "" : " (no FMA)",
                        peak.gflops);
  }
  return text + "\n";
}

std::string HeadText(const BenchReport& report) {
  return fmt::format(
      "{}, {} threads\n{}{:<42} {:>5} {:>10} {:>10} {:>6} {:>10} {:>10} {:>8} {:>6} "
      "{:>10} {:>9}\n",
      report.processor.empty() ? "processor" : report.processor, report.threads, PeakText(report),
      "fastest of alternating calls", "batch", "eager ms", "jit ms", "ratio", "eager CPU",
      "jit CPU", "GFLOP/s", "% peak", "difference", "compile s");
}

std::string RowText(const BenchReport& report, const BenchRow& row) {
  const Comparison& c = row.comparison;
  return fmt::format(
      "{:<42} {:>5} {:>10.3f} {:>10.3f} {:>6.2f} {:>10.3f} {:>10.3f} {} {:>10.1e} {:>9.2f}\n",
      row.what + " " + row.name, row.batch, c.eager_ms, c.jit_ms, c.eager_ms / c.jit_ms,
      c.eager_cpu_ms, c.jit_cpu_ms, RateText(c.flop, c.jit_ms, report.peak()), c.max_rel_difference,
      c.compile_seconds);
}

std::string ProfileText(const BenchReport& report, const BenchRow& row) {
  const std::vector<ProfiledStep>& steps = row.comparison.steps;
  double total = TotalMs(steps);
  std::string text = fmt::format(
      "  {} steps of {} {}, {:.3f} ms a call\n  {:>9} {:>6} {:>9} {:>8} "
      "{:>6} {:>6} {}\n",
      steps.size(), row.what, row.name, total, "ms", "%", "CPU ms", "GFLOP/s", "% peak", "chunks",
      "step");
  for (const ProfiledStep& step : steps) {
    text += fmt::format("  {:>9.4f} {:>6.2f} {:>9.4f} {} {:>6} {} {}: {}\n", step.ms,
                        Percent(step.ms, total), step.cpu_ms,
                        RateText(step.flop, step.ms, report.peak()), step.chunks, step.kind,
                        step.shape, step.label);
  }
  return text;
}

std::string ToJson(const BenchReport& report) {
  Json document = {{"calotype", CALOTYPE_VERSION}, {"processor", report.processor},
                   {"threads", report.threads},    {"winograd", report.winograd},
                   {"peak_gflops", report.peak()}, {"peaks", Json::array()},
                   {"rows", Json::array()}};
  for (const FmaPeak& peak : report.peaks) {
    document["peaks"].push_back({{"width", peak.width},
                                 {"fused", peak.fused},
                                 {"threads", peak.threads},
                                 {"gflops", peak.gflops}});
  }
  for (const BenchRow& row : report.rows) document["rows"].push_back(RowJson(report, row));
  return JsonFile(document);
}

std::string ToTrace(const BenchReport& report) {
  Json events = Json::array();
  auto name = [&](const char* what, int process, int thread, const std::string& text) {
    events.push_back({{"name", what},
                      {"ph", "M"},
                      {"pid", process},
                      {"tid", thread},
                      {"args", {{"name", text}}}});
  };
  int process = 0;
  for (const BenchRow& row : report.rows) {
    const Comparison& c = row.comparison;
    ++process;
    name("process_name", process, 0, fmt::format("{} {}, batch {}", row.what, row.name, row.batch));
    std::vector<const ProfiledStep*> steps(c.steps.size());
    for (const ProfiledStep& step : c.steps) steps[static_cast<size_t>(step.step)] = &step;
    std::set<int> threads;
    for (const jit::RunProfile::Event& event : c.events) {
      if (threads.insert(event.thread).second)
        name("thread_name", process, event.thread, fmt::format("thread {}", event.thread));
      const ProfiledStep& step = *steps[static_cast<size_t>(event.step)];
      events.push_back({{"name", step.label},
                        {"cat", step.kind},
                        {"ph", "X"},
                        {"pid", process},
                        {"tid", event.thread},
                        {"ts", 1e6 * event.begin},  // microseconds
                        {"dur", 1e6 * (event.end - event.begin)},
                        {"args",
                         {{"step", event.step},
                          {"shape", step.shape},
                          {"chunks", event.chunks},
                          {"flop_of_step", step.flop}}}});
    }
  }
  return JsonText(Json{{"traceEvents", events}, {"displayTimeUnit", "ns"}}) + "\n";
}

}  // namespace calotype::app
