#include "app/terminal.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace calotype::app {
namespace {

volatile sig_atomic_t caught_signal = 0;

void OnSignal(int signal) {
  caught_signal = signal;
  struct sigaction action = {};
  action.sa_handler = SIG_DFL;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

}  // namespace

void CatchSignals() {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

int CaughtSignal() { return caught_signal; }

std::string FormatDuration(double seconds) {
  if (!std::isfinite(seconds) || seconds > 1e7) return "?";
  int64_t s = std::llround(std::max(0.0, seconds));
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{:02}:{:02}", s / 60, s % 60);
}

ProgressBar::ProgressBar(std::string title, bool quiet)
    : title_(std::move(title)), quiet_(quiet), terminal_(isatty(STDERR_FILENO)) {}

ProgressBar::~ProgressBar() {
  if (drawn_) fputc('\n', stderr);
}

void ProgressBar::Clear() {
  if (!drawn_) return;
  fputs("\r\033[K", stderr);
  drawn_ = false;
}

void ProgressBar::Message(const std::string& text) {
  if (quiet_) return;
  Clear();
  fmt::print(stderr, "{}\n", text);
}

void ProgressBar::Update(int64_t done, int64_t total, const std::string& text) {
  if (quiet_) return;
  auto now = Clock::now();
  auto interval = terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(10000);
  if (first_ < 0) {
    first_ = done;
    start_ = now;
  } else if (done < total && now - last_ < interval) {
    return;
  }
  last_ = now;
  double seconds = std::chrono::duration<double>(now - start_).count();
  double pace = done > first_ ? seconds / static_cast<double>(done - first_) : NAN;
  std::string speed = std::isnan(pace) ? "?"
                      : pace >= 1      ? fmt::format("{:.2f}s/it", pace)
                                       : fmt::format("{:.2f}it/s", 1 / pace);
  double fraction = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1;
  std::string line = fmt::format(
      "{}: {:3.0f}%|{:<20}| {}/{} [{}<{}, {}] {}", title_, 100 * fraction,
      std::string(static_cast<size_t>(20 * fraction), '#'), done, total, FormatDuration(seconds),
      FormatDuration(pace * static_cast<double>(total - done)), speed, text);
  if (terminal_) {
    Clear();
    fputs(line.c_str(), stderr);
    drawn_ = done < total;
    if (!drawn_) fputc('\n', stderr);
  } else {
    fmt::print(stderr, "{}\n", line);
  }
  fflush(stderr);
}

}  // namespace calotype::app
