// x -> (E4M3 or E2M1 data, packed UE8M0 scales) in one pass, and back.
//
// A block quantises a tile of 128 x 128; a warp has 16 of its rows, a lane eight chunks of eight
// values that all lie in the same eight columns. So a K-group is a quad (gran_k 32) or a half warp
// (gran_k 128), every chunk stays in registers from the load to the store, and each row of a tile
// has one scale word (gran_k 32) or one byte of it (gran_k 128).
#include "device/chunk.cuh"
#include "device/convert.cuh"
#include "device/warp.cuh"
#include "kernels/quantize.h"

namespace sm120 {
namespace {

constexpr int kTile = 128;  // rows and columns
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kChunks = 8;  // a lane's
constexpr int kChunkCols = 8;
constexpr int kWarpRows = kTile / kWarps;
static_assert(kWarps * kWarpRows == kTile && kChunks * 2 == kWarpRows);

// Where a lane stands: its warp's rows in the block's tile, and its columns. Tiles go along the
// columns first.
struct Place {
  int64_t tile_row;
  uint32_t tile_col;
  int warp = threadIdx.x / kWarpSize;
  int chunk = threadIdx.x % 16;     // which columns of the tile
  int half = threadIdx.x / 16 % 2;  // which rows of the warp
  uint32_t col;                     // the lane's first column
  int64_t row;                      // the lane's first row
  int32_t rows_left;                // rows of the matrix from that row on, at most kTile

  __device__ Place(int64_t rows, uint32_t cols) {
    const uint32_t col_tiles = (cols + kTile - 1) / kTile;
    tile_row = static_cast<int64_t>(blockIdx.x / col_tiles) * kTile;
    tile_col = blockIdx.x % col_tiles * kTile;
    col = tile_col + chunk * kChunkCols;
    row = tile_row + first_row();
    rows_left =
        static_cast<int32_t>(min(rows - tile_row, static_cast<int64_t>(kTile))) - first_row();
  }
  __device__ int first_row() const { return warp * kWarpRows + 2 * half; }

  // The lane's chunk i lies this many rows below its first row. Chunks 2p and 2p + 1 are in
  // neighbouring rows, which a transposed source has in one word.
  static __device__ constexpr int row_of(int i) { return 4 * (i / 2) + i % 2; }
  static __device__ constexpr int step_to(int i) { return row_of(i) - row_of(i - 1); }
  __device__ bool has_row(int i) const { return row_of(i) < rows_left; }
};

template <typename T>
using RawBits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// ---- Loads -------------------------------------------------------------------------------------

// Row-major source, any alignment of T.
template <typename T>
__device__ __forceinline__ void load_rows(const QuantizeArgs& args, const Place& at,
                                          Words<T> (&x)[kChunks]) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
#pragma unroll
    for (int j = 0; j < kChunkWords<T>; ++j) x[i][j] = 0;
  }
  if (at.col >= args.cols) return;
  const T* p = static_cast<const T*>(args.x) + at.row * args.stride + at.col;
  const bool vector =
      reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.stride * sizeof(T) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (i > 0) p += at.step_to(i) * args.stride;
    if (!at.has_row(i)) continue;
    if (vector) {
      load_chunk<T, Load::kReadonly>(p, x[i]);
    } else {
      const auto* bits = reinterpret_cast<const RawBits<T>*>(p);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[i][j * sizeof(T) / 4] |= static_cast<uint32_t>(bits[j]) << 8 * (j * sizeof(T) % 4);
      }
    }
  }
}

// Transposed source (stride 1 along the rows): it passes through shared memory in parts of 128
// columns x 256 bytes of rows. 16-byte piece `piece` of column c lies at piece ^ (c / 8 % 16), so
// that the 16 lanes of a half warp, which read the same rows of 16 chunks, use different banks.
constexpr int kPieces = 16;

template <typename T>
__device__ __forceinline__ void stage_columns(const QuantizeArgs& args, int64_t first_row,
                                              uint32_t first_col, uint4 (&part)[kTile][kPieces]) {
  constexpr int kPieceRows = 16 / sizeof(T);
  const int piece = threadIdx.x % kPieces;
  const int64_t row = first_row + piece * kPieceRows;
  const bool vector = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                      args.stride * sizeof(T) % 16 == 0 && row + kPieceRows <= args.rows;
  const int first = threadIdx.x / kPieces;
  constexpr int kStep = kThreads / kPieces;
  uint4 v[kTile / kStep];
#pragma unroll
  for (int i = 0; i < kTile / kStep; ++i) {
    v[i] = make_uint4(0, 0, 0, 0);
    const uint32_t col = first_col + first + i * kStep;
    if (col >= args.cols || row >= args.rows) continue;
    const T* p = static_cast<const T*>(args.x) + col * args.stride + row;
    if (vector) {
      v[i] = load_readonly(reinterpret_cast<const uint4*>(p));
    } else {
      const auto* bits = reinterpret_cast<const RawBits<T>*>(p);
      uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < kPieceRows; ++j) {
        if (row + j < args.rows) {
          w[j * sizeof(T) / 4] |= static_cast<uint32_t>(bits[j]) << 8 * (j * sizeof(T) % 4);
        }
      }
      v[i] = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTile / kStep; ++i) {
    const int col = first + i * kStep;
    part[col][piece ^ (col / 8 % kPieces)] = v[i];
  }
}

template <typename T>
__device__ __forceinline__ void load_columns(const QuantizeArgs& args, const Place& at,
                                             Words<T> (&x)[kChunks]) {
  __shared__ uint4 part[kTile][kPieces];
  constexpr int kPartRows = kPieces * 16 / sizeof(T);
#pragma unroll 1
  for (int first = 0; first < kTile; first += kPartRows) {
    if (first > 0) __syncthreads();  // the part before has been read
    stage_columns<T>(args, at.tile_row + first, at.tile_col, part);
    __syncthreads();
    if (at.warp * kWarpRows / kPartRows * kPartRows != first) continue;
#pragma unroll
    for (int i = 0; i < kChunks; i += 2) {
      const int byte = (at.first_row() + at.row_of(i) - first) * sizeof(T);
#pragma unroll
      for (int j = 0; j < kChunkCols; ++j) {
        const uint4* piece = &part[at.chunk * kChunkCols + j][byte / 16 ^ at.chunk];
        const char* p = reinterpret_cast<const char*>(piece) + byte % 16;
        if constexpr (sizeof(T) == 4) {
          const uint2 pair = *reinterpret_cast<const uint2*>(p);
          x[i][j] = pair.x;
          x[i + 1][j] = pair.y;
        } else {
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(p);
          x[i][j / 2] = j % 2 ? x[i][j / 2] | pair << 16 : pair & 0xffff;
          x[i + 1][j / 2] = j % 2 ? x[i + 1][j / 2] | (pair & 0xffff0000) : pair >> 16;
        }
      }
    }
  }
}

// ---- Scales ------------------------------------------------------------------------------------

// amax[i]: of the lane's chunk i -> of the whole group that the chunk belongs to.
__device__ __forceinline__ void reduce_amax(const QuantizeArgs& args, const Place& at,
                                            uint32_t (&amax)[kChunks]) {
  if (args.gran_mn == 1) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) amax[i] = max_across(max_across(amax[i], 1), 2);
    if (args.gran_k == kTile) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) amax[i] = max_across(max_across(amax[i], 4), 8);
    }
    return;
  }
  uint32_t block = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) block = max(block, amax[i]);
  block = max_across(max_across(max_across(block, 1), 2), 16);
  if (args.gran_k == kTile) block = max_across(max_across(block, 4), 8);

  __shared__ uint32_t warp_amax[kWarps][4];
  if (at.half == 0 && at.chunk % 4 == 0) warp_amax[at.warp][at.chunk / 4] = block;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (args.gran_mn == kTile || w / 2 == at.warp / 2) {
      block = max(block, warp_amax[w][at.chunk / 4]);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) amax[i] = block;
}

// byte[i]: the scale of the group of the lane's chunk i.
__device__ __forceinline__ void store_scales(const QuantizeArgs& args, const Place& at,
                                             const uint32_t (&byte)[kChunks]) {
  // gran_k 32: the tile is one word of each row. Lane q of quad g puts byte g of the words of
  // chunks q and q + 4 together with the three other quads; quads 0 and 1 store them.
  // gran_k 128: the tile is one byte of each row's word, and lanes 0..7 store it. The words of a
  // tile's rows are neighbours, and so are the tiles that share them.
  const bool whole_word = args.gran_k != kTile;
  const uint32_t tile = at.tile_col / kTile;
  const int mine = at.chunk % kChunks;
  const int row = at.row_of(mine);
  const bool exists = row < at.rows_left;
  const int64_t word = (whole_word ? tile : tile / 4) * args.scale.stride + at.row + row;
  // Padding rows are zeroed where there is storage for them.
  const bool padding = at.row + row < (args.rows + 3) / 4 * 4 && word < args.scale.capacity;
  const bool stored = at.chunk < kChunks && (exists || padding);
  if (whole_word) {
    const int q = at.chunk % 4, g = at.chunk / 4;
    const bool group_exists = at.tile_col + 32 * g < args.cols;
    uint32_t low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low = q == i && group_exists ? byte[i] : low;
      high = q == i && group_exists ? byte[i + 4] : high;
    }
    low = or_across(or_across(low << 8 * g, 4), 8);
    high = or_across(or_across(high << 8 * g, 4), 8);
    if (stored) args.scale.words[word] = exists ? (g ? high : low) : 0;
  } else if (stored) {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) own = mine == i && exists ? byte[i] : own;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(args.scale.words + word);
    bytes[tile % 4] = own;
    if (at.tile_col + kTile >= args.cols) {  // no later tile has the bytes after it
      for (uint32_t i = tile % 4 + 1; i < 4; ++i) bytes[i] = 0;
    }
  }
}

// ---- Quantise ----------------------------------------------------------------------------------

template <typename T, bool kFp4, bool kTransposed>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 4)
    quantize_kernel(const QuantizeArgs args, const ScaleRule rule) {
  const Place at(args.rows, args.cols);
  Words<T> x[kChunks];
  if constexpr (kTransposed) {
    load_columns<T>(args, at, x);
  } else {
    load_rows<T>(args, at, x);
  }

  uint32_t scale[kChunks];  // the amax of a chunk, of its group, the byte
#pragma unroll
  for (int i = 0; i < kChunks; ++i) scale[i] = chunk_amax<T>(x[i]);
  reduce_amax(args, at, scale);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) scale[i] = scale_byte(scale[i], rule);
  store_scales(args, at, scale);

  if (at.col >= args.cols) return;
  using Packed = std::conditional_t<kFp4, uint32_t, uint2>;
  const uint32_t row_chunks = args.cols / kChunkCols;
  Packed* data = static_cast<Packed*>(args.data) + at.row * row_chunks + at.col / kChunkCols;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (i > 0) data += at.step_to(i) * static_cast<uint64_t>(row_chunks);
    if (!at.has_row(i)) continue;
    float f[8];
    chunk_to_float<T>(x[i], f);
    if constexpr (kFp4) {
      *data = chunk_to_e2m1<sizeof(T) == 4>(f, scale[i], args.ocp_rule);
    } else {
      *data = chunk_to_e4m3(f, inverse_scale(scale[i]));
    }
  }
}

// ---- Dequantise --------------------------------------------------------------------------------

template <typename T, bool kFp4>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeArgs args) {
  constexpr int kBytes = kFp4 ? 4 : 8;  // of a chunk
  const Place at(args.rows, args.cols);
  const uint32_t col = at.col;
  if (col >= args.cols) return;
  const uint32_t group = col / args.gran_k;
  const bool whole = col + kChunkCols <= args.cols;
  const bool vector_load =
      whole && (reinterpret_cast<uintptr_t>(args.data) | args.stride) % kBytes == 0;
  const bool vector_store =
      whole && reinterpret_cast<uintptr_t>(args.out) % 16 == 0 && args.cols * sizeof(T) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (!at.has_row(i)) continue;
    const int64_t row = at.row + at.row_of(i);
    const auto* source =
        static_cast<const uint8_t*>(args.data) + row * args.stride + (kFp4 ? col / 2 : col);
    uint32_t w[2] = {0, 0};
    if (vector_load) {
      if constexpr (kFp4) {
        w[0] = *reinterpret_cast<const uint32_t*>(source);
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(source);
        w[0] = v.x, w[1] = v.y;
      }
    } else {
      const uint32_t bytes = kFp4 ? (args.cols - col) / 2 : args.cols - col;
#pragma unroll
      for (int j = 0; j < kBytes; ++j) {
        if (j < bytes) w[j / 4] |= static_cast<uint32_t>(source[j]) << 8 * (j % 4);
      }
    }
    const uint32_t word = args.scale[group / 4 * args.scale_stride + row];
    const float scale = scale_value(word >> 8 * (group % 4) & 0xff);
    float f[8];
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if constexpr (kFp4) {
        f[j] = float_of_e2m1(w[0] >> 4 * j & 15) * scale;
        f[j + 1] = float_of_e2m1(w[0] >> 4 * (j + 1) & 15) * scale;
      } else {
        const float2 pair = floats_of_e4m3x2(w[j / 4] >> 8 * (j % 4) & 0xffff);
        f[j] = pair.x * scale;
        f[j + 1] = pair.y * scale;
      }
    }
    Words<T> result;
    chunk_from_float<T>(f, result);
    T* out = static_cast<T*>(args.out) + row * args.cols + col;
    if (vector_store) {
#pragma unroll
      for (int j = 0; j < kChunkWords<T>; j += 4) {
        reinterpret_cast<uint4*>(out)[j / 4] =
            make_uint4(result[j], result[j + 1], result[j + 2], result[j + 3]);
      }
    } else {
      auto* bits = reinterpret_cast<RawBits<T>*>(out);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (col + j < args.cols) bits[j] = result[j * sizeof(T) / 4] >> 8 * (j * sizeof(T) % 4);
      }
    }
  }
}

// ---- Launch ------------------------------------------------------------------------------------

unsigned grid_of(int64_t rows, uint32_t cols) {
  return static_cast<unsigned>((rows + kTile - 1) / kTile * ((cols + kTile - 1) / kTile));
}

template <typename T>
void launch_quantize_as(const QuantizeArgs& args, cudaStream_t stream) {
  const auto kernel = args.fp4          ? args.transposed ? &quantize_kernel<T, true, true>
                                                          : &quantize_kernel<T, true, false>
                      : args.transposed ? &quantize_kernel<T, false, true>
                                        : &quantize_kernel<T, false, false>;
  kernel<<<grid_of(args.rows, args.cols), kThreads, 0, stream>>>(
      args, scale_rule(args.fp4, args.ocp_rule));
}

template <typename T>
void launch_dequantize_as(const DequantizeArgs& args, cudaStream_t stream) {
  const auto kernel = args.fp4 ? &dequantize_kernel<T, true> : &dequantize_kernel<T, false>;
  kernel<<<grid_of(args.rows, args.cols), kThreads, 0, stream>>>(args);
}

}  // namespace

void launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return;
  switch (args.type) {
    case SourceType::kBf16:
      return launch_quantize_as<__nv_bfloat16>(args, stream);
    case SourceType::kFp16:
      return launch_quantize_as<__half>(args, stream);
    case SourceType::kFp32:
      return launch_quantize_as<float>(args, stream);
  }
}

void launch_dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return;
  switch (args.type) {
    case SourceType::kBf16:
      return launch_dequantize_as<__nv_bfloat16>(args, stream);
    case SourceType::kFp16:
      return launch_dequantize_as<__half>(args, stream);
    case SourceType::kFp32:
      return launch_dequantize_as<float>(args, stream);
  }
}

}  // namespace sm120
