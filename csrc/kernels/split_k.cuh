// What becomes of a tile's sums, whole or a part of K. Serves every GEMM kernel: its Traits name
// the tile (kBlockRows, kBlockCols), the order of fragment columns (kColAccess), whether D may have
// a head split (kHeadSplit) and the threads, from 0 on, that hold sums (kStoreThreads).
//
// Of a tile that was cut, the CTA with the first K-block waits for the others' sums, adds them to
// its own in the order of K (so the result does not depend on timing) and stores. All CTAs of a
// split run at once: it is a cooperative launch. A CTA waits for the others of its tile alone, by
// flags that nobody has to clear beforehand: raised, a flag has the launch's token, 64 bits that
// memory does not hold by chance; and who has seen it takes it down, so that the token of a graph's
// replay before is not found either. A CTA has one flag, since a release orders all of an SM's
// writes and those of several warps queue up behind each other.
#pragma once
#include "device/flag.cuh"
#include "device/launch.cuh"
#include "device/warp.cuh"
#include "kernels/epilogue.cuh"
#include "kernels/gemm.h"
#include "kernels/tile_queue.cuh"

namespace sm120 {

// Workspace layout: [CTA][fragment][thread] float4, so that a thread finds its own fragments
// again.
template <class T, int kFragments>
__device__ __forceinline__ float4* handed_fragments(const GemmParams& p, int cta) {
  return reinterpret_cast<float4*>(p.workspace) +
         static_cast<int64_t>(cta) * kFragments * T::kStoreThreads + opaque(threadIdx.x);
}

// Between a tile's sums or flags and what is done about them. By every math thread, also those that
// hold no sums: racecheck does not follow a barrier of fewer threads beside one of all.
__device__ __forceinline__ void sync_split() {
  named_barrier<2, kMathThreads>();
}

template <class T, int MT, int NT>
__device__ __forceinline__ void hand_over(const GemmParams& p, const float (&acc)[MT][NT][4]) {
  float4* to = handed_fragments<T, MT * NT>(p, blockIdx.x);
#pragma unroll
  for (int f = 0; f < MT * NT; ++f) {
    const float (&v)[4] = acc[f / NT][f % NT];
    to[f * T::kStoreThreads] = make_float4(v[0], v[1], v[2], v[3]);
  }
  sync_split();
  if (opaque(threadIdx.x) == 0) raise_flag(p.flags + blockIdx.x, p.token);
}

// Adds what the `others` CTAs after this one have handed over.
template <class T, int MT, int NT>
__device__ __forceinline__ void add_others(const GemmParams& p, int others,
                                           float (&acc)[MT][NT][4]) {
  constexpr int kFragments = MT * NT;
  for (int i = opaque(threadIdx.x); i < others; i += T::kStoreThreads) {
    take_flag(p.flags + blockIdx.x + 1 + i, p.token);
  }
  sync_split();
  const float4* from = handed_fragments<T, kFragments>(p, blockIdx.x + 1);
  // CTAs whose sums are loaded together: latency counts here, not bandwidth.
  constexpr int kAtOnce = kFragments < 16 ? 16 / kFragments : 1;
#pragma unroll 1
  for (; others > 0; others -= kAtOnce, from += kAtOnce * kFragments * T::kStoreThreads) {
    if constexpr (kAtOnce == 1) {
      add_fragments<kFragments>(&acc[0][0][0], from, T::kStoreThreads);
    } else {
      float4 part[kAtOnce][kFragments];
#pragma unroll
      for (int x = 0; x < kAtOnce * kFragments; ++x) {
        const int cta = min(x / kFragments, others - 1);
        part[x / kFragments][x % kFragments] =
            from[(cta * kFragments + x % kFragments) * T::kStoreThreads];
      }
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        if (c >= others) break;
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          float (&v)[4] = acc[f / NT][f % NT];
          const float4& add = part[c][f];
          v[0] += add.x, v[1] += add.y, v[2] += add.z, v[3] += add.w;
        }
      }
    }
  }
}

// What a warp has of the tile at the queue's head, if it has sums: to D, or its part of K to the
// CTA that stores the tile. By every math warp. The tile is read anew where it is needed, rather
// than kept in registers beside the sums.
template <class T, int MT, int NT>
__device__ __forceinline__ void store_tile(const GemmParams& p, const TileQueue<T>& queue,
                                           float (&acc)[MT][NT][4], bool has_sums, int warp_row,
                                           int warp_col) {
  const int others = queue.read().others;
  if (!has_sums) {
    if (others != 0) sync_split();
    return;
  }
  if (others == kHandedOver) return hand_over<T>(p, acc);
  if (others > 0) add_others<T>(p, others, acc);
  store_fragments<T::kColAccess, T::kHeadSplit>(p, queue.read(), acc, warp_row, warp_col);
}

}  // namespace sm120
