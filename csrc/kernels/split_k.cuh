// What becomes of a tile's sums, whole or a part of K. Serves every GEMM kernel: its Traits name
// the tile (kBlockRows, kBlockCols), the order of fragment columns (kColAccess), whether D may have
// a head split (kHeadSplit) and the threads, from 0 on, that hold sums (kStoreThreads).
//
// Of a tile that was cut, the CTA with the first K-block waits for the others' sums, adds them to
// its own in the order of K (so the result does not depend on timing) and stores. A warp waits for
// its like in the other CTA alone, by a flag that nobody has to clear beforehand: raised it has the
// launch's token, 64 bits that memory does not hold by chance; and who has seen it takes it down,
// so that the token of a graph's earlier replay is not found either.
#pragma once
#include "device/flag.cuh"
#include "device/warp.cuh"
#include "kernels/epilogue.cuh"
#include "kernels/gemm.h"
#include "kernels/tile_queue.cuh"

namespace sm120 {

// Workspace layout: [range][fragment][thread] float4, so that a thread finds its own fragments
// again.
template <class T, int kFragments>
__device__ __forceinline__ float4* handed_fragments(const GemmParams& p, int range) {
  return reinterpret_cast<float4*>(p.workspace) +
         static_cast<int64_t>(range) * kFragments * T::kStoreThreads + threadIdx.x;
}

__device__ __forceinline__ uint64_t* flag_of_warp(const GemmParams& p, int range) {
  return p.flags + range * kMathWarps + threadIdx.x / kWarpSize;
}

// What a warp has of the tile at the queue's head: to D, or its part of K to the CTA that stores the
// tile. The tile is read anew where it is needed, rather than kept in registers beside the sums.
template <class T, int MT, int NT>
__device__ __forceinline__ void store_tile(const GemmParams& p, const TileQueue<T>& queue,
                                           float (&acc)[MT][NT][4], int warp_row, int warp_col) {
  constexpr int kFragments = MT * NT;
  int others = queue.read().others, range = TileScheduler<T>::range_of_cta();
  if (others == kHandedOver) {
    float4* to = handed_fragments<T, kFragments>(p, range);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const float (&v)[4] = acc[f / NT][f % NT];
      to[f * T::kStoreThreads] = make_float4(v[0], v[1], v[2], v[3]);
    }
    raise_flag(flag_of_warp(p, range), p.token);
    return;
  }
#pragma unroll 1
  for (; others > 0; --others) {
    ++range;
    take_flag(flag_of_warp(p, range), p.token);
    const float4* from = handed_fragments<T, kFragments>(p, range);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      add_from(acc[f / NT][f % NT], from + f * T::kStoreThreads);
    }
  }
  store_fragments<T::kColAccess, T::kHeadSplit>(p, queue.read(), acc, warp_row, warp_col);
}

}  // namespace sm120
