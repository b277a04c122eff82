// Exchange between the lanes of a warp, and vector access to global memory.
#pragma once
#include <cstdint>

#include "device/arch.cuh"

namespace sm120 {

// PTX ISA "Data Movement and Conversion Instructions: shfl.sync". All lanes must take part.
__device__ __forceinline__ uint32_t or_across(uint32_t value, int lane_mask) {
  return value | __shfl_xor_sync(0xffffffff, value, lane_mask);
}

__device__ __forceinline__ uint32_t max_across(uint32_t value, int lane_mask) {
  return max(value, __shfl_xor_sync(0xffffffff, value, lane_mask));
}

__device__ __forceinline__ float add_across(float value, int lane_mask) {
  return value + __shfl_xor_sync(0xffffffff, value, lane_mask);
}

// 16 bytes that no thread of the kernel writes. PTX ISA "ld.global.nc"; it may stay in L1, which
// the two halves of a float32 chunk need: they share 32-byte sectors.
__device__ __forceinline__ uint4 load_readonly(const uint4* p) {
  return __ldg(p);
}

}  // namespace sm120
