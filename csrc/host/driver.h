// What the user can do about CUDA errors that come from the machine and not from the call.
#pragma once
#include <cuda_runtime_api.h>

namespace sm120 {

// The oldest driver branch for the CUDA runtime that is linked in. CUDA 12 also runs on older
// drivers of its major version, and 570 is the first that knows SM120.
#if CUDART_VERSION >= 13000
constexpr const char* kMinDriver = "580";
constexpr const char* kDriverCure =
    "; needed: NVIDIA driver 580 or newer; run: update the driver (nvidia-smi shows its version), "
    "or install the +cu129 build of this wheel, which runs on older ones";
#else
constexpr const char* kMinDriver = "570";
constexpr const char* kDriverCure =
    "; needed: NVIDIA driver 570 or newer; run: update the driver (nvidia-smi shows its version)";
#endif

// Ends an error message; empty where the machine is not to blame.
inline const char* cure(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return kDriverCure;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
      return "; needed: a GPU of compute capability 12.x or 9.0, and a wheel with code for it; "
             "run: python -m sm120_ops info";
    default:
      return "";
  }
}

}  // namespace sm120
