// From accumulators to D: adds C, rounds once, honours the swap and the head split.
#pragma once
#include <cuda_bf16.h>

#include "device/exchange.cuh"
#include "device/operand.cuh"
#include "kernels/gemm.h"

namespace sm120 {

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <bool kHeadSplit>
__device__ __forceinline__ int64_t output_column(const GemmOutput& out, int n) {
  if (!kHeadSplit || out.period == 0) return n;
  const int head = n / out.period;
  const bool right = n - head * out.period >= out.left;
  return n + (static_cast<int64_t>(head) + right) * out.mid;
}

// Element by element, for any alignment, edge and orientation. (row, col) in the MMA's product.
template <Access kColAccess, bool kHeadSplit, class TOut, int MT, int NT>
__device__ __forceinline__ void store_elements(const GemmParams& p, const float (&acc)[MT][NT][4],
                                               int row, int col) {
  const GemmOutput& out = p.out;
  const int g = lane_id() / 4, t = lane_id() % 4;
  // Elements between neighbours of the product, where there is no head split.
  const int64_t d_down = p.swapped ? 1 : out.d_stride, d_across = p.swapped ? out.d_stride : 1;
  const int64_t c_down = p.swapped ? 1 : out.c_stride, c_across = p.swapped ? out.c_stride : 1;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = row + 16 * i + 8 * h + g;
      if (m >= p.num_rows) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int first = col + fragment_column<kColAccess>(2 * t + e);
        TOut* d = static_cast<TOut*>(out.d) + m * d_down + first * d_across;
        const TOut* c = static_cast<const TOut*>(out.c) + m * c_down + first * c_across;
#pragma unroll
        for (int j = 0; j < NT; ++j, d += 8 * d_across, c += 8 * c_across) {
          const int n = first + 8 * j;
          if (n >= p.num_cols) continue;
          // A head split moves columns of D and C: rows of a swapped product.
          const int column = p.swapped ? m : n;
          const int64_t moved = output_column<kHeadSplit>(out, column) - column;
          float value = acc[i][j][2 * h + e];
          if (out.c) value += to_float(c[moved]);
          d[moved] = TOut(value);
        }
      }
    }
  }
}

// 16-byte stores for whole, aligned tiles: each lane brings two columns of four fragments and, for
// bf16, takes one whole fragment away; fp32 pairs fill 32-byte sectors as they are.
template <bool kHeadSplit, class TOut, int MT, int NT>
__device__ __forceinline__ void store_vectors(const GemmParams& p, const float (&acc)[MT][NT][4],
                                              int row, int col) {
  const GemmOutput& out = p.out;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int j0 = 0; j0 < NT; j0 += 4) {
    int64_t pair_col[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      pair_col[j] = output_column<kHeadSplit>(out, col + 8 * (j0 + j) + 2 * t);
    const int64_t vector_col = output_column<kHeadSplit>(out, col + 8 * (j0 + t));
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = row + 16 * i + 8 * h + g;
        const bool valid = m < p.num_rows;
        float2 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = {acc[i][j0 + j][2 * h], acc[i][j0 + j][2 * h + 1]};
          if (out.c && valid) {
            const TOut* c = static_cast<const TOut*>(out.c) + m * out.c_stride + pair_col[j];
            v[j].x += to_float(c[0]), v[j].y += to_float(c[1]);
          }
        }
        TOut* d = static_cast<TOut*>(out.d) + m * out.d_stride;
        if constexpr (sizeof(TOut) == 4) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (valid) *reinterpret_cast<float2*>(d + pair_col[j]) = v[j];
          }
        } else {
          uint32_t packed[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(v[j].x, v[j].y);
            packed[j] = reinterpret_cast<const uint32_t&>(pair);
          }
          quad_transpose(packed, t);
          if (valid) {
            *reinterpret_cast<uint4*>(d + vector_col) =
                make_uint4(packed[0], packed[1], packed[2], packed[3]);
          }
        }
      }
    }
  }
}

// The same for a swapped product and bf16: 8x8 blocks are transposed, then four of them gathered.
template <Access kColAccess, bool kHeadSplit, int MT, int NT>
__device__ __forceinline__ void store_vectors_swapped(const GemmParams& p,
                                                      const float (&acc)[MT][NT][4], int row,
                                                      int col) {
  const GemmOutput& out = p.out;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int i0 = 0; i0 < MT; i0 += 2) {  // 32 rows of the product: 32 columns of D
    int64_t c_col[4];
#pragma unroll
    for (int x = 0; x < 4; ++x)
      c_col[x] = output_column<kHeadSplit>(out, row + 16 * i0 + 8 * x + g);
    const int64_t vector_col = output_column<kHeadSplit>(out, row + 16 * i0 + 8 * t);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      uint32_t packed[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        float2 v = {acc[i0 + x / 2][j][x % 2 * 2], acc[i0 + x / 2][j][x % 2 * 2 + 1]};
        if (out.c) {
          const auto* c = static_cast<const __nv_bfloat16*>(out.c) + c_col[x];
          const int m = col + 8 * j, m0 = m + fragment_column<kColAccess>(2 * t);
          const int m1 = m + fragment_column<kColAccess>(2 * t + 1);
          if (m0 < p.num_cols) v.x += to_float(c[m0 * out.c_stride]);
          if (m1 < p.num_cols) v.y += to_float(c[m1 * out.c_stride]);
        }
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
        packed[x] = transpose_8x8(reinterpret_cast<const uint32_t&>(pair));
      }
      quad_transpose(packed, t);
      const int m = col + 8 * j + fragment_column<kColAccess>(g);
      if (m < p.num_cols) {
        auto* d = static_cast<__nv_bfloat16*>(out.d) + m * out.d_stride + vector_col;
        *reinterpret_cast<uint4*>(d) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }
}

// A warp's fragments, at (row, col) of the product the MMA computed. Without kHeadSplit D has none.
template <Access kColAccess, bool kHeadSplit, int MT, int NT>
__device__ __forceinline__ void store_fragments(const GemmParams& p, const float (&acc)[MT][NT][4],
                                                int row, int col) {
  if constexpr (MT % 2 == 0) {
    if (p.out.vector && p.swapped && !p.out.fp32 && row + 16 * MT <= p.num_rows) {
      return store_vectors_swapped<kColAccess, kHeadSplit>(p, acc, row, col);
    }
  }
  if constexpr (NT % 4 == 0 && kColAccess == Access::kPlain) {
    if (p.out.vector && !p.swapped && col + 8 * NT <= p.num_cols) {
      return p.out.fp32 ? store_vectors<kHeadSplit, float>(p, acc, row, col)
                        : store_vectors<kHeadSplit, __nv_bfloat16>(p, acc, row, col);
    }
  }
  if (p.out.fp32) {
    store_elements<kColAccess, kHeadSplit, float>(p, acc, row, col);
  } else {
    store_elements<kColAccess, kHeadSplit, __nv_bfloat16>(p, acc, row, col);
  }
}

}  // namespace sm120
