// The library's device/mma.cuh, its PTX replaced by recording the operands.
#pragma once
#include "warp.h"
#define mma_f16 ptx_mma_f16
#define mma_f16_zero ptx_mma_f16_zero
#define mma_mxf8f6f4 ptx_mma_mxf8f6f4
#define mma_mxf4 ptx_mma_mxf4
#include_next "device/mma.cuh"
#undef mma_f16
#undef mma_f16_zero
#undef mma_mxf8f6f4
#undef mma_mxf4

namespace sm120 {

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simulated::warp.mma(d,
                      {simulated::MmaKind::kF16, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, 0, 0, 0});
}

inline void mma_f16_zero(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  for (float& sum : d) sum = 0.f;
  mma_f16(d, a, b);
}

template <Format kA, int kByte>
void mma_mxf8f6f4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t sfa,
                  uint32_t sfb) {
  simulated::warp.mma(
      d, {simulated::MmaKind::kMxf8f6f4, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, sfa, sfb, kByte});
}

template <int kByte>
void mma_mxf4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t sfa,
              uint32_t sfb) {
  static_assert(kByte == 0 || kByte == 2, "byte selectors of scale_vec::2X");
  simulated::warp.mma(
      d, {simulated::MmaKind::kMxf4, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, sfa, sfb, kByte});
}

}  // namespace sm120
