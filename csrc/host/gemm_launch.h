// From a checked GEMM problem to a kernel launch.
#pragma once
#include <cuda_runtime.h>

#include "host/gemm_config.h"
#include "kernels/gemm.h"

namespace sm120 {

// A K-major operand and its packed scales: one matrix, or one for each group.
struct GemmOperand {
  const void* data;      // [groups, rows, K] e4m3 bytes or [groups, rows, K/2] packed e2m1
  int64_t stride;        // bytes between rows
  const void* scale;     // int32 [groups, rows, words], rows contiguous
  int64_t scale_stride;  // int32 between words
  OperandFormat format;
  int gran_k;
  int64_t rows;
  int64_t groups;                            // 1: a single matrix
  int64_t group_stride, scale_group_stride;  // bytes, int32
};

struct GemmProblem {
  GemmOperand a, b;
  int64_t k;
  GemmOutput out;
  Schedule schedule;  // of the groups; a single product has kTiles, whatever the configuration
  GemmGroups groups;  // without `step` and `items`
};

// Bytes of workspace the configuration needs for partial sums (0 unless split).
int64_t gemm_workspace_bytes(const GemmConfig& config);

// D = (C +) A @ B.T on the stream; workspace as sized above. Returns the launch's error.
cudaError_t launch_gemm(const GemmConfig& config, const GemmProblem& problem, void* workspace,
                        cudaStream_t stream);

}  // namespace sm120
