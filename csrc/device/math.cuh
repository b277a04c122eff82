// Float32 arithmetic whose exact form matters.
#pragma once
#include "device/arch.cuh"

namespace sm120 {

// Product and sum with a rounding of their own, never fused: what a CPU computes, bit for bit.
__device__ __forceinline__ float rounded_product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ float rounded_sum(float a, float b) {
  return __fadd_rn(a, b);
}

// a / b to a relative error of about 2^-21; b in 2^-126 .. 2^126.
__device__ __forceinline__ float rough_quotient(float a, float b) {
  return __fdividef(a, b);
}

// 1 / (1 + exp(-x)) to a relative error of about 2^-21 + |x| 2^-23; 0 where exp overflows, NaN of
// NaN. PTX ISA "Floating Point Instructions: ex2", "rcp" (approx: 2^-22.5 and 1 ulp).
__device__ __forceinline__ float sigmoid(float x) {
  float power, result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

}  // namespace sm120
