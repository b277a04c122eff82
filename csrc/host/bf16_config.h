// Which compiled tile, orientation and schedule a BF16 GEMM runs with: pure host code.
#pragma once
#include <cstdint>

#include "host/gemm_config.h"

namespace sm120 {

// The compiled tiles: rows x cols of the product (rows = the MMA's 16-row axis), warps along the
// rows within a slice, slices of K (kernels/bf16_gemm.cuh), K of a stage (32 for each slice).
// Shared memory delivers 128 bytes a clock, an MMA takes about 1.5 clocks of an H200's SM, and an
// operand byte serves as many MMAs as the warp tile is wide: hence 64 x 64 warps and slices.
//   128 x 256  eight 64x64 warps: the least shared-memory and L2 traffic an MMA. K 32 a stage, so
//              that four stages fit.
//   128 x 128  half the tile, in two slices of 64x64 warps.
//   128 x 64   products that would leave SMs idle: four 64x32 warps, two slices.
//   64 x 64    33 .. 64 tokens, or narrow products.
//   64 x 32    17 .. 32 tokens.
//   64 x 16    1 .. 16 tokens, weights on the 16-row axis.
//   16 x 32    17 .. 32 tokens, and
//   16 x 8     1 .. 8 tokens beside few weight rows: each warp has a part of K of its own, so that
//              2112 weight rows are 132 whole tiles and nothing crosses a CTA.
#define SM120_BF16_TILES(X) \
  X(128, 256, 2, 1, 32)     \
  X(128, 128, 2, 2, 64)     \
  X(128, 64, 2, 2, 64)      \
  X(64, 64, 2, 2, 64)       \
  X(64, 32, 2, 4, 128)      \
  X(64, 16, 2, 4, 128)      \
  X(16, 32, 1, 8, 256)      \
  X(16, 8, 1, 8, 256)

struct Bf16Tile {
  int rows, cols, warps_down, slices, block_k;
};
inline constexpr Bf16Tile kBf16Tiles[] = {
#define SM120_TILE(...) {__VA_ARGS__},
    SM120_BF16_TILES(SM120_TILE)
#undef SM120_TILE
};
inline constexpr int kNumBf16Tiles = sizeof(kBf16Tiles) / sizeof(kBf16Tiles[0]);

// K that a chain of MMAs adds up. Each MMA cuts off half a unit in the last place on average, which
// adds up to K * 2^-29.7 of a random sum (measured): 8.9e-6 of a chain of this length, a calc_diff
// of 4e-11. Longer sums are put together from chains. Where two slices have the registers of 64 x
// 64 warps there is no room for that; such a tile takes what keeps its calc_diff below 1e-10.
inline constexpr int64_t kChainK = 8192, kLongestChainK = 12288;
constexpr bool has_chains(int cols, int slices) {
  return slices == 1 || cols < 128;
}

// Tiles that groups of K can be cut into; the largest has no registers left for it.
constexpr bool has_any_k(int cols) {
  return cols < 256;
}

struct Bf16Shape {
  int64_t m, n, k;       // of one matrix
  int64_t shared_k = 0;  // groups of K, which may begin and end anywhere: what they divide, which
                         // one of them may have alone; `k` is what each is expected to have
  int64_t batch = 1;     // products of this shape; GroupedBf16Shape counts its groups itself
  int64_t summed = 1;    // pairs of matrices that a product is the sum of
  bool a_mn_major = false, b_mn_major = false;
};

using GroupedBf16Shape = Grouped<Bf16Shape>;

struct Bf16Config {
  int tile;      // index into kBf16Tiles
  bool swapped;  // rows = B, cols = A
  bool split;    // K-blocks of all tiles cut into `grid` equal ranges
  int grid;
  // the model's terms, in microseconds
  double compute_us, dram_us, tail_us, total_us;

  std::string to_string() const;  // JSON
};

// The kernel counts tiles, and where it splits their K-blocks, in 32 bits. Only a product with more
// than one K-block can be split.
bool is_legal(int tile, bool swapped, bool split, const Bf16Shape& shape, int num_sms);

// A given configuration with its grid and the model's estimate.
Bf16Config evaluate_bf16_config(int tile, bool swapped, bool split, const Bf16Shape& shape,
                                const GpuModel& gpu);

// The cheapest legal configuration by the cost model; needs m, n > 0.
Bf16Config choose_bf16_config(const Bf16Shape& shape, const GpuModel& gpu);

// Grouped tokens, and groups of K: a split is for single products. Needs n > 0.
bool is_legal_grouped(int tile, bool swapped, const GroupedBf16Shape& shape);
Bf16Config evaluate_grouped_config(int tile, bool swapped, const GroupedBf16Shape& shape,
                                   const GpuModel& gpu);
Bf16Config choose_grouped_config(const GroupedBf16Shape& shape, const GpuModel& gpu);

}  // namespace sm120
