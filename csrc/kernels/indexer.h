// An indexer's top-k and its KV cache's writer, as the host sees them (sm120_ops/ops/indexer.py).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sm120 {

struct TopkArgs {
  const void* logits;  // [rows, columns]
  int64_t stride;
  int32_t rows, columns;
  bool bf16, relative;
  const int32_t* starts;  // [rows] or nullptr for 0
  const int32_t* ends;    // [rows]
  int32_t k;
  const int32_t* block_table;  // [rows / rows_a_table, table_width] or nullptr
  int64_t table_stride;
  int32_t table_width, rows_a_table, block_kv;
  int32_t* out;  // [rows, k], contiguous
  // Where few long rows leave SMs idle a row is cut into so many parts, whose chosen logits compete
  // in a second launch: the chosen ones of a row's parts, [rows, parts * k], in the workspace.
  int32_t parts;
  void* part_logits;
  int32_t* part_columns;
};

// How many parts a row is best cut into; 1: it is not.
int32_t topk_parts(int32_t rows, int32_t columns, int32_t k, int32_t num_sms);

void launch_indexer_topk(const TopkArgs& args, cudaStream_t stream);

struct CacheWriteArgs {
  const void* k;   // bf16 [rows, dim], 16-byte aligned rows
  int64_t stride;  // elements
  int64_t rows;
  int32_t dim;
  bool fp4;
  const void* slots;  // [rows]
  bool long_slots;    // int64, or else int32
  uint8_t* cache;     // pages of block_kv rows
  int64_t pages, page_stride;
  int32_t block_kv;
};

void launch_mqa_cache_write(const CacheWriteArgs& args, cudaStream_t stream);

}  // namespace sm120
