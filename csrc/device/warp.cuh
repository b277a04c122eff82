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

// The value of another lane: by number, by XOR with `mask`, `distance` lanes below (one's own where
// there is none).
template <typename T>
__device__ __forceinline__ T from_lane(T value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}
template <typename T>
__device__ __forceinline__ T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}
template <typename T>
__device__ __forceinline__ T from_lane_below(T value, int distance) {
  return __shfl_up_sync(0xffffffff, value, distance);
}

// PTX ISA "vote.sync": the lanes for which `condition` holds; whether it holds for all.
__device__ __forceinline__ uint32_t lanes_where(bool condition) {
  return __ballot_sync(0xffffffff, condition);
}
__device__ __forceinline__ bool all_lanes(bool condition) {
  return __all_sync(0xffffffff, condition);
}

// PTX ISA "redux.sync"
__device__ __forceinline__ int min_of_warp(int value) {
  return __reduce_min_sync(0xffffffff, value);
}
__device__ __forceinline__ int max_of_warp(int value) {
  return __reduce_max_sync(0xffffffff, value);
}

// 16 bytes that no thread of the kernel writes. PTX ISA "ld.global.nc"; it may stay in L1, which
// the two halves of a float32 chunk need: they share 32-byte sectors.
__device__ __forceinline__ uint4 load_readonly(const uint4* p) {
  return __ldg(p);
}

}  // namespace sm120
