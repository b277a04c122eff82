// Chunks (convert.cuh: eight consecutive values as they lie in memory) in and out of memory, as
// 16-byte accesses.
#pragma once
#include "device/convert.cuh"
#include "device/warp.cuh"

namespace sm120 {

template <typename T>
using Words = uint32_t[kChunkWords<T>];

// kReadonly: nothing may have written the source since the launch. That excludes a kernel launched
// before its predecessor has ended (launch.cuh: pdl_wait) from it.
enum class Load { kPlain, kReadonly };

template <typename T, Load kLoad = Load::kPlain>
__device__ __forceinline__ void load_chunk(const T* p, Words<T>& w) {
#pragma unroll
  for (int j = 0; j < kChunkWords<T>; j += 4) {
    const uint4* source = reinterpret_cast<const uint4*>(p) + j / 4;
    const uint4 v = kLoad == Load::kReadonly ? load_readonly(source) : *source;
    w[j] = v.x, w[j + 1] = v.y, w[j + 2] = v.z, w[j + 3] = v.w;
  }
}

template <typename T>
__device__ __forceinline__ void store_chunk(T* p, const Words<T>& w) {
#pragma unroll
  for (int j = 0; j < kChunkWords<T>; j += 4) {
    reinterpret_cast<uint4*>(p)[j / 4] = make_uint4(w[j], w[j + 1], w[j + 2], w[j + 3]);
  }
}

// Adds eight values of bfloat16 or float32, whichever the memory holds.
__device__ __forceinline__ void add_floats(const void* base, int64_t index, bool fp32,
                                           float (&sum)[8]) {
  float f[8];
  if (fp32) {
    Words<float> w;
    load_chunk(static_cast<const float*>(base) + index, w);
    chunk_to_float<float>(w, f);
  } else {
    Words<__nv_bfloat16> w;
    load_chunk(static_cast<const __nv_bfloat16*>(base) + index, w);
    chunk_to_float<__nv_bfloat16>(w, f);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] += f[j];
}

}  // namespace sm120
