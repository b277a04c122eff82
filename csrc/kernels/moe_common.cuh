// What the kernels of the MoE layer share: the expert of a slot, a warp that quantises a segment of
// a row, and the launch.
#pragma once
#include "device/chunk.cuh"
#include "device/convert.cuh"
#include "device/launch.cuh"
#include "device/warp.cuh"
#include "kernels/moe.h"

namespace sm120 {

// The expert of slot i, or -1 if its id is none of 0 .. experts - 1.
__device__ __forceinline__ int32_t load_expert(const void* ids, bool ids64, int32_t experts,
                                               int64_t i) {
  const int64_t id =
      ids64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
  return id >= 0 && id < experts ? static_cast<int32_t>(id) : -1;
}

// A segment is 256 columns of a row, eight consecutive ones a lane. A K-group is then a quad
// (gran_k 32) or a half warp (gran_k 128), and a half warp has one scale word (gran_k 32) or one
// byte of a word (gran_k 128).
constexpr int kSegment = 8 * kWarpSize;

template <bool kFp4>
class Segment {
 public:
  // f: the lane's eight values, zeros past the last column; amax: bits of their largest magnitude.
  // kWide: the values may have more than 12 significant bits. All lanes must take part.
  template <bool kWide>
  static __device__ __forceinline__ Segment quantize(const MoeQuantized& out, const ScaleRule& rule,
                                                     uint32_t first_col, const float (&f)[8],
                                                     uint32_t amax) {
    Segment s;
    const int lane = threadIdx.x % kWarpSize;
    s.col_ = first_col + 8 * lane;
    s.group_col_ = first_col + 128 * (lane / 16);
    amax = max_across(max_across(amax, 1), 2);
    if (out.gran_k == 128) amax = max_across(max_across(amax, 4), 8);
    const uint32_t byte = scale_byte(amax, rule);
    s.scale_ = byte;
    if (out.gran_k == 32) {
      const bool exists = s.col_ / 32 * 32 < out.cols;
      const uint32_t shifted = exists ? byte << 8 * (lane / 4 % 4) : 0;
      s.scale_ = or_across(or_across(shifted, 4), 8);
    }
    if constexpr (kFp4) {
      s.data_ = chunk_to_e2m1<kWide>(f, byte, 0);
    } else {
      s.data_ = chunk_to_e4m3(f, inverse_scale(byte));
    }
    return s;
  }

  __device__ __forceinline__ void store_data(const MoeQuantized& out, int64_t row) const {
    if (col_ < out.cols) {
      static_cast<Packed*>(out.data)[row * (out.cols / 8) + col_ / 8] = data_;
    }
  }

  // One lane of each half warp must call it for a row.
  __device__ __forceinline__ void store_scale(const MoeQuantized& out, int64_t row) const {
    if (group_col_ >= out.cols) return;
    if (out.gran_k == 32) {
      out.scale[group_col_ / 128 * out.scale_stride + row] = scale_;
      return;
    }
    const uint32_t group = group_col_ / 128;
    auto* bytes = reinterpret_cast<uint8_t*>(out.scale + group / 4 * out.scale_stride + row);
    bytes[group % 4] = scale_;
    if (group_col_ + 128 >= out.cols) {  // no other half warp has the bytes after the last group
      for (uint32_t i = group % 4 + 1; i < 4; ++i) bytes[i] = 0;
    }
  }

 private:
  using Packed = std::conditional_t<kFp4, uint32_t, uint2>;
  uint32_t col_, group_col_, scale_;  // scale_: a word, or with gran_k 128 a byte
  Packed data_;
};

// A launch that may be set up while the kernel before it finishes: the kernel calls pdl_wait().
template <typename Args, typename... Rest>
cudaError_t launch_dependent(void (*kernel)(Args, Rest...), int64_t blocks, int threads,
                             cudaStream_t stream, const Args& args, const Rest&... rest) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(threads);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kernel, args, rest...);
}

}  // namespace sm120
