// The block-scaled GEMM as the host sees it: D[m, n] = (C[m, n] +) sum_k A[m, k] * B[n, k].
//
// "Rows" is the operand on the MMA's 16-row axis, "cols" the one on its 8-column axis. Normally
// rows = A and cols = B; with `swapped` rows = B (weights) and cols = A (tokens), and the product's
// transpose is written to D. Few tokens are best as cols; an FP4 operand beside an FP8 one must be
// the rows.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sm120 {

// Where products go. Column n of the product lies at column n of D, or, with a head split, at
// column n + (n / period) * mid + (n % period >= left ? mid : 0).
struct GemmOutput {
  void* d;           // [M, N'] bf16 or fp32
  const void* c;     // nullptr, or [M, N'] of D's type, added before rounding
  int64_t d_stride;  // elements between rows
  int64_t c_stride;
  int32_t left, period, mid;  // head split; period 0 = none
  bool fp32;
  bool vector;  // product columns 8i .. 8i+7 are adjacent in D and 16-byte aligned
};

inline constexpr int kBlockK = 128;  // K of the main loop's unit, and of a scale word at gran_k 32

// gran_k of one operand, as the kernel uses it: words a K-block, and the byte selectors that pick
// a block's four scales from its word (see scale_selector in device/atom.cuh).
struct ScaleGran {
  bool per_block;  // gran_k 128: one word serves four blocks
  uint32_t select, select_step, select_tail;

  ScaleGran() = default;
  ScaleGran(int gran_k, int k) : per_block(gran_k == kBlockK) {
    const int groups = (k + 31) / 32 % 4;  // K-groups of 32 in the last block, 0 = all four
    const uint32_t valid = groups == 0 ? 0xffffu : (1u << 4 * groups) - 1;
    select = per_block ? 0 : 0x3210;
    select_step = per_block ? 0x1111 : 0;
    select_tail = per_block ? 0 : (0x3210 ^ 0x4444) & ~valid & 0xffff;
  }
};

struct GemmParams {
  CUtensorMap rows;        // bytes [rows, K], box [block_rows, stage bytes], swizzled
  CUtensorMap cols;        // bytes [cols, K]
  CUtensorMap rows_scale;  // int32 [words, rows], box [1, block_rows]
  CUtensorMap cols_scale;  // int32 [words, cols]
  GemmOutput out;
  float* workspace;  // split only: [2 * grid, block_rows * block_cols] partial sums
  int32_t num_rows, num_cols;
  ScaleGran rows_gran, cols_gran;
  int32_t row_tiles, col_tiles, k_blocks;
  uint32_t total_blocks;  // split only: row_tiles * col_tiles * k_blocks
  bool swapped;
  bool split;  // contiguous ranges of K-blocks, one a CTA, then a reduction
};

using GemmKernel = void (*)(GemmParams);

// One compiled tile shape for one pair of formats.
struct GemmInstance {
  GemmKernel kernel;
  int smem_bytes;
  int rows_box_bytes, cols_box_bytes;  // bytes of an operand's line that a box holds
};

// By index into kGemmTiles (host/gemm_config.h); named rows_cols.
GemmInstance gemm_instance_fp8_fp8(int tile);
GemmInstance gemm_instance_fp4_fp4(int tile);
GemmInstance gemm_instance_fp4_fp8(int tile);

// The BF16 GEMM (kernels/bf16_gemm.cuh) by the layouts of rows and cols, K-major or MN-major; by
// index into kBf16Tiles (host/bf16_config.h). It takes GemmParams without scales.
GemmInstance bf16_instance_k_k(int tile);
GemmInstance bf16_instance_k_mn(int tile);
GemmInstance bf16_instance_mn_k(int tile);
GemmInstance bf16_instance_mn_mn(int tile);

// A CTA: math warps first, then the producer's.
inline constexpr int kMathWarps = 8;
inline constexpr int kMathThreads = 32 * kMathWarps;
inline constexpr int kGemmThreads = kMathThreads + 128;

}  // namespace sm120
