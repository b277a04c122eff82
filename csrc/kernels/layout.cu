// Scale forms and packed FP4. These kernels move bytes; every one takes any alignment.
#include "device/convert.cuh"
#include "kernels/layout.h"

namespace sm120 {
namespace {

constexpr int kThreads = 256;

__host__ __device__ constexpr int64_t tiles(int64_t n, int64_t tile) {
  return (n + tile - 1) / tile;
}

bool aligned(const void* p, int64_t stride, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride)) % bytes == 0;
}

// ---- Scales ------------------------------------------------------------------------------------

// A block writes 32 rows of 8 words: whole 128-byte lines of the packed form, and 32 neighbouring
// groups of each row of the plain one.
constexpr int kPackRows = 32;
constexpr int kPackWords = kThreads / kPackRows;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_scales_kernel(const PlainScales source, int64_t rows, int64_t groups, int gran_mn,
                       const PackedScales out) {
  const int64_t row_tiles = tiles(rows, kPackRows);
  const int64_t row = blockIdx.x % row_tiles * kPackRows + threadIdx.x % kPackRows;
  const int64_t column = blockIdx.x / row_tiles * kPackWords + threadIdx.x / kPackRows;
  const int64_t word = column * out.stride + row;
  if (4 * column >= groups) return;
  if (row >= rows) {
    if (row < tiles(rows, 4) * 4 && word < out.capacity) out.words[word] = 0;
    return;
  }
  const T* scale = static_cast<const T*>(source.scale) + row / gran_mn * source.row_stride;
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t group = 4 * column + i;
    if (group >= groups) break;
    const T value = scale[group * source.group_stride];
    if constexpr (sizeof(T) == 4) {
      packed |= byte_of_scale(value) << 8 * i;
    } else {
      packed |= static_cast<uint32_t>(value) << 8 * i;
    }
  }
  out.words[word] = packed;
}

// A block writes 32 groups of 8 rows.
constexpr int kUnpackGroups = 32;
constexpr int kUnpackRows = kThreads / kUnpackGroups;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    unpack_scales_kernel(const uint32_t* words, int64_t stride, int64_t rows, int64_t groups,
                         T* out) {
  const int64_t group_tiles = tiles(groups, kUnpackGroups);
  const int64_t group = blockIdx.x % group_tiles * kUnpackGroups + threadIdx.x % kUnpackGroups;
  const int64_t row = blockIdx.x / group_tiles * kUnpackRows + threadIdx.x / kUnpackGroups;
  if (row >= rows || group >= groups) return;
  const uint32_t byte = words[group / 4 * stride + row] >> 8 * (group % 4) & 0xff;
  if constexpr (sizeof(T) == 4) {
    out[row * groups + group] = scale_value(byte);
  } else {
    out[row * groups + group] = byte;
  }
}

// ---- Packed FP4 --------------------------------------------------------------------------------

// Four codes, one a byte <-> the low 16 bits of a word.
__device__ __forceinline__ uint32_t pack_nibbles(uint32_t codes) {
  const uint32_t low = codes & 0x0f0f0f0f;
  const uint32_t pairs = low | low >> 4;  // bytes 0 and 2
  return (pairs & 0xff) | (pairs >> 8 & 0xff00);
}

__device__ __forceinline__ uint32_t unpack_nibbles(uint32_t packed) {
  const uint32_t pairs = (packed & 0xff) | (packed & 0xff00) << 8;
  return (pairs | pairs << 4) & 0x0f0f0f0f;
}

constexpr int kVectorBytes = 8;  // packed, a thread

__global__ void __launch_bounds__(kThreads)
    pack_fp4_kernel(const uint8_t* codes, uint8_t* packed, int64_t packed_bytes, bool vector) {
  const int64_t first = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kVectorBytes;
  if (vector && first + kVectorBytes <= packed_bytes) {
    const uint4 v = *reinterpret_cast<const uint4*>(codes + 2 * first);
    *reinterpret_cast<uint2*>(packed + first) = make_uint2(
        pack_nibbles(v.x) | pack_nibbles(v.y) << 16, pack_nibbles(v.z) | pack_nibbles(v.w) << 16);
    return;
  }
  for (int64_t i = first; i < min(first + kVectorBytes, packed_bytes); ++i) {
    packed[i] = (codes[2 * i] & 15) | codes[2 * i + 1] << 4;
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_fp4_kernel(const uint8_t* packed, uint8_t* codes, int64_t packed_bytes, bool vector) {
  const int64_t first = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kVectorBytes;
  if (vector && first + kVectorBytes <= packed_bytes) {
    const uint2 v = *reinterpret_cast<const uint2*>(packed + first);
    *reinterpret_cast<uint4*>(codes + 2 * first) =
        make_uint4(unpack_nibbles(v.x), unpack_nibbles(v.x >> 16), unpack_nibbles(v.y),
                   unpack_nibbles(v.y >> 16));
    return;
  }
  for (int64_t i = first; i < min(first + kVectorBytes, packed_bytes); ++i) {
    codes[2 * i] = packed[i] & 15;
    codes[2 * i + 1] = packed[i] >> 4;
  }
}

// A block transposes 128 x 128 codes through shared memory. Word w of row r lies in column
// (w + r / 8) % 16 of the tile: a half warp reads the same word of rows 8 apart, and so from
// different banks.
constexpr int kTileCodes = 128;
constexpr int kTileWords = kTileCodes / 8;

__global__ void __launch_bounds__(kThreads)
    transpose_fp4_kernel(const uint8_t* packed, int64_t stride, int64_t rows, int64_t row_bytes,
                         uint8_t* out, bool vector_load, bool vector_store) {
  __shared__ uint32_t tile[kTileCodes][kTileWords];
  const int64_t byte_tiles = tiles(row_bytes, kTileCodes / 2);
  const int64_t first_row = blockIdx.x / byte_tiles * kTileCodes;
  const int64_t first_byte = blockIdx.x % byte_tiles * (kTileCodes / 2);
  const int lane = threadIdx.x % 16;

#pragma unroll
  for (int i = 0; i < kTileCodes / 16; ++i) {
    const int r = threadIdx.x / 16 + 16 * i;
    const int64_t byte = first_byte + 4 * lane;
    const uint8_t* source = packed + (first_row + r) * stride + byte;
    uint32_t word = 0;
    if (first_row + r < rows) {
      if (vector_load && byte + 4 <= row_bytes) {
        word = *reinterpret_cast<const uint32_t*>(source);
      } else {
        for (int j = 0; j < 4 && byte + j < row_bytes; ++j) {
          word |= static_cast<uint32_t>(source[j]) << 8 * j;
        }
      }
    }
    tile[r][(lane + r / 8) % kTileWords] = word;
  }
  __syncthreads();

  // A thread gathers one byte column of 8 rows: a word of each of two output rows.
  const int64_t out_byte = first_row / 2 + 4 * lane;
  const int64_t out_bytes = rows / 2;
#pragma unroll
  for (int i = 0; i < kTileCodes / 2 / 16; ++i) {
    const int column = threadIdx.x / 16 + 16 * i;  // byte of the source row
    uint32_t even = 0, odd = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t word = tile[8 * lane + k][(column / 4 + lane) % kTileWords];
      const uint32_t pair = word >> 8 * (column % 4);
      even |= (pair & 15) << 4 * k;
      odd |= (pair >> 4 & 15) << 4 * k;
    }
    if (first_byte + column >= row_bytes) break;
    uint8_t* p = out + 2 * (first_byte + column) * out_bytes + out_byte;
    if (vector_store && out_byte + 4 <= out_bytes) {
      *reinterpret_cast<uint32_t*>(p) = even;
      *reinterpret_cast<uint32_t*>(p + out_bytes) = odd;
    } else {
      for (int j = 0; j < 4 && out_byte + j < out_bytes; ++j) {
        p[j] = even >> 8 * j;
        p[out_bytes + j] = odd >> 8 * j;
      }
    }
  }
}

}  // namespace

void launch_pack_scales(const PlainScales& source, int64_t rows, int64_t groups, int gran_mn,
                        const PackedScales& out, cudaStream_t stream) {
  if (rows == 0 || groups == 0) return;
  const auto kernel = source.fp32 ? &pack_scales_kernel<uint32_t> : &pack_scales_kernel<uint8_t>;
  // The padding rows lie in the last row tile: its size is a multiple of 4.
  const auto grid = static_cast<unsigned>(tiles(rows, kPackRows) * tiles(groups, 4 * kPackWords));
  kernel<<<grid, kThreads, 0, stream>>>(source, rows, groups, gran_mn, out);
}

void launch_unpack_scales(const uint32_t* words, int64_t stride, int64_t rows, int64_t groups,
                          void* out, bool fp32, cudaStream_t stream) {
  if (rows == 0 || groups == 0) return;
  const auto grid = static_cast<unsigned>(tiles(rows, kUnpackRows) * tiles(groups, kUnpackGroups));
  if (fp32) {
    unpack_scales_kernel<<<grid, kThreads, 0, stream>>>(words, stride, rows, groups,
                                                        static_cast<float*>(out));
  } else {
    unpack_scales_kernel<<<grid, kThreads, 0, stream>>>(words, stride, rows, groups,
                                                        static_cast<uint8_t*>(out));
  }
}

void launch_pack_fp4(const uint8_t* codes, uint8_t* packed, int64_t packed_bytes,
                     cudaStream_t stream) {
  if (packed_bytes == 0) return;
  const bool vector = aligned(codes, 0, 16) && aligned(packed, 0, 8);
  const auto grid = static_cast<unsigned>(tiles(packed_bytes, kThreads * kVectorBytes));
  pack_fp4_kernel<<<grid, kThreads, 0, stream>>>(codes, packed, packed_bytes, vector);
}

void launch_unpack_fp4(const uint8_t* packed, uint8_t* codes, int64_t packed_bytes,
                       cudaStream_t stream) {
  if (packed_bytes == 0) return;
  const bool vector = aligned(packed, 0, 8) && aligned(codes, 0, 16);
  const auto grid = static_cast<unsigned>(tiles(packed_bytes, kThreads * kVectorBytes));
  unpack_fp4_kernel<<<grid, kThreads, 0, stream>>>(packed, codes, packed_bytes, vector);
}

void launch_transpose_fp4(const uint8_t* packed, int64_t stride, int64_t rows, int64_t row_bytes,
                          uint8_t* out, cudaStream_t stream) {
  if (rows == 0 || row_bytes == 0) return;
  const auto grid =
      static_cast<unsigned>(tiles(rows, kTileCodes) * tiles(row_bytes, kTileCodes / 2));
  transpose_fp4_kernel<<<grid, kThreads, 0, stream>>>(
      packed, stride, rows, row_bytes, out, aligned(packed, stride, 4), aligned(out, rows / 2, 4));
}

}  // namespace sm120
