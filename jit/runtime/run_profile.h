// RunProfile: where the time of calls goes, step by step and thread by thread.
#pragma once

#include <cstdint>
#include <vector>

namespace calotype::jit {

struct RunProfile {
  // Sums over all calls. CPU time is that of the whole process, waiting threads that spin included.
  struct StepTime {
    double wall = 0, cpu = 0;  // seconds
  };
  // What one thread did for one step: from the start of its first chunk to the end of its last.
  struct Event {
    int step = 0;
    int thread = 0;             // 0, 1, ... in the order in which they appear
    double begin = 0, end = 0;  // seconds since the call began
    int64_t chunks = 0;
  };

  bool want_events = false;  // costs a lock for each chunk
  int64_t runs = 0;
  std::vector<StepTime> steps;  // as Executable::steps()
  std::vector<Event> events;    // of the last call, by step
};

}  // namespace calotype::jit
