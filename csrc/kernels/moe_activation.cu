// Bias, SwiGLU and requantisation of the gate_up product, rows outside the groups left out.
//
// A block has a tile of 16 rows and up to four segments of the output's columns. As groups start at
// multiples of 16, a tile lies in one group at most; the block finds it by counting the groups that
// end at or before the tile, and leaves at once if the tile has no row of a group. Its warps share
// the segments of the rows that there are, so that one row alone (a decode batch) keeps half of
// them busy, and a whole tile all.
#include "device/math.cuh"
#include "kernels/moe_common.cuh"

namespace sm120 {
namespace {

constexpr int kTileRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlockSegments = 4;

// The group of the tile that starts at `row`, and how many rows of it lie in the tile. Ends that
// are no group ends give some other rows of the matrix, never rows outside of it.
struct Tile {
  int32_t group;
  int32_t rows;

  __device__ __forceinline__ Tile(const MoeGroups& groups, int64_t row, int64_t num_rows) {
    group = 0;
    for (int32_t first = 0; first < groups.count; first += kThreads) {
      const int32_t g = first + threadIdx.x;
      group += count_in_block(g < groups.count && groups.ends[g] <= row);
    }
    rows = 0;
    if (group == groups.count) return;
    const int64_t before = group == 0 ? 0 : groups.ends[group - 1];
    const int64_t start = (before + groups.alignment - 1) / groups.alignment * groups.alignment;
    const int64_t end = min(static_cast<int64_t>(groups.ends[group]), num_rows);
    if (row >= start) {
      rows = static_cast<int32_t>(min(end - row, static_cast<int64_t>(kTileRows)));
    }
  }
};

// Where the lane's eight gates and eight ups are: two chunks of a row of 2 * cols elements.
struct Columns {
  uint32_t col;  // of the output
  int64_t first, second;
  bool interleaved;

  __device__ __forceinline__ Columns(uint32_t col, uint32_t cols, bool interleaved)
      : col(col),
        first(interleaved ? 2ll * col : col),
        second(interleaved ? 2ll * col + 8 : static_cast<int64_t>(cols) + col),
        interleaved(interleaved) {}

  // The two chunks -> gates and ups, in place.
  __device__ __forceinline__ void sort(float (&a)[8], float (&b)[8]) const {
    if (!interleaved) return;
    float gate[8], up[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      gate[j] = a[2 * j], up[j] = a[2 * j + 1];
      gate[j + 4] = b[2 * j], up[j + 4] = b[2 * j + 1];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) a[j] = gate[j], b[j] = up[j];
  }
};

__device__ __forceinline__ float swiglu(const MoeActivationArgs& args, float gate, float up) {
  // Comparisons and not min and max, which would drop a NaN.
  gate = gate > args.limit ? args.limit : gate;
  up = up > args.limit ? args.limit : up < -args.limit ? -args.limit : up;
  return gate * sigmoid(args.alpha * gate) * (up + args.up_offset);
}

// Blocks beside each other in a tile of rows.
__host__ __device__ constexpr uint32_t column_parts(uint32_t cols) {
  return (cols + kBlockSegments * kSegment - 1) / (kBlockSegments * kSegment);
}

template <typename T, bool kFp4>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 4)
    moe_activation_kernel(const MoeActivationArgs args, const ScaleRule rule) {
  pdl_wait();
  pdl_launch_dependents();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t cols = args.out.cols, parts = column_parts(cols);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / parts) * kTileRows;
  const uint32_t first_col = blockIdx.x % parts * (kBlockSegments * kSegment);
  const Tile tile(args.groups, first_row, args.rows);
  if (tile.rows <= 0) return;

  const uint32_t segments =
      min((cols - first_col + kSegment - 1) / kSegment, static_cast<uint32_t>(kBlockSegments));
  const uint32_t items = tile.rows * segments;  // a row's segment each
  const auto columns_of = [&](uint32_t item) {
    return Columns(first_col + item % segments * kSegment + 8 * lane, cols, args.interleaved);
  };
  // A warp's next item is on its way while it works on one.
  Words<T> ahead_a = {}, ahead_b = {};
  const auto load_ahead = [&](uint32_t item) {
    const Columns at = columns_of(item);
    if (item >= items || at.col >= cols) return;
    const T* row = static_cast<const T*>(args.gate_up) + (first_row + item / segments) * 2 * cols;
    load_chunk(row + at.first, ahead_a);
    load_chunk(row + at.second, ahead_b);
  };
  load_ahead(warp);
  for (uint32_t item = warp; item < items; item += kWarps) {
    const Columns at = columns_of(item);
    const bool exists = at.col < cols;
    float gate[8], up[8];
    chunk_to_float<T>(ahead_a, gate);
    chunk_to_float<T>(ahead_b, up);
    load_ahead(item + kWarps);
    if (args.bias != nullptr && exists) {
      const int64_t bias = static_cast<int64_t>(tile.group) * 2 * cols;
      add_floats(args.bias, bias + at.first, args.bias_fp32, gate);
      add_floats(args.bias, bias + at.second, args.bias_fp32, up);
    }
    at.sort(gate, up);
    uint32_t amax = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      gate[j] = exists ? swiglu(args, gate[j], up[j]) : 0;
      amax = max(amax, bits_of(gate[j]) & 0x7fffffff);
    }
    const auto segment =
        Segment<kFp4>::template quantize<true>(args.out, rule, at.col - 8 * lane, gate, amax);
    const int64_t row = first_row + item / segments;
    segment.store_data(args.out, row);
    if (lane % 16 == 0) segment.store_scale(args.out, row);
  }
}

template <typename T>
cudaError_t launch_as(const MoeActivationArgs& args, cudaStream_t stream) {
  const auto kernel =
      args.out.fp4 ? &moe_activation_kernel<T, true> : &moe_activation_kernel<T, false>;
  const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
  return launch_dependent(kernel, tiles * column_parts(args.out.cols), kThreads, stream, args,
                          scale_rule(args.out.fp4, false));
}

}  // namespace

cudaError_t launch_moe_activation(const MoeActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.out.cols == 0) return cudaSuccess;
  return args.fp32 ? launch_as<float>(args, stream) : launch_as<__nv_bfloat16>(args, stream);
}

}  // namespace sm120
