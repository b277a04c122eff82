// The schedule of paged MQA logits, worked out once for several calls.
#include "kernels/mqa_schedule.cuh"

namespace sm120 {
namespace {

constexpr int kWarps = 16;  // measured: 8 are slower, 32 are not faster

template <bool kLengthACell>
__global__ void __launch_bounds__(kWarps* kWarpSize, 1)
    mqa_metadata(const __grid_constant__ MqaRows rows, int ctas, Cursor* cursors) {
  __shared__ int64_t sums[kWarps];
  find_cursors<kWarps, kLengthACell>(rows, ctas, 0, ctas, cursors, sums);
}

}  // namespace

cudaError_t launch_mqa_metadata(const MqaRows& rows, int ctas, int32_t* cursors,
                                cudaStream_t stream) {
  const auto kernel = has_length_a_cell(rows) ? mqa_metadata<true> : mqa_metadata<false>;
  kernel<<<1, kWarps * kWarpSize, 0, stream>>>(rows, ctas, reinterpret_cast<Cursor*>(cursors));
  return cudaGetLastError();
}

}  // namespace sm120
