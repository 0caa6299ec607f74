#include "core/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/attention_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace calotype {

namespace {

const AttentionKernels& Kernels() { return CALOTYPE_SELECT_ISA(kAttentionKernels); }

int64_t Padded(int64_t floats) { return (floats + 15) / 16 * 16; }

// Calls f(item, scratch) for every item, where no two calls that run at once share a scratch of
// `floats` floats out of `base`: as many workers as there are threads draw the items.
template <class F>
void ForEachItem(int64_t items, int workers, float* base, int64_t floats, F f) {
  std::atomic<int64_t> next{0};
  ParallelFor(workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t item; (item = next++) < items;) f(item, base + worker * Padded(floats));
  });
}

int Workers(int64_t items) { return static_cast<int>(std::min<int64_t>(Threads(), items)); }

// Pointers of head `h` of batch element `b` for the tensors that forward and backward share.
AttentionHead HeadAt(const AttentionShape& s, const AttentionMask& mask, int64_t b, int64_t h,
                     const float* q, const float* k, const float* v) {
  AttentionHead head{};
  int64_t kv_b = s.kv_batch == 1 ? 0 : b;
  head.q_row = s.heads * s.head_dim;
  head.v_row = s.heads * s.value_dim;
  head.q = q + b * s.queries * head.q_row + h * s.head_dim;
  head.k = k + kv_b * s.keys * head.q_row + h * s.head_dim;
  head.v = v + kv_b * s.keys * head.v_row + h * s.value_dim;
  head.mask = mask;
  if (mask.data) head.mask.data = mask.data + b * mask.batch + h * mask.head;
  head.dropout_base = static_cast<uint64_t>((b * s.heads + h) * s.queries * s.keys);
  return head;
}

}  // namespace

void AttentionForward(const AttentionShape& s, const AttentionMask& mask, const float* q,
                      const float* k, const float* v, float* out, float* lse) {
  const AttentionKernels& kernels = Kernels();
  int64_t block = std::min(s.block_q, std::max<int64_t>(s.queries, 1));
  int64_t blocks = (s.queries + block - 1) / block;
  int64_t items = s.batch * s.heads * blocks;
  int64_t floats = kernels.forward_scratch(s);
  int workers = Workers(items);
  float* base = reinterpret_cast<float*>(ThreadScratch(workers * Padded(floats) * 4));
  ForEachItem(items, workers, base, floats, [&](int64_t item, float* scratch) {
    int64_t bh = item / blocks, b = bh / s.heads, h = bh % s.heads;
    int64_t begin = item % blocks * block;
    AttentionHead head = HeadAt(s, mask, b, h, q, k, v);
    head.out = out + b * s.queries * head.v_row + h * s.value_dim;
    head.lse = lse + bh * s.queries;
    kernels.forward(s, head, begin, std::min(begin + block, s.queries), scratch);
  });
}

void AttentionBackward(const AttentionShape& s, const AttentionMask& mask, const float* q,
                       const float* k, const float* v, const float* out, const float* lse,
                       const float* dout, float* dq, float* dk, float* dv) {
  const AttentionKernels& kernels = Kernels();
  int64_t items = s.batch * s.heads;
  int64_t floats = kernels.backward_scratch(s);
  int workers = Workers(items);
  int64_t k_size = s.keys * s.heads * s.head_dim, v_size = s.keys * s.heads * s.value_dim;
  // Keys shared by the batch: each batch element writes its part, summed in order afterwards.
  bool shared = s.kv_batch == 1 && s.batch != 1;
  ScratchLayout size;
  auto layout = [&](ScratchLayout& part, float*& base, float*& dk_parts, float*& dv_parts) {
    base = part.Take<float>(workers * Padded(floats));
    dk_parts = part.Take<float>(shared ? s.batch * k_size : 0);
    dv_parts = part.Take<float>(shared ? s.batch * v_size : 0);
  };
  float *base, *dk_parts, *dv_parts;
  layout(size, base, dk_parts, dv_parts);
  ScratchLayout block(ThreadScratch(size.size()));
  layout(block, base, dk_parts, dv_parts);
  if (!shared) {
    dk_parts = dk;
    dv_parts = dv;
  }
  ForEachItem(items, workers, base, floats, [&](int64_t bh, float* scratch) {
    int64_t b = bh / s.heads, h = bh % s.heads;
    AttentionHead head = HeadAt(s, mask, b, h, q, k, v);
    head.out = const_cast<float*>(out) + b * s.queries * head.v_row + h * s.value_dim;
    head.lse = const_cast<float*>(lse) + bh * s.queries;
    head.dout = dout + b * s.queries * head.v_row + h * s.value_dim;
    head.dq = dq + b * s.queries * head.q_row + h * s.head_dim;
    head.dk = dk_parts + b * k_size + h * s.head_dim;
    head.dv = dv_parts + b * v_size + h * s.value_dim;
    kernels.backward(s, head, scratch);
  });
  if (!shared) return;
  auto sum = [&](const float* parts, int64_t n, float* total) {
    ParallelFor(n, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) total[i] = 0;
      for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t i = begin; i < end; ++i) total[i] += parts[b * n + i];
      }
    });
  };
  sum(dk_parts, k_size, dk);
  sum(dv_parts, v_size, dv);
}

}  // namespace calotype
