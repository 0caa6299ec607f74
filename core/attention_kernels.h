// The kernels behind core/attention.h, one table for each instruction-set level (attention_isa.cc).
// Each handles one head on one thread.
#pragma once

#include <stdint.h>

#include "core/attention.h"
#include "core/isa.h"

namespace calotype {

// One head of one batch element, pointers at its first element; rows are tokens.
struct AttentionHead {
  const float *q, *k, *v;
  int64_t q_row,
      v_row;           // floats between tokens: heads * head_dim (q, k), heads * value_dim (v, out)
  AttentionMask mask;  // data at (b, h)
  uint64_t dropout_base;  // index of the dropout number of query 0 and key 0
  float *out, *lse;       // written by forward, read by backward
  const float* dout;
  float *dq, *dk, *dv;  // dk and dv dense: rows of q_row and v_row floats
};

struct AttentionKernels {
  // Scratch of one thread in floats.
  int64_t (*forward_scratch)(const AttentionShape& shape);
  int64_t (*backward_scratch)(const AttentionShape& shape);
  // Queries [begin, end), at most block_q of them; `scratch` is 64-byte aligned.
  void (*forward)(const AttentionShape& shape, const AttentionHead& head, int64_t begin,
                  int64_t end, float* scratch);
  // The whole head.
  void (*backward)(const AttentionShape& shape, const AttentionHead& head, float* scratch);
};

CALOTYPE_DECLARE_ISA(extern const AttentionKernels kAttentionKernels)

}  // namespace calotype
