// What becomes of a tile's sums, whole or a part of K. Serves every GEMM kernel: its Traits name
// the tile (kBlockRows, kBlockCols), a warp's fragments (MT, NT), the order of fragment columns
// (kColAccess), whether D may have a head split (kHeadSplit) and the threads, from 0 on, that hold
// sums (kStoreThreads).
#pragma once
#include "kernels/epilogue.cuh"
#include "kernels/gemm.h"
#include "kernels/tile_scheduler.cuh"

namespace sm120 {

// Workspace layout: [2 * CTA + slot][fragment][thread] float4, so that a thread finds its own
// fragments again.
template <class T>
__device__ __forceinline__ float4* partial_fragment(const GemmParams& p, int cta, int slot,
                                                    int fragment) {
  const int64_t tile_vectors = static_cast<int64_t>(T::MT) * T::NT * T::kStoreThreads;
  return reinterpret_cast<float4*>(p.workspace) + (2ll * cta + slot) * tile_vectors +
         fragment * T::kStoreThreads + threadIdx.x;
}

// What a warp has of a tile: to D, or its part of K to the workspace.
template <class T>
__device__ __forceinline__ void store_tile(const GemmParams& p, const Tile& tile,
                                           const float (&acc)[T::MT][T::NT][4], int warp_row,
                                           int warp_col) {
  if (tile.partial < 0) {
    store_fragments<T::kColAccess, T::kHeadSplit>(p, tile, acc, warp_row, warp_col);
    return;
  }
#pragma unroll
  for (int f = 0; f < T::MT * T::NT; ++f) {
    const float (&v)[4] = acc[f / T::NT][f % T::NT];
    *partial_fragment<T>(p, blockIdx.x, tile.partial, f) = make_float4(v[0], v[1], v[2], v[3]);
  }
}

// After the grid barrier: every 16-row slice of a tile that was cut is summed in CTA order (so the
// result does not depend on timing) and stored.
template <class T>
__device__ __forceinline__ void reduce_partials(const GemmParams& p, int warp_row, int warp_col) {
  const int slices = p.total_blocks / p.k_blocks * T::MT;
  for (int slice = blockIdx.x; slice < slices; slice += gridDim.x) {
    const int index = slice / T::MT, i = slice % T::MT;
    const int first = TileScheduler<T>::owner(p, index * p.k_blocks);
    const int last = TileScheduler<T>::owner(p, index * p.k_blocks + p.k_blocks - 1);
    if (first == last) continue;  // one CTA had all of K and stored it already
    float sum[1][T::NT][4] = {};
    // CTAs whose parts are loaded together: latency counts here, not bandwidth.
    constexpr int kAtOnce = 4;
    for (int cta0 = first; cta0 <= last; cta0 += kAtOnce) {
      float4 part[kAtOnce][T::NT];
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const int cta = min(cta0 + c, last);
        const int slot = TileScheduler<T>::slot_of(p, cta, index);
#pragma unroll
        for (int j = 0; j < T::NT; ++j) {
          part[c][j] = *partial_fragment<T>(p, cta, slot, i * T::NT + j);
        }
      }
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        if (cta0 + c > last) break;
#pragma unroll
        for (int j = 0; j < T::NT; ++j) {
          sum[0][j][0] += part[c][j].x, sum[0][j][1] += part[c][j].y;
          sum[0][j][2] += part[c][j].z, sum[0][j][3] += part[c][j].w;
        }
      }
    }
    const Tile tile = TileScheduler<T>::whole_tile(p, index);
    store_fragments<T::kColAccess, T::kHeadSplit>(p, tile, sum, warp_row + 16 * i, warp_col);
  }
}

}  // namespace sm120
