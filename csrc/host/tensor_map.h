// TMA descriptors. The driver's encoder is found at run time, so that nothing links libcuda.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace sm120 {

// A K-major operand as bytes: [rows, row_bytes], rows `stride` bytes apart (both multiples of 16),
// read in swizzled boxes of [box_rows, box_bytes] (32, 64 or 128 bytes; 16 bytes have no swizzle).
CUtensorMap operand_map(const void* data, int64_t rows, int64_t row_bytes, int64_t stride,
                        int box_rows, int box_bytes);

// The same as [groups, rows, row_bytes], groups `group_stride` bytes apart (a multiple of 16), read
// in boxes of one group.
CUtensorMap operand_map(const void* data, int64_t groups, int64_t rows, int64_t row_bytes,
                        int64_t group_stride, int64_t stride, int box_rows, int box_bytes);

// An operand as bytes: [groups, lines, line_bytes], lines `stride` bytes apart. Read in
// swizzled boxes of [box_lines, box_bytes] at a byte of the lines; or, with box_atoms > 0, as
// [groups, line_bytes / box_bytes, lines, box_bytes], so many atoms at once.
CUtensorMap lines_map(const void* data, int64_t groups, int64_t lines, int64_t line_bytes,
                      int64_t group_stride, int64_t stride, int box_lines, int box_bytes,
                      int box_atoms);

// Canonical packed scales: int32 [rows, words] with the rows contiguous and words `stride` int32
// apart, read in boxes of one word of box_rows rows.
CUtensorMap scale_map(const void* data, int64_t rows, int64_t words, int64_t stride, int box_rows);

// The same as [groups, rows, words], groups `group_stride` int32 apart (a multiple of 4).
CUtensorMap scale_map(const void* data, int64_t groups, int64_t rows, int64_t words,
                      int64_t group_stride, int64_t stride, int box_rows, int box_words);

}  // namespace sm120
