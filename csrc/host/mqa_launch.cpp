#include "host/mqa_launch.h"

#include "host/launch.h"
#include "host/math.h"
#include "host/tensor_map.h"

namespace sm120 {
namespace {

int log2_of(int power) {
  int shift = 0;
  while (1 << shift < power) ++shift;
  return shift;
}

}  // namespace

cudaError_t launch_mqa_logits(MqaParams& p, const MqaQueries& q, const MqaKeys& k, int ctas,
                              cudaStream_t stream) {
  const bool ragged = p.rows.starts != nullptr;
  // 64 columns a warp reuse a key fragment most; with fewer heads than that in a cell, 32 waste
  // less.
  const int rows = p.rows.indices != nullptr ? 1 : p.rows.cell_rows;
  const int tiles = (ragged ? p.rows.num_rows : rows) * p.heads > 32 ? 8 : 4;
  const int queries = 8 * tiles / p.heads;
  const MqaInstance instance = q.fp4 ? mqa_instance_fp4(q.head_dim, tiles, queries)
                                     : mqa_instance_fp8(q.head_dim, tiles, queries);
  const int row_bytes = q.fp4 ? q.head_dim / 2 : q.head_dim;
  if (ragged) {
    p.block_kv = kTileKeys;
    p.rows.cell_rows = kMqaWarps * 8 * tiles / p.heads;
    p.rows.cells = static_cast<int>(ceil_div(p.rows.num_rows, p.rows.cell_rows));
  }
  p.rows.overhead = 1;  // 2 where tiles are short makes no difference that can be measured
  p.value_bytes = p.bf16 ? 2 : 4;
  p.heads_shift = log2_of(p.heads);
  p.page_shift = log2_of(p.block_kv);
  p.scale_shift = p.block_kv == 16 ? 3 : 2;  // TMA writes to multiples of 128 bytes
  p.boxes_a_cta = static_cast<float>(p.rows.num_rows) * p.heads / (8 * tiles * ctas);
  if (!ragged) {
    p.table_entries = (p.rows.cells - 1) * p.table_stride + ceil_div(p.rows.limit, p.block_kv);
    p.entries_a_cta = ceil_div(p.table_entries, ctas);
  }
  p.q = operand_map(q.data, static_cast<int64_t>(p.rows.num_rows) * p.heads, row_bytes, row_bytes,
                    8 * tiles, row_bytes);
  p.num_blocks = static_cast<int32_t>(k.count);
  if (k.count == 0) {
    // No key is ever read; the maps stay empty.
  } else if (ragged) {
    p.k = operand_map(k.data, k.count, row_bytes, k.stride, kTileKeys, row_bytes);
    p.k_scale = scale_map(k.scale, k.count, 1, align_up(k.count, 4), kTileKeys);
  } else {
    p.k = operand_map(k.data, k.count, p.block_kv, row_bytes, k.stride, row_bytes, p.block_kv,
                      row_bytes);
    const auto* scales = static_cast<const uint8_t*>(k.data) + p.block_kv * row_bytes;
    p.k_scale = scale_map(scales, p.block_kv, k.count, k.stride / 4, p.block_kv);
  }
  return launch_kernel(instance.kernel, ctas, kMqaThreads, instance.smem_bytes, false, stream, p);
}

}  // namespace sm120
