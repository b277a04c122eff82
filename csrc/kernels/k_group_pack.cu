#include "kernels/k_group_pack.h"

#include "device/convert.cuh"
#include "device/warp.cuh"
#include "kernels/gemm.h"

namespace sm120 {
namespace {

constexpr int kThreads = 256;
constexpr int kTileBytes = 128;  // of a row of the MN-major source: 128 rows of FP8 or 256 of FP4
constexpr int kTilesPerCta = 4;  // tiles along the rows, for one search of the group
constexpr int kVector = 16;      // bytes
constexpr uint32_t kScaleOne = 127;

__host__ __device__ constexpr int tile_rows(bool fp4) {
  return fp4 ? 2 * kTileBytes : kTileBytes;
}
__host__ __device__ inline int tiles(int64_t n, int tile) {
  return static_cast<int>((n + tile - 1) / tile);
}
int chunks(const KGroupOperand& x) {
  return tiles(x.rows, kTilesPerCta * tile_rows(x.fp4));
}

// What a CTA packs: one K-block of one group.
struct Piece {
  int k_begin, k;      // of the group, in the source
  int block;           // of the group's
  uint32_t scale_row;  // the group's first
};

// Inclusive sum over the warp, from `start` on, that stops at `most` < 2^31: sizes that add up to
// more than the source holds cut the groups off there.
__device__ __forceinline__ uint32_t bounded_sum(uint32_t value, uint32_t start, uint32_t most) {
  const int lane = threadIdx.x % kWarpSize;
  value = min(value, most);
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t below = from_lane_below(value, distance);
    if (lane >= distance) value = min(value + below, most);
  }
  return min(value + start, most);
}

// One warp: finds the group that K-block `block` of the packed form belongs to; k = 0 if it lies
// behind all of them. The grid's first CTA stores where the groups' blocks end.
__device__ void find_piece(const KGroupPack& p, const KGroupOperand& x, int block, bool store_ends,
                           Piece& piece) {
  const int lane = threadIdx.x % kWarpSize;
  const int k_per_scale_row = x.form == ScaleForm::kWords ? 4 * x.gran_k : x.gran_k;
  uint32_t k_before = 0, blocks_before = 0, scale_rows_before = 0;
  bool found = false;
  for (int first = 0; first < p.groups && (!found || store_ends); first += kWarpSize) {
    const int group = first + lane;
    int k = group < p.groups ? max(p.ks[group], 0) : 0;
    k -= k % p.step;
    const uint32_t k_end = bounded_sum(k, k_before, p.total_k);
    const int below = from_lane_below(k_end, 1);
    const int k_begin = lane == 0 ? k_before : below;
    k = k_end - k_begin;
    const int blocks = tiles(k, kBlockK), scale_rows = tiles(k, k_per_scale_row);
    const uint32_t block_end = blocks_before + inclusive_sum(blocks);
    const uint32_t scale_row_end = scale_rows_before + inclusive_sum(scale_rows);
    if (store_ends && group < p.groups) p.ends[group] = block_end;
    const int inside = block - static_cast<int>(block_end - blocks);
    const bool here = inside >= 0 && inside < blocks;
    if (here) piece = {k_begin, k, inside, scale_row_end - scale_rows};
    found |= lanes_where(here) != 0;
    k_before = from_lane(k_end, kWarpSize - 1);
    blocks_before = from_lane(block_end, kWarpSize - 1);
    scale_rows_before = from_lane(scale_row_end, kWarpSize - 1);
  }
  if (!found && lane == 0) piece = {0, 0, 0, 0};
}

// The byte of a K-group's scale, in range or not: NaN behind the end of the scales.
__device__ __forceinline__ uint32_t scale_byte(const KGroupOperand& x, const Piece& piece,
                                               int group, int row) {
  if (group * x.gran_k >= piece.k) return kScaleOne;
  const int64_t scale_row =
      int64_t{piece.scale_row} + (x.form == ScaleForm::kWords ? group / 4 : group);
  if (scale_row >= x.scale_rows) return kScaleNan;
  const int64_t at = scale_row * x.scale_stride + row;
  if (x.form == ScaleForm::kFloats) return byte_of_scale(static_cast<const uint32_t*>(x.scale)[at]);
  if (x.form == ScaleForm::kBytes) return static_cast<const uint8_t*>(x.scale)[at];
  return static_cast<const uint32_t*>(x.scale)[at] >> 8 * (group % 4) & 0xff;
}

// The scales of rows begin .. end - 1. At gran_k 128 a word has the bytes of four K-blocks, and
// each of their CTAs stores its own.
__device__ void pack_scales(const KGroupOperand& x, const Piece& piece, int block, int begin,
                            int end) {
  for (int row = begin + threadIdx.x; row < end; row += kThreads) {
    if (x.gran_k == kBlockK) {
      uint8_t* bytes = reinterpret_cast<uint8_t*>(x.words + block / 4 * x.words_stride + row);
      bytes[block % 4] = scale_byte(x, piece, piece.block, row);
    } else {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word |= scale_byte(x, piece, 4 * piece.block + i, row) << 8 * i;
      }
      x.words[block * x.words_stride + row] = word;
    }
  }
}

// K-major sources: rows move as they are. A group's k is whole vectors, and so is what precedes it.
__device__ void copy_tile(const KGroupOperand& x, const Piece& piece, int block, int first_row) {
  const int shift = x.fp4 ? 1 : 0;
  const int block_bytes = kBlockK >> shift, k_bytes = piece.k >> shift;
  const int vectors = block_bytes / kVector;  // of a row
  const uint8_t* group = x.data + (static_cast<int64_t>(x.rows) * piece.k_begin >> shift);
#pragma unroll
  for (int i = 0; i < kTileBytes * kBlockK / kVector / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int row = first_row + index / vectors, byte = index % vectors * kVector;
    if (row >= x.rows) break;
    const int at = piece.block * block_bytes + byte;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (at < k_bytes) {
      v = *reinterpret_cast<const uint4*>(group + static_cast<int64_t>(row) * k_bytes + at);
    }
    uint8_t* to = x.packed + row * x.packed_stride + static_cast<int64_t>(block) * block_bytes;
    *reinterpret_cast<uint4*>(to + byte) = v;
  }
}

// Transposes a square of elements of kBits, one row a word, the first element lowest.
template <int kBits>
__device__ __forceinline__ void transpose_words(uint32_t* w) {
  constexpr int kSize = 32 / kBits;
#pragma unroll
  for (int distance = 1; distance < kSize; distance *= 2) {
    const int shift = distance * kBits;
    const uint32_t mask = 0xffffffffu / ((1u << shift) + 1);  // the low half of every 2 * shift
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i & distance) continue;
      const uint32_t swap = (w[i] >> shift ^ w[i + distance]) & mask;
      w[i + distance] ^= swap;
      w[i] ^= swap << shift;
    }
  }
}

// MN-major sources: kBlockK rows of K by kTileBytes go through shared memory. Word c of row k lies
// in column (c + k / 16 * 4) % 32, so that the lanes of a warp, which take a few neighbouring words
// of rows 16 or 32 apart, find them in different banks.
using TransposeTile = uint32_t[kBlockK][kTileBytes / 4];

__device__ __forceinline__ int tile_column(int k, int word) {
  return (word + k / 16 * 4) % (kTileBytes / 4);
}

__device__ void load_tile(const KGroupOperand& x, const Piece& piece, int first_byte,
                          TransposeTile& tile) {
  const int row_bytes = x.fp4 ? x.rows / 2 : x.rows;
  constexpr int kVectors = kTileBytes / kVector;
#pragma unroll
  for (int i = 0; i < kBlockK * kVectors / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int k = index / kVectors, byte = first_byte + index % kVectors * kVector;
    const int k_of_group = piece.block * kBlockK + k;
    uint32_t w[4] = {};
    if (k_of_group < piece.k) {
      const uint8_t* from =
          x.data + (static_cast<int64_t>(piece.k_begin) + k_of_group) * x.stride + byte;
      if (x.vector && byte + kVector <= row_bytes) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if (byte + j < row_bytes) w[j / 4] |= static_cast<uint32_t>(from[j]) << 8 * (j % 4);
        }
      }
    }
    *reinterpret_cast<uint4*>(&tile[k][tile_column(k, index % kVectors * 4)]) =
        make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// A thread takes a word of each of 4 * 32 / kBits rows: a vector of each of 32 / kBits packed rows.
template <int kBits>
__device__ void store_tile(const KGroupOperand& x, int block, int first_row,
                           const TransposeTile& tile) {
  constexpr int kSize = 32 / kBits, kRun = 4 * kSize;
  const int lane = threadIdx.x % kWarpSize, run = lane / kSize;
  const int word = threadIdx.x / kWarpSize * kSize + lane % kSize;
  if (word >= kTileBytes / 4) return;
  uint32_t w[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int k = run * kRun + i;
    w[i] = tile[k][tile_column(k, word)];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) transpose_words<kBits>(w + i * kSize);
  const int row = first_row + word * kSize;
  uint8_t* to = x.packed + row * x.packed_stride +
                static_cast<int64_t>(block) * (kBlockK * kBits / 8) + run * kVector;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    if (row + e < x.rows) {
      *reinterpret_cast<uint4*>(to + e * x.packed_stride) =
          make_uint4(w[e], w[e + kSize], w[e + 2 * kSize], w[e + 3 * kSize]);
    }
  }
}

// grid: K-blocks of the packed form, and for each the row chunks of one operand, then of the other.
template <bool kMajorK>
__global__ void __launch_bounds__(kThreads)
    k_group_pack(const __grid_constant__ KGroupPack p, int first_chunks, int all_chunks) {
  __shared__ Piece shared_piece;
  __shared__ __align__(16) TransposeTile tile;
  const int block = blockIdx.x / all_chunks;
  int chunk = blockIdx.x % all_chunks;
  const bool second = chunk >= first_chunks;
  if (second) chunk -= first_chunks;
  const KGroupOperand& x = p.operand[second];
  if (threadIdx.x < kWarpSize) find_piece(p, x, block, blockIdx.x == 0, shared_piece);
  __syncthreads();
  const Piece piece = shared_piece;
  if (piece.k == 0) return;

  const int step = tile_rows(x.fp4), begin = chunk * kTilesPerCta * step;
  const int end = min(begin + kTilesPerCta * step, x.rows);
  pack_scales(x, piece, block, begin, end);
  for (int row = begin; row < end; row += step) {
    if constexpr (kMajorK) {
      copy_tile(x, piece, block, row);
    } else {
      load_tile(x, piece, x.fp4 ? row / 2 : row, tile);
      __syncthreads();
      if (x.fp4) {
        store_tile<4>(x, block, row, tile);
      } else {
        store_tile<8>(x, block, row, tile);
      }
      __syncthreads();
    }
  }
}

}  // namespace

void launch_k_group_pack(const KGroupPack& pack, cudaStream_t stream) {
  const int first = chunks(pack.operand[0]), all = first + chunks(pack.operand[1]);
  const auto kernel = pack.k_major ? &k_group_pack<true> : &k_group_pack<false>;
  kernel<<<static_cast<unsigned>(pack.capacity) * all, kThreads, 0, stream>>>(pack, first, all);
}

}  // namespace sm120
