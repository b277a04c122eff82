// The MQA logits of a sparse-attention indexer, as the host sees them (see sm120_ops/ops/mqa.py).
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/mqa_rows.h"

namespace sm120 {

struct MqaParams {
  CUtensorMap q;        // bytes [rows * H, D'], box [8 * NT, D']
  CUtensorMap k;        // ragged: bytes [SKV, D'], box [128, D']; paged: [blocks, block_kv, D']
  CUtensorMap k_scale;  // ragged: words [1, SKV], box [1, 128]; paged: [blocks, block_kv]
  MqaRows rows;
  const int32_t* metadata;  // [grid + 1, 2] cursors, or nullptr: the kernel works them out
  const uint32_t* q_scale;  // FP4: [rows, H]
  const float* weights;     // [rows, H]
  int64_t weights_stride;
  const int32_t* block_table;  // paged: [B, any]
  int64_t table_stride, table_entries;
  int32_t num_blocks, block_kv;     // ragged: keys (0 or not), and 128 as a stage's block
  int32_t page_shift, scale_shift;  // log2 of block_kv; of the bytes between scales in a stage
  int32_t heads, heads_shift;       // and log2 of it
  float boxes_a_cta;                // of queries, if all cells had the same length
  int64_t entries_a_cta;            // of the block table, which has table_entries in all
  void* out;                        // [rows, columns]
  int64_t out_stride;
  int32_t columns, value_bytes;  // 2 or 4 for a logit
  bool bf16, clean;
};

using MqaKernel = void (*)(MqaParams);

struct MqaInstance {
  MqaKernel kernel = nullptr;
  int smem_bytes = 0;
};

// tiles: 8-column tiles of a warp, 4 or 8; queries: those that share these columns, 0 where one
// query has twice as many. Empty for a head_dim that is not compiled.
MqaInstance mqa_instance_fp8(int head_dim, int tiles, int queries);
MqaInstance mqa_instance_fp4(int head_dim, int tiles, int queries);

inline constexpr int kMqaThreads = 384;  // 8 math warps + 4 producer warps
inline constexpr int kMqaWarps = 8;
inline constexpr int kTileKeys = 128;

// Cursors [ctas + 1, 2] for the rows, written by one block.
cudaError_t launch_mqa_metadata(const MqaRows& rows, int ctas, int32_t* cursors,
                                cudaStream_t stream);

}  // namespace sm120
