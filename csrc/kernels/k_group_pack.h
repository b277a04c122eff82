// Brings the operands of a k-grouped GEMM into the one form that the main loop reads.
//
// The product of group g sums over its own range of K. Wherever the groups lie in the source, in
// the packed form every group begins at a whole K-block of kBlockK and is padded with zeros to the
// next one: data [rows, capacity blocks] K-major, scales in words, one matrix over all groups. So
// the tensor maps depend on shapes alone, and the group sizes are read on the device.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sm120 {

enum class ScaleForm : int32_t { kWords, kBytes, kFloats };

struct KGroupOperand {
  // K-major: of each group [rows, k] without gaps, one after the other. MN-major: [sum of k, rows]
  // with `stride` bytes between the rows of memory, FP4 packed along them.
  const uint8_t* data;
  int64_t stride;
  // [scale_rows, rows], one row (words: a row of four) a K-group; each group begins a new row
  const void* scale;
  int64_t scale_stride;  // elements
  int64_t scale_rows;
  ScaleForm form;
  int32_t gran_k;
  int32_t rows;
  bool fp4;
  bool vector;  // MN-major: every 16 bytes of a row are aligned

  uint8_t* packed;        // [rows, capacity * kBlockK] codes
  uint32_t* words;        // MN-major scale words
  int64_t packed_stride;  // bytes
  int64_t words_stride;   // words
};

struct KGroupPack {
  KGroupOperand operand[2];
  const int32_t* ks;  // [groups]
  int32_t* ends;      // [groups]: where each group's K-blocks end
  int32_t groups;
  int32_t total_k;   // rows of K that the sources hold, a multiple of `step`
  int32_t step;      // what a group size is a multiple of: rounded down to it, and clamped
  int32_t capacity;  // K-blocks of the packed form, at least total_k / kBlockK + groups
  bool k_major;
};

void launch_k_group_pack(const KGroupPack& pack, cudaStream_t stream);

}  // namespace sm120
