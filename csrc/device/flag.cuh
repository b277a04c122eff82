// Signals between blocks, through global memory: what was written before a flag is raised can be
// read after it was seen. PTX ISA "Memory Consistency Model": release and acquire patterns.
#pragma once
#include <cstdint>

#include "device/arch.cuh"

namespace sm120 {

// For all that the thread has written, and others before a barrier with it.
__device__ __forceinline__ void raise_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// Waits until the flag has the value, then takes it down. By the one thread that waits for it.
__device__ __forceinline__ void take_flag(uint64_t* flag, uint64_t value) {
  uint64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != value);
  *flag = 0;
}

}  // namespace sm120
