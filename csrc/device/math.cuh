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

// A float32 sum that keeps what rounding takes from it. Plain sums of thousands of squares of bf16
// come out too small: such squares end in the same bits, and rounding to even then always goes
// down.
class LongSum {
 public:
  __device__ __forceinline__ void add(float v) {
    const float sum = sum_ + v;
    lost_ += v - (sum - sum_);
    sum_ = sum;
  }
  // Without an infinite sum's Inf - Inf.
  __device__ __forceinline__ float value() const { return isinf(sum_) ? sum_ : sum_ + lost_; }

 private:
  float sum_ = 0, lost_ = 0;
};

}  // namespace sm120
