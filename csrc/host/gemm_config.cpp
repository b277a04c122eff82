#include "host/gemm_config.h"

#include <algorithm>
#include <cstdio>

#include "kernels/gemm.h"

namespace sm120 {
namespace {



int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double element_bytes(OperandFormat f) { return f == OperandFormat::kMxfp4 ? 0.5 : 1.0; }

// Time one CTA needs for one K-block (128 of K) of a tile, in microseconds, when nothing else
// holds it up: the MMAs it issues, at the rate its warps' tiles reach.
double block_us(const GemmTile& tile, const GemmShape& s, const GpuModel& gpu) {
  const double flops = 2.0 * tile.rows * tile.cols * kBlockK;
  const bool both_fp4 = s.a == OperandFormat::kMxfp4 && s.b == OperandFormat::kMxfp4;
  const bool coarse = s.gran_k_a == kBlockK && s.gran_k_b == kBlockK;
  // peak FLOP a microsecond and SM. Native: the tensor core's 2048 (FP4: 4096) a clock at 2.1 GHz,
  // known from others' measurements. Emulated: what the 128 x 128 tile reaches on an H200.
  const double peak = gpu.native ? (both_fp4 ? 4096.0 : 2048.0) * 2100.0
                                 : (both_fp4 ? 1.7e6 : coarse ? 2.8e6 : 2.0e6);
  // Small tiles issue more loads and waits an MMA, and cover less latency.
  const int area = tile.rows * tile.cols;
  const double efficiency = area >= 128 * 128 ? 0.85 : area >= 128 * 64 ? 0.75
                            : area >= 64 * 64 ? 0.6  : area >= 64 * 32 ? 0.45 : 0.3;
  // A block of the pipeline costs its waits and scale loads however few MMAs it has.
  return std::max(flops / (peak * efficiency), 0.12);
}

}  // namespace

bool is_legal(int index, bool swapped, bool split, const GemmShape& s, int num_sms) {
  if (split) {
    const GemmTile& tile = kGemmTiles[index];
    const double blocks = static_cast<double>(ceil_div(swapped ? s.n : s.m, tile.rows)) *
                          ceil_div(swapped ? s.m : s.n, tile.cols) * ceil_div(s.k, kBlockK);
    if (s.k <= kBlockK || blocks * (num_sms + 1) >= (1ll << 32)) return false;
  }
  return s.a == s.b || swapped == (s.b == OperandFormat::kMxfp4);
}

GemmConfig evaluate_gemm_config(int index, bool swapped, bool split, const GemmShape& s,
                                const GpuModel& gpu) {
  const GemmTile& tile = kGemmTiles[index];
  const int64_t row_tiles = ceil_div(swapped ? s.n : s.m, tile.rows);
  const int64_t col_tiles = ceil_div(swapped ? s.m : s.n, tile.cols);
  const int64_t tiles = row_tiles * col_tiles, blocks = ceil_div(s.k, kBlockK);
  GemmConfig c{index, swapped, split, 0, 0, 0, 0, 0};
  c.grid = static_cast<int>(std::min<int64_t>(gpu.num_sms, split ? tiles * blocks : tiles));

  // Compute: the busiest CTA's blocks, as waves of whole tiles or as an equal share of blocks.
  const double block = block_us(tile, s, gpu);
  const double busiest = split ? static_cast<double>(ceil_div(tiles * blocks, c.grid))
                               : static_cast<double>(ceil_div(tiles, c.grid) * blocks);
  // Copies from L2 bound a CTA as well: about 40 GB/s a microsecond... per SM (64 B a clock at best).
  const double tile_bytes =
      kBlockK * (tile.rows * element_bytes(swapped ? s.b : s.a) +
                 tile.cols * element_bytes(swapped ? s.a : s.b)) + 4.0 * (tile.rows + tile.cols);
  c.compute_us = busiest * std::max(block, tile_bytes / 70e3);

  // DRAM: each operand once; a grid smaller than the GPU cannot pull the full bandwidth.
  const double dram = (gpu.dram_gbps > 0 ? gpu.dram_gbps : 1000) * 1e3 * 0.85;  // bytes a us
  const double bytes = s.m * (s.k * element_bytes(s.a)) + s.n * (s.k * element_bytes(s.b)) + 2.0 * s.m * s.n;
  c.dram_us = bytes / (dram * std::min(1.0, 1.3 * c.grid / gpu.num_sms));

  // Tail: pipeline fill and store, once; split: the grid barrier and the partial sums' way through
  // L2, written and read once each.
  c.tail_us = 1.5 + ceil_div(tiles, c.grid) * tile.rows * tile.cols / 16384.0 * 0.4;
  if (split) {
    const double partial_bytes = 2.0 * (tiles + c.grid) * tile.rows * tile.cols * 4;
    c.tail_us += 2.0 + partial_bytes / (gpu.num_sms * 30e3);
  }
  c.total_us = std::max(c.compute_us, c.dram_us) + c.tail_us;
  return c;
}

GemmConfig choose_gemm_config(const GemmShape& s, const GpuModel& gpu) {
  GemmConfig best{};
  bool found = false;
  for (int tile = 0; tile < kNumGemmTiles; ++tile) {
    for (const bool swapped : {false, true}) {
      for (const bool split : {false, true}) {
        if (!is_legal(tile, swapped, split, s, gpu.num_sms)) continue;
        const GemmConfig c = evaluate_gemm_config(tile, swapped, split, s, gpu);
        // A later candidate must win clearly: the list runs from the largest tile, plain and
        // unsplit first.
        if (!found || c.total_us < 0.98 * best.total_us) best = c;
        found = true;
      }
    }
  }
  return best;
}

std::string GemmConfig::to_string() const {
  char text[256];
  std::snprintf(text, sizeof(text),
                "{\"tile_rows\": %d, \"tile_cols\": %d, \"swapped\": %s, \"split\": %s, \"grid\": %d, "
                "\"compute_us\": %.2f, \"dram_us\": %.2f, \"tail_us\": %.2f, \"total_us\": %.2f}",
                kGemmTiles[tile].rows, kGemmTiles[tile].cols, swapped ? "true" : "false",
                split ? "true" : "false", grid, compute_us, dram_us, tail_us, total_us);
  return text;
}

}  // namespace sm120
