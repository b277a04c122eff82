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

// PTX ISA 9.7.9.6 "shfl.sync": w[j] of quad lane t becomes w[t] of quad lane j. A 4x4 transpose
// over the quad: of each 2x2 block, then of the blocks.
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4], int t) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool high = t & bit;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? w[j] : w[j | bit], bit);
      w[j] = high ? got : w[j];
      w[j | bit] = high ? w[j | bit] : got;
    }
  }
}

}  // namespace sm120
