// The library's device/ldmatrix.cuh, its PTX replaced by what the PTX ISA says it does.
#pragma once
#include "warp.h"
#define ldmatrix ptx_ldmatrix
#define lds8 ptx_lds8
#define lds32 ptx_lds32
#define lds64 ptx_lds64
#include_next "device/ldmatrix.cuh"
#undef ldmatrix
#undef lds8
#undef lds32
#undef lds64

namespace sm120 {

// Lanes 8i .. 8i+7 give the addresses of the 16-byte rows of matrix i; lane 4r + c receives bytes
// 4c .. 4c+3 of row r.
template <int kCount>
void ldmatrix(uint32_t* r, uint32_t address) {
  const auto& rows = simulated::warp.exchange(address);
  const int lane = simulated::warp.lane;
  for (int i = 0; i < kCount; ++i) {
    r[i] = simulated::warp.load32(rows[8 * i + lane / 4], 16, 4 * (lane % 4));
  }
}

inline uint32_t lds8(uint32_t address) {
  return simulated::warp.load32(address & ~3u, 4) >> 8 * (address & 3u) & 0xffu;
}

inline uint32_t lds32(uint32_t address) {
  return simulated::warp.load32(address, 4);
}

inline void lds64(uint32_t& lo, uint32_t& hi, uint32_t address) {
  lo = simulated::warp.load32(address, 8);
  hi = simulated::warp.load32(address, 8, 4);
}

}  // namespace sm120
