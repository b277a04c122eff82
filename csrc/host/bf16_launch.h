// From a checked BF16 GEMM problem to a kernel launch.
#pragma once
#include <cuda_runtime.h>

#include "host/bf16_config.h"
#include "kernels/gemm.h"

namespace sm120 {

// A bf16 operand [rows, K]: K-major, lines of K `stride` bytes apart, or MN-major, lines of `rows`.
struct Bf16Operand {
  const void* data;
  int64_t stride;  // bytes, a multiple of 16
  int64_t rows;
  bool mn_major;
};

// Bytes of workspace the configuration needs for partial sums (0 unless split).
int64_t bf16_workspace_bytes(const Bf16Config& config);

// D = (C +) A @ B.T on the stream; workspace as sized above. Returns the launch's error.
cudaError_t launch_bf16_gemm(const Bf16Config& config, const Bf16Operand& a, const Bf16Operand& b,
                             int64_t k, const GemmOutput& out, void* workspace,
                             cudaStream_t stream);

}  // namespace sm120
