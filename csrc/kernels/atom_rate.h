// Bare MMA loops: the rate an atom reaches on register operands, the ceiling a GEMM is held
// against.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sm120 {

enum class RateAtom { kMxfp8Gran128, kMxfp8Gran32, kMxfp4, kMxfp4Mxfp8, kBf16 };

// Runs `iterations` K-blocks of 128 on every SM with the warp tiles of the 128 x 128 GEMM: operands
// in registers and fresh each step, scales in registers and applied as often as in the GEMM. sink:
// [num_sms * 256] floats. Returns the floating-point operations of the launch, or 0 with *error
// set.
int64_t launch_atom_rate(RateAtom atom, int iterations, int num_sms, float* sink,
                         cudaStream_t stream, cudaError_t* error);

}  // namespace sm120
