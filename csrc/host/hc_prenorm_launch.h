// From a checked prenorm problem to a kernel launch.
#pragma once
#include <cuda_runtime.h>

#include "kernels/hc_prenorm.h"

namespace sm120 {

struct PrenormProblem {
  const void* x;   // bf16 [m, k], rows x_stride bytes apart (a multiple of 16)
  const void* fn;  // float32 [n, k], rows fn_stride bytes apart
  int64_t x_stride, fn_stride;
  int64_t m, n, k;  // m, n, k > 0; n <= 128, k a multiple of 64
  int64_t splits;   // 1 .. k / 64, or 0: chosen here, and reduced in the same launch
  bool scale;       // splits = 0 only
  float eps;
  float* d;
  float* sqr_sum;
};

// Grid and workspace of a problem on a GPU of num_sms.
struct PrenormPlan {
  int grid;
  int64_t splits;
  bool reduced;  // they are summed through the workspace: a cooperative launch
  int64_t workspace_bytes;
};

PrenormPlan plan_prenorm(const PrenormProblem& problem, int num_sms);

cudaError_t launch_prenorm(const PrenormProblem& problem, const PrenormPlan& plan, void* workspace,
                           cudaStream_t stream);

}  // namespace sm120
