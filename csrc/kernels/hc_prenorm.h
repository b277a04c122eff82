// The hyper-connection prenorm as the host sees it: d[m, n] = sum_k x[m, k] * fn[n, k] and
// sqr_sum[m] = sum_k x[m, k]^2, in one pass over x.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sm120 {

inline constexpr int kPrenormRows = 256;      // rows of x a tile covers
inline constexpr int kPrenormGroupRows = 32;  // rows of a tile that one warp has
inline constexpr int kPrenormBlockK = 64;     // K of the main loop's unit
inline constexpr int kPrenormCopyWarps = 4, kPrenormMathWarps = 8;
inline constexpr int kPrenormThreads = 32 * (kPrenormCopyWarps + kPrenormMathWarps);
inline constexpr int kPrenormMathThreads = 32 * kPrenormMathWarps;

// 16-byte vectors of a row of partial sums: an instance's columns in the order of fragments, then
// sqr_sum, four times.
inline constexpr int prenorm_row_vectors(int columns) {
  return columns / 4 + 1;
}

struct PrenormParams {
  CUtensorMap x;      // bytes [M, 2 K], box [kPrenormRows / 2, 128], swizzled
  CUtensorMap fn;     // bytes [N, 4 K], box [8 * tiles, 128], swizzled
  float* d;           // [M, N], or [splits, M, N]
  float* sqr_sum;     // [M], or [splits, M]
  float4* workspace;  // reduced: partial sums, [splits, M, prenorm_row_vectors]
  uint64_t* flags;    // reduced: [splits, M], `token` where a group begins whose sums are there
  uint64_t token;
  int32_t m, n, row_tiles, k_blocks;
  int32_t halves;  // of a tile that have rows: 1 if M <= kPrenormRows / 2, and 2
  int32_t splits;  // parts of K
  int32_t split_blocks, longer_splits;  // K-blocks of each, and how many of them have one more
  bool reduced;                         // the splits are summed here; if not, each is an output
  // reduced: rows of a group (a power of two up to kPrenormGroupRows), and threads that share a
  // vector of it
  int32_t group_rows, sharing;
  bool scale;  // d *= rsqrt(sqr_sum * inverse_k + eps)
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
