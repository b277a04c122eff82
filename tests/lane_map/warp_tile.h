// The library's warp tile on the simulated warp, over tiles of tagged elements in shared memory;
// and the CuTe traits of its MMA.
#pragma once
#include <cuda_runtime.h>  // first: defines __forceinline__ and the like, as nothing
#include <cutlass/numeric_types.h>

#include <cmath>
#include <cute/atom/copy_traits_sm90_tma_swizzle.hpp>
#include <cute/atom/mma_traits_sm120.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <memory>
#include <random>
#include <set>
#include <utility>

#include "device/operand.cuh"
#include "host/gemm_config.h"
#include "kernels/epilogue.cuh"
#include "kernels/gemm.h"
#include "warp.h"

using std::max;

// The one PTX statement of device/atom.cuh converts four e4m3 in v to f16 pairs lo and hi. Here
// each code stays as it is, in the half where its value would be.
#define asm(...) lo = (v & 0xff) | (v & 0xff00) << 8, hi = (v >> 16 & 0xff) | v >> 24 << 16
#include "device/atom.cuh"
#undef asm
#include "device/spread_mma.cuh"

namespace lane_map {

using namespace sm120;
using simulated::check;
using simulated::MmaCall;
using simulated::MmaKind;
using simulated::warp;

inline constexpr bool kSimulateNative = SIMULATE_NATIVE;

// ---- What CuTe says -----------------------------------------------------------------------------

template <Format kFormat>
using Element =
    std::conditional_t<kFormat == Format::kFp4, cutlass::float_e2m1_t, cutlass::float_e4m3_t>;

template <Format kA, Format kB>
struct CuteAtom {
  using Type = cute::SM120::BLOCKSCALED::SM120_16x8x32_TN_VS<Element<kA>, Element<kB>, float,
                                                             cutlass::float_ue8m0_t, 32>;
};
template <>
struct CuteAtom<Format::kFp4, Format::kFp4> {
  using Type =
      cute::SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<cutlass::float_e2m1_t, cutlass::float_e2m1_t,
                                                    float, cutlass::float_ue8m0_t, 32>;
};

template <Format kA, Format kB>
using Traits = cute::MMA_Traits<std::conditional_t<kSimulateNative, typename CuteAtom<kA, kB>::Type,
                                                   cute::SM80_16x8x16_F32F16F16F32_TN>>;

// The swizzles of tiles as the TMA unit writes them, by row width.
template <int kRowBytes>
using TileSwizzle = cute::Swizzle<kRowBytes == 128 ? 3 : 2, 4, 3>;
static_assert(cute::detail::get_tma_swizzle_bits(TileSwizzle<128>{}) ==
              cute::TMA::SmemSwizzleBits::B128);
static_assert(cute::detail::get_tma_swizzle_bits(TileSwizzle<64>{}) ==
              cute::TMA::SmemSwizzleBits::B64);

// ---- Shared memory ------------------------------------------------------------------------------

inline constexpr int kMaxRows = 256, kMaxTile = kMaxRows * 128;
inline constexpr int kRowsAt = 1024, kColsAt = kRowsAt + kMaxTile,
                     kRowsScaleAt = kColsAt + kMaxTile;
inline constexpr int kColsScaleAt = kRowsScaleAt + 4 * kMaxRows,
                     kMemory = kColsScaleAt + 4 * kMaxRows;

// An element's tag has 16 bits; memory holds one of its nibbles at a time, which fits any format.
inline constexpr int kPlanes = 4;
inline uint32_t tag(int row, int k) {
  return row | k << 8;
}
inline int tag_row(uint32_t tag) {
  return tag & 0xff;
}
inline int tag_k(uint32_t tag) {
  return tag >> 8;
}

// A K-block, from `first_byte` of the tile's rows on.
template <Format kFormat, int kRowBytes>
void fill_tile(int base, int rows, int plane, int first_byte) {
  constexpr int kPerByte = kFormat == Format::kFp4 ? 2 : 1;
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < kBlockK / kPerByte; ++column) {
      uint32_t byte = 0;
      for (int e = 0; e < kPerByte; ++e) {
        byte |= (tag(row, column * kPerByte + e) >> 4 * plane & 15) << 4 * e;
      }
      const int at = row * kRowBytes + first_byte + column;
      warp.memory[base + TileSwizzle<kRowBytes>::apply(at)] = byte;
    }
  }
}

// Scale code of a row's 32-block. All products of two stay normal floats, whatever they multiply.
inline int scale_code(int base, int row, int block) {
  return warp.memory[base + 4 * row + block];
}

inline void fill_scales(int base, int rows, bool per_block, std::mt19937& random) {
  for (int i = 0; i < 4 * rows; ++i) {
    const bool repeat = per_block && i % 4;
    warp.memory[base + i] = repeat ? warp.memory[base + i - 1] : 96 + random() % 64;
  }
}

// ---- One K-block of one warp --------------------------------------------------------------------

template <Format kRowsFormat, Format kColsFormat, int kRows, int kCols, int kDown>
struct WarpTile {
  static constexpr Format kA = kRowsFormat, kB = kColsFormat;
  static constexpr int kTileRows = kRows, kTileCols = kCols;
  static constexpr int kDeep = blocks_a_stage(kA == Format::kFp4, kRows, kCols);
  static constexpr int kSliceWarps = 8 / kDeep;
  static constexpr int kWarpsDown = kDeep == 1 ? kDown : kSliceWarps;
  static constexpr int kAcross = kSliceWarps / kWarpsDown;
  static constexpr int MT = kRows / kWarpsDown / 16, NT = kCols / kAcross / 8;
  using Mma = WarpMma<kA, kB, MT, NT, kGemmStepK<kA, kB>>;
  using Acc = float[MT][NT][4];
  static constexpr bool kMixed = kA != kB;
  static constexpr bool kBothFp4 = kA == Format::kFp4 && kB == Format::kFp4;
  using Cute = Traits<kA, kB>;

  // The tile row of column c of a B fragment: 0 1 .. 7, or 0 2 4 6 1 3 5 7.
  static int column(int c) { return kMixed ? 2 * (c % 4) + c / 4 : c; }

  // Rows of a tile: FP4's hold all K-blocks of a stage, FP8's one.
  static constexpr int kRowsBytes = kA == Format::kFp4 ? kDeep * kBlockK / 2 : kBlockK;
  static constexpr int kColsBytes = kB == Format::kFp4 ? kDeep * kBlockK / 2 : kBlockK;
  static inline int slice;  // K-block of the stage
  static int first_row_byte() { return kA == Format::kFp4 ? slice * kBlockK / 2 : 0; }
  static int first_col_byte() { return kB == Format::kFp4 ? slice * kBlockK / 2 : 0; }

  template <class Scaling, class M = Mma>
  static void run(Acc* acc, int warp_row, int warp_col) {
    constexpr ScaleRead kRead = Scaling::kPerBlock ? ScaleRead::kCoarse : ScaleRead::kAny;
    run_blocks<M, Scaling, kRead>(
        acc, warp_row, warp_col, [](int) { return 0; },
        [](const M& mma, auto& sums) { mma.finish_tile(sums); });
  }

  // The loop of the kernel (accumulate() in kernels/block_scaled_gemm.cuh) without its pipeline.
  // byte(lane): which one of its scale words a lane reads; finish: at the end of the tile.
  template <class M, class Scaling, ScaleRead kRead, class Byte, class Finish>
  static void run_blocks(Acc* acc, int warp_row, int warp_col, Byte byte, Finish finish) {
    const uint32_t selector = scale_selector(ScaleGran(32, kBlockK), 0, false);
    warp.run([&](int lane) {
      for (auto& row : acc[lane]) {
        for (auto& fragment : row) std::fill(fragment, fragment + 4, 0.f);
      }
      const ReaderA<M::kAccessA, kRowsBytes> rows(warp_row, first_row_byte());
      const typename M::template ReaderCols<kColsBytes> cols(warp_col, first_col_byte());
      M mma(warp_row, warp_col);
      mma.template load_scales<kRead>(kRowsScaleAt + byte(lane), kColsScaleAt + byte(lane),
                                      selector, selector);
      static_for<kBlockK / M::kStepK>([&](auto step) {
        constexpr int kStep = step;
        mma.template set_scales<Scaling>(kStep);
        typename M::RawB b[NT];
        cols.load(b, kColsAt, kStep);
        mma.template set_b<kStep>(b);
        for (int i = 0; i < MT; ++i) {
          typename M::RawA raw;
          rows.load(raw, kRowsAt, i, kStep);
          typename M::FragA a;
          M::convert(a, raw);
          mma.template multiply<kStep, Scaling>(i, acc[lane][i], a);
        }
      });
      mma.template finish_block<Scaling>(acc[lane]);
      finish(mma, acc[lane]);
    });
  }
};

}  // namespace lane_map
