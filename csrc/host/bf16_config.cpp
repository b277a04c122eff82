#include "host/bf16_config.h"

#include <algorithm>
#include <cstdio>

#include "host/math.h"
#include "host/split_launch.h"

namespace sm120 {
namespace {

// The model's constants. Those of the H200 are measured or fitted; the native ones follow from
// published rates (16 clocks an MMA and tensor core, with FP32 sums) and have not been held against
// a card.
struct Sm {
  double mhz, clocks_an_mma;  // m16n8k16, all tensor cores of an SM busy
  double busy;                // share of the busier of MMA and shared memory
};
constexpr Sm kH200Sm{1980, 1.95, 0.92}, kNativeSm{2400, 4, 0.85};

constexpr double kSharedBytesAClock = 128;
constexpr double kLaunchUs = 6.5;     // launch, first copies, last stores
constexpr double kColdTileUs = 4.0;   // code of a 128 x 256 tile, first time
constexpr double kTileStoreUs = 0.8;  // epilogue of 128 x 256, each further wave
constexpr double kDramShare = 0.95;   // of the nominal bandwidth, cold, the whole ring on its way
constexpr double kL2BytesAUs = 60e3;  // L2 to one SM
constexpr double kMnColsCost = 1.03;  // of compute, where cols are MN-major rather than rows
constexpr double kStageUs = 0.11;     // the copying thread, for the two copies of a stage

// Clocks of an SM for 16 of K, by tensor cores or by shared memory: fragments read by the warps
// that share the 16, and the operands' arrival.
double clocks_a_step(const Bf16Tile& t, const Sm& sm) {
  const double mmas = t.rows * t.cols / 128.0;
  const int warps = 8 / t.slices, across = warps / t.warps_down;
  const double read = 32.0 * (t.rows * across + t.cols * t.warps_down);
  const double written = 32.0 * (t.rows + t.cols);
  return std::max(mmas * sm.clocks_an_mma, (read + written) / kSharedBytesAClock) / sm.busy;
}

// Tiles of all products.
int64_t count_tiles(const Bf16Tile& t, bool swapped, const Bf16Shape& s) {
  return s.batch * ceil_div(swapped ? s.n : s.m, t.rows) * ceil_div(swapped ? s.m : s.n, t.cols);
}
int64_t k_blocks(const Bf16Tile& t, const Bf16Shape& s) {
  return s.summed * ceil_div(s.k, t.block_k);
}

// Ranges of a split: equal parts of each tile, where there are SMs for two or more, else one an SM.
int64_t count_ranges(int64_t tiles, int64_t blocks, int num_sms) {
  const int64_t parts = std::min(num_sms / tiles, blocks);
  return parts > 1 ? parts * tiles : std::min<int64_t>(num_sms, tiles * blocks);
}

// The model's terms, for `tiles` tiles on c.grid CTAs; all operands and D have `bytes`, and that
// share of the GPU's SMs loads them.
void estimate(Bf16Config& c, const Bf16Shape& s, int64_t tiles, double bytes, double busy,
              const GpuModel& gpu) {
  const Bf16Tile& tile = kBf16Tiles[c.tile];
  const Sm& sm = gpu.native ? kNativeSm : kH200Sm;
  const int64_t blocks = k_blocks(tile, s);
  // Compute: the busiest CTA's K-blocks, as waves of whole tiles or as an equal share of blocks.
  const int64_t rows = c.swapped ? s.n : s.m, cols = c.swapped ? s.m : s.n;
  // Of what all CTAs load at the same time, a part comes once for several of them.
  const double loaded = tile.rows * (tiles > ceil_div(cols, tile.cols) ? 1 : 0.75) +
                        tile.cols * (tiles > ceil_div(rows, tile.rows) ? 1 : 0.75);
  const double block_us = std::max({clocks_a_step(tile, sm) * (tile.block_k / 16) / sm.mhz,
                                    2.0 * tile.block_k * loaded / kL2BytesAUs, kStageUs});
  const int64_t waves = ceil_div(tiles, c.grid);
  c.compute_us = (c.split ? ceil_div(tiles * blocks, c.grid) : waves * blocks) * block_us;
  if (c.swapped ? s.a_mn_major : s.b_mn_major) c.compute_us *= kMnColsCost;

  // DRAM: each operand once; a grid smaller than the GPU cannot pull the full bandwidth.
  const double dram = (gpu.dram_gbps > 0 ? gpu.dram_gbps : 1000) * 1e3 * kDramShare;
  // Rows and columns past the edge take room in the ring from those on their way; it is enough
  // without a third of it.
  const double useful =
      static_cast<double>(std::min<int64_t>(tile.rows, rows) + std::min<int64_t>(tile.cols, cols)) /
      (tile.rows + tile.cols);
  c.dram_us = bytes / (dram * std::min(1.0, 1.3 * busy)) * std::max(1.0, 1.7 - useful);

  const double area = static_cast<double>(tile.rows) * tile.cols, full = 128.0 * 256;
  // Slices add their sums through shared memory, written and read.
  const double combine_us = (tile.slices - 1) * area * 8 / kSharedBytesAClock / sm.mhz;
  c.tail_us = kLaunchUs + area / full * kColdTileUs + waves * combine_us +
              (waves - 1) * area / full * kTileStoreUs;
  // The largest tile's sums fill the registers, so that others are added a few at a time.
  if (c.split) c.tail_us += hand_over_us(c.grid, tiles, area * 4) * (area < full ? 1 : 2);
  // The shorter of the two is not hidden entirely; it also breaks ties among memory-bound choices.
  c.total_us =
      std::max(c.compute_us, c.dram_us) + 0.1 * std::min(c.compute_us, c.dram_us) + c.tail_us;
}

double bytes_of(const Bf16Shape& s) {
  return 2.0 * s.batch * (s.summed * (s.m + s.n) * s.k + s.m * s.n);
}

// Whether the tile is compiled for it, and sums of so many K-blocks are as exact as is promised.
bool can_sum(const Bf16Tile& t, const Bf16Shape& s, int64_t blocks) {
  const int64_t longest = std::max(blocks * t.block_k, s.shared_k);
  return (has_chains(t.cols, t.slices) || longest <= kLongestChainK * t.slices) &&
         (has_any_k(t.cols) || s.shared_k == 0);
}

}  // namespace

bool is_legal(int index, bool swapped, bool split, const Bf16Shape& s, int num_sms) {
  const Bf16Tile& tile = kBf16Tiles[index];
  const int64_t tiles = count_tiles(tile, swapped, s), blocks = k_blocks(tile, s);
  if (tiles >= kMostTiles) return false;
  if (!split) return can_sum(tile, s, blocks);
  if (blocks <= 1 || static_cast<double>(tiles) * blocks * (num_sms + 1) >= (1ll << 32)) {
    return false;
  }
  // No CTA has more of a tile's K than its range has of all.
  return can_sum(tile, s,
                 std::min(blocks, ceil_div(tiles * blocks, count_ranges(tiles, blocks, num_sms))));
}

Bf16Config evaluate_bf16_config(int index, bool swapped, bool split, const Bf16Shape& s,
                                const GpuModel& gpu) {
  const Bf16Tile& tile = kBf16Tiles[index];
  const int64_t tiles = count_tiles(tile, swapped, s), blocks = k_blocks(tile, s);
  Bf16Config c{index, swapped, split, 0, 0, 0, 0, 0};
  c.grid = static_cast<int>(split ? count_ranges(tiles, blocks, gpu.num_sms)
                                  : std::min<int64_t>(gpu.num_sms, tiles));
  // The CTAs of a split with several tiles each are all over the product and K: what L2 does not
  // hold comes anew for every tile.
  double bytes = bytes_of(s);
  if (split && tiles > c.grid && bytes > 0.8 * gpu.l2_bytes) {
    bytes = 2.0 * tiles * blocks * tile.block_k * (tile.rows + tile.cols);
  }
  estimate(c, s, tiles, bytes, static_cast<double>(c.grid) / gpu.num_sms, gpu);
  return c;
}

Bf16Config choose_bf16_config(const Bf16Shape& s, const GpuModel& gpu) {
  Bf16Config best{};
  bool found = false;
  for (int tile = 0; tile < kNumBf16Tiles; ++tile) {
    for (const bool swapped : {false, true}) {
      for (const bool split : {false, true}) {
        if (!is_legal(tile, swapped, split, s, gpu.num_sms)) continue;
        const Bf16Config c = evaluate_bf16_config(tile, swapped, split, s, gpu);
        // A later candidate must win clearly: the list runs from the largest tile, plain and
        // unsplit first.
        if (!found || c.total_us < 0.98 * best.total_us) best = c;
        found = true;
      }
    }
  }
  return best;
}

bool is_legal_grouped(int index, bool swapped, const GroupedBf16Shape& s) {
  const Bf16Tile& tile = kBf16Tiles[index];
  return can_sum(tile, s.one, k_blocks(tile, s.one)) && most_tiles(tile, swapped, s) < kMostTiles;
}

Bf16Config evaluate_grouped_config(int index, bool swapped, const GroupedBf16Shape& s,
                                   const GpuModel& gpu) {
  const Bf16Tile& tile = kBf16Tiles[index];
  const int64_t tiles = expected_tiles(tile, swapped, s);
  Bf16Config c{index, swapped, false, 0, 0, 0, 0, 0};
  c.grid = static_cast<int>(std::min<double>(gpu.num_sms, most_tiles(tile, swapped, s)));
  // In the last wave some SMs have nothing to load.
  const double busy =
      static_cast<double>(tiles) / static_cast<double>(ceil_div(tiles, c.grid) * gpu.num_sms);
  estimate(c, s.one, tiles, s.groups * bytes_of(s.one), busy, gpu);
  return c;
}

Bf16Config choose_grouped_config(const GroupedBf16Shape& s, const GpuModel& gpu) {
  Bf16Config best{};
  bool found = false;
  for (int tile = 0; tile < kNumBf16Tiles; ++tile) {
    for (const bool swapped : {false, true}) {
      if (!is_legal_grouped(tile, swapped, s)) continue;
      const Bf16Config c = evaluate_grouped_config(tile, swapped, s, gpu);
      if (!found || c.total_us < 0.98 * best.total_us) best = c;
      found = true;
    }
  }
  return best;
}

std::string Bf16Config::to_string() const {
  const Bf16Tile& t = kBf16Tiles[tile];
  char text[352];
  std::snprintf(text, sizeof(text),
                "{\"tile_rows\": %d, \"tile_cols\": %d, \"warps_down\": %d, \"slices\": %d, "
                "\"swapped\": %s, \"split\": %s, \"grid\": %d, "
                "\"compute_us\": %.2f, \"dram_us\": %.2f, \"tail_us\": %.2f, \"total_us\": %.2f}",
                t.rows, t.cols, t.warps_down, t.slices, swapped ? "true" : "false",
                split ? "true" : "false", grid, compute_us, dram_us, tail_us, total_us);
  return text;
}

}  // namespace sm120
