// From accumulators to D: adds C, rounds once, honours the swap and the head split.
#pragma once
#include <cuda_bf16.h>

#include "device/exchange.cuh"
#include "device/operand.cuh"
#include "kernels/gemm.h"

namespace sm120 {

// Where a tile's sums go: its group's matrices in D and C, and where the product's rows and columns
// end.
struct Store {
  const GemmOutput& out;
  bool swapped;
  int row_end, col_end, group;

  __device__ Store(const GemmParams& p, const Tile& tile)
      : out(p.out),
        swapped(p.swapped),
        row_end(tile.row_end),
        col_end(tile.col_end),
        group(tile.group) {}

  template <class TOut>
  __device__ TOut* d() const {
    return static_cast<TOut*>(out.d) + group * out.d_group_stride;
  }
  template <class TOut>
  __device__ const TOut* c() const {
    return static_cast<const TOut*>(out.c) + group * out.c_group_stride;
  }
};

template <bool kHeadSplit>
__device__ __forceinline__ int64_t output_column(const GemmOutput& out, int n) {
  if (!kHeadSplit || out.period == 0) return n;
  const int head = n / out.period;
  const bool right = n - head * out.period >= out.left;
  return n + (static_cast<int64_t>(head) + right) * out.mid;
}

// Calls visit(element offset in D or C, fragment element) for the product's elements that a warp
// has, given the strides of that matrix. (row, col) in the MMA's product. What is done for each
// element is short and without jumps, since the code is cold more often than not.
template <Access kColAccess, bool kHeadSplit, int MT, int NT, class Visit>
__device__ __forceinline__ void for_elements(const Store& to, int64_t stride,
                                             float (&acc)[MT][NT][4], int row, int col,
                                             const Visit& visit) {
  if (row >= to.row_end || col >= to.col_end) return;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t down = to.swapped ? 1 : stride, across = to.swapped ? stride : 1;
  // A head split moves columns of D and C: rows of a swapped product.
  const auto offset = [&](int i, int64_t step, bool is_column) {
    return is_column && kHeadSplit ? output_column<true>(to.out, i) : i * step;
  };
  int64_t row_at[2 * MT];
#pragma unroll
  for (int y = 0; y < 2 * MT; ++y) row_at[y] = offset(row + 8 * y + g, down, to.swapped);
#pragma unroll
  for (int x = 0; x < 2 * NT; ++x) {
    const int n = col + 8 * (x / 2) + fragment_column<kColAccess>(2 * t + x % 2);
    const int64_t col_at = offset(n, across, !to.swapped);
#pragma unroll
    for (int y = 0; y < 2 * MT; ++y) {
      if (row + 8 * y + g < to.row_end && n < to.col_end) {
        visit(row_at[y] + col_at, acc[y / 2][x / 2][y % 2 * 2 + x % 2]);
      }
    }
  }
}

template <Access kColAccess, bool kHeadSplit, int MT, int NT>
__device__ __forceinline__ void add_c(const Store& to, float (&acc)[MT][NT][4], int row, int col) {
  const auto* c32 = to.c<float>();
  const auto* c16 = to.c<__nv_bfloat16>();
  const bool fp32 = to.out.fp32;
  for_elements<kColAccess, kHeadSplit>(
      to, to.out.c_stride, acc, row, col,
      [=](int64_t at, float& v) { v += fp32 ? c32[at] : __bfloat162float(c16[at]); });
}

// Element by element, for any alignment, edge and orientation.
template <Access kColAccess, bool kHeadSplit, class TOut, int MT, int NT>
__device__ __forceinline__ void store_elements(const Store& to, float (&acc)[MT][NT][4], int row,
                                               int col) {
  TOut* d = to.d<TOut>();
  for_elements<kColAccess, kHeadSplit>(to, to.out.d_stride, acc, row, col,
                                       [d](int64_t at, float& v) { d[at] = TOut(v); });
}

// 16-byte stores for whole, aligned tiles: each lane brings two columns of four fragments and, for
// bf16, takes one whole fragment away; fp32 pairs fill 32-byte sectors as they are.
template <bool kHeadSplit, class TOut, int MT, int NT>
__device__ __forceinline__ void store_vectors(const Store& to, const float (&acc)[MT][NT][4],
                                              int row, int col) {
  const GemmOutput& out = to.out;
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
        const bool valid = m < to.row_end;
        float2 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = {acc[i][j0 + j][2 * h], acc[i][j0 + j][2 * h + 1]};
        }
        TOut* d = to.d<TOut>() + m * out.d_stride;
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
__device__ __forceinline__ void store_vectors_swapped(const Store& to,
                                                      const float (&acc)[MT][NT][4], int row,
                                                      int col) {
  const GemmOutput& out = to.out;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int i0 = 0; i0 < MT; i0 += 2) {  // 32 rows of the product: 32 columns of D
    const int64_t vector_col = output_column<kHeadSplit>(out, row + 16 * i0 + 8 * t);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      uint32_t packed[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const float2 v = {acc[i0 + x / 2][j][x % 2 * 2], acc[i0 + x / 2][j][x % 2 * 2 + 1]};
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
        packed[x] = transpose_8x8(reinterpret_cast<const uint32_t&>(pair));
      }
      quad_transpose(packed, t);
      const int m = col + 8 * j + fragment_column<kColAccess>(g);
      if (m < to.col_end) {
        auto* d = to.d<__nv_bfloat16>() + m * out.d_stride + vector_col;
        *reinterpret_cast<uint4*>(d) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }
}

// A warp's fragments, (row, col) from the tile's corner. Without kHeadSplit D has none. C is added
// in a pass of its own, so that the code without it, which a small product fetches from a cold
// cache, is short.
template <Access kColAccess, bool kHeadSplit, int MT, int NT>
__device__ __forceinline__ void store_fragments(const GemmParams& p, const Tile& tile,
                                                float (&acc)[MT][NT][4], int row, int col) {
  const Store to(p, tile);
  row += tile.row, col += tile.col;
  if (to.out.c) add_c<kColAccess, kHeadSplit>(to, acc, row, col);
  if constexpr (MT % 2 == 0) {
    if (to.out.vector && to.swapped && !to.out.fp32 && row + 16 * MT <= to.row_end) {
      return store_vectors_swapped<kColAccess, kHeadSplit>(to, acc, row, col);
    }
  }
  if constexpr (NT % 4 == 0 && kColAccess == Access::kPlain) {
    if (to.out.vector && !to.swapped && col + 8 * NT <= to.col_end) {
      return to.out.fp32 ? store_vectors<kHeadSplit, float>(to, acc, row, col)
                         : store_vectors<kHeadSplit, __nv_bfloat16>(to, acc, row, col);
    }
  }
  if (to.out.fp32) {
    store_elements<kColAccess, kHeadSplit, float>(to, acc, row, col);
  } else {
    store_elements<kColAccess, kHeadSplit, __nv_bfloat16>(to, acc, row, col);
  }
}

}  // namespace sm120
