// TMA descriptors. The driver's encoder is found at run time, so that nothing links libcuda.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace sm120 {

// A K-major operand as bytes: [groups, rows, row_bytes], groups and rows `group_stride` and
// `stride` bytes apart (all multiples of 16), read in swizzled boxes of [box_rows, box_bytes] (64
// or 128 bytes).
CUtensorMap operand_map(const void* data, int64_t groups, int64_t rows, int64_t row_bytes,
                        int64_t group_stride, int64_t stride, int box_rows, int box_bytes);

// Packed scales: int32 [groups, rows, words] with the rows contiguous; groups and words
// `group_stride` and `stride` int32 apart (multiples of 4), read in boxes of one word of box_rows
// rows.
CUtensorMap scale_map(const void* data, int64_t groups, int64_t rows, int64_t words,
                      int64_t group_stride, int64_t stride, int box_rows);

}  // namespace sm120
