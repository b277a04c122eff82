// Top-k of rows of logits by radix selection, one block a row.
//
// Logits become unsigned keys of the same order. Histograms of the keys' top 12 bits, then of 10
// and 10 more among those that share the k-th key's bits, give the k-th key exactly; a last pass
// writes the columns of all greater keys, and of equal ones as many as are missing, in column
// order. When the keys that share the first 12 bits fit shared memory, they are gathered there
// first, so that a row is read three times. Of a long row a sample tells about where the k-th key
// is; if the keys from there on are k or more and fit shared memory, the histograms need only them,
// and the row is read twice. Nothing depends on the order in which threads run.
#include <cuda_bf16.h>

#include "device/barrier.cuh"
#include "device/convert.cuh"
#include "device/warp.cuh"
#include "kernels/indexer.h"

namespace sm120 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarpSize;
constexpr int kBins = 4096;
constexpr int kGathered = 6144;  // keys that fit shared memory
constexpr int kValues = 4;       // consecutive columns a thread loads
constexpr int kChunk = kValues * kThreads;
constexpr int kSample = 16;  // of a long row's chunks, every 16th is looked at first

struct Shared {
  uint32_t bins[kBins];
  uint32_t gathered[kGathered];
  uint32_t count;
  uint32_t warp_sums[2][kWarps];
  uint32_t bin, above, inside;  // a search's result
};
static_assert(sizeof(Shared) <= 48 * 1024, "static shared memory");

// Larger logits have larger keys; NaN has the largest, -0 that of +0. No logit has a key of 0.
__device__ __forceinline__ uint32_t key_of(float logit) {
  const uint32_t bits = bits_of(logit + 0.f);
  if ((bits & 0x7fffffff) > kInfBits) return 0xffffffff;
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

template <typename T>
struct Row {
  const T* logits;
  int start, end;
  bool aligned;  // vectors of kValues may be loaded

  __device__ __forceinline__ int first() const { return start / kValues * kValues; }
  // Keys of the columns column .. column + 3; 0 outside the window, which is not read.
  __device__ __forceinline__ void load(uint32_t (&key)[kValues], int column) const {
    if (aligned && column >= start && column + kValues <= end) {
      if constexpr (sizeof(T) == 4) {
        const float4 v = *reinterpret_cast<const float4*>(logits + column);
        key[0] = key_of(v.x), key[1] = key_of(v.y), key[2] = key_of(v.z), key[3] = key_of(v.w);
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(logits + column);
        key[0] = key_of(float_of(v.x << 16)), key[1] = key_of(float_of(v.x & 0xffff0000));
        key[2] = key_of(float_of(v.y << 16)), key[3] = key_of(float_of(v.y & 0xffff0000));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int c = column + i;
      key[i] = c >= start && c < end ? key_of(static_cast<float>(logits[c])) : 0;
    }
  }
  // f(key) for all keys of the window, in no order; or for those of every kStep-th chunk.
  template <int kStep = 1, typename F>
  __device__ __forceinline__ void each(F&& f) const {
    constexpr int kStride = kStep * kChunk;
#pragma unroll(kStep == 1 ? 4 : 1)
    for (int64_t column = first() + kValues * threadIdx.x; column < end; column += kStride) {
      uint32_t key[kValues];
      load(key, static_cast<int>(column));
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (key[i] != 0) f(key[i]);
      }
    }
  }
};

// Exclusive prefix of each thread's value over the block, and the total. Sums stay below 2^16 in
// each half. `turn` alternates from call to call, so that one barrier is enough.
__device__ __forceinline__ uint32_t block_prefix(Shared& s, uint32_t value, int turn,
                                                 uint32_t& total) {
  const int lane = lane_id(), warp = threadIdx.x / kWarpSize;
  uint32_t upto = value;
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const uint32_t below = from_lane_below(upto, d);
    if (lane >= d) upto += below;
  }
  if (lane == kWarpSize - 1) s.warp_sums[turn][warp] = upto;
  __syncthreads();
  uint32_t sums = s.warp_sums[turn][lane];
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const uint32_t below = from_lane_below(sums, d);
    if (lane >= d) sums += below;
  }
  total = from_lane(sums, kWarpSize - 1);
  const uint32_t before = from_lane(sums, max(warp - 1, 0));
  return upto - value + (warp > 0 ? before : 0);
}

// The bin, from the top, in which the `wanted`-th key lies. Counts may exceed 16 bits here.
__device__ __forceinline__ void search_bins(Shared& s, int bins, uint32_t wanted) {
  const int each = bins / kThreads, top = bins - 1 - each * static_cast<int>(threadIdx.x);
  uint32_t own = 0, total;
  for (int i = 0; i < each; ++i) own += s.bins[top - i];
  uint32_t before = block_prefix(s, own, 0, total);
  if (before < wanted && wanted <= before + own) {
    int bin = top;
    while (before + s.bins[bin] < wanted) before += s.bins[bin--];
    s.bin = bin, s.above = before, s.inside = s.bins[bin];
  }
  __syncthreads();
}

__device__ __forceinline__ void clear_bins(Shared& s, int bins) {
  for (int i = threadIdx.x; i < bins; i += kThreads) s.bins[i] = 0;
  __syncthreads();
}

struct Threshold {
  uint32_t key;   // greater keys are chosen
  uint32_t ties;  // and so many equal ones, by lower column
};

__device__ __forceinline__ void append(Shared& s, uint32_t key) {
  const uint32_t place = atomicAdd(&s.count, 1);
  if (place < kGathered) s.gathered[place] = key;
}

// Gathers a long row's greatest keys, by a guess from a sample of where they begin. Gives how many,
// at least k; 0 where the guess was bad.
template <typename T>
__device__ __forceinline__ uint32_t gather_greatest(Shared& s, const Row<T>& row, uint32_t k) {
  if (row.end - row.start < kSample * kChunk) return 0;
  if (threadIdx.x == 0) s.count = 0;
  clear_bins(s, kBins);
  row.template each<kSample>([&](uint32_t key) { atomicAdd(&s.bins[key >> 20], 1); });
  __syncthreads();
  search_bins(s, kBins, k / kSample + k / 64 + 32);
  const uint32_t from = s.bin << 20;
  row.each([&](uint32_t key) {
    if (key >= from) append(s, key);
  });
  __syncthreads();
  return s.count >= k && s.count <= kGathered ? s.count : 0;
}

template <typename T>
__device__ __forceinline__ Threshold find_threshold(Shared& s, const Row<T>& row, uint32_t k) {
  if (static_cast<uint32_t>(row.end - row.start) <= k) return {0, 0};
  uint32_t gathered = gather_greatest(s, row, k);
  // f(key) for all keys that may be the k-th
  const auto each = [&](auto&& f) {
    if (gathered == 0) return row.each(f);
    for (uint32_t i = threadIdx.x; i < gathered; i += kThreads) f(s.gathered[i]);
  };
  clear_bins(s, kBins);
  each([&](uint32_t key) { atomicAdd(&s.bins[key >> 20], 1); });
  __syncthreads();
  search_bins(s, kBins, k);
  uint32_t prefix = s.bin, wanted = k - s.above;
  if (s.inside == wanted) return {(prefix << 20) - 1, 0};
  if (gathered == 0 && s.inside <= kGathered) {
    const uint32_t inside = s.inside;
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    row.each([&](uint32_t key) {
      if (key >> 20 == prefix) append(s, key);
    });
    gathered = inside;
  }
  for (int shift = 10; shift >= 0; shift -= 10) {
    clear_bins(s, 1024);
    const auto count = [&](uint32_t key) {
      if (key >> (shift + 10) == prefix) atomicAdd(&s.bins[key >> shift & 1023], 1);
    };
    each(count);
    __syncthreads();
    search_bins(s, 1024, wanted);
    prefix = prefix << 10 | s.bin;
    wanted -= s.above;
    if (shift > 0 && s.inside == wanted) return {(prefix << shift) - 1, 0};
  }
  return {prefix, wanted};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) indexer_topk(TopkArgs args) {
  __shared__ Shared s;
  const int64_t index = blockIdx.x;
  Row<T> row;
  row.logits = static_cast<const T*>(args.logits) + index * args.stride;
  row.start = args.starts ? max(args.starts[index], 0) : 0;
  row.end = max(min(args.ends[index], args.columns), row.start);
  row.aligned = reinterpret_cast<uintptr_t>(row.logits) % (kValues * sizeof(T)) == 0;
  int32_t* out = args.out + index * args.k;
  const int found = min(args.k, row.end - row.start);
  const Threshold threshold = find_threshold(s, row, args.k);
  const int32_t* table =
      args.block_table ? args.block_table + index / args.rows_a_table * args.table_stride : nullptr;
  const auto write = [&](uint32_t place, int column) {
    int value = args.relative ? column - row.start : column;
    if (table != nullptr) {
      const int page = value / args.block_kv;
      const int block = page < args.table_width ? table[page] : -1;
      value = block < 0 ? -1 : block * args.block_kv + value % args.block_kv;
    }
    out[place] = value;
  };

  uint32_t greater = 0, equal = 0;  // in the chunks before, of the low and the high half
  int turn = 0;
  for (int chunk = row.first(); chunk < row.end; chunk += kChunk) {
    const int column = chunk + kValues * static_cast<int>(threadIdx.x);
    uint32_t key[kValues] = {}, own = 0, total;
    if (column < row.end) row.load(key, column);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      own += (key[i] > threshold.key) + (key[i] == threshold.key && key[i] != 0) * 0x10000u;
    }
    turn ^= 1;
    const uint32_t before = block_prefix(s, own, turn, total);
    uint32_t g = greater + (before & 0xffff), e = equal + (before >> 16);
    if (own != 0) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const bool tie = key[i] == threshold.key && key[i] != 0;
        if (key[i] > threshold.key || (tie && e < threshold.ties)) {
          write(g + min(e, threshold.ties), column + i);
        }
        g += key[i] > threshold.key;
        e += tie;
      }
    }
    greater += total & 0xffff, equal += total >> 16;
    if (greater + min(equal, threshold.ties) >= static_cast<uint32_t>(found)) break;
  }
  for (int i = found + static_cast<int>(threadIdx.x); i < args.k; i += kThreads) out[i] = -1;
}

}  // namespace

void launch_indexer_topk(const TopkArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  if (args.bf16) {
    indexer_topk<__nv_bfloat16><<<args.rows, kThreads, 0, stream>>>(args);
  } else {
    indexer_topk<float><<<args.rows, kThreads, 0, stream>>>(args);
  }
}

}  // namespace sm120
