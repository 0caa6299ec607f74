// What a person sees while a command runs: a progress bar on a terminal, plain lines elsewhere, all
// on stderr; and the signals that ask to stop.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace calotype::app {

// After this call SIGINT and SIGTERM only set a flag; a second one ends the process at once.
void CatchSignals();
// The signal caught, or 0.
int CaughtSignal();

// "12%|#         | 48/400 [02:44<20:04, 3.42s/it] text". On a terminal one line that is redrawn at
// most 10 times a second; otherwise a line at most every 10 seconds and at the end.
class ProgressBar {
 public:
  explicit ProgressBar(std::string title, bool quiet = false);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;

  // The clock for speed and time left starts at the first call.
  void Update(int64_t done, int64_t total, const std::string& text);
  // A line of its own, above the bar.
  void Message(const std::string& text);

 private:
  using Clock = std::chrono::steady_clock;
  void Clear();

  std::string title_;
  bool quiet_, terminal_, drawn_ = false;
  int64_t first_ = -1;  // done at the first call
  Clock::time_point start_, last_;
};

// "mm:ss" or "h:mm:ss".
std::string FormatDuration(double seconds);

}  // namespace calotype::app
