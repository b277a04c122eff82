// Changes of layout that touch no value, as the host sees them: scale forms and packed FP4.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sm120 {

// UE8M0 scales, four consecutive K-groups a word: the word of (row, j) is words[j * stride + row].
// Padding rows up to a multiple of 4 are zeroed as far as `capacity` words reach.
struct PackedScales {
  uint32_t* words;
  int64_t stride;
  int64_t capacity;
};

// One scale a row and K-group, or a block of gran_mn rows: exponent bytes or float32 values.
struct PlainScales {
  const void* scale;
  int64_t row_stride;    // elements
  int64_t group_stride;  // elements
  bool fp32;
};

void launch_pack_scales(const PlainScales& source, int64_t rows, int64_t groups, int gran_mn,
                        const PackedScales& out, cudaStream_t stream);

// out: contiguous [rows, groups], bytes or float32
void launch_unpack_scales(const uint32_t* words, int64_t stride, int64_t rows, int64_t groups,
                          void* out, bool fp32, cudaStream_t stream);

// codes: one E2M1 code a byte; packed: two a byte, the first in the low nibble.
void launch_pack_fp4(const uint8_t* codes, uint8_t* packed, int64_t packed_bytes,
                     cudaStream_t stream);
void launch_unpack_fp4(const uint8_t* packed, uint8_t* codes, int64_t packed_bytes,
                       cudaStream_t stream);

// packed: [rows, row_bytes] with `stride` bytes between rows, rows even
// out: contiguous [2 * row_bytes, rows / 2]
void launch_transpose_fp4(const uint8_t* packed, int64_t stride, int64_t rows, int64_t row_bytes,
                          uint8_t* out, cudaStream_t stream);

}  // namespace sm120
