// The weighted sum of a token's rows: float32, in the order of its slots, rounded once.
//
// A thread has eight columns of one token. It loads the rows of a few slots before it adds any.
#include "device/math.cuh"
#include "kernels/moe_common.cuh"

namespace sm120 {
namespace {

constexpr int kThreads = 128;
constexpr int kSlotsAhead = 4;

// Row of x and weight of slot i; the row is -1 for a slot that contributes nothing.
struct Slot {
  int64_t row;
  int32_t expert;
  float weight;

  __device__ __forceinline__ Slot(const MoeCombineArgs& args, int64_t i) {
    row = args.rows[i];
    expert = args.bias != nullptr ? load_expert(args.ids, args.ids64, args.experts, i) : 0;
    if (row < 0 || row >= args.x_rows || expert < 0) row = -1;
    weight = args.weights_fp32
                 ? static_cast<const float*>(args.weights)[i]
                 : __bfloat162float(static_cast<const __nv_bfloat16*>(args.weights)[i]);
  }
};

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) moe_combine_kernel(const MoeCombineArgs args) {
  pdl_wait();
  pdl_launch_dependents();
  const uint32_t parts = (args.cols / 8 + kThreads - 1) / kThreads;
  const int64_t token = blockIdx.x / parts;
  const uint32_t col = (blockIdx.x % parts * kThreads + threadIdx.x) * 8;
  if (col >= args.cols) return;

  float sum[8] = {};
  for (int32_t first = 0; first < args.topk; first += kSlotsAhead) {
    const int32_t count = min(kSlotsAhead, args.topk - first);
    int64_t rows[kSlotsAhead];
    float weights[kSlotsAhead];
    int32_t experts[kSlotsAhead];
    Words<T> values[kSlotsAhead];
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
      rows[i] = -1;
      if (i >= count) continue;
      const Slot slot(args, token * args.topk + first + i);
      rows[i] = slot.row, weights[i] = slot.weight, experts[i] = slot.expert;
    }
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
      if (rows[i] < 0) continue;
      load_chunk(static_cast<const T*>(args.x) + rows[i] * args.cols + col, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kSlotsAhead; ++i) {
      if (rows[i] < 0) continue;
      float f[8];
      chunk_to_float<T>(values[i], f);
      if (args.bias != nullptr) {
        add_floats(args.bias, static_cast<int64_t>(experts[i]) * args.cols + col, args.bias_fp32,
                   f);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum[j] = rounded_sum(sum[j], rounded_product(weights[i], f[j]));
      }
    }
  }
  Words<Out> result;
  chunk_from_float<Out>(sum, result);
  store_chunk(static_cast<Out*>(args.y) + token * args.cols + col, result);
}

template <typename T>
cudaError_t launch_as(const MoeCombineArgs& args, cudaStream_t stream) {
  const int64_t parts = (args.cols / 8 + kThreads - 1) / kThreads;
  const auto kernel = args.y_type == SourceType::kBf16   ? &moe_combine_kernel<T, __nv_bfloat16>
                      : args.y_type == SourceType::kFp16 ? &moe_combine_kernel<T, __half>
                                                         : &moe_combine_kernel<T, float>;
  return launch_dependent(kernel, args.tokens * parts, kThreads, stream, args);
}

}  // namespace

cudaError_t launch_moe_combine(const MoeCombineArgs& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.cols == 0) return cudaSuccess;
  return args.x_fp32 ? launch_as<float>(args, stream) : launch_as<__nv_bfloat16>(args, stream);
}

}  // namespace sm120
