// Exchanges of registers between the lanes of a warp.
#pragma once
#include <cstdint>

#include "device/arch.cuh"

namespace sm120 {

// Transposes an 8x8 matrix of b16 held as MMA fragments (lane 4g + t: row g, columns 2t, 2t + 1).
// PTX ISA 9.7.14.5.18 "movmatrix".
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
  return v;
}

// PTX ISA 9.7.9.6 "shfl.sync": w[j] of quad lane t becomes w[t] of quad lane j: a 4x4 transpose
// over the quad.
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4], int t) {
  uint32_t out[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int peer = t ^ r;
    const uint32_t send = peer < 2 ? (peer ? w[1] : w[0]) : (peer == 2 ? w[2] : w[3]);
    const uint32_t got = r ? __shfl_xor_sync(0xffffffffu, send, r) : send;
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = peer == j ? got : out[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) w[j] = out[j];
}

}  // namespace sm120
