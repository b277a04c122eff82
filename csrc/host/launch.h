// One way to launch a kernel.
#pragma once
#include <cuda_runtime.h>

namespace sm120 {

// Allows a kernel its dynamic shared memory on the current device; cheap after the first time.
cudaError_t allow_smem(const void* kernel, int smem_bytes);

// A cooperative launch may have CTAs that wait for one another: all run at once. Any other may be
// set up while the kernel before it finishes (pdl_wait() in the kernel waits for that one's end).
cudaLaunchAttribute launch_attribute(bool cooperative);

template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), int grid, int threads, int smem_bytes,
                          bool cooperative, cudaStream_t stream, const Params& params) {
  const cudaError_t error = allow_smem(reinterpret_cast<const void*>(kernel), smem_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = launch_attribute(cooperative);
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(grid);
  launch.blockDim = dim3(threads);
  launch.dynamicSmemBytes = smem_bytes;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kernel, params);
}

}  // namespace sm120
