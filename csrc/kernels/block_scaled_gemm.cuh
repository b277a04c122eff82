// The block-scaled GEMM, one kernel for every format pair, granularity, orientation and split.
//
// A persistent CTA of 12 warps: one thread of the last four copies operand and scale tiles by TMA
// into a ring of stages, eight warps multiply and store. Per stage: rows [block_rows, stage_k],
// cols [block_cols, stage_k], K-major and swizzled; per 128 of K, one packed scale word a row.
#pragma once
#include "device/atom.cuh"
#include "device/launch.cuh"
#include "device/tma.cuh"
#include "kernels/epilogue.cuh"
#include "kernels/gemm.h"
#include "kernels/tile_scheduler.cuh"

namespace sm120 {

inline constexpr int kMathWarps = 8;
inline constexpr int kMathThreads = kMathWarps * kWarpSize;

template <Format kRowsFormat, Format kColsFormat, int kRows, int kCols, int kWarpsDown, int kStageK>
struct GemmTraits {
  static constexpr int kBlockRows = kRows, kBlockCols = kCols;
  static constexpr int kWarpsAcross = kMathWarps / kWarpsDown;
  static constexpr int MT = kRows / kWarpsDown / 16, NT = kCols / kWarpsAcross / 8;
  using Mma = WarpMma<kRowsFormat, kColsFormat, MT, NT>;

  // Shared-memory map: rows stages | cols stages | rows scales | cols scales | full | empty
  static constexpr int kStagesABlock = kBlockK / kStageK;
  static constexpr int kRowsRowBytes = kStageK / (kRowsFormat == Format::kFp4 ? 2 : 1);
  static constexpr int kColsRowBytes = kStageK / (kColsFormat == Format::kFp4 ? 2 : 1);
  static constexpr int kRowsBytes = kRows * kRowsRowBytes, kColsBytes = kCols * kColsRowBytes;
  static constexpr int kRowsScaleBytes = 4 * kRows, kColsScaleBytes = 4 * kCols;
  static constexpr int align128(int bytes) { return (bytes + 127) / 128 * 128; }
  // A scale slot is overwritten without a barrier of its own: the data stage that the producer
  // waits for first must imply that the slot's old block is finished with.
  static constexpr int scale_slots(int stages) {
    return (stages + 2 * kStagesABlock - 2) / kStagesABlock;
  }
  static constexpr int smem_bytes(int stages) {
    return stages * (kRowsBytes + kColsBytes + 16) +
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
  static constexpr int kSmemBytes = kEmptyAt + 8 * kStages;

  static_assert(kSmemBytes <= kSmemLimit && kStages >= 2);
  static_assert(kRowsBytes % 1024 == 0 && kColsBytes % 1024 == 0, "swizzled tiles: 1024-aligned");
  static_assert(MT >= 1 && NT >= 1 && kRows % (16 * kWarpsDown) == 0);
};

// Ring positions of one role: data stages, and scale slots (one a K-block).
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
  __device__ uint32_t empty() const { return base + Traits::kEmptyAt + 8 * data.stage; }
};

// Producer: one thread copies every tile's stages, running ahead as far as the ring allows.
template <class T>
__device__ __forceinline__ void produce(const GemmParams& p, Ring<T> ring) {
  tma_prefetch_map(&p.rows);
  tma_prefetch_map(&p.cols);
  tma_prefetch_map(&p.rows_scale);
  tma_prefetch_map(&p.cols_scale);
  TileScheduler scheduler(p);
  for (Tile tile; scheduler.next(tile);) {
    const int row = tile.row * T::kBlockRows, col = tile.col * T::kBlockCols;
    for (int block = tile.k_begin; block < tile.k_end; ++block) {
#pragma unroll
      for (int s = 0; s < T::kStagesABlock; ++s) {
        const int stage = block * T::kStagesABlock + s;
        mbarrier_wait(ring.empty(), ring.data.parity ^ 1);
        const int scale_bytes = s == 0 ? T::kRowsScaleBytes + T::kColsScaleBytes : 0;
        mbarrier_expect_tx(ring.full(), T::kRowsBytes + T::kColsBytes + scale_bytes);
        tma_load_2d(ring.rows(), &p.rows, ring.full(), stage * T::kRowsRowBytes, row);
        tma_load_2d(ring.cols(), &p.cols, ring.full(), stage * T::kColsRowBytes, col);
        if (s == 0) {
          const int row_word = p.rows_gran.per_block ? block / 4 : block;
          const int col_word = p.cols_gran.per_block ? block / 4 : block;
          tma_load_2d(ring.rows_scale(), &p.rows_scale, ring.full(), row, row_word);
          tma_load_2d(ring.cols_scale(), &p.cols_scale, ring.full(), col, col_word);
          ring.scale.advance();
        }
        ring.data.advance();
      }
    }
  }
}

// Consumer: one math warp's share of a tile, accumulated over the tile's K-blocks.
template <class T, bool kScalePerBlock>
__device__ __forceinline__ void accumulate(const GemmParams& p, const Tile& tile, Ring<T>& ring,
                                           float (&acc)[T::MT][T::NT][4], int warp_row,
                                           int warp_col) {
  using Mma = typename T::Mma;
  constexpr int kSteps = kBlockK / Mma::kStepK, kStepsAStage = kSteps / T::kStagesABlock;
  const ReaderA<Mma::kAccessA, T::kRowsRowBytes> rows(warp_row);
  const ReaderB<Mma::kAccessB, T::kColsRowBytes, T::NT> cols(warp_col);
  Mma mma;
  typename Mma::RawA a[2];  // the A fragment at work and the next, already on its way
  typename Mma::RawB b[T::NT];
  const auto enter_stage = [&] {
    mbarrier_wait(ring.full(), ring.data.parity);
    cols.load(b, ring.cols(), 0);
    rows.load(a[0], ring.rows(), 0, 0);
  };
  if (tile.k_begin < tile.k_end) enter_stage();
  for (int block = tile.k_begin; block < tile.k_end; ++block) {
    const bool last = block == p.k_blocks - 1;
    mma.load_scales(ring.rows_scale() + 4 * warp_row, ring.cols_scale() + 4 * warp_col,
                    scale_selector(p.rows_gran, block, last),
                    scale_selector(p.cols_gran, block, last));
    ring.scale.advance();
    const auto multiply_block = [&](auto scaling) {
      using Scaling = decltype(scaling);
      static_for<kSteps>([&](auto step) {
        constexpr int kInStage = step % kStepsAStage;
        mma.template set_scales<step, Scaling>();
        mma.set_b(b);
        static_for<T::MT>([&](auto i) {
          constexpr int kAt = kInStage * T::MT + i;  // A fragments of this stage, in order
          typename Mma::RawA& next = a[(kAt + 1) % 2];
          if constexpr (i + 1 < T::MT) {
            rows.load(next, ring.rows(), i + 1, kInStage);
          } else if constexpr (kInStage + 1 < kStepsAStage) {
            cols.load(b, ring.cols(), kInStage + 1);
            rows.load(next, ring.rows(), 0, kInStage + 1);
          } else {
            release_stage(ring.empty());
            ring.data.advance();
          }
          mma.template multiply<step, Scaling>(i, acc[i], a[kAt % 2]);
          if constexpr (i + 1 == T::MT && kInStage + 1 == kStepsAStage) {
            if (step + 1 < kSteps || block + 1 < tile.k_end) enter_stage();
          }
        });
      });
      mma.template finish_block<Scaling>(acc);
    };
    if (mma.regular_scales()) {
      multiply_block(ScalingMode<kScalePerBlock, false>{});
    } else {
      multiply_block(ScalingMode<kScalePerBlock, true>{});
    }
  }
#pragma unroll
  for (int i = 0; i < T::MT; ++i) {
#pragma unroll
    for (int j = 0; j < T::NT; ++j) {
#pragma unroll
      for (int x = 0; x < 4; ++x) acc[i][j][x] *= Mma::kAccScale;
    }
  }
}

// Workspace layout: [2 * CTA + slot][fragment][math thread] float4, so that a thread finds its own
// fragments again.
template <class T>
__device__ __forceinline__ float4* partial_fragment(const GemmParams& p, int cta, int slot,
                                                    int fragment) {
  const int64_t tile_vectors = static_cast<int64_t>(T::MT) * T::NT * kMathThreads;
  return reinterpret_cast<float4*>(p.workspace) + (2ll * cta + slot) * tile_vectors +
         fragment * kMathThreads + threadIdx.x;
}

// After the grid barrier: every 16-row slice of a tile that was cut is summed in CTA order (so the
// result does not depend on timing) and stored.
template <class T>
__device__ __forceinline__ void reduce_partials(const GemmParams& p, int warp_row, int warp_col) {
  const int slices = p.row_tiles * p.col_tiles * T::MT;
  for (int slice = blockIdx.x; slice < slices; slice += gridDim.x) {
    const int index = slice / T::MT, i = slice % T::MT;
    const int first = TileScheduler::owner(p, index * p.k_blocks);
    const int last = TileScheduler::owner(p, index * p.k_blocks + p.k_blocks - 1);
    if (first == last) continue;  // one CTA had all of K and stored it already
    float sum[1][T::NT][4] = {};
    for (int cta = first; cta <= last; ++cta) {
      const int slot = TileScheduler::slot_of(p, cta, index);
#pragma unroll
      for (int j = 0; j < T::NT; ++j) {
        const float4 v = *partial_fragment<T>(p, cta, slot, i * T::NT + j);
        sum[0][j][0] += v.x, sum[0][j][1] += v.y, sum[0][j][2] += v.z, sum[0][j][3] += v.w;
      }
    }
    Tile tile;
    TileScheduler::place(p, index, tile);
    store_fragments<T::Mma::kAccessB>(p, sum, tile.row * T::kBlockRows + warp_row + 16 * i,
                                      tile.col * T::kBlockCols + warp_col);
  }
}

template <class T>
__global__ void __launch_bounds__(kGemmThreads, 1)
    block_scaled_gemm(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  Ring<T> ring;
  ring.base = opaque(smem_address(smem));
  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      mbarrier_init(ring.base + T::kFullAt + 8 * s, 1);
      mbarrier_init(ring.base + T::kEmptyAt + 8 * s, kMathWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarpSize;
  if (warp >= kMathWarps) {
    shrink_registers<40>();
    if (threadIdx.x == kMathThreads && p.k_blocks > 0) produce<T>(p, ring);
    if (p.split) grid_barrier();
    return;
  }

  grow_registers<232>();
  const int warp_row = warp / T::kWarpsAcross * T::MT * 16;
  const int warp_col = warp % T::kWarpsAcross * T::NT * 8;
  TileScheduler scheduler(p);
  for (Tile tile; scheduler.next(tile);) {
    float acc[T::MT][T::NT][4] = {};
    const bool scale_per_block = p.rows_gran.per_block && p.cols_gran.per_block;
    if (!kNative && scale_per_block) {
      accumulate<T, true>(p, tile, ring, acc, warp_row, warp_col);
    } else {
      accumulate<T, false>(p, tile, ring, acc, warp_row, warp_col);
    }
    if (tile.partial < 0) {
      store_fragments<T::Mma::kAccessB>(p, acc, tile.row * T::kBlockRows + warp_row,
                                        tile.col * T::kBlockCols + warp_col);
    } else {
#pragma unroll
      for (int f = 0; f < T::MT * T::NT; ++f) {
        const float(&v)[4] = acc[f / T::NT][f % T::NT];
        *partial_fragment<T>(p, blockIdx.x, tile.partial, f) = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
  }
  if (p.split) {
    grid_barrier();
    reduce_partials<T>(p, warp_row, warp_col);
  }
}

}  // namespace sm120
