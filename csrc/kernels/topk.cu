// Top-k of rows of logits by radix selection, one block a row, or a part of a long row.
//
// Logits become unsigned keys of the same order. A sample of a long row tells about where the k-th
// logit is; one reading of the row gathers all logits from there on, with their columns, in shared
// memory, and radix selection among them (histograms of 11, 11 and 10 bits) gives the k-th key. The
// chosen columns are put in order by a bitmap. Where the guess was bad (too few, or too many to
// fit), histograms over the row itself narrow the range until what lies above it fits; where ties
// alone do not, a last reading picks them. Nothing depends on the order in which threads run.
//
// The chosen logits of a row's parts, one part after the other, are in the order of their columns:
// a row like any other to the launch that merges them.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "device/barrier.cuh"
#include "device/convert.cuh"
#include "device/warp.cuh"
#include "kernels/indexer.h"

namespace sm120 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarpSize;
constexpr int kBins = 2048;
constexpr int kGathered = 4608;  // logits that fit shared memory
constexpr int kValues = 4;       // consecutive columns a thread loads
constexpr uint32_t kChunk = kValues * kThreads;
constexpr uint32_t kWindow = 32 * kThreads;  // columns of a bitmap
constexpr int kAlone = 131072;               // columns that one block chooses from soonest

struct Shared {
  uint32_t bins[kBins];  // also two bitmaps of kThreads words
  float gathered[kGathered];
  int columns[kGathered];
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
// The logit of a key; NaN where there is none.
__device__ __forceinline__ float logit_of(uint32_t key) {
  return float_of(key >> 31 ? key ^ 0x80000000 : ~key);
}

template <typename T>
struct Row {
  const T* logits;
  int start, end;
  bool aligned;  // vectors of kValues may be loaded

  __device__ __forceinline__ uint32_t first() const { return start / kValues * kValues; }
  // Columns column .. column + 3; gives which of them lie in the window. Others are not read.
  __device__ __forceinline__ uint32_t load(float (&v)[kValues], uint32_t column) const {
    if (aligned && column >= static_cast<uint32_t>(start) &&
        column + kValues <= static_cast<uint32_t>(end)) {
      if constexpr (sizeof(T) == 4) {
        const float4 x = *reinterpret_cast<const float4*>(logits + column);
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
      } else {
        const uint2 x = *reinterpret_cast<const uint2*>(logits + column);
        v[0] = float_of(x.x << 16), v[1] = float_of(x.x & 0xffff0000);
        v[2] = float_of(x.y << 16), v[3] = float_of(x.y & 0xffff0000);
      }
      return 15;
    }
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t c = column + i;
      v[i] = 0;
      if (c >= static_cast<uint32_t>(start) && c < static_cast<uint32_t>(end)) {
        v[i] = static_cast<float>(logits[c]);
        inside |= 1u << i;
      }
    }
    return inside;
  }
  // f(key) for all keys of the window, in no order.
  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
    for (uint32_t column = first() + kValues * threadIdx.x; column < static_cast<uint32_t>(end);
         column += kChunk) {
      float v[kValues];
      const uint32_t inside = load(v, column);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (inside >> i & 1) f(key_of(v[i]));
      }
    }
  }
};

// Exclusive prefix of each thread's value over the block, and the total. Sums stay below 2^16 in
// each half. `turn` alternates from call to call, so that one barrier is enough.
__device__ __forceinline__ uint32_t block_prefix(Shared& s, uint32_t value, int turn,
                                                 uint32_t& total) {
  const int lane = lane_id(), warp = threadIdx.x / kWarpSize;
  const uint32_t upto = inclusive_sum(value);
  if (lane == kWarpSize - 1) s.warp_sums[turn][warp] = upto;
  __syncthreads();
  const uint32_t sums = inclusive_sum(s.warp_sums[turn][lane]);
  total = from_lane(sums, kWarpSize - 1);
  const uint32_t before = from_lane(sums, max(warp - 1, 0));
  return upto - value + (warp > 0 ? before : 0);
}

// ---- Radix selection ---------------------------------------------------------------------------

// Three rounds.
__host__ __device__ constexpr int shift_of(int round) {  // bits below those of a round
  return round == 0 ? 21 : round == 1 ? 10 : 0;
}
__host__ __device__ constexpr int bits_of_round(int round) {
  return round < 2 ? 11 : 10;
}

struct Range {
  uint32_t prefix = 0;  // upper bits of the wanted key
  uint32_t wanted;      // it is the wanted-th largest of those with this prefix
  uint32_t inside;      // which are so many
};

// Narrows the range by one round; each(f) calls f(key) for all keys there are.
template <int kRound, typename Each>
__device__ __forceinline__ void narrow(Shared& s, Range& r, Each&& each) {
  constexpr int kShift = shift_of(kRound), kBits = bits_of_round(kRound);
  constexpr int kOwn = (1 << kBits) / kThreads;  // bins of a thread
#pragma unroll
  for (int i = 0; i < kOwn; ++i) s.bins[threadIdx.x + i * kThreads] = 0;
  __syncthreads();
  each([&](uint32_t key) {
    if (kRound == 0 || key >> (kShift + kBits) % 32 == r.prefix) {
      count_up(&s.bins[key >> kShift & ((1 << kBits) - 1)]);
    }
  });
  __syncthreads();
  // The bin, from the top, in which the wanted key lies. Counts may exceed 16 bits here.
  const int top = (1 << kBits) - 1 - kOwn * static_cast<int>(threadIdx.x);
  uint32_t own = 0, total;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += s.bins[top - i];
  uint32_t before = block_prefix(s, own, kRound % 2, total);
  if (before < r.wanted && r.wanted <= before + own) {
    int bin = top;
    while (before + s.bins[bin] < r.wanted) before += s.bins[bin--];
    s.bin = bin, s.above = before, s.inside = s.bins[bin];
  }
  __syncthreads();
  r.prefix = r.prefix << kBits | s.bin;
  r.wanted -= s.above;
  r.inside = s.inside;
}

struct Threshold {
  uint32_t key;   // greater keys are chosen
  uint32_t ties;  // and so many equal ones, by lower column
};

// ---- Gathering ---------------------------------------------------------------------------------

// Gathers the logits whose key is `from` (but at most infinity's) or more, with their columns; from
// = 0: all. Gives how many there are; above kGathered, not all of them were kept.
template <typename T>
__device__ __forceinline__ uint32_t gather(Shared& s, const Row<T>& row, uint32_t from) {
  constexpr int kVectors = 2;
  const float least = logit_of(min(from, kInfBits | 0x80000000u));
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  const uint32_t end = row.end;
  for (uint32_t base = row.first(); base < end; base += kVectors * kChunk) {
    const uint32_t column = base + kValues * threadIdx.x;
    float v[kVectors][kValues];
    uint32_t hits[kVectors], own = 0;
#pragma unroll
    for (int x = 0; x < kVectors; ++x) hits[x] = row.load(v[x], column + x * kChunk);
#pragma unroll
    for (int x = 0; x < kVectors; ++x) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (v[x][i] < least) hits[x] &= ~(1u << i);  // no NaN is less, and nothing less than NaN
      }
      own += count_lanes(hits[x]);
    }
    const uint32_t upto = inclusive_sum(own);
    uint32_t place = 0;
    if (lane_id() == kWarpSize - 1) place = add_to(&s.count, upto);
    place = from_lane(place, kWarpSize - 1) + upto - own;
#pragma unroll
    for (int x = 0; x < kVectors; ++x) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (hits[x] >> i & 1) {
          if (place < kGathered) {
            s.gathered[place] = v[x][i];
            s.columns[place] = column + x * kChunk + i;
          }
          ++place;
        }
      }
    }
  }
  __syncthreads();
  return s.count;
}

// A key that somewhat more than k of a row's keys should reach, from kChunk of them: each warp
// looks at 128 columns in a row.
template <typename T>
__device__ __forceinline__ uint32_t guess(Shared& s, const Row<T>& row, uint32_t k) {
  const uint32_t part = (row.end - row.first()) / kWarps;
  float v[kValues];
  const uint32_t column = row.first() + threadIdx.x / kWarpSize * part / kValues * kValues;
  const uint32_t inside = row.load(v, column + kValues * lane_id());
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (inside >> i & 1) f(key_of(v[i]));
    }
  };
  // Five standard deviations more than k of them.
  const float expected = static_cast<float>(k) * kChunk / (row.end - row.start);
  Range r;
  r.wanted = min(static_cast<uint32_t>(expected + 5 * sqrtf(expected) + 8), kChunk - kValues);
  narrow<0>(s, r, each);
  narrow<1>(s, r, each);
  return r.prefix << shift_of(1);
}

// Gathers the k greatest of a row, or more; gives how many. 0: there are too many ties to. Then
// `threshold` tells what is chosen.
template <typename T>
__device__ __forceinline__ uint32_t gather_greatest(Shared& s, const Row<T>& row, uint32_t k,
                                                    Threshold& threshold) {
  if (row.end - row.start <= kGathered) return gather(s, row, 0);
  uint32_t count = gather(s, row, guess(s, row, k));
  if (count >= k && count <= kGathered) return count;
  const auto each = [&](auto&& f) { row.each(f); };
  Range r;
  r.wanted = k;
  const auto fits = [&](int round) {
    if (k - r.wanted + r.inside > kGathered) return false;
    count = gather(s, row, r.prefix << shift_of(round));
    return count <= kGathered;
  };
  narrow<0>(s, r, each);
  if (fits(0)) return count;
  narrow<1>(s, r, each);
  if (fits(1)) return count;
  narrow<2>(s, r, each);
  if (fits(2)) return count;
  threshold = {r.prefix, r.wanted};
  return 0;
}

__device__ __forceinline__ Threshold select_gathered(Shared& s, uint32_t count, uint32_t k) {
  if (count <= k) return {0, 0};
  const auto each = [&](auto&& f) {
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) f(key_of(s.gathered[i]));
  };
  Range r;
  r.wanted = k;
  narrow<0>(s, r, each);
  if (r.inside == r.wanted) return {(r.prefix << shift_of(0)) - 1, 0};
  narrow<1>(s, r, each);
  if (r.inside == r.wanted) return {(r.prefix << shift_of(1)) - 1, 0};
  narrow<2>(s, r, each);
  return {r.prefix, r.wanted};
}

// ---- Kernel ------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads, kNative ? 1 : 2)
    indexer_topk(TopkArgs args, bool merge) {
  __shared__ Shared s;
  const int64_t index = blockIdx.x;
  Row<T> row;
  row.logits = static_cast<const T*>(args.logits) + index * args.stride;
  row.start = args.starts ? max(args.starts[index], 0) : 0;
  row.end = max(min(args.ends[index], args.columns), row.start);
  const int start = row.start, window = row.end - row.start;
  const bool parted = args.parts > 1 && window > kAlone;
  if (!parted && (merge || blockIdx.y > 0)) return;
  const int64_t first_chosen = index * args.parts * args.k;
  T* part_logits = static_cast<T*>(args.part_logits) + first_chosen;
  int32_t* part_columns = args.part_columns + first_chosen;
  if (parted) {
    // All parts are as long but the last ones. Each gives `chosen` columns, or all it has.
    const int length = (window + args.parts - 1) / args.parts, chosen = min(length, args.k);
    if (merge) {
      row.logits = part_logits;
      row.start = 0;
      row.end = window / length * chosen + min(window % length, args.k);
    } else {
      const int part = blockIdx.y;
      row.start += min(part * length, window);
      row.end = min(row.start + length, row.end);
      part_logits += part * chosen, part_columns += part * chosen;
    }
  }
  row.aligned = reinterpret_cast<uintptr_t>(row.logits) % (kValues * sizeof(T)) == 0;
  int32_t* out = args.out + index * args.k;
  const uint32_t found = min(args.k, row.end - row.start);
  const int32_t* table =
      args.block_table ? args.block_table + index / args.rows_a_table * args.table_stride : nullptr;
  const auto write = [&](uint32_t place, int column) {
    if (parted && !merge) {
      part_logits[place] = row.logits[column];
      part_columns[place] = column;
      return;
    }
    if (merge) column = part_columns[column];
    int value = args.relative ? column - start : column;
    if (table != nullptr) {
      const int page = value / args.block_kv;
      const int block = page < args.table_width ? table[page] : -1;
      value = block < 0 ? -1 : block * args.block_kv + value % args.block_kv;
    }
    out[place] = value;
  };

  Threshold threshold;
  const uint32_t gathered = gather_greatest(s, row, args.k, threshold);
  if (gathered > 0) threshold = select_gathered(s, gathered, args.k);

  uint32_t greater = 0, equal = 0;  // of the columns before
  int turn = 0;
  // Writes the chosen ones of up to 32 columns a thread, from `column` on: all of `above`, and of
  // `level` as many as there are to be ties.
  const auto choose = [&](uint32_t above, uint32_t level, uint32_t column) {
    uint32_t total;
    turn ^= 1;
    const uint32_t own = count_lanes(above) | count_lanes(level) << 16;
    const uint32_t before = block_prefix(s, own, turn, total);
    uint32_t g = greater + (before & 0xffff), e = equal + (before >> 16);
    for (uint32_t rest = above | level; rest != 0; rest &= rest - 1) {
      const int i = lowest_bit(rest);
      const bool tie = level >> i & 1;
      if (!tie || e < threshold.ties) write(g + min(e, threshold.ties), column + i);
      g += !tie, e += tie;
    }
    greater += total & 0xffff, equal += total >> 16;
    return greater + min(equal, threshold.ties) >= found;
  };
  if (gathered > 0) {
    uint32_t *above = s.bins, *level = s.bins + kThreads;
    for (uint32_t base = row.start;; base += kWindow) {
      __syncthreads();
      above[threadIdx.x] = level[threadIdx.x] = 0;
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < gathered; i += kThreads) {
        const uint32_t key = key_of(s.gathered[i]), c = s.columns[i] - base;
        if (c >= kWindow || key < threshold.key) continue;
        set_bits((key > threshold.key ? above : level) + c / 32, 1u << c % 32);
      }
      __syncthreads();
      if (choose(above[threadIdx.x], level[threadIdx.x], base + 32 * threadIdx.x)) break;
    }
  } else if (found > 0) {
    for (uint32_t base = row.first();; base += kChunk) {
      const uint32_t column = base + kValues * threadIdx.x;
      float v[kValues];
      const uint32_t inside = row.load(v, column);
      uint32_t above = 0, level = 0;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const uint32_t key = inside >> i & 1 ? key_of(v[i]) : 0;
        above |= (key > threshold.key) << i;
        level |= (key == threshold.key) << i;
      }
      if (choose(above, level, column)) break;
    }
  }
  if (parted && !merge) return;
  for (uint32_t i = found + threadIdx.x; i < args.k; i += kThreads) out[i] = -1;
}

}  // namespace

int32_t topk_parts(int32_t rows, int32_t columns, int32_t k, int32_t num_sms) {
  if (rows == 0 || columns <= kAlone) return 1;
  // A part is columns / parts long, what is merged parts * k: least in sum where both are equal.
  const int best = static_cast<int>(std::sqrt(static_cast<double>(columns) / k));
  const int parts = std::min(num_sms / rows, best);
  return parts < 4 ? 1 : parts;
}

void launch_indexer_topk(const TopkArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  const auto kernel = args.bf16 ? indexer_topk<__nv_bfloat16> : indexer_topk<float>;
  kernel<<<dim3(args.rows, args.parts), kThreads, 0, stream>>>(args, false);
  if (args.parts > 1) kernel<<<args.rows, kThreads, 0, stream>>>(args, true);
}

}  // namespace sm120
