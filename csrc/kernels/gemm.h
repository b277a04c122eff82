// The block-scaled GEMM as the host sees it: D[m, n] = (C[m, n] +) sum_k A[m, k] * B[n, k], for one
// pair of matrices or for groups of them.
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
  void* d;           // [M, N'] bf16 or fp32; a group's matrix starts at group * d_group_stride
  const void* c;     // nullptr, or [M, N'] of D's type, added before rounding; likewise
  int64_t d_stride;  // elements between rows
  int64_t c_stride;
  int64_t d_group_stride, c_group_stride;  // elements between matrices; 0 where there is one
  int32_t left, period, mid;               // head split; period 0 = none
  bool fp32;
  bool vector;  // product columns 8i .. 8i+7 are adjacent in D and 16-byte aligned
};

inline constexpr int kBlockK = 128;  // K of the main loop's unit, and of a scale word at gran_k 32

// K-blocks that are copied together, for as many slices of the math warps. Eight where a tile has
// 16 rows: each warp has one. Two for few tokens on FP4 rows, whose time is that of copying the
// rows: 64 bytes of a row at a time, as in one block, come at half the bytes a second of 128.
constexpr int blocks_a_stage(bool fp4_rows, int rows, int cols) {
  return rows == 16 ? 8 : fp4_rows && cols <= 32 ? 2 : 1;
}

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

// How the work is cut into tiles, see kernels/tile_scheduler.cuh. From kBlocks on it is read at run
// time which groups have what. kSpans is for kernels that can begin at any k (kAnyK of their
// Traits).
enum class Schedule : int32_t {
  kTiles,     // one product, whole tiles
  kSplit,     // one product or a batch, contiguous ranges of K-blocks, one a CTA, then a reduction
  kBatch,     // a product a group, all of the same size, whole tiles
  kBlocks,    // grouped K: index[G] is where each group's K-blocks end
  kSpans,     // grouped K: index[G] is each group's K, any number
  kSegments,  // grouped tokens: index[M] is the expert of each row, in segments of `alignment` rows
  kEnds,      // grouped tokens: index[G] is where each group ends, starts are aligned
  kCounts,    // grouped tokens, a matrix a group: index[G] is the number of its valid rows
};

// Groups of a grouped product. "Tokens" are the operand whose rows the groups divide, "weights" the
// other one, which has a matrix for each group.
struct GemmGroups {
  const int32_t* index;  // as `Schedule` says
  int32_t count;         // G
  int32_t tokens;        // rows of the token matrix, or of each one; kSpans: K of all groups
  int32_t alignment;     // kSegments, kEnds: rows a group's start is a multiple of
  int32_t step;          // tokens of a tile: the tile's extent, or the alignment if less
  int32_t items;         // kSegments: segments; else groups
};

// The last two for tiles of `extent` tokens.
inline void set_token_tiles(GemmGroups& g, Schedule schedule, int extent) {
  const bool segments = schedule == Schedule::kSegments;
  g.step = segments && g.alignment < extent ? g.alignment : extent;
  g.items = segments ? (g.tokens + g.alignment - 1) / g.alignment : g.count;
}

// In the order of their use: what a CTA needs to find its first tile shares a line of the constant
// cache, which is cold when a kernel starts.
struct GemmParams {
  CUtensorMap rows;        // bytes [groups, rows, K], box [block_rows, stage bytes], swizzled
  CUtensorMap cols;        // bytes [groups, cols, K]
  CUtensorMap rows_scale;  // int32 [groups, words, rows], box [blocks a stage, block_rows]
  CUtensorMap cols_scale;  // int32 [groups, words, cols]
  Schedule schedule;
  int32_t row_tiles, col_tiles, k_blocks;
  int32_t num_rows, num_cols;           // of one matrix
  int32_t range_blocks, longer_ranges;  // kSplit: K-blocks of a CTA's range; so many of the first
                                        // ranges have one more
  int32_t matrix_blocks;  // BF16: k_blocks of one matrix, at least 1; k_blocks is those of all
                          // where the product is summed over the groups as well
  int32_t chain;          // BF16: how much of K, in a Tile's units, a chain of MMAs adds up; longer
                          // sums go through carry
  // How the map sees an operand whose stages are several lines of 128 bytes a row, or several atoms
  // of rows (BF16, MN-major): as whole ones, all in one copy.
  bool rows_whole_atoms, cols_whole_atoms;
  bool rows_grouped, cols_grouped;  // the operand has a matrix for each group
  bool swapped;
  ScaleGran rows_gran, cols_gran;
  GemmGroups groups;
  float* workspace;  // kSplit: [grid, block_rows * block_cols] sums handed over
  uint64_t* flags;   // kSplit: [grid], `token` when a CTA has handed over
  uint64_t token;    // kSplit: a value that uninitialised memory does not have
  float* carry;      // BF16: [grid, block_rows * block_cols] sums of the chains before
  GemmOutput out;
};

// A tile, as it goes from the warp that schedules to those that copy and multiply.
struct Tile {
  int32_t row, col;          // of the product: where the tile begins, in elements
  int32_t row_end, col_end;  // where the rows and columns to be stored end
  int32_t k_begin, k_end;    // K-blocks; kSpans: k
  int32_t group;             // matrix of grouped operands and of D; negative: there is no tile
  int16_t others;            // kSplit: how many CTAs after this one hold the rest of K, or
                             // kHandedOver; 0: all of K is here
  int16_t chain;             // bits kCarried, kMore
};

// Part of a tile whose sums another CTA adds and stores.
inline constexpr int16_t kHandedOver = -1;

// A Tile may be one of several chains of MMAs that follow each other: there were others before it,
// whose sums it adds; it is not the last.
inline constexpr int kCarried = 1, kMore = 2;

using GemmKernel = void (*)(GemmParams);

// One compiled tile shape for one pair of formats.
struct GemmInstance {
  GemmKernel kernel;
  int smem_bytes;
  int rows_box_bytes, cols_box_bytes;  // bytes of an operand's line that a box holds
  int stage_blocks;                    // K-blocks that are copied together
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
