// Controls that concern a whole block or grid: register budgets, dependent launch.
#pragma once

#include "device/arch.cuh"

namespace sm120 {

// PTX ISA 9.7.19.5 "setmaxnreg": registers are granted per four warps, so producers give theirs up.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// PTX ISA 9.7.13.13 "griddepcontrol" (programmatic dependent launch). Both are no-ops in a launch
// without the attribute. Every block must wait before its first read or write of global memory.
__device__ __forceinline__ void pdl_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void pdl_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// PTX ISA 9.7.13.1 "barrier": over the first kThreads threads to come, whole warps. Barrier 0 is
// __syncthreads().
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier() {
  asm volatile("barrier.cta.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// How many threads of the block say yes, and a block barrier; every thread must call it.
__device__ __forceinline__ int count_in_block(bool yes) {
  return __syncthreads_count(yes);
}

}  // namespace sm120
