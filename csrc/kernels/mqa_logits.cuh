// MQA logits, one kernel for ragged and paged keys, FP8 and FP4.
//
// A persistent CTA of 12 warps: one copies query and key tiles by TMA into a ring of stages, eight
// multiply and store, the last three fill what is outside the windows with -inf. For each segment
// (some rows that share a pass over some key tiles) the ring carries the rows' queries first, which
// the math warps keep in registers, and then the keys, 128 a stage. The math warps share a segment
// out as query boxes (8 * NT heads of columns) times interleaved groups of 16 keys.
#pragma once
#include "kernels/mqa_fill.cuh"
#include "kernels/mqa_producer.cuh"

namespace sm120 {

// ---- Consumer: eight warps ---------------------------------------------------------------------

// One warp's share of a segment: the heads of one query box, every key_warps-th group of 16 keys.
// Warps 2i and 2i + 1 have the halves of a query's heads if H > columns, in every segment: their
// barrier counts on it.
struct Share {
  int box;           // of the segment's
  int first_group;   // of 16 keys
  int row;           // of the box's first query
  int queries;       // that the box holds, 0 of a warp without work
  KeyRange window;   // lane i: of query i
  Target target;     // of query t / 2, with t the lane's number in its group of four
  int key_shift;     // log2(key_warps)
  int own_key;       // of 16, whose logit this lane stores: g + 8 * (t % 2)
  uint32_t columns;  // address of the weights of this lane's heads, 2t and 2t + 1 of each tile
  uint32_t slot;     // of the sums that the halves join; changes from one join to the next
};

// Of one of the box's queries; nothing for a lane (or a warp with half a query) that stores none.
template <class T>
__device__ __forceinline__ Target target_of(const MqaParams& p, const Share& share, int query) {
  const int begin = from_lane(share.window.begin, query);
  const int end = from_lane(share.window.end, query);
  const int64_t row = (share.row + query) * p.out_stride;
  const bool stores =
      T::kQueries > 1 || (lane_id() % 4 < 2 && !(T::kHalves && threadIdx.x / kWarpSize % 2));
  return {begin, stores && begin < end ? static_cast<uint32_t>(end - begin) : 0,
          static_cast<char*>(p.out) + (p.rows.width > 0 ? row - begin : row) * p.value_bytes};
}

template <class T>
__device__ __forceinline__ uint32_t own_columns(uint32_t base) {
  return base + T::kColumnsAt + threadIdx.x / kWarpSize * T::kColumns * 8;
}

template <class T>
__device__ __forceinline__ void take_share(const MqaParams& p, const MqaRing<T>& ring, int row,
                                           int rows, int boxes, Share& share) {
  const int warp = threadIdx.x / kWarpSize, lane = lane_id();
  share.key_shift = 3;
  while (kMqaWarps >> share.key_shift < boxes) --share.key_shift;
  constexpr int halved = T::kHalves ? 1 : 0;  // then there are 2 boxes or more
  share.first_group = warp >> halved & ((1 << share.key_shift) - 1);
  const int box = warp >> halved >> share.key_shift << halved | (warp & halved);
  share.box = box;

  // The columns' weights and scale words; only this warp reads them. All loads before their uses.
  constexpr int kOwn = T::kColumns / kWarpSize;
  float weight[kOwn];
  uint32_t word[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int column = box * T::kColumns + i * kWarpSize + lane;
    const int query = column >> p.heads_shift, head = column & (p.heads - 1);
    const int64_t at = static_cast<int64_t>(row) + query;
    weight[i] = query < rows ? p.weights[at * p.weights_stride + head] : 0.f;
    word[i] = T::kFp4 && query < rows ? p.q_scale[at * p.heads + head] : 0x7f7f7f7f;
  }
  const int first = box * T::kColumns >> p.heads_shift;
  share.row = row + first;
  share.queries = max(0, min(rows - first, T::kQueries));
  share.window = {0x7fffffff, 0};
  if (lane < share.queries) share.window = row_keys(p.rows, share.row + lane);
  if (share.window.begin >= share.window.end) share.window = {0x7fffffff, 0};
  share.target = target_of<T>(p, share, T::kQueries > 1 ? lane % 4 / 2 : 0);

  const uint32_t columns = own_columns<T>(ring.base);
  // A lane's weights of two tiles lie together.
  const int place = lane / 16 * 16 + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2;
  __syncwarp();  // all lanes have read the weights of the segment before
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    sts_float(columns + 4 * (kWarpSize * i + place), weight[i] * T::Mma::column_factor(word[i]));
    sts_float(columns + 4 * (T::kColumns + kWarpSize * i + lane), __uint_as_float(word[i]));
  }
  __syncwarp();
}

// H > columns: two warps have the halves of a query's heads. The odd one hands its sums to the
// other, in two slots by turns, so that one barrier a group is enough.
__device__ __forceinline__ float join_halves(Share& share, float sum) {
  const int warp = threadIdx.x / kWarpSize, t = lane_id() % 4;
  const uint32_t slot = share.slot + 4 * (lane_id() / 4 + 8 * (t % 2));
  share.slot ^= 64;
  if (warp % 2 && t < 2) sts_float(slot, sum);
  named_barrier(1 + warp / 2, 2 * kWarpSize);
  return sum + __uint_as_float(lds32(slot));
}

// Sums heads and stores the logits of 16 keys from `key` on. `known`: they lie in a page that was
// copied. Two queries at a time: lane 4g + t ends up with its own key of query t / 2 of them.
template <class T>
__device__ __forceinline__ void finish_keys(const MqaParams& p, Share& share,
                                            const float (&acc)[T::NT][4], int key, bool known,
                                            float factor) {
  constexpr int kTilesOfQuery = T::NT / T::kQueries;
  const int t = lane_id() % 4;
  const bool odd = share.own_key & 8;  // t % 2; one instruction rather than three
  // Sums over heads 2t, 2t + 1 of all tiles, for keys g and g + 8; even and odd tiles apart.
  constexpr int kParts = kTilesOfQuery > 1 ? 2 : 1;
  float sum[T::kQueries][kParts][2], w[4];
#pragma unroll
  for (int j = 0; j < T::NT; ++j) {
    float (&s)[2] = sum[j / kTilesOfQuery][j % kParts];
    if (j % 2 == 0) lds_floats(w, share.columns + 32 * j);  // of two tiles
    const float w0 = w[j % 2 * 2], w1 = w[j % 2 * 2 + 1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float first = relu(acc[j][2 * h]), second = relu(acc[j][2 * h + 1]);
      s[h] = fmaf(second, w1, j % kTilesOfQuery < kParts ? first * w0 : fmaf(first, w0, s[h]));
    }
  }
  if constexpr (kParts > 1) {
#pragma unroll
    for (int query = 0; query < T::kQueries; ++query) {
      sum[query][0][0] += sum[query][1][0], sum[query][0][1] += sum[query][1][1];
    }
  }
#pragma unroll
  for (int query = 0; query < T::kQueries; query += 2) {
    float (&s)[2] = sum[query][0];
    if constexpr (T::kQueries > 1) {
      float (&other)[2] = sum[query + 1][0];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[h] = (t < 2 ? s[h] : other[h]) + from_lane_xor(t < 2 ? other[h] : s[h], 2);
      }
    }
    float value = (odd ? s[1] : s[0]) + from_lane_xor(odd ? s[0] : s[1], 1);
    if constexpr (T::kQueries == 1) value += from_lane_xor(value, 2);
    if constexpr (T::kHalves) value = join_halves(share, value);
    const Target to = query == 0 ? share.target : target_of<T>(p, share, query + t / 2);
    store_logit(p, to, key + share.own_key, known ? value * factor : -INFINITY);
  }
}

// Gives `tiles` stages of keys back unread.
template <class T>
__device__ __forceinline__ void skip_keys(MqaRing<T>& ring, int tiles) {
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    mbarrier_wait(ring.full(), ring.at.parity);
    ring.release();
  }
}

// Of the segment's key tiles, multiplies those that this warp's queries see. A stage is given back
// when the next one's keys are about to be loaded: then all of its own are in registers.
template <class T>
__device__ __forceinline__ void multiply_keys(const MqaParams& p, MqaRing<T>& ring, int first_key,
                                              int tiles, Share& share, typename T::Mma& mma) {
  const int begin = min_of_warp(share.window.begin), end = max_of_warp(share.window.end);
  const int skipped = min(max(begin - first_key, 0) / kTileKeys, tiles);
  const int stop = min((max(end - first_key, 0) + kTileKeys - 1) / kTileKeys, tiles);
  skip_keys(ring, stop > skipped ? skipped : tiles);
  if (stop <= skipped) return;

  const int step = opaque(16 << share.key_shift), first = 16 * share.first_group;
  const auto rows = [&](int key) { return ring.data() + key * T::kRowBytes; };
  const auto scales = [&](int key) { return ring.scales() + (key << p.scale_shift); };
  const uint32_t words = own_columns<T>(ring.base) + 4 * T::kColumns;
  int left = (stop - skipped) * T::kGroups >> share.key_shift;
  int tile_key = first_key + skipped * kTileKeys, key = first;  // of the stage
  mbarrier_wait(ring.full(), ring.at.parity);
  uint32_t pages = ring.read_pages();
  float acc[T::NT][4];
  mma.start(rows(key), scales(key));
  mma.first_steps(acc, rows(key));
  bool turns = key + step >= kTileKeys;
  bool full = ring.next_is_full();  // asked for early: the answer takes a while
  while (true) {
    mma.correct(acc, rows(key), scales(key), words);
    if (--left == 0) break;
    const int current = opaque(tile_key + key);
    const uint32_t copied = pages >> (key >> p.page_shift) & 1;  // of lane 0
    const float factor = mma.row_factor();
    if (turns) {
      ring.release();
      if (!full) mbarrier_wait(ring.full(), ring.at.parity);
      pages = ring.read_pages();
      tile_key += kTileKeys;
      key = first;
    } else {
      key += step;
    }
    turns = key + step >= kTileKeys;
    mma.last_step(acc, rows(key), scales(key));
    finish_keys<T>(p, share, acc, current, from_lane(copied, 0), factor);
    mma.first_steps(acc, rows(key));
    full = ring.next_is_full();
  }
  const uint32_t copied = pages >> (key >> p.page_shift) & 1;
  ring.release();
  mma.last_step(acc);
  finish_keys<T>(p, share, acc, tile_key + key, from_lane(copied, 0), mma.row_factor());
  skip_keys(ring, tiles - stop);
}

template <class T>
__device__ __forceinline__ void consume_mqa(const MqaParams& p, MqaRing<T> ring) {
  typename T::Mma mma;
  Share share;
  share.own_key = mma.own_key();
  share.columns = opaque(own_columns<T>(ring.base) + 16 * (lane_id() % 4));
  share.slot = ring.base + T::kPartnersAt + threadIdx.x / kWarpSize / 2 * 128;
  while (true) {
    const SegmentInfo info = ring.read_segment();
    if (info.rows == 0) return;
    const int boxes = (info.rows * p.heads + T::kColumns - 1) / T::kColumns;
    take_share(p, ring, info.row, info.rows, boxes, share);
#pragma unroll 1
    for (int first = 0; first < boxes; first += T::kBoxes) {
      mbarrier_wait(ring.full(), ring.at.parity);
      if (share.box >= first && share.box < min(first + T::kBoxes, boxes)) {
        mma.load_queries(ring.data() + (share.box - first) * T::kBoxBytes,
                         own_columns<T>(ring.base) + 4 * T::kColumns);
      }
      ring.release();
    }
    multiply_keys(p, ring, info.first_key, info.tiles, share, mma);
  }
}

// ---- Kernel ------------------------------------------------------------------------------------

// Together what a CTA gets at its launch. The f16 queries of the emulated target need them most.
constexpr int kMathRegisters = kNative ? 224 : 232, kOtherRegisters = kNative ? 56 : 40;

template <class T>
__global__ void __launch_bounds__(kMqaThreads, 1) mqa_logits(const __grid_constant__ MqaParams p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  MqaRing<T> ring;
  ring.base = opaque(smem_address(smem));
  constexpr int kWarps = kMqaThreads / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == kMqaThreads - kWarpSize) {  // of the warp with the fewest cells to look at
    for (int s = 0; s < T::kStages; ++s) {
      mbarrier_init(ring.base + T::kFullAt + 8 * s, 1);
      mbarrier_init(ring.base + T::kEmptyAt + 8 * s, kMqaWarps);
    }
    for (int i = 0; i < kInfos; ++i) mbarrier_init(ring.base + T::kToldAt + 8 * i, 1);
    mbarrier_init_fence();
    tma_prefetch_map(&p.q);
    if (p.num_blocks > 0) {
      tma_prefetch_map(&p.k);
      tma_prefetch_map(&p.k_scale);
    }
  }
  pdl_wait();  // global memory may be touched from here on
  auto* found = reinterpret_cast<Cursor*>(smem + T::kCursorsAt);
  const Cursor* cursors = found;
  const bool few = p.metadata == nullptr && p.rows.cells <= kWarpSize;
  if (p.metadata != nullptr) {
    cursors = reinterpret_cast<const Cursor*>(p.metadata) + blockIdx.x;
  } else if (!few) {
    find_cursors<kWarps>(p.rows, gridDim.x, blockIdx.x, blockIdx.x + 1, found,
                         *reinterpret_cast<int64_t (*)[kWarps]>(smem + T::kSumsAt));
  }
  __syncthreads();

  if (warp >= kMqaWarps) {
    shrink_registers<kOtherRegisters>();
    if (warp == kMqaWarps) {
      produce_mqa<T>(p, ring, few ? SegmentWalk() : SegmentWalk(p.rows, cursors[0], cursors[1]));
      return;
    }
    if (few && warp == kMqaWarps + 1) prefetch_start<T>(p);
    if (p.clean) fill_outside(p, warp - kMqaWarps - 1, kWarps - kMqaWarps - 1);
    return;
  }
  grow_registers<kMathRegisters>();
  consume_mqa<T>(p, ring);
}

}  // namespace sm120
