// Which of the two targets this pass compiles for, and the limits both must keep.
#pragma once
#include <cstdint>

#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 1200 && __CUDA_ARCH__ < 1300
#if !defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#error "block-scaled MMA needs the family target: compile with code=sm_120f, not plain sm_120"
#endif
#define SM120_OPS_NATIVE 1
#elif __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SM120_OPS_NATIVE 0
#else
#error "sm120_ops kernels have two targets: sm_120f (native) and sm_90a (emulated MMA)"
#endif
#else
#define SM120_OPS_NATIVE 0
#endif

namespace sm120 {

// True where the tensor core multiplies block-scaled operands itself; false where the MMA is
// emulated through f16. Host code must not depend on it.
inline constexpr bool kNative = SM120_OPS_NATIVE;

// Shared memory one block may use on SM120 (99 KB); the emulated target obeys it too.
inline constexpr int kSmemLimit = 101376;

inline constexpr int kWarpSize = 32;

}  // namespace sm120
