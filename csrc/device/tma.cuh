// Bulk tensor copies, global -> shared, in their shared::cta form.
// PTX ISA 9.7.9.25 "cp.async.bulk.tensor". The shared::cluster form is avoided on purpose: it is
// reported to make the driver reserve gigabytes on SM120.
#pragma once
#include <cuda.h>

#include "device/barrier.cuh"

namespace sm120 {

// Box at element coordinates (x = along the contiguous axis, y = row); out-of-bounds elements
// arrive as zeros and count as transferred bytes.
__device__ __forceinline__ void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t full_bar,
                                            int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
      "l"(map), "r"(full_bar), "r"(x), "r"(y)
      : "memory");
}

// The same of a 3-D tensor; z is the outermost coordinate.
__device__ __forceinline__ void tma_load_3d(uint32_t dst, const CUtensorMap* map, uint32_t full_bar,
                                            int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
      "l"(map), "r"(full_bar), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Of a 4-D tensor; w is the outermost coordinate.
__device__ __forceinline__ void tma_load_4d(uint32_t dst, const CUtensorMap* map, uint32_t full_bar,
                                            int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
      "l"(map), "r"(full_bar), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// A box of a 2-D tensor into the L2 only. PTX ISA 9.7.9.25 "cp.async.bulk.prefetch.tensor"
__device__ __forceinline__ void tma_prefetch_2d(const CUtensorMap* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(x),
               "r"(y)
               : "memory");
}

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace sm120
