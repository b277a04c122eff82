// The hyper-connection prenorm as the host sees it: d[m, n] = sum_k x[m, k] * fn[n, k] and
// sqr_sum[m] = sum_k x[m, k]^2, in one pass over x.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sm120 {

inline constexpr int kPrenormRows = 256;     // rows of x a tile covers
inline constexpr int kPrenormBlockK = 64;    // K of the main loop's unit
inline constexpr int kPrenormThreads = 384;  // 8 math warps + 4 producer warps

struct PrenormParams {
  CUtensorMap x;   // bytes [M, 2 K], box [kPrenormRows / 2, 128], swizzled
  CUtensorMap fn;  // bytes [N, 4 K], box [8 * tiles, 128], swizzled
  float* d;        // [M, N], or [splits, M, N]
  float* sqr_sum;  // [M], or [splits, M]
  // splits = 0 only: [2 * grid][min(M, kPrenormRows)][N + 1] partial sums, sqr_sum in the last
  // column
  float* workspace;
  int32_t m, n, row_tiles, k_blocks;
  int32_t splits;  // > 0: K in that many parts, each with an output of its own; 0: reduced here
  int32_t parts;   // splits = 0: warps that share the reduction of a row, 1 or 8
  bool scale;      // d *= rsqrt(sqr_sum * inverse_k + eps)
  float inverse_k, eps;
};

using PrenormKernel = void (*)(PrenormParams);

struct PrenormInstance {
  PrenormKernel kernel;
  int smem_bytes;
  int columns;  // rows of fn in shared memory
};

// The smallest compiled kernel with at least n columns (n <= 128).
PrenormInstance prenorm_instance(int n);

}  // namespace sm120
