// Signals between blocks, through global memory: what was written before a flag is raised can be
// read after it was seen. PTX ISA "Memory Consistency Model": release and acquire patterns.
#pragma once
#include <cstdint>

#include "device/arch.cuh"

namespace sm120 {

// A lane raises its flag, if it has one, for all that the warp has written. By a whole warp.
__device__ __forceinline__ void raise_flags(bool has_flag, uint64_t* flag, uint64_t value) {
  __syncwarp();
  if (has_flag) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
  }
}

// Waits until the flag has the value, then takes it down. By the one thread that waits for it.
__device__ __forceinline__ void take_flag(uint64_t* flag, uint64_t value) {
  uint64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != value);
  *flag = 0;
}

// The same for `count` flags, `step` apart. By a whole warp, for all of its lanes.
__device__ __forceinline__ void take_flags(uint64_t* flags, int step, int count, uint64_t value) {
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    take_flag(flags + i * step, value);
  }
  __syncwarp();
}

}  // namespace sm120
