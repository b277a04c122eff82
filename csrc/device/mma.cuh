// Warp-level matrix instructions, one wrapper each. D = A * B + C, A row-major, B column-major.
// PTX ISA 9.7.14.5 "mma"; fragment order of lane 4g + t as drawn there. None is volatile: the
// compiler must be free to interleave independent tiles.
#pragma once
#include <cstdint>

#include "device/arch.cuh"

namespace sm120 {

#define SM120_MMA_OPERANDS(d, a, b)                \
  : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                             \
  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])

// m16n8k16, f16 x f16 -> f32. The emulated atoms are built on it.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%0,%1,%2,%3};" SM120_MMA_OPERANDS(d, a, b));
}

// The same with C = 0, which saves clearing the destination.
__device__ __forceinline__ void mma_f16_zero(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
}

// m16n8k16, bf16 x bf16 -> f32; the same instruction on both targets.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7},"
      " {%8,%9}, {%0,%1,%2,%3};" SM120_MMA_OPERANDS(d, a, b));
}

// The same with C = 0.
__device__ __forceinline__ void mma_bf16_zero(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
}

// Bits of a float32 -> of the nearest TF32, ties away from zero; Inf and NaN stay. PTX ISA "cvt".
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(bits));
  return rounded;
}

// m16n8k8, tf32 x tf32 -> f32; the same instruction on both targets.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7},"
      " {%8,%9}, {%0,%1,%2,%3};" SM120_MMA_OPERANDS(d, a, b));
}

// m16n8k32, e4m3 x e4m3 -> f32 without scales (sm_90a expands it into unpacking and two f16 MMAs).
__device__ __forceinline__ void mma_e4m3(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7},"
      " {%8,%9}, {%0,%1,%2,%3};" SM120_MMA_OPERANDS(d, a, b));
}

// Block-scaled MMAs, sm_120f only. PTX ISA 9.7.14.5.15 "block scaling": with thread-id selectors 0
// the scale word of A's rows g and g + 8 is read from lanes 4g and 4g + 1, of B's column n from
// lane 4n; kByte names the (first) byte of the words.
#define SM120_MMA_SCALED(KIND, SHAPE, TYPES)                                                     \
  asm("mma.sync.aligned.kind::" KIND ".block_scale.scale_vec::" SHAPE ".row.col.f32." TYPES      \
      ".f32.ue8m0 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12, 0}, {%11}," \
      " {%12, 0};"                                                                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(sfa), "r"(sfb),    \
        "n"(kByte))

enum class Format { kFp8, kFp4 };  // e4m3 in a byte, e2m1 two a byte (low nibble = even k)

// m16n8k32, one scale per 32 of K; B is e4m3, an e2m1 A lies in bits 5..2 of its bytes.
template <Format kA, int kByte>
__device__ __forceinline__ void mma_mxf8f6f4(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], uint32_t sfa, uint32_t sfb) {
#if SM120_OPS_NATIVE
  if constexpr (kA == Format::kFp8) {
    SM120_MMA_SCALED("mxf8f6f4", "1X.m16n8k32", "e4m3.e4m3");
  } else {
    SM120_MMA_SCALED("mxf8f6f4", "1X.m16n8k32", "e2m1.e4m3");
  }
#endif
}

// m16n8k64, both operands packed e2m1, two scales per 64 of K (bytes kByte, kByte + 1).
template <int kByte>
__device__ __forceinline__ void mma_mxf4(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], uint32_t sfa, uint32_t sfb) {
#if SM120_OPS_NATIVE
  SM120_MMA_SCALED("mxf4", "2X.m16n8k64", "e2m1.e2m1");
#endif
}

#undef SM120_MMA_SCALED
#undef SM120_MMA_OPERANDS

}  // namespace sm120
