#include "host/bf16_launch.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "host/launch.h"
#include "host/math.h"
#include "host/split_launch.h"
#include "host/tensor_map.h"

namespace sm120 {
namespace {

GemmInstance find_instance(const Bf16Operand& rows, const Bf16Operand& cols, int tile) {
  if (rows.mn_major) return cols.mn_major ? bf16_instance_mn_mn(tile) : bf16_instance_mn_k(tile);
  return cols.mn_major ? bf16_instance_k_mn(tile) : bf16_instance_k_k(tile);
}

CUtensorMap data_map(const Bf16Operand& x, int64_t k, int tile_rows, int block_k, int box_bytes,
                     bool whole_atoms) {
  const int64_t group_stride = x.groups > 1 ? x.group_stride : 16;
  const int64_t lines = x.mn_major ? k : x.rows, line_bytes = 2 * (x.mn_major ? x.rows : k);
  const int box_lines = x.mn_major ? block_k : tile_rows;
  const int atoms = 2 * (x.mn_major ? tile_rows : block_k) / box_bytes;
  if (!x.mn_major && atoms == 1) {
    return operand_map(x.data, x.groups, lines, line_bytes, group_stride, x.stride, box_lines,
                       box_bytes);
  }
  return lines_map(x.data, x.groups, lines, line_bytes, group_stride, x.stride, box_lines,
                   box_bytes, whole_atoms ? atoms : 0);
}

int64_t chain_blocks(const Bf16Config& config) {
  const Bf16Tile& tile = kBf16Tiles[config.tile];
  return kChainK / tile.block_k * tile.slices;
}

int64_t tile_bytes(const Bf16Config& config) {
  const Bf16Tile& tile = kBf16Tiles[config.tile];
  return 4ll * tile.rows * tile.cols;
}

int64_t handed_bytes(const Bf16Config& config) {
  return config.split ? split_bytes(config.grid, tile_bytes(config)) : 0;
}

int64_t k_blocks(const Bf16Config& config, const Bf16Problem& problem) {
  return problem.summed * ceil_div(problem.k, kBf16Tiles[config.tile].block_k);
}

// Whether a tile may need more than one chain.
bool has_carry(const Bf16Config& config, const Bf16Problem& problem) {
  const Bf16Tile& tile = kBf16Tiles[config.tile];
  return has_chains(tile.cols, tile.slices) && k_blocks(config, problem) > chain_blocks(config);
}

}  // namespace

int64_t bf16_workspace_bytes(const Bf16Config& config, const Bf16Problem& problem) {
  const int64_t carried = has_carry(config, problem) ? config.grid * tile_bytes(config) : 0;
  return handed_bytes(config) + carried;
}

cudaError_t launch_bf16_gemm(const Bf16Config& config, const Bf16Problem& problem, void* workspace,
                             cudaStream_t stream) {
  const Bf16Operand& rows = config.swapped ? problem.b : problem.a;
  const Bf16Operand& cols = config.swapped ? problem.a : problem.b;
  const int64_t k = problem.k;
  const Bf16Tile& tile = kBf16Tiles[config.tile];
  const GemmInstance instance = find_instance(rows, cols, config.tile);
  GemmParams p;
  std::memset(&p, 0, sizeof(p));
  if (k > 0) {
    // Tiles of grouped tokens begin anywhere.
    const auto whole = [&](const Bf16Operand& x, int box_bytes) {
      if (!x.mn_major) return 2 * k % box_bytes == 0;
      const bool tokens = problem.schedule >= Schedule::kSegments && &x == &problem.a;
      return !tokens && 2 * x.rows % box_bytes == 0;
    };
    p.rows_whole_atoms = whole(rows, instance.rows_box_bytes);
    p.cols_whole_atoms = whole(cols, instance.cols_box_bytes);
    p.rows =
        data_map(rows, k, tile.rows, tile.block_k, instance.rows_box_bytes, p.rows_whole_atoms);
    p.cols =
        data_map(cols, k, tile.cols, tile.block_k, instance.cols_box_bytes, p.cols_whole_atoms);
  }
  p.out = problem.out;
  p.groups = problem.groups;
  set_token_tiles(p.groups, problem.schedule, config.swapped ? tile.cols : tile.rows);
  p.chain = std::numeric_limits<int32_t>::max();
  if (has_carry(config, problem)) {
    const int unit = problem.schedule == Schedule::kSpans ? tile.block_k : 1;
    p.chain = static_cast<int32_t>(chain_blocks(config) * unit);
    p.carry = static_cast<float*>(workspace) + handed_bytes(config) / 4;
  }
  p.num_rows = static_cast<int32_t>(rows.rows);
  p.num_cols = static_cast<int32_t>(cols.rows);
  p.row_tiles = static_cast<int32_t>(ceil_div(rows.rows, tile.rows));
  p.col_tiles = static_cast<int32_t>(ceil_div(cols.rows, tile.cols));
  p.k_blocks = static_cast<int32_t>(k_blocks(config, problem));
  p.matrix_blocks = static_cast<int32_t>(std::max<int64_t>(ceil_div(k, tile.block_k), 1));
  if (config.split) {
    const int64_t products = problem.schedule == Schedule::kBatch ? problem.groups.count : 1;
    set_split(p, products * p.row_tiles * p.col_tiles * p.k_blocks, config.grid, workspace,
              tile_bytes(config));
  }
  p.rows_grouped = rows.groups > 1;
  p.cols_grouped = cols.groups > 1;
  p.swapped = config.swapped;
  p.schedule = config.split ? Schedule::kSplit : problem.schedule;
  return launch_kernel(instance.kernel, config.grid, kGemmThreads, instance.smem_bytes,
                       config.split, stream, p);
}

}  // namespace sm120
