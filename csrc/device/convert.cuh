// Conversions between float32, the MX element formats and UE8M0 scales.
//
// What runs on a CPU as well is __host__ __device__, so that it can be checked exhaustively there.
// Nothing here may be compiled with -ftz=true: scales reach 2^-127 and FP4 is rounded in
// subnormals.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device/arch.cuh"

namespace sm120 {

__host__ __device__ inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

__host__ __device__ inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// ---- UE8M0 scales ------------------------------------------------------------------------------

inline constexpr uint32_t kScaleNan = 0xff;
inline constexpr uint32_t kInfBits = 0x7f800000;
inline constexpr uint32_t kNanBits = 0x7fc00000;

// How the amax of a group becomes its exponent byte. With max = (1 + mantissa) * 2^emax the largest
// element, ceil(log2(amax / max)) is the exponent of amax - emax, plus one where amax's mantissa is
// above max's: `round_bias` carries it over. The floor of OCP MX has no bias.
struct ScaleRule {
  uint32_t
      amax_floor;  // bits of the smallest amax, at least 2^(emax - 127): the byte is not below 0
  uint32_t round_bias;
  uint32_t emax;
};

// The rule of a format: OCP MX's, or else DeepGEMM's. The largest elements are 448 = 1.75 * 2^8
// (E4M3) and 6 = 1.5 * 2^2 (E2M1).
__host__ __device__ inline ScaleRule scale_rule(bool fp4, bool ocp) {
  const uint32_t emax = fp4 ? 2 : 8;
  if (ocp) return {emax << 23, 0, emax};
  return {bits_of(1e-4f), 0x007fffffu - (fp4 ? 0x00400000 : 0x00600000), emax};
}

// Takes the bits of a float32 >= 0, Inf or NaN.
__host__ __device__ inline uint32_t scale_byte(uint32_t amax, const ScaleRule& rule) {
  const uint32_t clamped = amax > rule.amax_floor ? amax : rule.amax_floor;
  const uint32_t byte = ((clamped + rule.round_bias) >> 23) - rule.emax;
  return amax < kInfBits ? byte : kScaleNan;
}

// 2^(127 - byte), exactly. No finite amax has a byte above 253, so the result is never subnormal.
__host__ __device__ inline float inverse_scale(uint32_t byte) {
  return float_of(byte == kScaleNan ? kNanBits : (254 - byte) << 23);
}

// 2^(byte - 127); 2^-127 is a subnormal.
__host__ __device__ inline float scale_value(uint32_t byte) {
  return float_of(byte == kScaleNan ? kNanBits : byte == 0 ? 0x00400000u : byte << 23);
}

// The byte of a float32 scale; 0xFF unless it is a power of two in 2^-127 .. 2^127.
__host__ __device__ inline uint32_t byte_of_scale(uint32_t scale_bits) {
  if (scale_bits == 0x00400000u) return 0;
  const uint32_t exponent = scale_bits >> 23;  // the sign bit makes it > 255
  return (scale_bits & 0x007fffff) == 0 && exponent >= 1 && exponent <= 254 ? exponent : kScaleNan;
}

// ---- Chunks: eight consecutive values of the source as loaded ----------------------------------

template <typename T>
inline constexpr int kChunkWords = 8 * sizeof(T) / 4;

// PTX ISA "Integer Arithmetic Instructions: max" (.u16x2 needs sm_90)
__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Bits of the largest |value| as float32. Integer order puts Inf and NaN above every finite value.
template <typename T>
__device__ __forceinline__ uint32_t chunk_amax(const uint32_t (&w)[kChunkWords<T>]) {
  if constexpr (sizeof(T) == 4) {
    uint32_t amax = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) amax = max(amax, w[j] & 0x7fffffff);
    return amax;
  } else {
    uint32_t pair = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) pair = max_u16x2(pair, w[j] & 0x7fff7fff);
    const uint32_t amax = max(pair & 0xffff, pair >> 16);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return amax << 16;
    return bits_of(__half2float(__ushort_as_half(static_cast<unsigned short>(amax))));
  }
}

template <typename T>
__device__ __forceinline__ void chunk_to_float(const uint32_t (&w)[kChunkWords<T>], float (&f)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if constexpr (std::is_same_v<T, float>) {
      f[j] = float_of(w[j]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      f[j] = float_of(j % 2 ? w[j / 2] & 0xffff0000 : w[j / 2] << 16);
    } else {
      f[j] = __half2float(__ushort_as_half(static_cast<unsigned short>(w[j / 2] >> 16 * (j % 2))));
    }
  }
}

// Rounds once, to nearest even.
template <typename T>
__device__ __forceinline__ void chunk_from_float(const float (&f)[8],
                                                 uint32_t (&w)[kChunkWords<T>]) {
#pragma unroll
  for (int j = 0; j < kChunkWords<T>; ++j) {
    if constexpr (std::is_same_v<T, float>) {
      w[j] = bits_of(f[j]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(f[2 * j], f[2 * j + 1]);
      memcpy(&w[j], &pair, sizeof(pair));
    } else {
      const __half2 pair = __floats2half2_rn(f[2 * j], f[2 * j + 1]);
      memcpy(&w[j], &pair, sizeof(pair));
    }
  }
}

// ---- E4M3 --------------------------------------------------------------------------------------

// Two values, the first in the low byte: nearest even, saturating at 448, NaN to 0x7F.
// PTX ISA "Data Movement and Conversion Instructions: cvt" (the first source is the high half)
__device__ __forceinline__ uint32_t e4m3x2(float low, float high) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}

// PTX ISA "cvt": e4m3x2 to f16x2 is exact.
__device__ __forceinline__ float2 floats_of_e4m3x2(uint32_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  __half2 h;
  memcpy(&h, &halves, sizeof(h));
  return __half22float2(h);
}

// Eight values times `inverse`, a power of two or NaN, as two words of E4M3. A product that is
// subnormal in float32 may be rounded, but rounds to zero in E4M3 either way.
__device__ __forceinline__ uint2 chunk_to_e4m3(const float (&f)[8], float inverse) {
  uint32_t pair[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) pair[j] = e4m3x2(f[2 * j] * inverse, f[2 * j + 1] * inverse);
  return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

// ---- E2M1 --------------------------------------------------------------------------------------

// Integer and float arithmetic on both targets: the cvt to e2m1x2 exists on sm_120f only, and
// rounds ties to even alone.

// Drops the low 12 mantissa bits of a float32, rounding to odd: 11 bits stay, which any later
// rounding to fewer than 10 cannot tell from the whole value. bfloat16 and float16 have no more.
__host__ __device__ inline float round_to_odd(float value) {
  const uint32_t bits = bits_of(value);
  return float_of((bits & 0xfffff000) | ((bits & 0x00000fff) ? 0x00001000 : 0));
}

// The 3-bit code of |value|, which has at most 12 significant bits. Times 2^-126, E2M1's normal and
// subnormal numbers fall on float32's: the code is the exponent and the first mantissa bit, to be
// rounded at bit 22. Saturates at 6.
//   ties_to_even 1: ties to the even code (OCP MX).
//   ties_to_even 0: ties to the lower magnitude (DeepGEMM).
__host__ __device__ inline uint32_t e2m1_magnitude(float value, uint32_t ties_to_even) {
  constexpr uint32_t kSix = 0x01c00000;
  const uint32_t bits = bits_of(fabsf(value) * float_of(0x00800000));
  const uint32_t u = bits < kSix ? bits : kSix;
  return (u + 0x001fffff + (u >> 22 & ties_to_even)) >> 22;
}

// Eight values times the inverse of their scale as a word of E2M1, the first in the low nibble. A
// zero keeps its sign with ties_to_even and loses it without. A NaN scale gives code 0.
template <bool kWide>  // the values are float32 with more than 12 significant bits
__device__ __forceinline__ uint32_t chunk_to_e2m1(const float (&f)[8], uint32_t byte,
                                                  uint32_t ties_to_even) {
  const float inverse = inverse_scale(byte);
  uint32_t word = 0, signs = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float value = kWide ? round_to_odd(f[j]) : f[j];
    word |= e2m1_magnitude(value * inverse, ties_to_even) << 4 * j;
    signs |= bits_of(value) >> 31 << (4 * j + 3);
  }
  const uint32_t not_zero = (word << 1 | word << 2 | word << 3) & 0x88888888;
  return byte == kScaleNan ? 0 : word | (ties_to_even ? signs : signs & not_zero);
}

__host__ __device__ inline float float_of_e2m1(uint32_t code) {
  // The code's three magnitude bits are the exponent and first mantissa bit of value * 2^-126.
  return float_of((code & 8) << 28 | (code & 7) << 22) * float_of(0x7e800000);
}

}  // namespace sm120
