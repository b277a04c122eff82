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

__device__ __forceinline__ int shuffle(int value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}

// The value of the lane `delta` below, or the own one where there is none.
__device__ __forceinline__ int shuffle_up(int value, int delta) {
  return __shfl_up_sync(0xffffffff, value, delta);
}

// Bit l: lane l's predicate. PTX ISA "vote.sync".
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffff, predicate);
}

// Positions of the lowest and the highest set bit; -1 if there is none.
__device__ __forceinline__ int lowest_bit(uint32_t bits) {
  return __ffs(bits) - 1;
}
__device__ __forceinline__ int highest_bit(uint32_t bits) {
  return 31 - __clz(bits);
}

// 16 bytes that no thread of the kernel writes. PTX ISA "ld.global.nc"; it may stay in L1, which
// the two halves of a float32 chunk need: they share 32-byte sectors.
__device__ __forceinline__ uint4 load_readonly(const uint4* p) {
  return __ldg(p);
}
__device__ __forceinline__ int load_readonly(const int* p) {
  return __ldg(p);
}

}  // namespace sm120
