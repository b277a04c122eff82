// The hyper-connection prenorm: a persistent, TMA-fed stream over x.
//
// x is bf16, which TF32 holds exactly, so each value that is unpacked for its square is an MMA
// operand as it stands; fn is rounded to TF32 (nearest, ties away) when it is read. A tile is 256
// rows of x with all of N: fn is then read from L2 once in 256 rows. Two groups of four warps take
// 128 rows each.
#include "kernels/hc_prenorm.h"

#include "device/convert.cuh"
#include "device/launch.cuh"
#include "device/operand.cuh"
#include "device/tma.cuh"
#include "device/warp.cuh"

namespace sm120 {
namespace {

constexpr int kMathWarps = kPrenormMathWarps, kGroupWarps = 4;

template <int kColumnTiles>
struct PrenormTraits {
  static constexpr int MT = 2, NT = kColumnTiles;
  static constexpr int kColumns = 8 * NT;
  // Steps of 16 k whose loads may overlap: two warps a scheduler hide little latency.
  static constexpr int kStepsAtOnce = NT <= 4 ? 4 : 1;
  // Shared-memory map: x units | fn slots | full, empty of the units | full, empty of the slots.
  // A unit is [128 rows, 64] bf16; a slot is fn [kColumns, 64] float32, as two boxes of 32.
  static constexpr int kUnitBytes = kPrenormRows / 2 * 128;
  static constexpr int kHalfSlotBytes = kColumns * 128, kSlotBytes = 2 * kHalfSlotBytes;
  static constexpr int kSlots = NT <= 4 ? 4 : 2;
  // Even, so that a place in the ring always belongs to the same group of warps. Hazard: copies may
  // complete out of order, and a group that found a place in another's hands every second time
  // would take the parity of the phase before last for that of its own.
  static constexpr int kUnits =
      (kSmemLimit - kSlots * (kSlotBytes + 16)) / (kUnitBytes + 16) / 2 * 2;
  static constexpr int kSlotsAt = kUnits * kUnitBytes;
  static constexpr int kUnitBarAt = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kSlotBarAt = kUnitBarAt + 16 * kUnits;
  static constexpr int kSmemBytes = kSlotBarAt + 16 * kSlots;
  static_assert(kSmemBytes <= kSmemLimit && kUnits >= 2 && kUnits % 2 == 0);
  // The reduction reuses the map: sums of a round's rows for each warp.
  static_assert(kMathWarps * kPrenormManyRows.rows * (kColumns + 1) * 4 <= kUnitBarAt);
};

template <class T>
struct PrenormRing {
  RingState<T::kUnits> unit;
  RingState<T::kSlots> slot;
  uint32_t base;

  __device__ uint32_t x() const { return base + unit.stage * T::kUnitBytes; }
  __device__ uint32_t x_full() const { return base + T::kUnitBarAt + 16 * unit.stage; }
  __device__ uint32_t x_empty() const { return x_full() + 8; }
  __device__ uint32_t fn() const { return base + T::kSlotsAt + slot.stage * T::kSlotBytes; }
  __device__ uint32_t fn_full() const { return base + T::kSlotBarAt + 16 * slot.stage; }
  __device__ uint32_t fn_empty() const { return fn_full() + 8; }
};

// ---- Which part of which tile a CTA computes ----------------------------------------------------

struct Work {
  int tile, k_begin, k_end;  // K in blocks
  int split;                 // output it belongs to
  int partial;               // workspace slot, or -1
};

// splits > 0: tiles of split 0, of split 1, ... round-robin; the first k_blocks % splits splits
// have a block more. splits = 0: all tiles' K-blocks laid end to end and cut into gridDim.x equal
// ranges.
class PrenormScheduler {
 public:
  __device__ explicit PrenormScheduler(const PrenormParams& p) : p_(p), next_(blockIdx.x) {
    end_ = p.row_tiles * p.splits;
    if (p.splits == 0) next_ = range_begin(p, blockIdx.x), end_ = range_begin(p, blockIdx.x + 1);
  }

  __device__ __forceinline__ bool next(Work& work) {
    if (next_ >= end_) return false;
    const int per_tile = p_.splits > 0 ? p_.row_tiles : p_.k_blocks;
    const int quotient = next_ / per_tile, rest = next_ - quotient * per_tile;
    work.partial = -1;
    if (p_.splits > 0) {
      const int each = p_.k_blocks / p_.splits, more = p_.k_blocks - each * p_.splits;
      work.split = quotient, work.tile = rest;
      work.k_begin = quotient * each + min(quotient, more);
      work.k_end = work.k_begin + each + (quotient < more);
      next_ += gridDim.x;
      return true;
    }
    work.split = 0, work.tile = quotient;
    work.k_begin = rest;
    work.k_end = min(p_.k_blocks, rest + end_ - next_);
    if (work.k_end - work.k_begin < p_.k_blocks) work.partial = first_ ? 0 : 1;
    next_ += work.k_end - work.k_begin;
    first_ = false;
    return true;
  }

  // 32-bit: the host uses splits = 0 only where row_tiles * k_blocks * (gridDim.x + 1) fits.
  static __device__ __forceinline__ int range_begin(const PrenormParams& p, uint32_t cta) {
    return cta * (p.row_tiles * p.k_blocks) / gridDim.x;
  }
  // CTA whose range holds K-block `unit` of all tiles.
  static __device__ __forceinline__ int owner(const PrenormParams& p, uint32_t unit) {
    return ((unit + 1) * gridDim.x - 1) / (p.row_tiles * p.k_blocks);
  }

 private:
  const PrenormParams& p_;
  int next_, end_;
  bool first_ = true;  // the tile the range begins in has workspace slot 0, the one it ends in 1
};

// ---- Producer -----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void produce(const PrenormParams& p, PrenormRing<T> ring) {
  tma_prefetch_map(&p.x);
  tma_prefetch_map(&p.fn);
  PrenormScheduler scheduler(p);
  for (Work work; scheduler.next(work);) {
    for (int block = work.k_begin; block < work.k_end; ++block) {
      mbarrier_wait(ring.fn_empty(), ring.slot.parity ^ 1);
      mbarrier_expect_tx(ring.fn_full(), T::kSlotBytes);
      tma_load_2d(ring.fn(), &p.fn, ring.fn_full(), 256 * block, 0);
      tma_load_2d(ring.fn() + T::kHalfSlotBytes, &p.fn, ring.fn_full(), 256 * block + 128, 0);
      ring.slot.advance();
      for (int half = 0; half < 2; ++half) {
        mbarrier_wait(ring.x_empty(), ring.unit.parity ^ 1);
        mbarrier_expect_tx(ring.x_full(), T::kUnitBytes);
        tma_load_2d(ring.x(), &p.x, ring.x_full(), 128 * block,
                    work.tile * kPrenormRows + half * (kPrenormRows / 2));
        ring.unit.advance();
      }
    }
  }
  pdl_launch_dependents();
}

// ---- Consumer -----------------------------------------------------------------------------------

// A warp's sums over a part of K: fragments of d, and squares of rows 16 i + 8 h + g in independent
// chains, so that long sums lose little to rounding.
template <class T>
__device__ __forceinline__ void accumulate(const Work& work, PrenormRing<T>& ring,
                                           float (&d)[T::MT][T::NT][4],
                                           float (&squares)[T::MT][2][4], int unit_row) {
  const ReaderA<Access::kPlain, 128, 1> x_reader(unit_row);
  // Its 8-byte loads give lane 4g + t the values k = 2t, 2t + 1 of each 8, which is how ldmatrix
  // hands out bf16. They are the MMA's k = t and t + 4; any order will do if both sides share it.
  const ReaderB<Access::kPairedFp8, 128, T::NT, 1> fn_reader(0);
  for (int block = work.k_begin; block < work.k_end; ++block) {
    mbarrier_wait(ring.fn_full(), ring.slot.parity);
    mbarrier_wait(ring.x_full(), ring.unit.parity);
#pragma unroll T::kStepsAtOnce
    for (int step = 0; step < 4; ++step) {  // 16 of K
      uint32_t low[T::MT][4], high[T::MT][4];
#pragma unroll
      for (int i = 0; i < T::MT; ++i) {
        uint32_t pairs[4];  // rows g, g + 8 of k 0..7, then of k 8..15
        x_reader.load(pairs, ring.x(), i, step);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          low[i][r] = pairs[r] << 16;
          high[i][r] = pairs[r] & 0xffff0000u;
          float (&chain)[4] = squares[i][r % 2];
          chain[r / 2] = fmaf(float_of(low[i][r]), float_of(low[i][r]), chain[r / 2]);
          chain[2 + r / 2] = fmaf(float_of(high[i][r]), float_of(high[i][r]), chain[2 + r / 2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t b[T::NT][2];
        fn_reader.load(b, ring.fn() + step / 2 * T::kHalfSlotBytes, step % 2 * 2 + half);
#pragma unroll
        for (int j = 0; j < T::NT; ++j) {
          b[j][0] = round_to_tf32(b[j][0]), b[j][1] = round_to_tf32(b[j][1]);
#pragma unroll
          for (int i = 0; i < T::MT; ++i) {
            const uint32_t a[4] = {low[i][2 * half], low[i][2 * half + 1], high[i][2 * half],
                                   high[i][2 * half + 1]};
            mma_tf32(d[i][j], a, b[j]);
          }
        }
      }
    }
    release_stage(ring.x_empty());
    release_stage(ring.fn_empty());
    ring.slot.advance();
    ring.unit.advance();  // the other group's
    ring.unit.advance();
  }
}

__device__ __forceinline__ float rms_factor(const PrenormParams& p, float sqr_sum) {
  return p.scale ? rsqrtf(sqr_sum * p.inverse_k + p.eps) : 1.f;
}

// A warp's sums to the output, or to the workspace if they are a part only. `row`: of the tile.
template <class T>
__device__ __forceinline__ void store(const PrenormParams& p, const Work& work,
                                      const float (&d)[T::MT][T::NT][4],
                                      const float (&squares)[T::MT][2][4], int row) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const bool whole = work.partial < 0;
  const int slot_rows = min(p.m, kPrenormRows);
  float* partial = p.workspace + (2ll * blockIdx.x + work.partial) * slot_rows * (p.n + 1);
#pragma unroll
  for (int i = 0; i < T::MT; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float (&chain)[4] = squares[i][h];
      float sqr_sum = (chain[0] + chain[1]) + (chain[2] + chain[3]);
      sqr_sum = add_across(add_across(sqr_sum, 1), 2);
      const int tile_row = row + 16 * i + 8 * h + g;
      const int64_t m = static_cast<int64_t>(work.tile) * kPrenormRows + tile_row;
      if (m >= p.m) continue;
      const int64_t out_row = static_cast<int64_t>(work.split) * p.m + m;
      float* out = whole ? p.d + out_row * p.n : partial + tile_row * (p.n + 1);
      const float factor = whole ? rms_factor(p, sqr_sum) : 1.f;
      if (t == 0) *(whole ? p.sqr_sum + out_row : out + p.n) = sqr_sum;
#pragma unroll
      for (int j = 0; j < T::NT; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = 8 * j + fragment_column<Access::kPairedFp8>(2 * t + e);
          if (n < p.n) out[n] = d[i][j][2 * h + e] * factor;
        }
      }
    }
  }
}

// After the grid barrier: every row of a tile that was cut is summed over its CTAs, in an order
// that depends on shape and grid alone, by one warp or, where that is quicker, by up to eight. A
// warp, or those that share, takes kRows neighbouring rows at a time.
template <int kRows, int kParts>
__device__ __forceinline__ void reduce_partials(const PrenormParams& p, float* scratch) {
  const auto wait = [&] {
    p.sharing > 1 ? named_barrier<1, kMathWarps * kWarpSize>() : __syncwarp();
  };
  const int warp = threadIdx.x / kWarpSize, width = p.n + 1, share = warp % p.sharing;
  const int rows_at_once = kMathWarps / p.sharing * kRows;
  const int64_t slot_size = static_cast<int64_t>(min(p.m, kPrenormRows)) * width;
  float* mine = scratch + warp * kRows * width;
  for (int row0 = blockIdx.x * rows_at_once; row0 < p.m; row0 += gridDim.x * rows_at_once) {
    const int m0 = row0 + warp / p.sharing * kRows;
    // All in one tile: kPrenormRows is a multiple of kRows.
    const int tile = m0 / kPrenormRows, first_block = tile * p.k_blocks;
    const int first = PrenormScheduler::owner(p, first_block);
    const int last = PrenormScheduler::owner(p, first_block + p.k_blocks - 1);
    const int rows = first != last ? min(kRows, p.m - m0) : 0;
    // The first CTA's range may begin in the tile before; all others begin in this one.
    const int first_slot = PrenormScheduler::range_begin(p, first) < first_block;
    const float* row = p.workspace + m0 % kPrenormRows * width;
    if (rows > 0) {
      for (int n = lane_id(); n < width; n += kWarpSize) {
        float sum[kRows] = {};
#pragma unroll 1
        for (int cta0 = first + share; cta0 <= last; cta0 += kParts * p.sharing) {
          float part[kParts][kRows];  // loaded together: latency counts here
#pragma unroll
          for (int c = 0; c < kParts; ++c) {
            const int cta = cta0 + c * p.sharing, slot = cta == first ? first_slot : 0;
            const float* from = row + (2 * cta + slot) * slot_size + n;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              part[c][r] = cta <= last && r < rows ? from[r * width] : 0.f;
            }
          }
#pragma unroll
          for (int c = 0; c < kParts; ++c) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r] += part[c][r];
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) mine[r * width + n] = sum[r];
      }
    }
    wait();
    if (share == 0) {
      const auto total = [&](int at) {
        float part[kMathWarps], sum = 0;
#pragma unroll
        for (int s = 0; s < kMathWarps; ++s) {
          part[s] = s < p.sharing ? mine[s * kRows * width + at] : 0.f;
        }
#pragma unroll
        for (int s = 0; s < kMathWarps; ++s) sum += part[s];
        return sum;
      };
      for (int r = 0; r < rows; ++r) {
        const float squares = total(r * width + p.n), factor = rms_factor(p, squares);
        float* d = p.d + static_cast<int64_t>(m0 + r) * p.n;
#pragma unroll 1
        for (int n = lane_id(); n < p.n; n += kWarpSize) d[n] = total(r * width + n) * factor;
        if (lane_id() == 0) p.sqr_sum[m0 + r] = squares;
      }
    }
    wait();
  }
}

template <class T>
__global__ void __launch_bounds__(kPrenormThreads, 1)
    hc_prenorm(const __grid_constant__ PrenormParams p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  PrenormRing<T> ring;
  ring.base = opaque(smem_address(smem));
  if (threadIdx.x == 0) {
    for (int u = 0; u < T::kUnits; ++u) {
      mbarrier_init(ring.base + T::kUnitBarAt + 16 * u, 1);
      mbarrier_init(ring.base + T::kUnitBarAt + 16 * u + 8, kGroupWarps);
    }
    for (int s = 0; s < T::kSlots; ++s) {
      mbarrier_init(ring.base + T::kSlotBarAt + 16 * s, 1);
      mbarrier_init(ring.base + T::kSlotBarAt + 16 * s + 8, kMathWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  pdl_wait();

  const int warp = threadIdx.x / kWarpSize;
  if (warp >= kMathWarps) {
    shrink_registers<40>();
    if (threadIdx.x == kMathWarps * kWarpSize) produce<T>(p, ring);
    if (p.splits == 0) grid_barrier();
    return;
  }
  grow_registers<232>();
  const int group = warp / kGroupWarps, unit_row = warp % kGroupWarps * T::MT * 16;
  if (group == 1) ring.unit.advance();
  PrenormScheduler scheduler(p);
  for (Work work; scheduler.next(work);) {
    float d[T::MT][T::NT][4] = {}, squares[T::MT][2][4] = {};
    accumulate<T>(work, ring, d, squares, unit_row);
    store<T>(p, work, d, squares, group * (kPrenormRows / 2) + unit_row);
  }
  if (p.splits == 0) {
    grid_barrier();
    float* scratch = reinterpret_cast<float*>(smem);
    if (p.many_rows) {
      reduce_partials<kPrenormManyRows.rows, kPrenormManyRows.parts>(p, scratch);
    } else {
      reduce_partials<kPrenormManyParts.rows, kPrenormManyParts.parts>(p, scratch);
    }
  }
}

template <int kColumnTiles>
PrenormInstance instance() {
  using T = PrenormTraits<kColumnTiles>;
  return {hc_prenorm<T>, T::kSmemBytes, T::kColumns};
}

}  // namespace

// 24 columns are those of the models (hc_mult 4: 4 * (4 + 2)); the others bound the waste by half.
PrenormInstance prenorm_instance(int n) {
  if (n <= 8) return instance<1>();
  if (n <= 16) return instance<2>();
  if (n <= 24) return instance<3>();
  if (n <= 32) return instance<4>();
  if (n <= 64) return instance<8>();
  return instance<16>();
}

}  // namespace sm120
