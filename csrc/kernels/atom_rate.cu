#include "kernels/atom_rate.h"

#include "device/atom.cuh"

namespace sm120 {
namespace {

constexpr int kThreads = 256;

// Operands that change every step: loops over unchanging ones are merged by the compiler. FP4 is
// converted with shifts and masks, so each of its nibbles must change: what becomes of bits that
// stay is moved out of the loop.
template <Format kFormat, int kRegs>
__device__ __forceinline__ void refresh(uint32_t (&r)[kRegs], uint32_t salt) {
#pragma unroll
  for (int x = 0; x < kRegs; ++x) r[x] ^= kFormat == Format::kFp4 ? salt * 0x11111111u : salt;
}

template <Format kA, Format kB, int MT, int NT, bool kPerBlock>
__global__ void __launch_bounds__(kThreads, 1) scaled_rate(int iterations, float* sink) {
  using Mma = WarpMma<kA, kB, MT, NT, kGemmStepK<kA, kB>>;
  // not exact: with scales that never change, the exact order's products would leave the loop
  using Scaling = ScalingMode<kPerBlock, false>;
  __shared__ uint32_t scales[2][256];
  scales[0][threadIdx.x] = 0x7e7f7f7e + (threadIdx.x & 1);
  scales[1][threadIdx.x] = 0x7f7e7e7f - (threadIdx.x & 1);
  __syncthreads();
  const uint32_t sfa = smem_address(scales[0]), sfb = smem_address(scales[1]);

  typename Mma::RawA a[MT];
  typename Mma::RawB b[NT];
  for (auto& fragment : a) {
    for (uint32_t& r : fragment) r = (threadIdx.x * 2654435761u) & 0x33333333u;
  }
  for (auto& fragment : b) {
    for (uint32_t& r : fragment) r = (threadIdx.x * 2246822519u) & 0x33333333u;
  }
  float acc[MT][NT][4] = {};
  Mma mma(0, 0);
  mma.template load_scales<ScaleRead::kAny>(sfa, sfb, 0x3210, 0x3210);
  mma.template set_scales<Scaling>(0);
  for (int it = 0; it < iterations; ++it) {
    static_for<kBlockK / Mma::kStepK>([&](auto step) {
#pragma unroll
      for (int j = 0; j < NT; ++j) refresh<kB>(b[j], (it & 1) + step + 1);
      mma.template set_b<0>(b);
#pragma unroll
      for (int i = 0; i < MT; ++i) refresh<kA>(a[i], (it & 1) + step + 1);
      typename Mma::FragA fragment[2];
      Mma::convert(fragment[0], a[0]);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        if (i + 1 < MT) Mma::convert(fragment[(i + 1) % 2], a[(i + 1) % MT]);
        mma.template multiply<step, Scaling>(i, acc[i], fragment[i % 2]);
      }
    });
    mma.template finish_block<Scaling>(acc);
  }
  float sum = 0;
  for (int i = 0; i < MT; ++i) {
    for (int j = 0; j < NT; ++j) {
      for (int x = 0; x < 4; ++x) sum += acc[i][j][x];
    }
  }
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads, 1) bf16_rate(int iterations, float* sink) {
  constexpr int MT = 2, NT = 8, kSteps = kBlockK / 16;
  uint32_t a[MT][4], b[NT][2];
  for (auto& fragment : a) {
    for (uint32_t& r : fragment) r = 0x3f803f80u + (threadIdx.x & 7);
  }
  for (auto& fragment : b) {
    for (uint32_t& r : fragment) r = 0x3f813f81u + (threadIdx.x & 3);
  }
  float acc[MT][NT][4] = {};
  for (int it = 0; it < iterations; ++it) {
    static_for<kSteps>([&](auto step) {
#pragma unroll
      for (int j = 0; j < NT; ++j) refresh<Format::kFp8>(b[j], (it & 1) + step + 1);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        refresh<Format::kFp8>(a[i], (it & 1) + step + 1);
#pragma unroll
        for (int j = 0; j < NT; ++j) mma_bf16(acc[i][j], a[i], b[j]);
      }
    });
  }
  float sum = 0;
  for (int i = 0; i < MT; ++i) {
    for (int j = 0; j < NT; ++j) {
      for (int x = 0; x < 4; ++x) sum += acc[i][j][x];
    }
  }
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
}

}  // namespace

int64_t launch_atom_rate(RateAtom atom, int iterations, int num_sms, float* sink,
                         cudaStream_t stream, cudaError_t* error) {
  constexpr Format k8 = Format::kFp8, k4 = Format::kFp4;
  switch (atom) {
    case RateAtom::kMxfp8Gran128:
      scaled_rate<k8, k8, 2, 8, true><<<num_sms, kThreads, 0, stream>>>(iterations, sink);
      break;
    case RateAtom::kMxfp8Gran32:
      scaled_rate<k8, k8, 4, 4, false><<<num_sms, kThreads, 0, stream>>>(iterations, sink);
      break;
    case RateAtom::kMxfp4:
      scaled_rate<k4, k4, 2, 8, false><<<num_sms, kThreads, 0, stream>>>(iterations, sink);
      break;
    case RateAtom::kMxfp4Mxfp8:
      scaled_rate<k4, k8, 2, 8, false><<<num_sms, kThreads, 0, stream>>>(iterations, sink);
      break;
    case RateAtom::kBf16:
      bf16_rate<<<num_sms, kThreads, 0, stream>>>(iterations, sink);
      break;
  }
  *error = cudaGetLastError();
  if (*error != cudaSuccess) return 0;
  const int64_t block_flops = 8ll * (32 * 64) * kBlockK * 2;  // 8 warps, 32x64 each
  return block_flops * iterations * num_sms;
}

}  // namespace sm120
