#include "host/launch.h"

#include <array>
#include <atomic>
#include <cstdint>

namespace sm120 {

cudaError_t allow_smem(const void* kernel, int smem_bytes) {
  // Kernels that have it, by address and device: a set with linear probing that only grows. A full
  // or contended set costs time, not correctness.
  static std::array<std::atomic<uint64_t>, 4096> done{};
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t key = reinterpret_cast<uintptr_t>(kernel) << 8 | (device & 0xff);
  const size_t home = (key * 0x9e3779b97f4a7c15ull) >> 52;
  size_t slot = home;
  for (int probe = 0; probe < 16; ++probe, slot = (slot + 1) % done.size()) {
    const uint64_t found = done[slot].load(std::memory_order_acquire);
    if (found == key) return cudaSuccess;
    if (found == 0) break;
  }
  const cudaError_t set =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (set == cudaSuccess) {
    uint64_t empty = 0;
    done[slot].compare_exchange_strong(empty, key, std::memory_order_release);
  }
  return set;
}

cudaLaunchAttribute launch_attribute(bool cooperative) {
  cudaLaunchAttribute attribute{};
  if (cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return attribute;
}

}  // namespace sm120
