// The threads of compiled code. OpenMP's barriers wait for every thread of the team, so on a
// machine that also does other work a thread without a processor holds up each of the hundred short
// regions of a call for a time slice; here the caller works on, and only chunks that somebody has
// begun are waited for. (oneDNN and the interpreter stay with OpenMP, see core/parallel.h.)
#pragma once

#include "core/parallel.h"

namespace calotype::jit {

// Runs body(context, c) for every c in [0, chunks), in any order, on up to Threads() threads: the
// caller's and those of the pool, which are started when first needed and sleep when idle. If the
// pool is at work for another caller, or the caller is a chunk of the pool, the caller does it
// alone. Allocates nothing but the first threads. The body must not throw. Any thread may call it.
void RunChunks(int64_t chunks, ChunkFunction body, void* context);

}  // namespace calotype::jit
