// Multi-head attention on raw memory that never stores the queries x keys scores (Dao et al. 2022,
// arXiv:2205.14135): tiled, online softmax, queries in the vector lanes. Working memory is linear
// in queries and keys, forward and backward. Several threads; every sum runs in an order that
// depends on the shape and the block sizes alone, so results do not depend on the number of
// threads.
#pragma once

#include <cstdint>

namespace calotype {

// Token layout, dense f32: q [batch, queries, heads * head_dim], k [kv_batch, keys, heads *
// head_dim], v [kv_batch, keys, heads * value_dim], kv_batch = batch or 1 (shared by the batch).
//   s_ij = scale q_i . k_j + mask_ij, and -inf where `causal` and j > i
//   lse_i = log sum_j exp s_ij,  p_ij = exp(s_ij - lse_i),  out_i = sum_j z_ij p_ij v_j
// with z = 1, or under dropout z_ij = 0 with probability `dropout`, else 1 / (1 - dropout): the
// weight is kept where PhiloxUniform(seed, stream) at index ((b heads + h) queries + i) keys + j is
// >= dropout. A query whose keys are all masked by -inf gives out = 0, lse = -inf and zero
// gradients, as in PyTorch's scaled_dot_product_attention.
struct AttentionShape {
  int64_t batch = 1, kv_batch = 1, heads = 1, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  float scale = 1;
  bool causal = false;
  float dropout = 0;
  uint64_t seed = 0, stream = 0;
  // Tile: queries of one piece of work and keys that are scored at a time.
  int64_t block_q = 64, block_kv = 64;
};

// An additive mask that broadcasts: element (b, h, i, j) is data[b * batch + h * head + i * query +
// j * key]. No mask if data is null.
struct AttentionMask {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// Writes out [batch, queries, heads * value_dim] and lse [batch, heads, queries].
void AttentionForward(const AttentionShape& shape, const AttentionMask& mask, const float* q,
                      const float* k, const float* v, float* out, float* lse);

// Writes dq, dk, dv (shapes of q, k, v; dk and dv summed over the batch if kv_batch is 1) from the
// results of AttentionForward and dout. With D_i = dout_i . out_i, recomputing p:
//   dp_ij = z_ij dout_i . v_j,  ds_ij = p_ij (dp_ij - D_i),
//   dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i z_ij p_ij dout_i.
void AttentionBackward(const AttentionShape& shape, const AttentionMask& mask, const float* q,
                       const float* k, const float* v, const float* out, const float* lse,
                       const float* dout, float* dq, float* dk, float* dv);

}  // namespace calotype
