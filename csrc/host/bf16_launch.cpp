#include "host/bf16_launch.h"

#include <algorithm>
#include <cstring>

#include "host/launch.h"
#include "host/math.h"
#include "host/tensor_map.h"

namespace sm120 {
namespace {

GemmInstance find_instance(const Bf16Operand& rows, const Bf16Operand& cols, int tile) {
  if (rows.mn_major) return cols.mn_major ? bf16_instance_mn_mn(tile) : bf16_instance_mn_k(tile);
  return cols.mn_major ? bf16_instance_k_mn(tile) : bf16_instance_k_k(tile);
}

CUtensorMap data_map(const Bf16Operand& x, int64_t k, int tile_rows, int block_k, int box_bytes) {
  const int64_t group_stride = x.groups > 1 ? x.group_stride : 16;
  if (x.mn_major) {
    return operand_map(x.data, x.groups, k, 2 * x.rows, group_stride, x.stride, block_k, box_bytes);
  }
  return operand_map(x.data, x.groups, x.rows, 2 * k, group_stride, x.stride, tile_rows, box_bytes);
}

// Floats of partial sums, [2 * grid] tiles.
int64_t split_floats(const Bf16Config& config) {
  const Bf16Tile& tile = kBf16Tiles[config.tile];
  return config.split ? 2ll * config.grid * tile.rows * tile.cols : 0;
}

// A slice's K-blocks after which it adds its sums to those before; 0 if it has fewer in any case.
int keep_blocks(const Bf16Config& config, const Bf16Problem& problem) {
  const Bf16Tile& tile = kBf16Tiles[config.tile];
  const int most = kMostSummedK / tile.block_k;
  const int64_t blocks = ceil_div(problem.k, tile.block_k) * problem.summed;
  return problem.out.fp32 && ceil_div(blocks, tile.slices) > most ? most : 0;
}

}  // namespace

int64_t bf16_workspace_bytes(const Bf16Config& config, const Bf16Problem& problem) {
  const Bf16Tile& tile = kBf16Tiles[config.tile];
  int64_t floats = split_floats(config);
  if (keep_blocks(config, problem) > 0) {
    floats += static_cast<int64_t>(config.grid) * tile.rows * tile.cols * tile.slices;
  }
  return 4 * floats;
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
    p.rows = data_map(rows, k, tile.rows, tile.block_k, instance.rows_box_bytes);
    p.cols = data_map(cols, k, tile.cols, tile.block_k, instance.cols_box_bytes);
  }
  p.out = problem.out;
  p.groups = problem.groups;
  p.groups.step = config.swapped ? tile.cols : tile.rows;
  if (problem.schedule == Schedule::kSegments) {
    p.groups.step = std::min(p.groups.step, p.groups.alignment);
  }
  p.workspace = static_cast<float*>(workspace);
  p.keep_blocks = keep_blocks(config, problem);
  if (p.keep_blocks > 0) {
    p.kept = p.workspace + split_floats(config);
  } else {
    p.keep_blocks = INT32_MAX;
  }
  p.num_rows = static_cast<int32_t>(rows.rows);
  p.num_cols = static_cast<int32_t>(cols.rows);
  p.row_tiles = static_cast<int32_t>(ceil_div(rows.rows, tile.rows));
  p.col_tiles = static_cast<int32_t>(ceil_div(cols.rows, tile.cols));
  const int64_t blocks = ceil_div(k, tile.block_k);
  p.k_blocks = static_cast<int32_t>(blocks * problem.summed);
  p.matrix_blocks = static_cast<int32_t>(std::max<int64_t>(blocks, 1));
  if (config.split) {
    const int products = problem.schedule == Schedule::kBatch ? problem.groups.count : 1;
    p.total_blocks = static_cast<uint32_t>(p.row_tiles) * p.col_tiles * p.k_blocks * products;
  }
  p.rows_grouped = rows.groups > 1;
  p.cols_grouped = cols.groups > 1;
  p.swapped = config.swapped;
  p.schedule = config.split ? Schedule::kSplit : problem.schedule;
  return launch_kernel(instance.kernel, config.grid, kGemmThreads, instance.smem_bytes,
                       config.split, stream, p);
}

}  // namespace sm120
