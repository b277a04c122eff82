// Quantisation to MXFP8 / MXFP4 and back, as the host sees it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/layout.h"

namespace sm120 {

enum class SourceType { kBf16, kFp16, kFp32 };

struct QuantizeArgs {
  const void* x;  // [rows, cols]: element (r, c) at r * stride + c, or at c * stride + r
  int64_t stride;
  int64_t rows;
  uint32_t cols;  // a multiple of 16 (FP8) or 32 (FP4)
  bool transposed;
  SourceType type;
  bool fp4;          // the element format: E2M1, two a byte, or else E4M3
  bool ocp_rule;     // OCP MX scales and ties, or else DeepGEMM's
  uint32_t gran_k;   // 32 or 128
  uint32_t gran_mn;  // 1, 32 or 128
  void* data;        // [rows, cols], contiguous, 16-byte aligned
  PackedScales scale;
};

void launch_quantize(const QuantizeArgs& args, cudaStream_t stream);

struct DequantizeArgs {
  const void* data;  // [rows, cols] E4M3 or [rows, cols / 2] packed E2M1
  int64_t stride;    // bytes between rows
  int64_t rows;
  uint32_t cols;
  bool fp4;
  uint32_t gran_k;
  const uint32_t* scale;
  int64_t scale_stride;
  SourceType type;
  void* out;  // [rows, cols], contiguous
};

void launch_dequantize(const DequantizeArgs& args, cudaStream_t stream);

}  // namespace sm120
