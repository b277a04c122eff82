// Which compiled tile, orientation and schedule a GEMM runs with: pure host code, no GPU needed.
#pragma once
#include <cstdint>
#include <string>

#include "host/grouped_shape.h"

namespace sm120 {

enum class OperandFormat { kMxfp8, kMxfp4 };

// The compiled tiles. Per row: rows x cols of the product a CTA computes (rows = the MMA's 16-row
// axis), warps along the rows (of 8), the formats it is for, and why it is there.
//   128 x 256  native only, as the emulation lacks the registers: 64x64 warps load least an MMA,
//              and a tile takes three quarters of the bytes from L2. For every large product; two
//              FP8 stages just fit 99 KB.
//   128 x 128  next in reuse a byte; eight 32x64 warps, so that an unpacked or converted fragment
//              of 16 rows serves 8 MMAs. Three FP8 stages just fit 99 KB.
//   the same   with 64x32 warps, which need half the registers for column scales: FP8, emulated.
//   128 x 64   half the tile, for products that would leave SMs idle with 128 x 128.
//   64 x 64    33 .. 64 tokens, or narrow products.
//   64 x 32    17 .. 32 tokens.
//   64 x 16    1 .. 16 tokens: weights on the 16-row axis, 8 or 16 columns for the tokens.
//   128 x 16   the same with half the CTA count, for many weight rows.
//   128 x 8    1 .. 8 tokens, as most experts have in decoding: half the work on tokens that are
//              not there.
//   16 x 8     1 .. 8 tokens beside few weight rows, both FP8: each warp has K-blocks of its own;
//              2112 weight rows are 132 whole tiles, and no sum crosses a CTA.
#define SM120_GEMM_TILES(X)         \
  X(128, 256, 2, TileFormats::kAny) \
  X(128, 128, 4, TileFormats::kAny) \
  X(128, 128, 2, TileFormats::kFp8) \
  X(128, 64, 4, TileFormats::kAny)  \
  X(64, 64, 4, TileFormats::kAny)   \
  X(64, 32, 4, TileFormats::kAny)   \
  X(64, 16, 4, TileFormats::kAny)   \
  X(128, 16, 8, TileFormats::kAny)  \
  X(128, 8, 8, TileFormats::kAny)   \
  X(16, 8, 1, TileFormats::kFp8)

// kFp8: both operands.
enum class TileFormats { kAny, kFp8 };

struct GemmTile {
  int rows, cols, warps_down;
  TileFormats formats;
};
inline constexpr GemmTile kGemmTiles[] = {
#define SM120_TILE(...) {__VA_ARGS__},
    SM120_GEMM_TILES(SM120_TILE)
#undef SM120_TILE
};
inline constexpr int kNumGemmTiles = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

struct GemmShape {
  int64_t m, n, k;
  OperandFormat a, b;
  int gran_k_a, gran_k_b;
  int64_t batch = 1;  // products of this shape; GroupedShape counts its groups itself
};

using GroupedShape = Grouped<GemmShape>;

struct GpuModel {
  int num_sms;
  bool native;  // block-scaled MMA in hardware (12.x), else emulated (9.0)
  int64_t l2_bytes;
  int dram_gbps;  // 0 = unknown
};

struct GemmConfig {
  int tile;      // index into kGemmTiles
  bool swapped;  // rows = B, cols = A
  bool split;    // K-blocks of all tiles cut into `grid` equal ranges
  int grid;
  // the model's terms, in microseconds
  double compute_us, dram_us, tail_us, total_us;

  std::string to_string() const;  // JSON
};

constexpr bool has_instance(TileFormats tile, OperandFormat rows, OperandFormat cols) {
  return tile == TileFormats::kAny ||
         (rows == OperandFormat::kMxfp8 && cols == OperandFormat::kMxfp8);
}

// The tile must be compiled for the formats; FP4 beside FP8 must be the operand of the 16-row axis
// (device/operand.cuh). Only a product with more than one K-block can be split. The kernel counts
// tiles, and where it splits their K-blocks, in 32 bits.
bool is_legal(int tile, bool swapped, bool split, const GemmShape& shape, int num_sms);

// A given configuration with its grid and the model's estimate.
GemmConfig evaluate_gemm_config(int tile, bool swapped, bool split, const GemmShape& shape,
                                const GpuModel& gpu);

// The cheapest legal configuration by the cost model; needs m, n > 0.
GemmConfig choose_gemm_config(const GemmShape& shape, const GpuModel& gpu);

// Grouped tokens: is this tile legal in this orientation; the estimate; the cheapest one. The split
// schedule is for single products. Needs n > 0.
bool is_legal_grouped(int tile, bool swapped, const GroupedShape& shape);
GemmConfig evaluate_grouped_config(int tile, bool swapped, const GroupedShape& shape,
                                   const GpuModel& gpu);
GemmConfig choose_grouped_config(const GroupedShape& shape, const GpuModel& gpu);

}  // namespace sm120
