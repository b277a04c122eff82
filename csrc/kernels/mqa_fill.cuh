// Stores of MQA logits, and the -inf outside the windows, which three warps of a CTA write while
// the others compute.
#pragma once
#include <cuda_bf16.h>

#include "kernels/mqa_schedule.cuh"

namespace sm120 {

__device__ __forceinline__ void store_logit(const MqaParams& p, int64_t at, float value) {
  if (p.bf16) {
    static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16(value);
  } else {
    static_cast<float*>(p.out)[at] = value;
  }
}

// The keys from `begin` on whose logits are to be stored, and the address that key 0's would have.
struct Target {
  int begin;
  uint32_t keys;
  char* at;
};

__device__ __forceinline__ void store_logit(const MqaParams& p, const Target& to, int key,
                                            float value) {
  const bool stores = static_cast<uint32_t>(key - to.begin) < to.keys;
  char* at = to.at + static_cast<int64_t>(key) * p.value_bytes;
  store_if(stores && !p.bf16, reinterpret_cast<float*>(at), value);
  store_if(stores && p.bf16, reinterpret_cast<uint16_t*>(at), value);
}

// Writes -inf outside the windows of all rows, in pieces that the grid's fill warps share out.
__device__ __forceinline__ void fill_outside(const MqaParams& p, int warp, int warps) {
  constexpr int kPiece = 4096;
  const uint32_t pieces = (p.columns + kPiece - 1) / kPiece;
  const uint32_t total = p.rows.num_rows * pieces;  // below 2^31: the logits would not fit else
  for (uint32_t i = blockIdx.x * warps + warp; i < total; i += gridDim.x * warps) {
    const int row = i / pieces;
    const int begin = static_cast<int>(i - row * pieces) * kPiece;
    const int end = min(begin + kPiece, p.columns);
    KeyRange window = row_keys(p.rows, row);
    if (p.rows.width > 0) window = {0, window.end - window.begin};
    if (window.begin >= window.end) window = {end, end};
    const int64_t at = static_cast<int64_t>(row) * p.out_stride;
#pragma unroll 1
    for (int c = begin + lane_id(); c < min(end, window.begin); c += kWarpSize) {
      store_logit(p, at + c, -INFINITY);
    }
#pragma unroll 1
    for (int c = max(begin, window.end) + lane_id(); c < end; c += kWarpSize) {
      store_logit(p, at + c, -INFINITY);
    }
  }
}

}  // namespace sm120
