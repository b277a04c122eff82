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
// Adds to a counter in shared memory and gives what it was.
__device__ __forceinline__ uint32_t add_to(uint32_t* counter, uint32_t value) {
  return atomicAdd_block(counter, value);
}
__device__ __forceinline__ void set_bits(uint32_t* word, uint32_t bits) {
  atomicOr_block(word, bits);
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

// Positions of the lowest and the highest set bit; -1 if there is none.
__device__ __forceinline__ int lowest_bit(uint32_t bits) {
  return __ffs(bits) - 1;
}
__device__ __forceinline__ int highest_bit(uint32_t bits) {
  return 31 - __clz(bits);
}

// Sum over the warp's lanes up to this one.
__device__ __forceinline__ uint32_t inclusive_sum(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t below = from_lane_below(value, distance);
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
__device__ __forceinline__ int load_readonly(const int* p) {
  return __ldg(p);
}

// PTX ISA "prefetch"
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Stores where `yes`, without a branch: a branch ends the block of instructions that the compiler
// interleaves. PTX ISA "Predicated Execution".
__device__ __forceinline__ void store_if(bool yes, float* p, float value) {
  asm volatile("{\n.reg .pred q;\nsetp.ne.u32 q, %0, 0;\n@q st.global.f32 [%1], %2;\n}" ::"r"(
                   static_cast<uint32_t>(yes)),
               "l"(p), "f"(value)
               : "memory");
}
// As bf16.
__device__ __forceinline__ void store_if(bool yes, uint16_t* p, float value) {
  asm volatile(
      "{\n.reg .pred q;\n.reg .b16 h;\nsetp.ne.u32 q, %0, 0;\ncvt.rn.bf16.f32 h, %2;\n"
      "@q st.global.b16 [%1], h;\n}" ::"r"(static_cast<uint32_t>(yes)),
      "l"(p), "f"(value)
      : "memory");
}

// v[f] += p[f * step], fragment by fragment. A few loads are on their way at a time: with one the
// latency would add up, and left to itself the compiler wants registers for all.
template <int kFragments>
__device__ __forceinline__ void add_fragments(float* v, const float4* p, int step) {
  constexpr int kAtOnce = kFragments % 4 == 0 ? 4 : kFragments % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int f = 0; f < kFragments; f += kAtOnce) {
    float4 part[kAtOnce];
#pragma unroll
    for (int x = 0; x < kAtOnce; ++x) {
      asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                   : "=f"(part[x].x), "=f"(part[x].y), "=f"(part[x].z), "=f"(part[x].w)
                   : "l"(p + (f + x) * step)
                   : "memory");
    }
#pragma unroll
    for (int x = 0; x < kAtOnce; ++x) {
      float* sum = v + 4 * (f + x);
      sum[0] += part[x].x, sum[1] += part[x].y, sum[2] += part[x].z, sum[3] += part[x].w;
    }
  }
}

}  // namespace sm120
