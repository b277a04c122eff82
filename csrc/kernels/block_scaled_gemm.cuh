// The block-scaled GEMM, one kernel for every format pair, granularity, orientation and split.
//
// A persistent CTA of 12 warps. Of the last four, one decides which tiles are next and puts them in
// a short queue, and one copies their operands and scales by TMA into a ring of stages; the first
// eight multiply and store. A stage is one K-block: rows [block_rows, 128] and cols
// [block_cols, 128], K-major and swizzled, and a packed scale word a row. Where few tokens meet FP4
// rows it is two, so that a row of the copy is 128 bytes rather than 64, and in tiles of 16 rows
// eight; the math warps then are as many slices, each of which has one of the blocks, and their
// sums are added when the tile ends.
#pragma once
#include "device/atom.cuh"
#include "device/launch.cuh"
#include "device/spread_mma.cuh"
#include "device/tma.cuh"
#include "kernels/gemm.h"
#include "kernels/split_k.cuh"
#include "kernels/tile_queue.cuh"

namespace sm120 {

template <Format kRowsFormat, Format kColsFormat, int kRows, int kCols, int kWarpsDown>
struct GemmTraits {
  static constexpr int kBlockRows = kRows, kBlockCols = kCols;
  static constexpr bool kRowsFp4 = kRowsFormat == Format::kFp4;
  static constexpr bool kColsFp4 = kColsFormat == Format::kFp4;
  static constexpr int kDeep = blocks_a_stage(kRowsFp4, kRows, kCols);
  static constexpr int kSliceWarps = kMathWarps / kDeep;  // that share a K-block
  static constexpr int kDown = kDeep == 1 ? kWarpsDown : kSliceWarps;
  static constexpr int kWarpsAcross = kSliceWarps / kDown;
  static constexpr int MT = kRows / kDown / 16, NT = kCols / kWarpsAcross / 8;
  using Mma = WarpMma<kRowsFormat, kColsFormat, MT, NT, kGemmStepK<kRowsFormat, kColsFormat>>;
  // Emulated, tiles of one or two columns have an MMA of their own (device/spread_mma.cuh).
  static constexpr bool kSpreads = !kNative && kRowsFp4 && !kColsFp4 && kDeep == 2 && NT == 1;
  static constexpr Access kColAccess = Mma::kAccessB;
  static constexpr bool kHeadSplit = true;
  static constexpr bool kAnyK = false, kChains = false;
  static constexpr int kStoreThreads = 32 * kSliceWarps;

  // Shared-memory map: rows stages | cols stages | rows scales | cols scales | full | empty
  //                    | tile queue | sums of the other slice
  static constexpr int kRowsBlockBytes = kBlockK / (kRowsFp4 ? 2 : 1);  // of a row, a K-block
  static constexpr int kColsBlockBytes = kBlockK / (kColsFp4 ? 2 : 1);
  // Rows of a tile have at most the 128 bytes of a swizzle pattern: more tiles for the rest.
  static constexpr int row_bytes(int stage_bytes) { return stage_bytes < 128 ? stage_bytes : 128; }
  static constexpr int kRowsRowBytes = row_bytes(kDeep * kRowsBlockBytes);
  static constexpr int kColsRowBytes = row_bytes(kDeep * kColsBlockBytes);
  static constexpr int kRowsTileBytes = kRows * kRowsRowBytes;
  static constexpr int kColsTileBytes = kCols * kColsRowBytes;
  static constexpr int kRowsBytes = kRows * kDeep * kRowsBlockBytes;
  static constexpr int kColsBytes = kCols * kDeep * kColsBlockBytes;
  static constexpr int kRowsScaleBytes = 4 * kRows * kDeep, kColsScaleBytes = 4 * kCols * kDeep;
  static constexpr int kStageBytes = kRowsBytes + kColsBytes + kRowsScaleBytes + kColsScaleBytes;
  static constexpr int kSumsBytes = (kDeep - 1) * 4 * kRows * kCols;
  static constexpr int align128(int bytes) { return (bytes + 127) / 128 * 128; }
  // One scale slot fewer than stages, as a block's words are in registers before the stage of the
  // block before is given back: see Ring. As many would not fit beside two FP8 stages of 128 x 256.
  static constexpr int scale_slots(int stages) { return stages - 1; }
  static constexpr int smem_bytes(int stages) {
    return stages * (kRowsBytes + kColsBytes + 16) + kQueueBytes + kSumsBytes +
           scale_slots(stages) * align128(kRowsScaleBytes) +
           scale_slots(stages) * align128(kColsScaleBytes);
  }
  static constexpr int most_stages(int stages) {
    return smem_bytes(stages) <= kSmemLimit ? stages : most_stages(stages - 1);
  }
  static constexpr int kStages = most_stages(12);
  static constexpr int kScaleSlots = scale_slots(kStages);
  static constexpr int kColsAt = kStages * kRowsBytes;
  static constexpr int kRowsScaleAt = kColsAt + kStages * kColsBytes;
  static constexpr int kColsScaleAt = kRowsScaleAt + kScaleSlots * align128(kRowsScaleBytes);
  static constexpr int kFullAt = kColsScaleAt + kScaleSlots * align128(kColsScaleBytes);
  static constexpr int kEmptyAt = kFullAt + 8 * kStages;
  static constexpr int kQueueAt = kEmptyAt + 8 * kStages;
  static constexpr int kSumsAt = kQueueAt + kQueueBytes;
  static constexpr int kSmemBytes = kSumsAt + kSumsBytes;

  static_assert(kSmemBytes == smem_bytes(kStages) && kSmemBytes <= kSmemLimit && kStages >= 2);
  static_assert(kDeep == 1 || kSumsAt % 16 == 0);
  static_assert(kRowsTileBytes % 1024 == 0 && kColsTileBytes % (8 * kColsRowBytes) == 0,
                "swizzled tiles: aligned to the pattern, 8 rows");
  static_assert(MT >= 1 && NT >= 1 && kRows % (16 * kDown) == 0);
};

// Ring positions of one role: data stages, and scale slots (one a stage).
//
// The consumers arrive at empty(s) when they have begun the block in stage s: its scale words are
// in registers, and so is all of the block before. So it gives back the stage *before* s, and the
// scale slot of s. Of S stages and S - 1 slots, those are the two that block x + S - 1 needs if x
// is in s.
template <class Traits>
struct Ring {
  RingState<Traits::kStages> data;
  RingState<Traits::kScaleSlots> scale;
  uint32_t base;  // shared-memory address of the map

  __device__ uint32_t rows() const { return base + data.stage * Traits::kRowsBytes; }
  __device__ uint32_t cols() const {
    return base + Traits::kColsAt + data.stage * Traits::kColsBytes;
  }
  __device__ uint32_t rows_scale() const {
    return base + Traits::kRowsScaleAt + scale.stage * Traits::align128(Traits::kRowsScaleBytes);
  }
  __device__ uint32_t cols_scale() const {
    return base + Traits::kColsScaleAt + scale.stage * Traits::align128(Traits::kColsScaleBytes);
  }
  __device__ uint32_t full() const { return base + Traits::kFullAt + 8 * data.stage; }
  __device__ uint32_t empty(int stage) const { return base + Traits::kEmptyAt + 8 * stage; }
};

// What a stage has of an operand, from byte x of the rows on: tiles of one line a row. Several come
// in one copy if K is made of whole lines.
template <int kTiles, int kTileBytes>
__device__ __forceinline__ void load_operand(uint32_t dst, const CUtensorMap* map, uint32_t full,
                                             int x, int row, int group, bool whole_lines) {
  constexpr int kLineBytes = 128;
  if constexpr (kTiles == 1) {
    tma_load_3d(dst, map, full, x, row, group);
  } else if (whole_lines) {
    tma_load_4d(dst, map, full, 0, row, x / kLineBytes, group);
  } else {
    for (int i = 0; i < kTiles; ++i) {
      tma_load_4d(dst + i * kTileBytes, map, full, x + i * kLineBytes, row, 0, group);
    }
  }
}

// Producer: one thread copies every tile's stages, running ahead as far as the ring allows.
template <class T>
__device__ __forceinline__ void produce(const GemmParams& p, Ring<T> ring, TileQueue<T> queue) {
  Tile tile;
  bool known = TileScheduler<T>::find_first(p, tile);
  finish_setup();
  if (lane_id() > 0) return;
  // Few tokens: little code to fetch before the first copies.
  constexpr int kUnroll = T::kDeep == 1 ? 2 : 1;
  for (;; ++queue.count) {
    if (!known) tile = queue.wait();
    known = false;
    if (tile.group < 0) break;
#pragma unroll kUnroll
    for (int block = tile.k_begin; block < tile.k_end; block += T::kDeep) {
      // Free when the block S - 1 before this one, the last in the next stage, has been begun.
      RingState<T::kStages> next = ring.data;
      next.advance();
      mbarrier_wait(ring.empty(next.stage), next.parity ^ 1);
      mbarrier_expect_tx(ring.full(), T::kStageBytes);
      load_operand<T::kRowsBytes / T::kRowsTileBytes, T::kRowsTileBytes>(
          ring.rows(), &p.rows, ring.full(), block * T::kRowsBlockBytes, tile.row,
          p.rows_grouped ? tile.group : 0, p.rows_whole_atoms);
      load_operand<T::kColsBytes / T::kColsTileBytes, T::kColsTileBytes>(
          ring.cols(), &p.cols, ring.full(), block * T::kColsBlockBytes, tile.col,
          p.cols_grouped ? tile.group : 0, p.cols_whole_atoms);
      tma_load_3d(ring.rows_scale(), &p.rows_scale, ring.full(), tile.row,
                  p.rows_gran.per_block ? block / 4 : block, p.rows_grouped ? tile.group : 0);
      tma_load_3d(ring.cols_scale(), &p.cols_scale, ring.full(), tile.col,
                  p.cols_gran.per_block ? block / 4 : block, p.cols_grouped ? tile.group : 0);
      ring.data = next;
      ring.scale.advance();
    }
    mbarrier_arrive(queue.empty());
  }
  pdl_launch_dependents();  // the next kernel's setup may overlap this one's last tiles
}

// Consumer: one math warp's share of a tile, accumulated over the tile's K-blocks, or over block
// `slice` of each stage. kScales: how both operands' scales are read.
template <class T, class Mma, ScaleRead kScales>
__device__ __forceinline__ void accumulate(const GemmParams& p, const Tile& tile, Ring<T>& ring,
                                           float (&acc)[T::MT][T::NT][4], int warp_row,
                                           int warp_col, int slice) {
  constexpr bool kScalePerBlock = kScales == ScaleRead::kCoarse;
  constexpr bool kSpread = kScales == ScaleRead::kSpread;
  constexpr int kSteps = kBlockK / Mma::kStepK;
  constexpr int kFragments = kSteps * T::MT;  // A fragments of a block
  static_assert(kFragments % 2 == 0 && kSteps % 2 == 0, "buffers alternate by parity");
  // The fragment before which the stage of the block before is given back: not the first, if it can
  // be helped, as that would wait for the scale words.
  constexpr int kReleaseAt = kFragments == 2 ? 0 : T::MT == 1 ? 1 : T::MT / 2;
  static_assert(kReleaseAt <= kFragments - 2, "before the ring moves on");
  // The slice's block within a stage: in which tile, and where in the tile's rows.
  constexpr int kRowsLine = T::kRowsRowBytes / T::kRowsBlockBytes;  // blocks of a line
  constexpr int kColsLine = T::kColsRowBytes / T::kColsBlockBytes;
  const ReaderA<Mma::kAccessA, T::kRowsRowBytes> rows(warp_row,
                                                      slice % kRowsLine * T::kRowsBlockBytes);
  const typename Mma::template ReaderCols<T::kColsRowBytes> cols(
      warp_col, slice % kColsLine * T::kColsBlockBytes);
  const int rows_tile = slice / kRowsLine * T::kRowsTileBytes;
  const int cols_tile = slice / kColsLine * T::kColsTileBytes;

  // Software pipeline over the A fragments of all blocks in order: two ahead is on its way from
  // shared memory; with kConvertAhead the next is converted while one is multiplied.
  Mma mma(warp_row, warp_col, tile.col_end - tile.col);
  constexpr int kBufferedB = T::MT > 1 ? 1 : 2;  // steps of B on their way
  typename Mma::RawA a[2];
  typename Mma::RawB b[kBufferedB][T::NT];
  typename Mma::FragA fragment[2];
  const auto load_fragment = [&](auto n) {  // n: 0 .. kFragments - 1 of the ring's current stage
    constexpr int kStep = n / T::MT;
    if constexpr (n % T::MT == 0) cols.load(b[kStep % kBufferedB], ring.cols() + cols_tile, kStep);
    rows.load(a[n % 2], ring.rows() + rows_tile, n % T::MT, kStep);
  };
  const auto run_block = [&](auto scaling, auto more) {
    using Scaling = decltype(scaling);
    static_for<kFragments>([&](auto n) {
      constexpr int kStep = n / T::MT, kAhead = n + 2;
      if constexpr (n % T::MT == 0) {
        mma.template set_scales<Scaling>(kStep);
        mma.template set_b<kStep>(b[kStep % kBufferedB]);
      }
      if constexpr (!Mma::template kConvertAhead<Scaling>) Mma::convert(fragment[0], a[n % 2]);
      if constexpr (n == kReleaseAt) release_stage(ring.empty(ring.data.stage));
      if constexpr (kAhead == kFragments) {  // the next block's fragments follow
        ring.data.advance();
        if constexpr (more) mbarrier_wait(ring.full(), ring.data.parity);
      }
      if constexpr (kAhead < kFragments || more) {
        load_fragment(std::integral_constant<int, kAhead % kFragments>{});
      }
      if constexpr (Mma::template kConvertAhead<Scaling>) {
        if constexpr (n + 1 < kFragments || more) {
          Mma::convert(fragment[(n + 1) % 2], a[(n + 1) % 2]);
        }
        mma.template multiply<kStep, Scaling>(n % T::MT, acc[n % T::MT], fragment[n % 2]);
      } else {
        mma.template multiply<kStep, Scaling>(n % T::MT, acc[n % T::MT], fragment[0]);
      }
    });
    mma.template finish_block<Scaling>(acc);
  };
  // Emulated, a block with scales far from 1 (see ScalingMode): rare, so step by step, in few
  // instructions. A second run_block beside the first would have ptxas spill sums where they meet.
  const auto run_irregular_block = [&](auto more) {
    using Scaling = ScalingMode<false, true>;
    release_stage(ring.empty(ring.data.stage));
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      cols.load(b[0], ring.cols() + cols_tile, step);
      mma.template set_b<0>(b[0]);
      mma.template set_scales<Scaling>(step);
#pragma unroll
      for (int i = 0; i < T::MT; ++i) {
        rows.load(a[0], ring.rows() + rows_tile, i, step);
        Mma::convert(fragment[0], a[0]);
        mma.template multiply<0, Scaling>(i, acc[i], fragment[0]);
      }
      mma.next_step();
    }
    ring.data.advance();
    if constexpr (more) {
      mbarrier_wait(ring.full(), ring.data.parity);
      static_for<2>(load_fragment);
      Mma::convert(fragment[0], a[0]);
    }
  };
  // Bytes from a slot's first scale word to the one that serves a block, or to a byte of it. Where
  // stages have several blocks, those of a slice have one value or two in turn.
  const auto scale_offset = [&](const ScaleGran& gran, int slot_rows, int block) -> uint32_t {
    const int shift = gran.per_block ? 2 : 0;
    const int word = (block >> shift) - ((block - slice) >> shift);
    int byte = kScalePerBlock ? block & 3 : 0;
    if constexpr (kSpread) byte = gran.per_block ? block & 3 : Mma::group();
    return 4 * slot_rows * word + byte;
  };
  constexpr bool kAlternate = T::kDeep == 2;
  static_assert(T::kDeep <= 2 || T::kDeep % 4 == 0);
  uint32_t rows_at = 0, cols_at = 0, rows_flip = 0, cols_flip = 0;
  if constexpr (T::kDeep > 1) {
    const int block = tile.k_begin + slice;
    rows_at = scale_offset(p.rows_gran, T::kBlockRows, block);
    cols_at = scale_offset(p.cols_gran, T::kBlockCols, block);
    if constexpr (kAlternate) {
      rows_flip = opaque(rows_at ^ scale_offset(p.rows_gran, T::kBlockRows, block + 2));
      cols_flip = opaque(cols_at ^ scale_offset(p.cols_gran, T::kBlockCols, block + 2));
    }
  }
  const auto next_block = [&](int block, auto more) {
    // Only a tile's last block can be the last of K, which may be partial.
    constexpr bool kPartial = (kScales == ScaleRead::kFine || kSpread) && !more;
    constexpr ScaleRead kRead = kPartial ? ScaleRead::kAny : kScales;
    constexpr uint32_t kInWord = kSpread && kPartial ? 3 : 0;  // kAny wants words
    const bool last = !more && block == p.k_blocks - 1;
    if constexpr (T::kDeep == 1) rows_at = cols_at = kScalePerBlock ? block & 3 : 0;
    mma.template load_scales<kRead>(
        ring.rows_scale() + (rows_at & ~kInWord), ring.cols_scale() + (cols_at & ~kInWord),
        scale_selector(p.rows_gran, block, last), scale_selector(p.cols_gran, block, last));
    if constexpr (kAlternate) rows_at ^= rows_flip, cols_at ^= cols_flip;
    ring.scale.advance();
    if constexpr (kNative || kScalePerBlock || kSpread) {
      run_block(ScalingMode<kScalePerBlock, true>{}, more);
    } else if (mma.regular_scales()) {
      run_block(ScalingMode<false, false>{}, more);
    } else {
      run_irregular_block(more);
    }
  };
  // The last stage may have blocks for the first slices only.
  const int last_blocks = (tile.k_end - tile.k_begin) % T::kDeep;
  const bool skips_last = last_blocks > 0 && slice >= last_blocks;
  const auto skip_stage = [&] {
    mbarrier_wait(ring.full(), ring.data.parity);
    release_stage(ring.empty(ring.data.stage));
    ring.data.advance();
    ring.scale.advance();
  };
  const int begin = tile.k_begin + slice;
  if (begin >= tile.k_end) {
    if (T::kDeep > 1 && skips_last) skip_stage();
    return;
  }
  mbarrier_wait(ring.full(), ring.data.parity);
  static_for<2>(load_fragment);
  Mma::convert(fragment[0], a[0]);
  const int last = tile.k_end - 1 - (tile.k_end - 1 - begin) % T::kDeep;
  for (int block = begin; block < last; block += T::kDeep) next_block(block, std::true_type{});
  next_block(last, std::false_type{});
  mma.finish_tile(acc);
  if (T::kDeep > 1 && skips_last) skip_stage();
}

// The same with what suits the tile and its scales.
template <class T>
__device__ __forceinline__ void multiply_tile(const GemmParams& p, const Tile& tile, Ring<T>& ring,
                                              float (&acc)[T::MT][T::NT][4], int warp_row,
                                              int warp_col, int slice) {
  using Mma = typename T::Mma;
  if (p.rows_gran.per_block && p.cols_gran.per_block) {
    accumulate<T, Mma, ScaleRead::kCoarse>(p, tile, ring, acc, warp_row, warp_col, slice);
  } else if constexpr (T::kSpreads) {
    using Spread = SpreadMma<T::MT>;
    using Wide = KGroupMma<T::MT>;
    if (tile.col_end - tile.col <= Spread::kColumns) {
      accumulate<T, Spread, ScaleRead::kSpread>(p, tile, ring, acc, warp_row, warp_col, slice);
    } else {
      accumulate<T, Wide, ScaleRead::kAny>(p, tile, ring, acc, warp_row, warp_col, slice);
    }
  } else if (kNative && !p.rows_gran.per_block && !p.cols_gran.per_block) {
    accumulate<T, Mma, ScaleRead::kFine>(p, tile, ring, acc, warp_row, warp_col, slice);
  } else {  // measured: the emulation loses 5 % with kFine
    accumulate<T, Mma, ScaleRead::kAny>(p, tile, ring, acc, warp_row, warp_col, slice);
  }
}

// Adds the sums of the other slices to those of slice 0. Every math warp must call it.
template <class T>
__device__ __forceinline__ void combine_slices(uint32_t base, float (&acc)[T::MT][T::NT][4],
                                               int slice) {
  constexpr int kFragments = T::MT * T::NT;
  // [slice - 1][fragment][thread]
  float4* sums =
      static_cast<float4*>(smem_pointer(base + T::kSumsAt)) + threadIdx.x % T::kStoreThreads;
  if (slice > 0) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const float (&v)[4] = acc[f / T::NT][f % T::NT];
      sums[((slice - 1) * kFragments + f) * T::kStoreThreads] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  named_barrier<1, kMathThreads>();
  if (slice == 0) {
#pragma unroll
    for (int x = 0; x < (T::kDeep - 1) * kFragments; ++x) {
      float (&v)[4] = acc[x % kFragments / T::NT][x % T::NT];
      const float4 other = sums[x * T::kStoreThreads];
      v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
    }
  }
  named_barrier<1, kMathThreads>();  // before the others write those of the next tile
}

template <class T>
__global__ void __launch_bounds__(kGemmThreads, 1)
    block_scaled_gemm(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  Ring<T> ring;
  TileQueue<T> queue;
  ring.base = queue.base = opaque(smem_address(smem));
  if (threadIdx.x == 0) {
    init_ring<T>(ring.base, 1);
  } else if (threadIdx.x == kWarpSize) {
    queue.init_barriers(kMathWarps + 1);
  } else if (threadIdx.x == kMathThreads + 2 * kWarpSize && p.k_blocks > 0) {  // else no maps
    tma_prefetch_map(&p.rows);
    tma_prefetch_map(&p.cols);
    tma_prefetch_map(&p.rows_scale);
    tma_prefetch_map(&p.cols_scale);
  }
  const int warp = threadIdx.x / kWarpSize;
  if (warp >= kMathWarps) {
    shrink_registers<40>();
    if (warp == kMathWarps) return schedule<T>(p, queue);
    if (warp == kMathWarps + 1) return produce<T>(p, ring, queue);
    return finish_setup();
  }
  finish_setup();

  grow_registers<232>();
  const int slice = T::kDeep == 1 ? 0 : warp / T::kSliceWarps;
  // Once for the main loop and once for the stores.
  const int warp_row = kept((warp - slice * T::kSliceWarps) / T::kWarpsAcross * T::MT * 16);
  const int warp_col = kept(warp % T::kWarpsAcross * T::NT * 8);
  for (;; ++queue.count) {
    const Tile tile = queue.wait();
    if (tile.group < 0) break;
    float acc[T::MT][T::NT][4] = {};
    multiply_tile<T>(p, tile, ring, acc, warp_row, warp_col, slice);
    if constexpr (T::kDeep > 1) combine_slices<T>(ring.base, acc, slice);
    store_tile<T>(p, queue, acc, slice == 0, warp_row, warp_col);
    mbarrier_arrive_of_warp(queue.empty());  // what was read has been used by now
  }
}

}  // namespace sm120
