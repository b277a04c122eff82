// The workspace of a split product (kernels/split_k.cuh).
#pragma once
#include <cstdint>

#include "kernels/gemm.h"

namespace sm120 {

// Bytes for the sums that CTAs hand over, tiles of tile_bytes, and for their flags.
int64_t split_bytes(int grid, int64_t tile_bytes);

// What handing over costs a split of `tiles` tiles, for the cost models.
double hand_over_us(int grid, int64_t tiles, double tile_bytes);

// Cuts `blocks` K-blocks, of all tiles, into a range for each CTA and gives the launch its
// workspace, which may hold anything, with a token of its own.
void set_split(GemmParams& p, int64_t blocks, int grid, void* workspace, int64_t tile_bytes);

}  // namespace sm120
