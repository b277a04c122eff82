// Signals between blocks, through global memory: what was written before a flag is raised can be
// read after it was seen. PTX ISA "Memory Consistency Model": release and acquire patterns.
#pragma once
#include <cstdint>

#include "device/arch.cuh"

namespace sm120 {

// Raises the flag for all that the warp has written.
__device__ __forceinline__ void raise_flag(uint64_t* flag, uint64_t value) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
  }
}

// Waits until each of `count` flags, `step` apart, has the value, then takes it down. By a whole
// warp, for all of its lanes.
__device__ __forceinline__ void take_flags(uint64_t* flags, int step, int count, uint64_t value) {
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    uint64_t* flag = flags + i * step;
    uint64_t seen;
    do {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
    } while (seen != value);
    *flag = 0;
  }
  __syncwarp();
}

}  // namespace sm120
