// From a checked BF16 GEMM problem to a kernel launch.
#pragma once
#include <cuda_runtime.h>

#include "host/bf16_config.h"
#include "kernels/gemm.h"

namespace sm120 {

// A bf16 operand [rows, K]: K-major, lines of K `stride` bytes apart, or MN-major, lines of `rows`;
// or a group of such matrices, `group_stride` bytes apart.
struct Bf16Operand {
  const void* data;
  int64_t stride;  // bytes, a multiple of 16
  int64_t rows;
  bool mn_major;
  int64_t groups = 1, group_stride = 0;  // bytes, a multiple of 16
};

// D = (C +) A @ B.T, for one pair of matrices or for groups as `schedule` says.
struct Bf16Problem {
  Bf16Operand a, b;
  int64_t k;
  GemmOutput out;
  Schedule schedule;   // of the groups; a single product has kTiles, whatever the configuration
  GemmGroups groups;   // without `step` and `items`
  int64_t summed = 1;  // groups of the operands that one product is summed over
};

// Bytes of workspace the configuration needs for partial sums: of a split, and of sums over more K
// than one chain of MMAs adds up.
int64_t bf16_workspace_bytes(const Bf16Config& config, const Bf16Problem& problem);

// Launches on the stream; workspace as sized above. Returns the launch's error.
cudaError_t launch_bf16_gemm(const Bf16Config& config, const Bf16Problem& problem, void* workspace,
                             cudaStream_t stream);

}  // namespace sm120
