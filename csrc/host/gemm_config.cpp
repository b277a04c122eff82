#include "host/gemm_config.h"

#include <algorithm>
#include <cstdio>

#include "host/math.h"
#include "host/split_launch.h"
#include "kernels/gemm.h"

namespace sm120 {
namespace {

double element_bytes(OperandFormat f) {
  return f == OperandFormat::kMxfp4 ? 0.5 : 1.0;
}

// The model's constants. Emulated ones were fitted to an H200 (docs/performance.md); the native
// ones follow from the published rate of the block-scaled MMA (2048 FLOP a clock and SM, FP4 twice
// that) at 2.1 GHz, and have not been held against a card.
double peak_flops_a_us(const GemmShape& s, bool native) {  // of one SM, with the 128 x 128 tile
  const bool a4 = s.a == OperandFormat::kMxfp4, b4 = s.b == OperandFormat::kMxfp4;
  if (native) return (a4 && b4 ? 4096.0 : 2048.0) * 2100.0 * 0.8;
  if (a4 && b4) return 1.47e6;
  if (a4 != b4) return 1.73e6;
  return s.gran_k_a == kBlockK && s.gran_k_b == kBlockK ? 2.85e6 : 1.88e6;
}

// Share of that rate another tile reaches: a smaller one has more loads and waits an MMA, and less
// to hide latency with. 128 x 256 spills where it is emulated. Native, it has a tenth fewer
// instructions an MMA and takes a quarter fewer bytes from L2: at the rate above, 128 x 128 tiles
// of FP8 would ask it for 27 KB a microsecond and SM.
double tile_efficiency(const GemmTile& t, const GemmShape& s, bool native) {
  if (t.rows * t.cols > 128 * 128) return native ? 1.1 : 0.3;
  const bool coarse = s.gran_k_a == kBlockK && s.gran_k_b == kBlockK;
  if (t.rows * t.cols == 128 * 128) {
    // Two formats of warp tile: see the table.
    const bool fp8 = s.a == OperandFormat::kMxfp8 && s.b == OperandFormat::kMxfp8;
    return (t.warps_down == 2) == (fp8 && !native) ? 1.0 : 0.95;
  }
  if (!native && (s.a == OperandFormat::kMxfp4 || s.b == OperandFormat::kMxfp4) && t.cols <= 32) {
    // FP4 rows, two K-blocks a stage
    return t.cols == 8 ? 0.35 : t.cols == 32 ? 0.5 : t.rows == 128 ? 0.45 : 0.33;
  }
  if (t.cols == 8) return 0.21;  // by its instructions, beside those of 128 x 16
  if (t.cols == 16) return t.rows == 128 ? 0.33 : 0.24;
  const int area = t.rows * t.cols;
  return area >= 128 * 64 ? (coarse ? 0.85 : 0.93) : area >= 64 * 64 ? 0.6 : 0.41;
}

constexpr double kLaunchUs = 4.5;     // launch, first copies, last stores
constexpr double kColdTileUs = 2.5;   // code of a 128 x 128 tile, first time
constexpr double kTileStoreUs = 0.4;  // epilogue of 128 x 128, each further wave
constexpr double kSlicesUs = 1.5;     // tile of 16 rows: its slices meet, each further wave
constexpr double kDramShare = 0.75;   // of the nominal bandwidth, cold
constexpr double kL2BytesAUs = 70e3;  // L2 to one SM

// Time of `tiles` tiles on c.grid CTAs. All operands have `bytes`, and that share of the GPU's SMs
// loads them.
void estimate(GemmConfig& c, const GemmShape& s, int64_t tiles, double bytes, double busy,
              const GpuModel& gpu) {
  const GemmTile& tile = kGemmTiles[c.tile];
  const int64_t blocks = ceil_div(s.k, kBlockK);
  // Compute: the busiest CTA's blocks, as waves of whole tiles or as an equal share of blocks.
  const double flops = 2.0 * tile.rows * tile.cols * kBlockK;
  const double tile_bytes = kBlockK * (tile.rows * element_bytes(c.swapped ? s.b : s.a) +
                                       tile.cols * element_bytes(c.swapped ? s.a : s.b)) +
                            4.0 * (tile.rows + tile.cols);
  const double block_us =
      std::max(flops / (peak_flops_a_us(s, gpu.native) * tile_efficiency(tile, s, gpu.native)),
               tile_bytes / kL2BytesAUs);
  const double busiest = c.split ? static_cast<double>(ceil_div(tiles * blocks, c.grid))
                                 : static_cast<double>(ceil_div(tiles, c.grid) * blocks);
  c.compute_us = busiest * block_us;

  // DRAM: each operand once; a grid smaller than the GPU cannot pull the full bandwidth.
  const double dram = (gpu.dram_gbps > 0 ? gpu.dram_gbps : 1000) * 1e3 * kDramShare;
  c.dram_us = bytes / (dram * std::min(1.0, 1.3 * busy));

  const double area = static_cast<double>(tile.rows) * tile.cols;
  c.tail_us = kLaunchUs + area / 16384 * kColdTileUs +
              (ceil_div(tiles, c.grid) - 1) *
                  (area / 16384 * kTileStoreUs + (tile.rows == 16 ? kSlicesUs : 0));
  if (c.split) c.tail_us += hand_over_us(c.grid, tiles, area * 4);
  // The shorter of the two is not hidden entirely; it also breaks ties among memory-bound choices.
  c.total_us =
      std::max(c.compute_us, c.dram_us) + 0.1 * std::min(c.compute_us, c.dram_us) + c.tail_us;
}

int64_t count_tiles(const GemmTile& t, bool swapped, const GemmShape& s) {  // of all products
  return s.batch * ceil_div(swapped ? s.n : s.m, t.rows) * ceil_div(swapped ? s.m : s.n, t.cols);
}

double operand_bytes(const GemmShape& s) {  // of one product, and D
  return s.m * (s.k * element_bytes(s.a)) + s.n * (s.k * element_bytes(s.b)) + 2.0 * s.m * s.n;
}

}  // namespace

bool is_legal(int index, bool swapped, bool split, const GemmShape& s, int num_sms) {
  const double tiles = count_tiles(kGemmTiles[index], swapped, s);
  if (tiles >= kMostTiles) return false;
  if (split) {
    const double blocks = tiles * ceil_div(s.k, kBlockK);
    if (s.k <= kBlockK || blocks * (num_sms + 1) >= (1ll << 32)) return false;
  }
  if (!has_instance(kGemmTiles[index].formats, swapped ? s.b : s.a, swapped ? s.a : s.b)) {
    return false;
  }
  return s.a == s.b || swapped == (s.b == OperandFormat::kMxfp4);
}

GemmConfig evaluate_gemm_config(int index, bool swapped, bool split, const GemmShape& s,
                                const GpuModel& gpu) {
  const GemmTile& tile = kGemmTiles[index];
  const int64_t tiles = count_tiles(tile, swapped, s);
  GemmConfig c{index, swapped, split, 0, 0, 0, 0, 0};
  c.grid = static_cast<int>(
      std::min<int64_t>(gpu.num_sms, split ? tiles * ceil_div(s.k, kBlockK) : tiles));
  const double busy = static_cast<double>(c.grid) / gpu.num_sms;
  estimate(c, s, tiles, s.batch * operand_bytes(s), busy, gpu);
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

bool is_legal_grouped(int index, bool swapped, const GroupedShape& s) {
  return most_tiles(kGemmTiles[index], swapped, s) < kMostTiles &&
         is_legal(index, swapped, false, s.one, 0);
}

GemmConfig evaluate_grouped_config(int index, bool swapped, const GroupedShape& s,
                                   const GpuModel& gpu) {
  const GemmTile& tile = kGemmTiles[index];
  const int64_t tiles = expected_tiles(tile, swapped, s);
  GemmConfig c{index, swapped, false, 0, 0, 0, 0, 0};
  c.grid = static_cast<int>(std::min<double>(gpu.num_sms, most_tiles(tile, swapped, s)));
  // In the last wave some SMs have nothing to load.
  const double busy =
      static_cast<double>(tiles) / static_cast<double>(ceil_div(tiles, c.grid) * gpu.num_sms);
  estimate(c, s.one, tiles, s.groups * operand_bytes(s.one), busy, gpu);
  return c;
}

GemmConfig choose_grouped_config(const GroupedShape& s, const GpuModel& gpu) {
  GemmConfig best{};
  bool found = false;
  for (int tile = 0; tile < kNumGemmTiles; ++tile) {
    for (const bool swapped : {false, true}) {
      if (!is_legal_grouped(tile, swapped, s)) continue;
      const GemmConfig c = evaluate_grouped_config(tile, swapped, s, gpu);
      if (!found || c.total_us < best.total_us) best = c;
      found = true;
    }
  }
  return best;
}

std::string GemmConfig::to_string() const {
  char text[320];
  std::snprintf(text, sizeof(text),
                "{\"tile_rows\": %d, \"tile_cols\": %d, \"warps_down\": %d, \"swapped\": %s, "
                "\"split\": %s, \"grid\": %d, "
                "\"compute_us\": %.2f, \"dram_us\": %.2f, \"tail_us\": %.2f, \"total_us\": %.2f}",
                kGemmTiles[tile].rows, kGemmTiles[tile].cols, kGemmTiles[tile].warps_down,
                swapped ? "true" : "false", split ? "true" : "false", grid, compute_us, dram_us,
                tail_us, total_us);
  return text;
}

}  // namespace sm120
