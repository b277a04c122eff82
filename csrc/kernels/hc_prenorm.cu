// The hyper-connection prenorm: a persistent, TMA-fed stream over x.
//
// x is bf16, which TF32 holds exactly, so each value that is unpacked for its square is an MMA
// operand as it stands; fn is rounded to TF32 (nearest, ties away) when it is read. A tile is 256
// rows of x with all of N: fn is then read from L2 once in 256 rows. Two groups of four warps take
// 128 rows each.
#include "kernels/hc_prenorm.h"

#include "device/convert.cuh"
#include "device/flag.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/operand.cuh"
#include "device/tma.cuh"
#include "device/warp.cuh"

namespace sm120 {
namespace {

constexpr int kMathWarps = kPrenormMathWarps, kGroupWarps = 4;
constexpr int kMathBarrier = 1;
constexpr int kChainBlocks = 8;  // K-blocks whose squares are added without compensation
constexpr int kPartsAtOnce = 8;  // that a thread of the reduction loads together

template <int kColumnTiles>
struct PrenormTraits {
  static constexpr int MT = 2, NT = kColumnTiles;
  static constexpr int kColumns = 8 * NT;
  static constexpr int kRowVectors = prenorm_row_vectors(kColumns);
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
  // The reduction reuses the map: a vector of sums for each thread.
  static_assert(16 * kPrenormMathThreads <= kUnitBarAt);
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
  int split, tile;
  int k_begin, k_end;  // in blocks
};

// Tiles of split 0, of split 1, ... round-robin: CTAs that run side by side read the same fn.
class PrenormScheduler {
 public:
  __device__ explicit PrenormScheduler(const PrenormParams& p) : p_(p), next_(blockIdx.x) {}

  __device__ __forceinline__ bool next(Work& work) {
    if (next_ >= p_.row_tiles * p_.splits) return false;
    work.split = next_ / p_.row_tiles, work.tile = next_ - work.split * p_.row_tiles;
    work.k_begin = first_block(work.split), work.k_end = first_block(work.split + 1);
    next_ += gridDim.x;
    return true;
  }

 private:
  __device__ __forceinline__ int first_block(int split) const {
    return split * p_.split_blocks + min(split, p_.longer_splits);
  }

  const PrenormParams& p_;
  int next_;
};

// ---- Producer -----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void produce(const PrenormParams& p, PrenormRing<T> ring) {
  tma_prefetch_map(&p.x);
  tma_prefetch_map(&p.fn);
  PrenormScheduler scheduler(p);
  for (Work work; scheduler.next(work);) {
#pragma unroll 1
    for (int block = work.k_begin; block < work.k_end; ++block) {
      mbarrier_wait(ring.fn_empty(), ring.slot.parity ^ 1);
      mbarrier_expect_tx(ring.fn_full(), T::kSlotBytes);
      tma_load_2d(ring.fn(), &p.fn, ring.fn_full(), 256 * block, 0);
      tma_load_2d(ring.fn() + T::kHalfSlotBytes, &p.fn, ring.fn_full(), 256 * block + 128, 0);
      ring.slot.advance();
#pragma unroll 1
      for (int half = 0; half < p.halves; ++half) {
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

// A warp's sums over a part of K: fragments of d, and squares of rows 16 i + 8 h + g.
template <class T>
__device__ __forceinline__ void accumulate(const PrenormParams& p, const Work& work,
                                           PrenormRing<T>& ring, float (&d)[T::MT][T::NT][4],
                                           LongSum (&squares)[T::MT][2], int unit_row,
                                           bool any_rows) {
  const ReaderA<Access::kPlain, 128, 1> x_reader(unit_row);
  // Its 8-byte loads give lane 4g + t the values k = 2t, 2t + 1 of each 8, which is how ldmatrix
  // hands out bf16. They are the MMA's k = t and t + 4; any order will do if both sides share it.
  const ReaderB<Access::kPairedFp8, 128, T::NT, 1> fn_reader(0);
  float chain[T::MT][2][4] = {};  // of squares; independent
  for (int block = work.k_begin; block < work.k_end; ++block) {
    // x goes to registers whole and its place back at once: a ring of two blocks is short, and the
    // next copy need not wait until this block is multiplied.
    uint32_t x[4][T::MT][4];  // of a step of 16 k: rows g, g + 8 of k 0..7, then of k 8..15
    mbarrier_wait(ring.x_full(), ring.unit.parity);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < T::MT; ++i) x_reader.load(x[step][i], ring.x(), i, step);
    }
    release_stage(ring.x_empty());
    mbarrier_wait(ring.fn_full(), ring.slot.parity);
#pragma unroll T::kStepsAtOnce
    for (int step = 0; step < 4 && any_rows; ++step) {
      uint32_t low[T::MT][4], high[T::MT][4];
#pragma unroll
      for (int i = 0; i < T::MT; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          low[i][r] = x[0][i][r] << 16;
          high[i][r] = x[0][i][r] & 0xffff0000u;
          float (&sum)[4] = chain[i][r % 2];
          sum[r / 2] = fmaf(float_of(low[i][r]), float_of(low[i][r]), sum[r / 2]);
          sum[2 + r / 2] = fmaf(float_of(high[i][r]), float_of(high[i][r]), sum[2 + r / 2]);
          // Indices are constants in a loop that is not unrolled, too.
          x[0][i][r] = x[1][i][r], x[1][i][r] = x[2][i][r], x[2][i][r] = x[3][i][r];
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
    release_stage(ring.fn_empty());
    ring.slot.advance();
    ring.unit.advance();
    if (p.halves > 1) ring.unit.advance();  // the other group's
    if (block % kChainBlocks < kChainBlocks - 1 && block + 1 < work.k_end) continue;
#pragma unroll
    for (int i = 0; i < T::MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float (&sum)[4] = chain[i][h];
        squares[i][h].add((sum[0] + sum[1]) + (sum[2] + sum[3]));
        sum[0] = sum[1] = sum[2] = sum[3] = 0;
      }
    }
  }
}

__device__ __forceinline__ float rms_factor(const PrenormParams& p, float sqr_sum) {
  return p.scale ? rsqrtf(sqr_sum * p.inverse_k + p.eps) : 1.f;
}

// Calls `use` with each row of x of which a lane has sums, its place in the fragments (i, h) and
// its sum of squares. No row number overflows: the last tile ends below 2^31.
template <class T, class Use>
__device__ __forceinline__ void for_rows(const PrenormParams& p, const LongSum (&squares)[T::MT][2],
                                         int first_m, Use use) {
#pragma unroll
  for (int i = 0; i < T::MT; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sqr_sum = add_across(add_across(squares[i][h].value(), 1), 2);
      const int m = first_m + 16 * i + 8 * h + lane_id() / 4;
      if (m < p.m) use(m, i, h, sqr_sum);
    }
  }
}

// A warp's sums to the output.
template <class T>
__device__ __forceinline__ void store(const PrenormParams& p, const Work& work,
                                      const float (&d)[T::MT][T::NT][4],
                                      const LongSum (&squares)[T::MT][2], int first_row) {
  const int t = lane_id() % 4;
  for_rows<T>(p, squares, work.tile * kPrenormRows + first_row,
              [&](int m, int i, int h, float sqr_sum) {
                const int64_t out_row = static_cast<int64_t>(work.split) * p.m + m;
                float* out = p.d + out_row * p.n;
                const float factor = rms_factor(p, sqr_sum);
                if (t == 0) p.sqr_sum[out_row] = sqr_sum;
#pragma unroll
                for (int j = 0; j < T::NT; ++j) {
#pragma unroll
                  for (int e = 0; e < 2; ++e) {
                    const int n = 8 * j + fragment_column<Access::kPairedFp8>(2 * t + e);
                    if (n < p.n) out[n] = d[i][j][2 * h + e] * factor;
                  }
                }
              });
}

// ---- Parts of K, from CTA to CTA ----------------------------------------------------------------
//
// A group of rows is reduced as soon as all its parts have a flag raised.
// Nobody has to clear flags beforehand: raised they have the launch's token, 64 bits that memory
// does not hold by chance; and who has seen one takes it down, so that the token of a graph's
// earlier replay is not found either. CTAs wait for each other, so all must run at once: a
// cooperative launch.

// Where row m has its sums over a split's part of K, and where the flag is of a group of rows that
// begins with it.
template <class T>
__device__ __forceinline__ float4* partial_row(const PrenormParams& p, int split, int m) {
  return p.workspace + (static_cast<int64_t>(split) * p.m + m) * T::kRowVectors;
}
__device__ __forceinline__ uint64_t* group_flag(const PrenormParams& p, int split, int m) {
  return p.flags + static_cast<int64_t>(split) * p.m + m;
}

template <class T>
__device__ __forceinline__ void store_partial(const PrenormParams& p, const Work& work,
                                              const float (&d)[T::MT][T::NT][4],
                                              const LongSum (&squares)[T::MT][2], int first_row) {
  const int t = lane_id() % 4;
  for_rows<T>(p, squares, work.tile * kPrenormRows + first_row,
              [&](int m, int i, int h, float sqr_sum) {
                float* out = reinterpret_cast<float*>(partial_row<T>(p, work.split, m));
#pragma unroll
                for (int j = 0; j < T::NT; ++j) {
                  *reinterpret_cast<float2*>(out + 8 * j + 2 * t) =
                      make_float2(d[i][j][2 * h], d[i][j][2 * h + 1]);
                }
                out[T::kColumns + t] = sqr_sum;
              });
  static_assert(T::MT * 16 == kPrenormGroupRows);
  const int row = lane_id() * p.group_rows, m = work.tile * kPrenormRows + first_row + row;
  __syncwarp();
  if (row < kPrenormGroupRows && m < p.m) raise_flag(group_flag(p, work.split, m), p.token);
}

__device__ __forceinline__ void add(float4& sum, const float4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// A row is summed over the splits in an order that depends on the shape alone. Groups of rows go
// round-robin. A thread sums one vector of a group over every p.sharing-th split; the sums of those
// that share it meet in shared memory.
template <class T>
__device__ __forceinline__ void reduce_partials(const PrenormParams& p, int thread,
                                                float4* scratch) {
  const int vectors = p.group_rows * T::kRowVectors;
  const int share = thread / vectors, v = thread - share * vectors;
  const int row = v / T::kRowVectors, column = 4 * (v % T::kRowVectors);
  const int step = gridDim.x * p.group_rows;
  for (int m0 = blockIdx.x * p.group_rows; m0 < p.m; m0 += step) {
    for (int split = thread; split < p.splits; split += kPrenormMathThreads) {
      take_flag(group_flag(p, split, m0), p.token);
    }
    // All flags have been seen, and nobody reads `scratch` or the ring any more.
    named_barrier<kMathBarrier, kPrenormMathThreads>();
    const bool present = row < p.m - m0 && share < p.sharing;
    if (present) {
      float4 sum{};
#pragma unroll 1
      for (int split0 = share; split0 < p.splits; split0 += kPartsAtOnce * p.sharing) {
        float4 part[kPartsAtOnce];
#pragma unroll
        for (int c = 0; c < kPartsAtOnce; ++c) {
          const int split = min(split0 + c * p.sharing, p.splits - 1);
          part[c] = partial_row<T>(p, split, m0)[v];
        }
#pragma unroll
        for (int c = 0; c < kPartsAtOnce; ++c) {
          if (split0 + c * p.sharing < p.splits) add(sum, part[c]);
        }
      }
      scratch[share * vectors + v] = sum;
    }
    named_barrier<kMathBarrier, kPrenormMathThreads>();
    if (!present || share > 0) continue;
    float4 sum{}, squares{};
#pragma unroll 4
    for (int s = 0; s < p.sharing; ++s) {
      const float4* shared_row = scratch + s * vectors + row * T::kRowVectors;
      add(sum, shared_row[column / 4]);
      add(squares, shared_row[T::kRowVectors - 1]);
    }
    const int m = m0 + row;
    if (column == T::kColumns) p.sqr_sum[m] = squares.x;
    if (column >= p.n) continue;
    const float factor = rms_factor(p, squares.x);
    float* out = p.d + static_cast<int64_t>(m) * p.n + column / 8 * 8;
    const auto n = [&](int e) { return fragment_column<Access::kPairedFp8>(column % 8 + e); };
    out[n(0)] = sum.x * factor, out[n(1)] = sum.y * factor;
    out[n(2)] = sum.z * factor, out[n(3)] = sum.w * factor;
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
      mbarrier_init(ring.base + T::kSlotBarAt + 16 * s + 8, p.halves * kGroupWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  pdl_wait();

  const int warp = threadIdx.x / kWarpSize;
  if (warp >= kMathWarps) {
    shrink_registers<40>();
    if (threadIdx.x == kPrenormMathThreads) produce<T>(p, ring);
    return;
  }
  grow_registers<232>();
  const int group = warp / kGroupWarps, unit_row = warp % kGroupWarps * T::MT * 16;
  const int first_row = group * (kPrenormRows / 2) + unit_row;
  if (group == 1) ring.unit.advance();
  PrenormScheduler scheduler(p);
  for (Work work; group < p.halves && scheduler.next(work);) {
    float d[T::MT][T::NT][4] = {};
    LongSum squares[T::MT][2];
    accumulate<T>(p, work, ring, d, squares, unit_row, work.tile * kPrenormRows + first_row < p.m);
    if (p.reduced) {
      store_partial<T>(p, work, d, squares, first_row);
    } else {
      store<T>(p, work, d, squares, first_row);
    }
  }
  if (p.reduced) reduce_partials<T>(p, threadIdx.x, reinterpret_cast<float4*>(smem));
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
