#include "host/gemm_launch.h"

#include <cstring>

#include "host/launch.h"
#include "host/math.h"
#include "host/split_launch.h"
#include "host/tensor_map.h"

namespace sm120 {
namespace {

GemmInstance find_instance(OperandFormat rows, OperandFormat cols, int tile) {
  if (rows == OperandFormat::kMxfp8) return gemm_instance_fp8_fp8(tile);
  return cols == OperandFormat::kMxfp4 ? gemm_instance_fp4_fp4(tile) : gemm_instance_fp4_fp8(tile);
}

int64_t bytes_of(const GemmOperand& x, int64_t values) {
  return x.format == OperandFormat::kMxfp4 ? values / 2 : values;
}

// What a stage has of a row is one box's line, or several; whether those are whole lines of the
// row, so that one copy brings them.
int lines_a_stage(const GemmOperand& x, int stage_blocks, int box_bytes) {
  return static_cast<int>(bytes_of(x, stage_blocks * kBlockK) / box_bytes);
}
bool has_whole_lines(const GemmOperand& x, int64_t k, int box_bytes) {
  return bytes_of(x, k) % box_bytes == 0;
}

CUtensorMap data_map(const GemmOperand& x, int64_t k, int box_rows, int box_bytes, int lines) {
  const int64_t row_bytes = bytes_of(x, k), group_stride = x.groups > 1 ? x.group_stride : 16;
  if (lines == 1) {
    return operand_map(x.data, x.groups, x.rows, row_bytes, group_stride, x.stride, box_rows,
                       box_bytes);
  }
  return lines_map(x.data, x.groups, x.rows, row_bytes, group_stride, x.stride, box_rows, box_bytes,
                   has_whole_lines(x, k, box_bytes) ? lines : 0);
}

CUtensorMap scales_map(const GemmOperand& x, int64_t k, int box_rows, int box_words) {
  return scale_map(x.scale, x.groups, x.rows, ceil_div(k, 4 * x.gran_k),
                   x.groups > 1 ? x.scale_group_stride : 4, x.scale_stride, box_rows, box_words);
}

int64_t tile_bytes(const GemmConfig& config) {
  const GemmTile& tile = kGemmTiles[config.tile];
  return 4ll * tile.rows * tile.cols;
}

}  // namespace

int64_t gemm_workspace_bytes(const GemmConfig& config) {
  return config.split ? split_bytes(config.grid, tile_bytes(config)) : 0;
}

cudaError_t launch_gemm(const GemmConfig& config, const GemmProblem& problem, void* workspace,
                        cudaStream_t stream) {
  const GemmOperand& rows = config.swapped ? problem.b : problem.a;
  const GemmOperand& cols = config.swapped ? problem.a : problem.b;
  const int64_t k = problem.k;
  const GemmTile& tile = kGemmTiles[config.tile];
  const GemmInstance instance = find_instance(rows.format, cols.format, config.tile);
  GemmParams p;
  std::memset(&p, 0, sizeof(p));
  if (k > 0) {
    const int blocks = instance.stage_blocks;
    p.rows = data_map(rows, k, tile.rows, instance.rows_box_bytes,
                      lines_a_stage(rows, blocks, instance.rows_box_bytes));
    p.cols = data_map(cols, k, tile.cols, instance.cols_box_bytes,
                      lines_a_stage(cols, blocks, instance.cols_box_bytes));
    p.rows_whole_atoms = has_whole_lines(rows, k, instance.rows_box_bytes);
    p.cols_whole_atoms = has_whole_lines(cols, k, instance.cols_box_bytes);
    p.rows_scale = scales_map(rows, k, tile.rows, blocks);
    p.cols_scale = scales_map(cols, k, tile.cols, blocks);
  }
  p.out = problem.out;
  p.groups = problem.groups;
  set_token_tiles(p.groups, problem.schedule, config.swapped ? tile.cols : tile.rows);
  p.num_rows = static_cast<int32_t>(rows.rows);
  p.num_cols = static_cast<int32_t>(cols.rows);
  p.rows_gran = ScaleGran(rows.gran_k, static_cast<int>(k));
  p.cols_gran = ScaleGran(cols.gran_k, static_cast<int>(k));
  p.row_tiles = static_cast<int32_t>(ceil_div(rows.rows, tile.rows));
  p.col_tiles = static_cast<int32_t>(ceil_div(cols.rows, tile.cols));
  p.k_blocks = static_cast<int32_t>(ceil_div(k, kBlockK));
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
