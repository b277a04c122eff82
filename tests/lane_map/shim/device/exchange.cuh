// The library's device/exchange.cuh, its PTX replaced by what the PTX ISA says it does.
#pragma once
#include "warp.h"
#define transpose_8x8 ptx_transpose_8x8
#include_next "device/exchange.cuh"
#undef transpose_8x8

namespace sm120 {

// movmatrix.trans: lane 4g + t gets elements (2t, g) and (2t + 1, g) of the matrix.
inline uint32_t transpose_8x8(uint32_t v) {
  const auto& all = simulated::warp.exchange(v);
  const int g = simulated::warp.lane / 4, t = simulated::warp.lane % 4;
  const auto element = [&](int row, int col) {
    return all[4 * row + col / 2] >> 16 * (col % 2) & 0xffff;
  };
  return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

}  // namespace sm120
