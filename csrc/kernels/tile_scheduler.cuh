// Which tiles a CTA computes, in which order. The producer warp alone runs it, and hands each tile
// to the math warps through shared memory.
#pragma once
#include "kernels/group_scan.cuh"
#include "kernels/k_spans.cuh"

namespace sm120 {

inline constexpr Tile kNoTile = {0, 0, 0, 0, 0, 0, -1, 0, 0};

// One product or a batch: whole tiles round-robin over a persistent grid; or, for few tiles with
// long K (kSplit), the K-blocks of all tiles laid end to end and cut into gridDim.x equal ranges,
// so that a tile may be shared by neighbouring CTAs. Groups: round-robin over the tiles that have
// work.
template <class T>
class TileScheduler {
 public:
  __device__ explicit TileScheduler(const GemmParams& p)
      : p_(p), scan_(p), spans_(p.groups), next_(blockIdx.x) {
    if (p.schedule == Schedule::kSplit) {
      next_ = range_begin(p, blockIdx.x);
      end_ = range_begin(p, blockIdx.x + 1);
    }
  }

  // The next tile, or kNoTile. All lanes of the warp must call it, and get the same.
  __device__ __forceinline__ Tile next() {
    if (p_.schedule >= Schedule::kSegments) return next_of_tokens();
    if (p_.schedule >= Schedule::kBatch) return next_of_groups();
    return p_.schedule == Schedule::kSplit ? next_range() : next_whole();
  }

  // A CTA's first tile, where it takes no division to find it: who copies it need not wait for the
  // scheduling warp then. False elsewhere.
  static __device__ __forceinline__ bool find_first(const GemmParams& p, Tile& tile) {
    const bool column = p.col_tiles == 1;
    tile.row = column ? blockIdx.x * T::kBlockRows : 0;
    tile.col = column ? 0 : blockIdx.x * T::kBlockCols;
    tile.k_begin = 0, tile.k_end = p.k_blocks, tile.group = 0;
    bool one_chain = true;
    if constexpr (T::kChains) one_chain = p.k_blocks <= p.chain;
    return p.schedule == Schedule::kTiles && (column || p.row_tiles == 1) && one_chain;
  }

  // A tile with all of K; `index` counts those of one product after the other.
  static __device__ __forceinline__ Tile whole_tile(const GemmParams& p, int index) {
    const int tiles = p.row_tiles * p.col_tiles;
    Tile tile;
    tile.group = index < tiles ? 0 : index / tiles, tile.others = 0, tile.chain = 0;
    place(index - tile.group * tiles, p.row_tiles, p.col_tiles, tile.row, tile.col);
    tile.row *= T::kBlockRows, tile.col *= T::kBlockCols;
    tile.row_end = p.num_rows, tile.col_end = p.num_cols;
    tile.k_begin = 0, tile.k_end = p.k_blocks;
    return tile;
  }

 private:
  __device__ __forceinline__ Tile next_whole() {
    if (next_ >= p_.row_tiles * p_.col_tiles) return kNoTile;
    const Tile tile = whole_tile(p_, next_);
    next_ += gridDim.x;
    return tile;
  }

  __device__ __forceinline__ Tile next_range() {
    if (next_ >= end_) return kNoTile;
    const int index = next_ / p_.k_blocks;
    Tile tile = whole_tile(p_, index);
    tile.k_begin = next_ - index * p_.k_blocks;
    tile.k_end = min(p_.k_blocks, tile.k_begin + end_ - next_);
    // The CTA with the first K-block, which it has last in its range, adds up the sums; the others
    // have their part first in theirs, and hand it over (kernels/split_k.cuh).
    if (tile.k_begin > 0) {
      tile.others = kHandedOver;
    } else if (tile.k_end < p_.k_blocks) {
      tile.others = owner(p_, (index + 1) * p_.k_blocks - 1) - blockIdx.x;
    }
    next_ += tile.k_end - tile.k_begin;
    return tile;
  }

  // First K-block (over all tiles) of a CTA's range: the first p.longer_ranges have one more than
  // p.range_blocks.
  static __device__ __forceinline__ int range_begin(const GemmParams& p, int cta) {
    return cta * p.range_blocks + min(cta, p.longer_ranges);
  }

  // CTA whose range holds K-block `unit`.
  static __device__ __forceinline__ int owner(const GemmParams& p, int unit) {
    const int longer = p.longer_ranges * (p.range_blocks + 1);
    return unit < longer ? unit / (p.range_blocks + 1)
                         : p.longer_ranges + (unit - longer) / p.range_blocks;
  }

  // Every group has a whole product: kBatch with all of K, kBlocks and kSpans over its own part.
  __device__ __forceinline__ Tile next_of_groups() {
    Tile tile = whole_tile(p_, next_);
    if (tile.group >= p_.groups.count) return kNoTile;
    if (p_.schedule == Schedule::kBlocks) {
      tile.k_begin = tile.group > 0 ? p_.groups.index[tile.group - 1] : 0;
      tile.k_end = p_.groups.index[tile.group];
    }
    if constexpr (T::kAnyK) {
      if (p_.schedule == Schedule::kSpans) spans_.find(tile.group, tile.k_begin, tile.k_end);
    }
    next_ += gridDim.x;
    return tile;
  }

  // Tokens and weights are rows and cols, or with `swapped` the other way round.
  __device__ __forceinline__ Tile next_of_tokens() {
    GroupScan::Place at;
    if (!scan_.find(next_, at)) return kNoTile;
    next_ += gridDim.x;
    Tile tile;
    tile.row = p_.swapped ? at.weight_tile * T::kBlockRows : at.token;
    tile.col = p_.swapped ? at.token : at.weight_tile * T::kBlockCols;
    tile.row_end = p_.swapped ? p_.num_rows : at.token_end;
    tile.col_end = p_.swapped ? at.token_end : p_.num_cols;
    tile.k_begin = 0, tile.k_end = p_.k_blocks;
    tile.group = at.group, tile.others = 0, tile.chain = 0;
    return tile;
  }

  const GemmParams& p_;
  GroupScan scan_;
  KSpans spans_;
  int next_, end_ = 0;
};

}  // namespace sm120
