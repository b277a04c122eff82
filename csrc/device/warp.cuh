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

// Sum over the warp's lanes up to this one.
__device__ __forceinline__ uint32_t inclusive_sum(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffff, value, distance);
    if (threadIdx.x % kWarpSize >= distance) value += below;
  }
  return value;
}

// The lanes that hold the same value as this one. PTX ISA "Parallel Synchronization and
// Communication Instructions: match.sync". All lanes must take part.
__device__ __forceinline__ uint32_t lanes_alike(int32_t value) {
  return __match_any_sync(0xffffffff, value);
}

__device__ __forceinline__ int count_lanes(uint32_t lanes) {
  return __popc(lanes);
}

// Adds one to a counter in shared memory. The count does not depend on the order.
__device__ __forceinline__ void count_up(uint32_t* counter) {
  atomicAdd_block(counter, 1u);
}

// 16 bytes that no thread of the kernel writes. PTX ISA "ld.global.nc"; it may stay in L1, which
// the two halves of a float32 chunk need: they share 32-byte sectors.
__device__ __forceinline__ uint4 load_readonly(const uint4* p) {
  return __ldg(p);
}

}  // namespace sm120
