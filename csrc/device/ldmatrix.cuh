// Reads of swizzled shared-memory tiles. PTX ISA 9.7.14.5.16 "ldmatrix".
// Volatile, so that they keep their place between the waits and releases of the stage ring.
#pragma once
#include <cute/swizzle.hpp>

#include "device/barrier.cuh"

namespace sm120 {

// kCount 8x8 matrices of b16; lanes 8i .. 8i+7 give the row addresses of matrix i.
template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t* r, uint32_t address) {
  if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address));
  } else {
    static_assert(kCount == 1);
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address));
  }
}

// Four matrices, each transposed: lane 4g + t gets rows 2t, 2t + 1 of column g.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ uint32_t lds32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t lds8(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ void lds64(uint32_t& lo, uint32_t& hi, uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(lo), "=r"(hi) : "r"(address));
}

// Byte offset in a tile that TMA wrote with the swizzle of its row width: 16-byte chunks are
// permuted within 128-byte lines (CU_TENSOR_MAP_SWIZZLE_128B / _64B / _32B). A whole multiple of 8
// rows may be added to the result, and bits of the column XORed into it.
template <int kRowBytes>
__host__ __device__ constexpr uint32_t swizzled(int row, int column_byte) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  using Swizzle = cute::Swizzle<kRowBytes == 128 ? 3 : kRowBytes / 32, 4, 3>;
  return static_cast<uint32_t>(Swizzle::apply(row * kRowBytes + column_byte));
}

}  // namespace sm120
