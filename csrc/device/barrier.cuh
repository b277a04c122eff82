// mbarrier objects and the producer/consumer ring built on them.
// PTX ISA 9.7.13 "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once
#include <cstdint>

#include "device/arch.cuh"

namespace sm120 {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void* smem_pointer(uint32_t address) {
  return __cvta_shared_to_generic(address);
}

// Keeps the compiler from recomputing a value (the shared-memory base costs it several
// instructions in every loop iteration) instead of holding it in a register.
__device__ __forceinline__ uint32_t opaque(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Has the compiler read two values here, from wherever they are.
__device__ __forceinline__ void read_here(const void* a, uint32_t b) {
  asm volatile("" ::"l"(a), "r"(b));
}

// A zero that the compiler does not take for another one it has.
__device__ __forceinline__ uint32_t new_zero() {
  uint32_t zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return zero;
}

// A zero that ptxas does not know for one: kernels here have no grid along z.
__device__ __forceinline__ uint32_t unknown_zero() {
  uint32_t zero;
  asm("mov.u32 %0, %%ctaid.z;" : "=r"(zero));
  return zero;
}

// The same for values that save instructions in the main loop, where there are registers for them:
// the emulated MMA needs its own.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
  return kNative ? opaque(v) : v;
}

__device__ __forceinline__ int lane_id() {
  return threadIdx.x % kWarpSize;
}

__device__ __forceinline__ void mbarrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Makes the inits visible to the async proxy (TMA) before any copy may signal them.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_expect_tx(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra retry;\n"
      "finished:\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// Whether the phase is over by now.
__device__ __forceinline__ bool mbarrier_test(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

// Barrier of the warps that name the same id (1 .. 15; 0 is __syncthreads). PTX ISA "bar.sync".
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Position in a ring of kStages slots: slot index and the parity of its current use.
template <int kStages>
struct RingState {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The same in one register, twice the slot plus the parity, for loops that have few.
template <int kStages>
struct PackedRingState {
  uint32_t packed = 0;

  __device__ __forceinline__ uint32_t stage() const { return packed / 2; }
  __device__ __forceinline__ uint32_t parity() const { return packed % 2; }
  __device__ __forceinline__ void advance() {
    packed += 2;
    if (packed >= 2 * kStages) packed = packed % 2 ^ 1;
  }
};

// One arrival for a whole warp, when all its lanes have come here; none unless `yes`. PTX ISA
// 9.7.13.15 "elect.sync" takes fewer instructions than a comparison of the lane's number; the
// emulation's loops get fewer registers with it.
__device__ __forceinline__ void mbarrier_arrive_of_warp(uint32_t bar, bool yes = true) {
  if constexpr (kNative) {
    asm volatile(
        "{\n.reg .pred one, yes;\nsetp.ne.u32 yes, %1, 0;\nelect.sync _|one, 0xffffffff;\n"
        "and.pred one, one, yes;\n@one mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(bar),
        "r"(static_cast<uint32_t>(yes))
        : "memory");
  } else {
    __syncwarp();
    if (yes && lane_id() == 0) mbarrier_arrive(bar);
  }
}

// Ordinary accesses to shared memory before it, TMA's after it. PTX ISA "membar / fence".
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// How a consumer warp gives a stage back to the producer.
// Hazard: without the fence ptxas issues the arrive while the warp's last ldmatrix is still in
// flight, and the next TMA write overwrites the tile under it (seen on an H200: up to 0.8 % wrong
// outputs). The fence must be executed by every lane, before the warp converges.
__device__ __forceinline__ void release_stage(uint32_t empty_bar) {
  async_proxy_fence();
  mbarrier_arrive_of_warp(empty_bar);
}

// The same without the fence, which waits for more than it must, if `yes`. `loaded` must depend on
// every ldmatrix from the stage: the arrive's address depends on it, so that it cannot be issued
// before they are done, for all lanes at once. (MMAs that use the data do not help: ptxas may move
// them behind the arrive.)
__device__ __forceinline__ void release_loaded_stage(uint32_t empty_bar, uint32_t loaded,
                                                     bool yes) {
  mbarrier_arrive_of_warp(empty_bar | (loaded & unknown_zero()), yes);
}

}  // namespace sm120
