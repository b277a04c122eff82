// The scales of an FP4 row as bf16 factors of its fragments, for the emulated MMA of MQA logits.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace sm120 {

// A row's scales for its bf16 fragments, which hold 2^-126 of the values (MqaMma::expand()): those
// of a 32-block b > 0 are multiplied by 2^(scale b - scale 0 + 17).
template <int kBlocks>
struct RowScale {
  static constexpr uint32_t kEach = 0x01010101, kSame = 144;  // bf16's exponent of 2^17
  static constexpr uint32_t kNone = kSame * kEach;            // all scales alike
  uint32_t first;                                             // byte of block 0
  uint32_t multipliers;  // their exponents; that of block 0 stands for nothing
  bool regular;          // bf16 has the multipliers, and all products are exact

  __device__ __forceinline__ explicit RowScale(uint32_t word) : first(word & 0xff) {
    // Each must be in 128 .. 159. Carries come only from bytes that are not, and within the bounds
    // of `first` none of those looks as if it were.
    multipliers = word + (kSame - first) * kEach;
    constexpr uint32_t kMask = kBlocks < 4 ? (1u << 8 * kBlocks % 32) - 1 : 0xffffffff;
    regular = ((multipliers ^ 0x80808080) & kMask & 0xe0e0e0e0) == 0 && first - 64 < 128;
  }
  __device__ __forceinline__ uint32_t used() const { return regular ? multipliers : kNone; }
  // Those of two blocks are made at a time, the halves of a register: a multiplication takes either
  // half for both of its own.
  static __device__ __forceinline__ uint32_t multiplier(uint32_t multipliers, int block) {
    const uint32_t two = (block % 2 ? multipliers >> 1 : multipliers << 7) & 0x7f807f80;
    __nv_bfloat162 h = *reinterpret_cast<const __nv_bfloat162*>(&two);
    h = block / 2 ? __high2bfloat162(h) : __low2bfloat162(h);
    return *reinterpret_cast<const uint32_t*>(&h);
  }
  // What the fragments lack (2^12 in their product), but for what rest() tells.
  __device__ __forceinline__ float factor() const {
    return __uint_as_float((regular ? first + 6 : 127 + 6) << 23);
  }
  // The scales that are left to be applied, block by block: none but those of an irregular row.
  __device__ __forceinline__ uint32_t rest(uint32_t word) const {
    return regular ? 0x7f7f7f7f : word;
  }
};

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                         *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}

}  // namespace sm120
