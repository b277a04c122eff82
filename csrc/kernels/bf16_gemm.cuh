// The BF16 GEMM: the ring, schedule and epilogue of the block-scaled one around HMMA m16n8k16.
//
// What limits it is shared memory, which delivers 128 bytes a clock: an MMA's operands must serve
// many MMAs. So warps take 64 x 64 of the product where the tile allows, and where the tile has
// fewer than eight such parts the warps share K: slice s multiplies part s of every K-block, and
// the slices' sums are added at the tile's end. (Slices that took K-blocks in turn would each hold
// a stage for as long as all of them take to multiply one, and few would be on their way.)
//
// An MMA cuts off, rather than rounds, what does not fit the sum's 24 bits, so the relative error
// of a chain of them grows with its length. Sums longer than p.chain are cut into chains,
// which ordinary additions put together.
#pragma once
#include "device/launch.cuh"
#include "device/operand.cuh"
#include "device/tma.cuh"
#include "host/bf16_config.h"
#include "kernels/split_k.cuh"
#include "kernels/tile_queue.cuh"

namespace sm120 {

// Each operand has a warp that copies it.
inline constexpr int kCopyWarps = 2;

// Operands by the layout of rows, then cols; the host indexes tables by it.
enum class Bf16Majors { kKK, kKMn, kMnK, kMnMn };

template <int kRows, int kCols, int kWarpsDown, int kSliceCount, int kK, Bf16Majors kMajors>
struct Bf16Traits {
  static constexpr int kBlockRows = kRows, kBlockCols = kCols, kBlockK = kK;
  static constexpr int kSlices = kSliceCount, kSliceWarps = kMathWarps / kSlices;
  static constexpr int kWarpsAcross = kSliceWarps / kWarpsDown;
  static constexpr int MT = kRows / kWarpsDown / 16, NT = kCols / kWarpsAcross / 8;
  // Whether the next stage's barrier is looked at early; the largest tile has no registers for it.
  static constexpr bool kLooksAhead = kSlices > 1;
  // Two slices share what follows the sum over K, half of a warp's rows each.
  static constexpr bool kHalves = kSlices == 2;
  static constexpr int kStoreRows = kHalves ? MT / 2 : MT;  // fragments of a warp, at the end
  static constexpr int kStoreThreads = kHalves ? kMathThreads : kSliceWarps * kWarpSize;
  static constexpr Access kColAccess = Access::kPlain;
  static constexpr bool kHeadSplit = false;
  static constexpr bool kChains = has_chains(kCols, kSliceCount);
  static constexpr Major kRowsMajor =
      kMajors == Bf16Majors::kKK || kMajors == Bf16Majors::kKMn ? Major::kK : Major::kMn;
  static constexpr Major kColsMajor =
      kMajors == Bf16Majors::kKK || kMajors == Bf16Majors::kMnK ? Major::kK : Major::kMn;
  // A line of an MN-major operand is one k, so that a tile can be cut off behind any of them.
  static constexpr bool kAnyK = kMajors == Bf16Majors::kMnMn && has_any_k(kCols);
  // At a full stage's barrier: all lanes that copied to it or wrote zeros.
  static constexpr int kFullArrivals = kCopyWarps * (kAnyK ? kWarpSize : 1);

  // Values of a line in one box, of at most 128 bytes. A tile of longer lines is several such
  // atoms: of an MN-major operand's rows or of a K-major one's K.
  static constexpr int kRowsAtom = kRows < 64 ? kRows : 64, kColsAtom = kCols < 64 ? kCols : 64;
  static constexpr int kKAtom = kK < 64 ? kK : 64;

  // Shared-memory map: stages of rows and cols | full | empty | cut | tile queue
  static constexpr int kRowsBytes = 2 * kK * kRows, kColsBytes = 2 * kK * kCols;
  static constexpr int kStageBytes = kRowsBytes + kColsBytes;
  static constexpr int kStages = (kSmemLimit - kQueueBytes - 16) / (kStageBytes + 16);
  static constexpr int kFullAt = kStages * kStageBytes;
  static constexpr int kEmptyAt = kFullAt + 8 * kStages;
  static constexpr int kCutAt = kEmptyAt + 8 * kStages;
  static constexpr int kQueueAt = kCutAt + 16;
  static constexpr int kSmemBytes = kQueueAt + kQueueBytes;

  // Registers a thread; the sum over the CTA's three groups of four warps is 504. What the sums
  // need not the producer may have.
  static constexpr int kMathRegisters = MT * NT < 32 ? 208 : kAnyK && !kChains ? 224 : 232;
  static constexpr int kProducerRegisters = 504 - 2 * kMathRegisters;

  static_assert(kSmemBytes <= kSmemLimit && kStages >= 2 && kStages <= kGemmThreads);
  static_assert((kSlices & (kSlices - 1)) == 0 && kK % kKAtom == 0 && kKAtom >= 32);
  static_assert(kK == 32 * kSlices, "a slice has two steps of 16 k of a K-block");
  static_assert(MT >= 1 && (NT == 1 || NT % 2 == 0) && MT * 16 <= 64 && NT * 8 <= 64);
  static_assert(kRowsBytes % 1024 == 0 && kColsBytes % 1024 == 0, "swizzled tiles: 1024-aligned");
};

template <class T>
struct Bf16Ring {
  uint32_t base;
  PackedRingState<T::kStages> at;

  __device__ uint32_t rows() const { return base + at.stage() * T::kStageBytes; }
  __device__ uint32_t cols() const { return rows() + T::kRowsBytes; }
  __device__ uint32_t full() const { return base + T::kFullAt + 8 * at.stage(); }
  __device__ uint32_t empty() const { return base + T::kEmptyAt + 8 * at.stage(); }
  __device__ uint32_t cut(bool of_cols) const { return base + T::kCutAt + 8 * of_cols; }
};

// ---- Producer -----------------------------------------------------------------------------------

// One operand's tile of the K-block that begins at k. Where it is several atoms: in one copy if the
// matrix's lines consist of whole atoms, or else atom by atom.
template <Major kMajor, int kBlockK, int kRows, int kAtom>
__device__ __forceinline__ void load_operand(uint32_t dst, const CUtensorMap* map, uint32_t full,
                                             int k, int row, int group, bool whole_atoms) {
  constexpr bool kMn = kMajor == Major::kMn;
  constexpr int kLines = kMn ? kBlockK : kRows, kLine = kMn ? kRows : kBlockK;
  const int line = kMn ? k : row, at = kMn ? row : k;
  if constexpr (!kMn && kLine == kAtom) {
    tma_load_3d(dst, map, full, 2 * at, line, group);
  } else if (whole_atoms) {
    tma_load_4d(dst, map, full, 0, line, at / kAtom, group);
  } else {
#pragma unroll
    for (int first = 0; first < kLine; first += kAtom) {
      tma_load_4d(dst + first * 2 * kLines, map, full, 2 * (at + first), line, 0, group);
    }
  }
}

// Zeros in place of the lines from `valid` on, in an MN-major tile. By a whole warp.
template <int kBlockK, int kRows, int kAtom>
__device__ __forceinline__ void cut_lines(uint32_t tile, int valid) {
  constexpr int kLineBytes = 2 * kAtom, kAtomBytes = kLineBytes * kBlockK;
#pragma unroll 1
  for (uint32_t atom = tile; atom < tile + kRows / kAtom * kAtomBytes; atom += kAtomBytes) {
#pragma unroll 1
    for (int at = valid * kLineBytes + 16 * lane_id(); at < kAtomBytes; at += 16 * kWarpSize) {
      sts128(atom + at, make_int4(0, 0, 0, 0));
    }
  }
}

// Whether tiles are in k rather than K-blocks.
template <class T>
__device__ __forceinline__ bool is_in_k(const GemmParams& p) {
  return T::kAnyK && p.schedule == Schedule::kSpans;
}

template <class T>
__device__ __forceinline__ int k_blocks_of(const GemmParams& p, const Tile& tile) {
  const int units = tile.k_end - tile.k_begin;
  return is_in_k<T>(p) ? (units + T::kBlockK - 1) / T::kBlockK : units;
}

// One thread copies an operand. Where groups divide K at any k, its whole warp takes part: what the
// last K-block of a group has of the next group is overwritten with zeros before the math warps see
// it.
template <class T, bool kCols>
__device__ __forceinline__ void produce(const GemmParams& p, Bf16Ring<T> ring, TileQueue<T> queue) {
  constexpr Major kMajor = kCols ? T::kColsMajor : T::kRowsMajor;
  constexpr int kExtent = kCols ? T::kBlockCols : T::kBlockRows;
  constexpr int kAtom = kCols ? T::kColsAtom : T::kRowsAtom;
  constexpr int kBytes = kCols ? T::kColsBytes : T::kRowsBytes;
  const CUtensorMap* map = kCols ? &p.cols : &p.rows;
  const bool grouped = kCols ? p.cols_grouped : p.rows_grouped;
  const bool whole_atoms = kCols ? p.cols_whole_atoms : p.rows_whole_atoms;
  Tile tile;
  bool known = TileScheduler<T>::find_first(p, tile);
  finish_setup();
  const bool copies = lane_id() == 0;
  if (!T::kAnyK && !copies) return;
  uint32_t cut_parity = 0;
  for (;; ++queue.count) {
    if (!known) tile = queue.wait();
    known = false;
    if (tile.group < 0) break;
    const bool in_k = is_in_k<T>(p);
    // Where the product is summed over the groups too, their K-blocks follow one another.
    int group = tile.group, first = tile.k_begin;
    if (!in_k && first >= p.matrix_blocks) {
      group += first / p.matrix_blocks, first %= p.matrix_blocks;
    }
    int k = in_k ? first : first * T::kBlockK;
#pragma unroll 1
    for (int left = k_blocks_of<T>(p, tile); left > 0; --left) {
      const bool cut = in_k && k + T::kBlockK > tile.k_end;
      const uint32_t full = cut ? ring.cut(kCols) : ring.full();
      const uint32_t dst = kCols ? ring.cols() : ring.rows();
      mbarrier_wait(ring.empty(), ring.at.parity() ^ 1);
      if (copies) {
        mbarrier_expect_tx(full, kBytes);
        load_operand<kMajor, T::kBlockK, kExtent, kMajor == Major::kK ? T::kKAtom : kAtom>(
            dst, map, full, k, kCols ? tile.col : tile.row, grouped ? group : 0, whole_atoms);
      } else if (!cut) {
        mbarrier_arrive(full);
      }
      if constexpr (T::kAnyK) {
        if (cut) {
          mbarrier_wait(full, cut_parity);
          cut_parity ^= 1;
          cut_lines<T::kBlockK, kExtent, kAtom>(dst, tile.k_end - k);
          async_proxy_fence();
          mbarrier_arrive(ring.full());
        }
      }
      ring.at.advance();
      k += T::kBlockK;
      if (k >= p.matrix_blocks * T::kBlockK) k = 0, ++group;
    }
    if (T::kAnyK) __syncwarp();  // all lanes have read the tile
    if (copies) mbarrier_arrive(queue.empty());
  }
  if (copies) pdl_launch_dependents();
}

// ---- Consumer -----------------------------------------------------------------------------------

// Which slice of K a warp multiplies, and which part of the tile: its first row and column.
template <class T>
struct WarpPlace {
  int slice, row, col;

  // Computed where it is needed, rather than in registers all the while.
  static __device__ __forceinline__ WarpPlace now() {
    const int warp = opaque(threadIdx.x) / kWarpSize, in_slice = warp % T::kSliceWarps;
    return {warp / T::kSliceWarps, in_slice / T::kWarpsAcross * T::MT * 16,
            in_slice % T::kWarpsAcross * T::NT * 8};
  }
};

// A warp's sums over its slice of `blocks` K-blocks. With slices the last stage is not given back.
template <class T>
__device__ __forceinline__ void accumulate(int blocks, Bf16Ring<T>& ring,
                                           float (&acc)[T::MT][T::NT][4]) {
  constexpr int kPairs = (T::NT + 1) / 2;
  constexpr int kLoadRows = (T::MT + 1) / 2;  // rows of fragments in whose time the next are loaded
  using Rows = ReaderBf16<T::kRowsMajor, T::kBlockRows, T::kBlockK, T::kRowsAtom, T::kKAtom>;
  using Cols = ReaderBf16<T::kColsMajor, T::kBlockCols, T::kBlockK, T::kColsAtom, T::kKAtom>;
  const WarpPlace<T> place = WarpPlace<T>::now();
  const Rows rows = Rows::template at<true>(place.row, 2 * place.slice);
  const Cols cols = Cols::template at<false>(place.col, 2 * place.slice);

  // While one step of 16 k is multiplied the next one's fragments are loaded, across stages too. A
  // stage is given back as soon as its second step's are there. No jump divides a step, so that the
  // next stage's barrier is looked at while MMAs are issued.
  uint32_t a[2][T::MT][4], b[2][kPairs][4];
  if (blocks <= 0) return;
  mbarrier_wait(ring.full(), ring.at.parity());
#pragma unroll
  for (int i = 0; i < T::MT; ++i) rows.load(a[0][i], ring.rows(), i, 0);
#pragma unroll
  for (int j = 0; j < kPairs; ++j) cols.load(b[0][j], ring.cols(), j, 0);
#pragma unroll 1
  for (; blocks > 0; --blocks) {
    const bool more = blocks > 1;
    Bf16Ring<T> next = ring;
    next.at.advance();
    bool next_full = false;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int then = 1 - step;
      if (step == 1 && more) {  // else the loads below read this stage again, for nothing
        if (!next_full) mbarrier_wait(next.full(), next.at.parity());
        ring.at = next.at;
      }
#pragma unroll
      for (int i = 0; i < T::MT; ++i) {
        // All loads in the first half of the step.
#pragma unroll
        for (int x = 2 * i; x < min(2 * i + 2, T::MT); ++x) {
          rows.load(a[then][x], ring.rows(), x, then);
        }
#pragma unroll
        for (int j = kPairs * i / kLoadRows; j < min(kPairs * (i + 1) / kLoadRows, kPairs); ++j) {
          cols.load(b[then][j], ring.cols(), j, then);
        }
#pragma unroll
        for (int j = 0; j < T::NT; ++j) {
          const uint32_t (&pair)[4] = b[step][j / 2];
          const uint32_t column[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
          mma_bf16(acc[i][j], a[step][i], column);
        }
        if (T::kLooksAhead && step == 0 && i == kLoadRows - 1) {
          next_full = mbarrier_test(next.full(), next.at.parity());
        }
      }
      if (step == 0) {
        uint32_t loaded = 0;  // from this stage, in either step
#pragma unroll
        for (int x = 0; x < 2 * T::MT; ++x) loaded |= a[x % 2][x / 2][0];
#pragma unroll
        for (int x = 0; x < 2 * kPairs; ++x) loaded |= b[x % 2][x / 2][0];
        release_loaded_stage(ring.empty(), loaded, more);
      }
    }
  }
  if constexpr (T::kSlices == 1) {
    release_stage(ring.empty());
    ring.at.advance();
  }
}

// A tile's sums of the chains of MMAs so far, kept by the thread that has them.
template <class T>
__device__ __forceinline__ float4* carried_fragment(const GemmParams& p, int fragment) {
  constexpr int kVectors = T::kStoreRows * T::NT * T::kStoreThreads;
  const uint32_t mine = opaque(blockIdx.x * kVectors + threadIdx.x);  // no earlier than here
  return reinterpret_cast<float4*>(p.carry) + mine + fragment * T::kStoreThreads;
}

template <class T>
__device__ __forceinline__ void put_away(const GemmParams& p,
                                         const float (&acc)[T::kStoreRows][T::NT][4]) {
#pragma unroll
  for (int f = 0; f < T::kStoreRows * T::NT; ++f) {
    const float (&v)[4] = acc[f / T::NT][f % T::NT];
    *carried_fragment<T>(p, f) = make_float4(v[0], v[1], v[2], v[3]);
  }
}

template <class T>
__device__ __forceinline__ void add_carried(const GemmParams& p,
                                            float (&acc)[T::kStoreRows][T::NT][4]) {
  add_fragments<T::kStoreRows * T::NT>(&acc[0][0][0], carried_fragment<T>(p, 0), T::kStoreThreads);
}

// Adds the slices' sums of a tile that has K-blocks: all of them into slice 0's, or with kHalves
// half of them into each slice's first kStoreRows fragments. By every math thread. They go through
// the tile's last stage, which no warp has given back yet; it is given back.
template <class T>
__device__ __forceinline__ void add_slices(float (&acc)[T::MT][T::NT][4], Bf16Ring<T>& ring) {
  constexpr int kRound = T::kStageBytes / (16 * kMathThreads);  // fragments that fit the stage
  constexpr int kSliceThreads = T::kSliceWarps * kWarpSize;
  constexpr int kFragments = T::kStoreRows * T::NT;             // of a thread, that it gives away
  constexpr int kUnroll = T::MT * T::NT <= 2 ? T::kSlices : 1;  // where latency counts
  const int slice = WarpPlace<T>::now().slice;
  float4* const scratch = static_cast<float4*>(smem_pointer(ring.rows())) + threadIdx.x;
  auto& sums = reinterpret_cast<float (&)[T::MT * T::NT][4]>(acc);
  if constexpr (T::kHalves) {  // its own half first
#pragma unroll
    for (int x = 0; x < kFragments * 4; ++x) {
      float& low = sums[x / 4][x % 4];
      float& high = sums[kFragments + x / 4][x % 4];
      const float own = slice > 0 ? high : low, other = slice > 0 ? low : high;
      low = own, high = other;
    }
  }
#pragma unroll
  for (int first = 0; first < kFragments; first += kRound) {
    const int count = min(kRound, kFragments - first);
    // All reads of the stage as operands, and of the round before, are over.
    named_barrier<1, kMathThreads>();
    if (T::kHalves || slice > 0) {
#pragma unroll
      for (int f = 0; f < count; ++f) {
        const float (&v)[4] = sums[(T::kHalves ? kFragments : 0) + first + f];
        scratch[f * kMathThreads] = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
    named_barrier<1, kMathThreads>();
    if (!T::kHalves && slice > 0) continue;
#pragma unroll kUnroll
    for (int x = 1; x < T::kSlices; ++x) {
      const float4* theirs = scratch + ((slice ^ x) - slice) * kSliceThreads;
#pragma unroll
      for (int f = 0; f < count; ++f) {
        float (&v)[4] = sums[first + f];
        const float4 add = theirs[f * kMathThreads];
        v[0] += add.x, v[1] += add.y, v[2] += add.z, v[3] += add.w;
      }
    }
  }
  // The stage's own barriers order these sums before the operands that come next, by way of the
  // producer; this one does it where racecheck sees it.
  named_barrier<1, kMathThreads>();
  release_stage(ring.empty());
  ring.at.advance();
}

template <class T>
__global__ void __launch_bounds__(kGemmThreads, 1) bf16_gemm(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  Bf16Ring<T> ring;
  TileQueue<T> queue;
  ring.base = queue.base = opaque(smem_address(smem));
  if (threadIdx.x == 0) {
    init_ring<T>(ring.base, T::kFullArrivals);
  } else if (threadIdx.x == kWarpSize) {
    queue.init_barriers(kMathWarps + kCopyWarps);
  } else if (threadIdx.x == kMathThreads + 3 * kWarpSize) {  // of the warp that has no role
    if constexpr (T::kAnyK) {
      mbarrier_init(ring.cut(false), 1);
      mbarrier_init(ring.cut(true), 1);
      mbarrier_init_fence();
    }
    if (p.k_blocks > 0) {  // else there are no maps
      tma_prefetch_map(&p.rows);
      tma_prefetch_map(&p.cols);
    }
  }
  const int warp = threadIdx.x / kWarpSize;
  if (warp >= kMathWarps) {
    shrink_registers<T::kProducerRegisters>();
    if (warp == kMathWarps) return schedule<T>(p, queue);
    if (warp == kMathWarps + 1) return produce<T, false>(p, ring, queue);
    if (warp == kMathWarps + 2) return produce<T, true>(p, ring, queue);
    return finish_setup();
  }

  finish_setup();
  grow_registers<T::kMathRegisters>();
  // Begun anew here: ptxas keeps in local memory what lives on from where registers were few.
  ring.at = {new_zero()}, queue.count = new_zero();
  // The parameters of the stores come into the constant cache, cold when a kernel starts, while
  // there is nothing else to do.
  read_here(p.out.d, p.out.mid);
  for (;; ++queue.count) {
    const Tile tile = queue.wait();
    if (tile.group < 0) break;
    float acc[T::MT][T::NT][4] = {};
    accumulate<T>(k_blocks_of<T>(p, tile), ring, acc);
    // From here on the tile is read anew, rather than kept in registers through the loop.
    if (T::kSlices > 1 && k_blocks_of<T>(p, queue.read()) > 0) add_slices<T>(acc, ring);
    auto& sums = reinterpret_cast<float (&)[T::kStoreRows][T::NT][4]>(acc);
    const WarpPlace<T> at = WarpPlace<T>::now();
    const bool stores = T::kHalves || at.slice == 0;
    const int chain = T::kChains ? queue.read().chain : 0;
    if (stores && chain & kCarried) add_carried<T>(p, sums);
    if (!(chain & kMore)) {
      store_tile<T>(p, queue, sums, stores, at.row + at.slice * T::kStoreRows * 16, at.col);
    } else if (stores) {
      put_away<T>(p, sums);
    }
    release_stage(queue.empty());
  }
}

}  // namespace sm120
