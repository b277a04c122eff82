// How a warp's lanes read A (16-row) and B (8-row) fragments from a swizzled, K-major tile.
//
// Lane 4g + t. Three access patterns, by the operand's format and its partner's:
//   like formats        32 bytes of a row a step, by ldmatrix: the MMA's own fragment order.
//   FP4 (A) beside FP8  16 bytes a step, by ldmatrix: lane t gets the 8 values k = 8t .. 8t+7.
//   FP8 (B) beside FP4  32 bytes a step, by 8-byte loads, so that lane t gets the same k's.
// The order of k within a 32-block is free as long as A and B agree. The mixed pair always has FP4
// as A: a lane's 8 bytes of FP8 are then an aligned register pair, just what a B fragment is.
// In the last pattern fragment column c is tile row 2(c mod 4) + c / 4, because rows 0, 2, 4, 6 of
// a swizzled tile lie in different banks and rows 0, 1, 2, 3 do not.
#pragma once
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"

namespace sm120 {

enum class Access { kPlain, kPackedFp4, kPairedFp8 };

template <Format kOwn, Format kOther>
inline constexpr Access kAccess = kOwn == kOther         ? Access::kPlain
                                  : kOwn == Format::kFp4 ? Access::kPackedFp4
                                                         : Access::kPairedFp8;

// Bytes of a row that one MMA step consumes.
template <Access kMode>
inline constexpr int kStepBytes = kMode == Access::kPackedFp4 ? 16 : 32;

// Tile row that holds column c (0..7) of a B fragment.
template <Access kMode>
__device__ __forceinline__ int fragment_column(int c) {
  return kMode == Access::kPairedFp8 ? 2 * (c & 3) + (c >> 2) : c;
}

// A reader's kHeld is how many of a row's steps have an offset of their own, to be held in
// registers: all, or 1 where there are none to spare or a loop over steps is not unrolled.
template <Access kMode, int kRowBytes>
inline constexpr int kHeldSteps = kNative ? kRowBytes / kStepBytes<kMode> : 1;

template <Access kMode, int kRowBytes, int kHeld = kHeldSteps<kMode, kRowBytes>>
class ReaderA {
 public:
  static constexpr int kRegs = kMode == Access::kPackedFp4 ? 2 : 4;

  static_assert(kMode != Access::kPairedFp8, "beside FP4, FP8 is the B operand");

  // first_row: tile row of the warp's first fragment, a multiple of 16. first_byte: where the
  // K-block begins in the tile's rows.
  __device__ explicit ReaderA(int first_row, int first_byte = 0) {
    const int lane = lane_id();
    const int chunk = kMode == Access::kPlain ? lane / 16 : 0;
    const uint32_t offset = swizzled<kRowBytes>(first_row + lane % 16, first_byte + 16 * chunk);
#pragma unroll
    for (int s = 0; s < kHeld; ++s) offset_[s] = kept(offset ^ (s * kStepBytes<kMode>));
  }

  // r: [kRegs] of fragment m_tile (16 rows each) at the given step
  __device__ __forceinline__ void load(uint32_t (&r)[kRegs], uint32_t tile, int m_tile,
                                       int step) const {
    ldmatrix<kRegs>(r, tile + offset(step) + m_tile * 16 * kRowBytes);
  }

 private:
  __device__ __forceinline__ uint32_t offset(int step) const {
    return kHeld == 1 ? offset_[0] ^ (step * kStepBytes<kMode>) : offset_[step];
  }
  uint32_t offset_[kHeld];
};

template <Access kMode, int kRowBytes, int kTiles, int kHeld = kHeldSteps<kMode, kRowBytes>>
class ReaderB {
 public:
  static constexpr int kRegs = kMode == Access::kPackedFp4 ? 1 : 2;

  // first_row: tile row of the warp's first fragment, a multiple of 8
  __device__ explicit ReaderB(int first_row, int first_byte = 0) {
    const int lane = lane_id();
    uint32_t offset;
    if constexpr (kMode == Access::kPairedFp8) {
      offset = swizzled<kRowBytes>(first_row + fragment_column<kMode>(lane / 4),
                                   first_byte + 8 * (lane % 4));
    } else if constexpr (kMode == Access::kPackedFp4) {  // matrices: tiles j, j+1 ..
      offset = swizzled<kRowBytes>(first_row + lane % (8 * kGroup), first_byte);
    } else {  // matrices: tile j chunks 0, 1, tile j+1 chunks 0, 1
      const int row = lane % 8 + (kTiles > 1 ? lane / 16 * 8 : 0);
      offset = swizzled<kRowBytes>(first_row + row, first_byte + 16 * (lane / 8 % 2));
    }
#pragma unroll
    for (int s = 0; s < kHeld; ++s) offset_[s] = kept(offset ^ (s * kStepBytes<kMode>));
  }

  // r: [kTiles][kRegs], fragments of 8 rows each, at the given step
  __device__ __forceinline__ void load(uint32_t (&r)[kTiles][kRegs], uint32_t tile,
                                       int step) const {
    const uint32_t address = tile + offset(step);
#pragma unroll
    for (int j = 0; j < kTiles; j += kGroup) {
      if constexpr (kMode == Access::kPairedFp8) {
        lds64(r[j][0], r[j][1], address + j * 8 * kRowBytes);
      } else {
        ldmatrix<kGroup * kRegs>(r[j], address + j * 8 * kRowBytes);
      }
    }
  }

 private:
  // fragments one instruction reads
  static constexpr int kGroup = kMode == Access::kPairedFp8 || kTiles % 2        ? 1
                                : kMode == Access::kPackedFp4 && kTiles % 4 == 0 ? 4
                                                                                 : 2;
  __device__ __forceinline__ uint32_t offset(int step) const {
    return kHeld == 1 ? offset_[0] ^ (step * kStepBytes<kMode>) : offset_[step];
  }
  uint32_t offset_[kHeld];
};

// ---- bf16 ---------------------------------------------------------------------------------------

// How a bf16 operand lies in memory, and so in a tile. K-major: chunks of kKAtom k, each kRows
// lines of kKAtom values. MN-major: atoms of kAtom rows, each kBlockK lines of kAtom values, a line
// being one k.
enum class Major { kK, kMn };

// Blocks of 16 rows x 16 k by one ldmatrix: an A fragment, or two B fragments. MN-major blocks are
// transposed on the way.
template <Major kMajor, int kRows, int kBlockK, int kAtom, int kKAtom>
class ReaderBf16 {
 public:
  static constexpr int kLineBytes = 2 * (kMajor == Major::kK ? kKAtom : kAtom);

  // first_row: tile row of the warp's first block. A warp's rows are a power of two, aligned to
  // their number and within an atom. first_step: the warp's first 16 k; its steps are a power of
  // two, aligned to their number and within an atom. kRowsInner: A's order of the four 8x8 matrices
  // (rows before k), or else B's.
  template <bool kRowsInner>
  static __device__ ReaderBf16 at(int first_row, int first_step) {
    constexpr int kAtomSteps = kKAtom / 16;
    const int lane = lane_id(), q = lane / 8;
    // A tile of 8 rows has their one half twice.
    const int row_half = kRows < 16 ? 0 : kRowsInner ? q % 2 : q / 2;
    const int k_half = kRowsInner ? q / 2 : q % 2;
    ReaderBf16 reader;
    if constexpr (kMajor == Major::kK) {
      reader.offset_ = first_step / kAtomSteps * (kLineBytes * kRows) +
                       swizzled<kLineBytes>(first_row + 8 * row_half + lane % 8,
                                            32 * (first_step % kAtomSteps) + 16 * k_half);
    } else {
      reader.offset_ = first_row / kAtom * (kLineBytes * kBlockK) +
                       swizzled<kLineBytes>(16 * first_step + 8 * k_half + lane % 8,
                                            first_row % kAtom * 2 + 16 * row_half);
    }
    return reader;
  }

  // r: rows 16 * block .. + 15 of the warp's, k 16 * step .. + 15 of its steps. The tile is
  // 128-byte aligned, so that what moves within a line may be XORed in last.
  __device__ __forceinline__ void load(uint32_t (&r)[4], uint32_t tile, int block, int step) const {
    if constexpr (kMajor == Major::kK) {
      ldmatrix<4>(r, ((tile + offset_) ^ (32 * step)) + block * 16 * kLineBytes);
    } else {
      ldmatrix_transposed(r, ((tile + offset_) ^ (32 * block)) + step * 16 * kLineBytes);
    }
  }

 private:
  uint32_t offset_;
};

}  // namespace sm120
