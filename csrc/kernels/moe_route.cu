// Routing: which row each (token, slot) gets, and the quantised token in all of its rows.
//
// One ordinary launch and no memory between the blocks. A block has a contiguous range of tokens.
// It counts the slots of ALL tokens for each expert, those before its range apart: that is a few KB
// to read for a decode batch, and costs less than a grid barrier. From the counts follow the
// groups, and the first row that is left for the block's own slots in each; one warp then ranks
// those in order of (token, slot). So the rows are the same whatever the grid. At last every warp
// quantises a segment of a token and writes it to the rows of all its slots.
#include "kernels/moe_common.cuh"

namespace sm120 {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBatchSlots = 512;  // ranked at a time
static_assert(kThreads >= kMoeMaxExperts, "one thread an expert");
static_assert(kBatchSlots % kWarpSize == 0 && kBatchSlots >= kMoeMaxTopk);

struct Shared {
  uint32_t before[kMoeMaxExperts];  // slots of the tokens before the block's; then the next row
  uint32_t from[kMoeMaxExperts];    // slots of the others
  uint32_t warp_sums[kWarps];
  int32_t rows[kBatchSlots];  // of a batch's slots
};
static_assert(sizeof(Shared) <= kSmemLimit);

__device__ __forceinline__ void count_slots(const MoeRouteArgs& args, int64_t own_slots,
                                            Shared& s) {
  const int64_t slots = static_cast<int64_t>(args.tokens) * args.topk;
  const int thread = threadIdx.x;
  s.before[thread] = 0;
  s.from[thread] = 0;
  __syncthreads();
#pragma unroll 8
  for (int64_t i = thread; i < slots; i += kThreads) {
    const int32_t expert = load_expert(args.ids, args.ids64, args.experts, i);
    if (expert >= 0) count_up((i < own_slots ? s.before : s.from) + expert);
  }
  __syncthreads();
}

// Thread e places expert e's group, and leaves in before[e] the row of the block's first slot.
__device__ __forceinline__ void place_groups(const MoeRouteArgs& args, Shared& s) {
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const uint32_t count = s.before[thread] + s.from[thread];
  const uint32_t aligned = (count + args.alignment - 1) / args.alignment * args.alignment;
  const uint32_t up_to = inclusive_sum(aligned);
  if (lane == kWarpSize - 1) s.warp_sums[warp] = up_to;
  __syncthreads();
  const uint32_t below = inclusive_sum(lane < warp ? s.warp_sums[lane] : 0);
  const uint32_t start = from_lane(below, kWarpSize - 1) + up_to - aligned;
  s.before[thread] += start;
  if (blockIdx.x == 0 && thread < args.experts) {
    args.group_ends[thread] = static_cast<int32_t>(start + count);
  }
  __syncthreads();
}

// One warp, in order of the slots: lanes with the same expert take consecutive rows.
__device__ __forceinline__ void rank_slots(const MoeRouteArgs& args, int64_t first_slot,
                                           int32_t slots, Shared& s) {
  const int lane = threadIdx.x % kWarpSize;
  for (int32_t i = lane; i - lane < slots; i += kWarpSize) {
    const int32_t expert =
        i < slots ? load_expert(args.ids, args.ids64, args.experts, first_slot + i) : -1;
    const uint32_t alike = lanes_alike(expert);
    const int rank = count_lanes(alike & ((1u << lane) - 1));
    int32_t row = -1;
    if (expert >= 0) row = static_cast<int32_t>(s.before[expert] + rank);
    __syncwarp();
    if (expert >= 0 && rank == 0) s.before[expert] += count_lanes(alike);
    __syncwarp();
    if (i < slots) {
      s.rows[i] = row;
      args.rows[first_slot + i] = row;
    }
  }
}

template <typename T, bool kFp4>
__global__ void __launch_bounds__(kThreads, 1)
    moe_route_kernel(const MoeRouteArgs args, const ScaleRule rule) {
  __shared__ Shared s;
  pdl_wait();
  pdl_launch_dependents();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto token_of = [&](int64_t block) {
    return static_cast<int32_t>(block * args.tokens / gridDim.x);
  };
  const int32_t first_token = token_of(blockIdx.x);
  const int32_t tokens = token_of(blockIdx.x + 1) - first_token;
  const uint32_t segments = (args.out.cols + kSegment - 1) / kSegment;
  const uint32_t items = tokens * segments;  // a token's segment each

  // A warp's next item is on its way while it works on one; the first, while the slots are counted.
  Words<T> ahead = {};
  const auto load_ahead = [&](uint32_t item) {
    const uint32_t col = item % segments * kSegment + 8 * lane;
#pragma unroll
    for (int j = 0; j < kChunkWords<T>; ++j) ahead[j] = 0;
    if (item < items && col < args.out.cols) {
      const int64_t token = first_token + item / segments;
      load_chunk(static_cast<const T*>(args.x) + token * args.out.cols + col, ahead);
    }
  };
  uint32_t item = warp;
  load_ahead(item);
  count_slots(args, static_cast<int64_t>(first_token) * args.topk, s);
  place_groups(args, s);

  const int32_t batch_tokens = kBatchSlots / args.topk;
  for (int32_t token = 0; token < tokens; token += batch_tokens) {
    const int32_t batch = min(batch_tokens, tokens - token);
    if (warp == 0) {
      rank_slots(args, static_cast<int64_t>(first_token + token) * args.topk, batch * args.topk, s);
    }
    __syncthreads();
    for (; item < (token + batch) * segments; item += kWarps) {
      const uint32_t amax = chunk_amax<T>(ahead);
      float f[8];
      chunk_to_float<T>(ahead, f);
      load_ahead(item + kWarps);
      const uint32_t col = item % segments * kSegment;
      const auto segment =
          Segment<kFp4>::template quantize<sizeof(T) == 4>(args.out, rule, col, f, amax);
      const int32_t* rows = s.rows + (item / segments - token) * args.topk;
      for (int slot = 0; slot < args.topk; ++slot) {
        if (rows[slot] >= 0) segment.store_data(args.out, rows[slot]);
      }
      for (int slot = lane % 16; slot < args.topk; slot += 16) {
        if (rows[slot] >= 0) segment.store_scale(args.out, rows[slot]);
      }
    }
    __syncthreads();  // the batch's rows have been read
  }
}

template <typename T>
cudaError_t launch_as(const MoeRouteArgs& args, int blocks, cudaStream_t stream) {
  const auto kernel = args.out.fp4 ? &moe_route_kernel<T, true> : &moe_route_kernel<T, false>;
  return launch_dependent(kernel, blocks, kThreads, stream, args, scale_rule(args.out.fp4, false));
}

}  // namespace

cudaError_t launch_moe_route(const MoeRouteArgs& args, int num_sms, cudaStream_t stream) {
  const int blocks = std::clamp(args.tokens, 1, num_sms);
  switch (args.type) {
    case SourceType::kBf16:
      return launch_as<__nv_bfloat16>(args, blocks, stream);
    case SourceType::kFp16:
      return launch_as<__half>(args, blocks, stream);
    case SourceType::kFp32:
      return launch_as<float>(args, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace sm120
