// Which tiles a CTA computes, in which order. Producer and math warps each run their own copy.
#pragma once
#include "kernels/gemm.h"

namespace sm120 {

struct Tile {
  int row, col;        // tile coordinates
  int k_begin, k_end;  // K-blocks
  int partial;         // workspace slot of this CTA (0, 1) if it holds part of K, else -1
};

// Whole tiles round-robin over a persistent grid; or, for few tiles with long K (split), the
// K-blocks of all tiles laid end to end and cut into gridDim.x equal ranges, so that a tile may be
// shared by neighbouring CTAs.
class TileScheduler {
 public:
  __device__ explicit TileScheduler(const GemmParams& p) : p_(p), next_(blockIdx.x) {
    if (p.split) {
      next_ = range_begin(p, blockIdx.x);
      end_ = range_begin(p, blockIdx.x + 1);
    }
  }

  __device__ __forceinline__ bool next(Tile& tile) {
    if (!p_.split) {
      if (next_ >= p_.row_tiles * p_.col_tiles) return false;
      place(p_, next_, tile);
      tile.k_begin = 0, tile.k_end = p_.k_blocks, tile.partial = -1;
      next_ += gridDim.x;
      return true;
    }
    if (next_ >= end_) return false;
    const int index = next_ / p_.k_blocks;
    place(p_, index, tile);
    tile.k_begin = next_ - index * p_.k_blocks;
    tile.k_end = min(p_.k_blocks, tile.k_begin + end_ - next_);
    const bool whole = tile.k_begin == 0 && tile.k_end == p_.k_blocks;
    tile.partial = whole ? -1 : slot_of(p_, blockIdx.x, index);
    next_ += tile.k_end - tile.k_begin;
    return true;
  }

  // Tile index -> coordinates: column by column within bands of kBand tile rows, so that CTAs
  // running at the same time share operand tiles in L2.
  static __device__ __forceinline__ void place(const GemmParams& p, int index, Tile& tile) {
    const int band = index / (kBand * p.col_tiles);
    const int height = min(kBand, p.row_tiles - band * kBand);
    const int inside = index - band * kBand * p.col_tiles;
    tile.row = band * kBand + inside % height;
    tile.col = inside / height;
  }

  // First K-block (over all tiles) of a CTA's range. 32-bit: the host splits only where
  // p.total_blocks * (gridDim.x + 1) fits.
  static __device__ __forceinline__ int range_begin(const GemmParams& p, int cta) {
    return static_cast<uint32_t>(cta) * p.total_blocks / gridDim.x;
  }

  // CTA whose range holds K-block `unit`.
  static __device__ __forceinline__ int owner(const GemmParams& p, int unit) {
    return ((unit + 1u) * gridDim.x - 1) / p.total_blocks;
  }

  // Workspace slot in which `cta` keeps its part of tile `index`: 0 for the tile its range begins
  // in, 1 for another (the one it ends in).
  static __device__ __forceinline__ int slot_of(const GemmParams& p, int cta, int index) {
    return range_begin(p, cta) / p.k_blocks == index ? 0 : 1;
  }

 private:
  static constexpr int kBand = 16;
  const GemmParams& p_;
  int next_, end_ = 0;
};

}  // namespace sm120
