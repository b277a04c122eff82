// The kernels of a mixture-of-experts layer around its two grouped GEMMs, as the host sees them.
// Meanings and formulas: sm120_ops/ops/moe.py.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/quantize.h"

namespace sm120 {

inline constexpr int kMoeMaxExperts = 1024;
inline constexpr int kMoeMaxTopk = 32;

// Rows in groups whose starts are multiples of `alignment`, group g from the first such row at or
// after ends[g - 1] up to ends[g].
struct MoeGroups {
  const int32_t* ends;
  int32_t count;
  int32_t alignment;  // 16, 32, 64 or 128
};

// Most rows that `slots` (token, slot) pairs can take up with any routing: as many groups as
// possible with one row each, and the rest in full pieces of `alignment` rows.
inline int64_t moe_capacity(int64_t slots, int64_t experts, int64_t alignment) {
  const int64_t groups = std::min(slots, experts);
  return alignment * (groups + (slots - groups) / alignment);
}

// Rows quantised by the rule `deepgemm`, with packed scales.
struct MoeQuantized {
  void* data;  // [rows, cols] E4M3 or [rows, cols / 2] E2M1, contiguous, 16-byte aligned
  uint32_t* scale;
  int64_t scale_stride;
  uint32_t cols;
  uint32_t gran_k;
  bool fp4;
};

struct MoeRouteArgs {
  const void* x;  // [tokens, out.cols], contiguous, 16-byte aligned
  SourceType type;
  int32_t tokens;
  const void* ids;  // [tokens, topk]
  bool ids64;
  int32_t topk;
  int32_t experts;
  int32_t alignment;
  MoeQuantized out;     // [moe_capacity, cols]; rows outside groups are left alone
  int32_t* group_ends;  // [experts]
  int32_t* rows;        // [tokens, topk]
};

cudaError_t launch_moe_route(const MoeRouteArgs& args, int num_sms, cudaStream_t stream);

struct MoeActivationArgs {
  const void* gate_up;  // [rows, 2 * out.cols], contiguous, 16-byte aligned
  bool fp32;            // or else bfloat16
  int64_t rows;
  MoeGroups groups;
  const void* bias;  // [groups, 2 * out.cols], contiguous, or null
  bool bias_fp32;
  bool interleaved;  // columns gate, up, gate, up ..., or else all gates and then all ups
  float alpha, up_offset;
  float limit;  // +inf: none
  MoeQuantized out;
};

cudaError_t launch_moe_activation(const MoeActivationArgs& args, cudaStream_t stream);

struct MoeCombineArgs {
  const void* x;  // [x_rows, cols], contiguous, 16-byte aligned
  bool x_fp32;    // or else bfloat16
  int64_t x_rows;
  uint32_t cols;        // a multiple of 8
  const int32_t* rows;  // [tokens, topk]
  const void* weights;  // [tokens, topk]
  bool weights_fp32;    // or else bfloat16
  int32_t tokens;
  int32_t topk;
  const void* bias;  // [experts, cols], contiguous, or null
  bool bias_fp32;
  const void* ids;  // [tokens, topk], with a bias
  bool ids64;
  int32_t experts;
  void* y;  // [tokens, cols], contiguous, 16-byte aligned
  SourceType y_type;
};

cudaError_t launch_moe_combine(const MoeCombineArgs& args, cudaStream_t stream);

}  // namespace sm120
