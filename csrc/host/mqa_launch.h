// From a checked MQA problem to a kernel launch.
#pragma once
#include <cuda_runtime.h>

#include "kernels/mqa.h"

namespace sm120 {

struct MqaKeys {
  const void* data;   // ragged: [count, row_bytes]; paged: the cache, [count, block_kv * ...] pages
  int64_t count;      // keys or pages
  int64_t stride;     // bytes between them
  const void* scale;  // ragged: [count] words; nullptr for pages, which hold their own
};

struct MqaQueries {
  const void* data;  // [rows * heads, row_bytes], contiguous
  int head_dim;
  bool fp4;
};

// Fills in the tensor maps and what follows from p.rows, p.heads and p.block_kv, then launches on
// `ctas` CTAs. Returns the launch's error.
cudaError_t launch_mqa_logits(MqaParams& p, const MqaQueries& q, const MqaKeys& k, int ctas,
                              cudaStream_t stream);

}  // namespace sm120
