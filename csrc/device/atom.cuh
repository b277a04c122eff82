// The block-scaled MMA of a warp tile, native (sm_120f) or emulated (sm_90a).
//
// A WarpMma<A, B, MT, NT> multiplies MT fragments of 16 rows with NT fragments of 8 columns, K
// advancing by kStepK a step and by kBlockK = 128 a block. Once a block it loads the scale words
// from shared memory; once a step it takes the step's scales and B fragments; then each A fragment,
// converted beforehand, is multiplied with all of them. acc[i][j] is the MMA's C fragment: rows g,
// g + 8 of tile i, columns 2t, 2t + 1 of j.
#pragma once
#include <utility>

#include "device/bits.cuh"
#include "device/operand.cuh"
#include "kernels/gemm.h"

namespace sm120 {

template <int... kI, class F>
__device__ __forceinline__ void static_for_impl(std::integer_sequence<int, kI...>, F&& f) {
  (f(std::integral_constant<int, kI>{}), ...);
}
// f(integral_constant<int, i>) for i = 0 .. kCount-1: indices that asm immediates can use.
template <int kCount, class F>
__device__ __forceinline__ void static_for(F&& f) {
  static_for_impl(std::make_integer_sequence<int, kCount>{}, static_cast<F&&>(f));
}

// Byte permute, PTX ISA 9.7.9.7 "prmt"; selector nibble 0..3 = byte of a, 4..7 = byte of b.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

inline constexpr uint32_t kNoScale = 0x7f;  // the code of 1.0

// Byte selector that turns a loaded scale word into the four scales of a K-block.
// gran_k 32: the word's own bytes, those past the last K-group replaced by kNoScale in the last
// block (their data is zero, but a stray 0xFF would make it NaN). gran_k 128: byte block % 4, four
// times.
__device__ __forceinline__ uint32_t scale_selector(const ScaleGran& gran, int block, bool last) {
  const uint32_t selector = gran.select + (block & 3) * gran.select_step;
  return last ? selector ^ gran.select_tail : selector;
}

// The scales of one row or column in a K-block, out of its word in shared memory.
//   kFine    gran_k 32 and a whole block: the word as it is.
//   kCoarse  gran_k 128: one byte, at the address of the word + block % 4; the others stay 0.
//   kSpread  one byte, at its address: what a lane of SpreadMma needs (device/spread_mma.cuh).
//   kAny     four scales by a byte selector.
enum class ScaleRead { kFine, kCoarse, kSpread, kAny };

template <ScaleRead kRead>
__device__ __forceinline__ uint32_t read_scale(uint32_t address, uint32_t selector) {
  if constexpr (kRead == ScaleRead::kFine) return lds32(address);
  if constexpr (kRead == ScaleRead::kCoarse || kRead == ScaleRead::kSpread) return lds8(address);
  return prmt(lds32(address), kNoScale, selector);
}

// How scales are applied.
//   kPerBlock  one scale covers the whole block on both sides (ScaleRead::kCoarse). The emulation
//              sums the block's four 32-blocks before it scales them.
//   kExact     handles every exponent code. Otherwise all are known to lie in 64 .. 191, where no
//              product leaves the range of normal floats and neither 0 (a subnormal) nor 0xFF (NaN)
//              needs care. The native MMA needs no such distinction.
template <bool kPerBlockValue, bool kExactValue>
struct ScalingMode {
  static constexpr bool kPerBlock = kPerBlockValue, kExact = kExactValue;
};

// K of the MMA instruction.
template <Format kA, Format kB>
inline constexpr int kNativeStepK = kA == Format::kFp4 && kB == Format::kFp4 ? 64 : 32;

// K of a step of the GEMM. The emulation's are short even for two FP4 operands: it holds a step's
// converted fragments and scales in registers.
template <Format kA, Format kB>
inline constexpr int kGemmStepK = SM120_OPS_NATIVE ? kNativeStepK<kA, kB> : 32;

#if SM120_OPS_NATIVE

template <Format kA, Format kB, int MT, int NT, int kStepKValue = kNativeStepK<kA, kB>>
class WarpMma {
 public:
  static constexpr bool kBothFp4 = kA == Format::kFp4 && kB == Format::kFp4;
  static constexpr int kStepK = kStepKValue;
  static constexpr Access kAccessA = kAccess<kA, kB>;
  static constexpr Access kAccessB = kAccess<kB, kA>;
  template <class Scaling>
  static constexpr bool kConvertAhead = false;
  using RawA = uint32_t[kAccessA == Access::kPackedFp4 ? 2 : 4];
  using RawB = uint32_t[2];
  using FragA = uint32_t[4];
  template <int kRowBytes>
  using ReaderCols = ReaderB<kAccessB, kRowBytes, NT>;

  // Lanes 4g and 4g + 1 hold the scales of A rows g and g + 8, lane 4n that of B column n: the
  // MMA's thread-id selectors stay 0, because each selector pair in use costs a uniform register
  // move and ptxas re-materialises them all over the loop. Opaque, for ptxas would do the same with
  // these addresses.
  __device__ WarpMma(int warp_row, int warp_col, int = 0) {
    const int g = lane_id() / 4, half = lane_id() % 2;
    row_scale_ = kept(4 * (warp_row + 8 * half + g));
    col_scale_ = kept(4 * (warp_col + fragment_column<kAccessB>(g)));
  }

  // sfa, sfb: of the CTA's tile
  template <ScaleRead kRead>
  __device__ __forceinline__ void load_scales(uint32_t sfa, uint32_t sfb, uint32_t select_a,
                                              uint32_t select_b) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      sfa_[i] = paired<kRead>(read_scale<kRead>(sfa + row_scale_ + 4 * 16 * i, select_a));
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      sfb_[j] = paired<kRead>(read_scale<kRead>(sfb + col_scale_ + 4 * 8 * j, select_b));
    }
  }

  // The MMA reads the words itself, whatever they hold.
  template <class Scaling>
  __device__ __forceinline__ void set_scales(int) {}

  template <int kStep>
  __device__ __forceinline__ void set_b(const RawB (&raw)[NT]) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      b_[j][0] = raw[j][0], b_[j][1] = raw[j][1];
    }
  }

  static __device__ __forceinline__ void convert(FragA& a, const RawA& raw) {
    if constexpr (kAccessA == Access::kPackedFp4) {
      unpack_fp4(a[0], a[2], raw[0]);
      unpack_fp4(a[1], a[3], raw[1]);
    } else {
#pragma unroll
      for (int x = 0; x < 4; ++x) a[x] = raw[x];
    }
  }

  // A fragment i, step kStep of the block.
  template <int kStep, class Scaling>
  __device__ __forceinline__ void multiply(int i, float (&acc)[NT][4], const FragA& a) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      constexpr int kScale = Scaling::kPerBlock ? 0 : kStep;  // which of a word's scales
      if constexpr (kBothFp4) {
        mma_mxf4<2 * kScale>(acc[j], a, b_[j], sfa_[i], sfb_[j]);
      } else {
        mma_mxf8f6f4<kA, kScale>(acc[j], a, b_[j], sfa_[i], sfb_[j]);
      }
    }
  }

  template <class Scaling>
  __device__ __forceinline__ void finish_block(float (&)[MT][NT][4]) {}
  __device__ __forceinline__ void next_step() {}
  __device__ __forceinline__ void finish_tile(float (&)[MT][NT][4]) const {}

 private:
  // The MMA of two FP4 operands takes two scales, which are one at gran_k 128.
  template <ScaleRead kRead>
  static __device__ __forceinline__ uint32_t paired(uint32_t scale) {
    return kBothFp4 && kRead == ScaleRead::kCoarse ? scale * 0x0101u : scale;
  }

  // 8 nibbles n0..n7 -> bytes n0..n3 and n4..n7, each value in bits 5..2
  static __device__ __forceinline__ void unpack_fp4(uint32_t& lo, uint32_t& hi, uint32_t packed) {
    const uint32_t even = (packed << 2) & 0x3c3c3c3cu, odd = (packed >> 2) & 0x3c3c3c3cu;
    lo = prmt(even, odd, 0x5140);
    hi = prmt(even, odd, 0x7362);
  }

  uint32_t row_scale_, col_scale_;  // bytes from the tile's first scale to the lane's first
  uint32_t sfa_[MT], sfb_[NT], b_[NT][2];
};

#else  // emulated

// Fragments become f16 (exact for e4m3 and e2m1), are multiplied by HMMA with FP32 sums, and the
// sums are scaled in FP32: d += p * 2^(ea-127) * 2^(eb-127).
template <Format kA, Format kB, int MT, int NT, int kStepKValue = kNativeStepK<kA, kB>>
class WarpMma {
 public:
  static constexpr bool kBothFp4 = kA == Format::kFp4 && kB == Format::kFp4;
  static constexpr int kStepK = kStepKValue;
  static constexpr bool kHalfSteps = kBothFp4 && kStepK == 32;
  static constexpr Access kAccessA = kHalfSteps ? Access::kPackedFp4 : kAccess<kA, kB>;
  static constexpr Access kAccessB = kHalfSteps ? Access::kPackedFp4 : kAccess<kB, kA>;
  // e2m1 is moved into f16's bits without re-biasing, which divides it by 2^14
  static constexpr uint32_t kUnbiasBits =
      (kA == Format::kFp4 ? 14 : 0) + (kB == Format::kFp4 ? 14 : 0);
  static constexpr float kUnbias = 1u << kUnbiasBits;
  // Converting early hides its latency where there are registers for it.
  template <class Scaling>
  static constexpr bool kConvertAhead = kStepK == 32 && !Scaling::kPerBlock;
  using RawA = uint32_t[kAccessA == Access::kPackedFp4 ? 2 : 4];
  using RawB = uint32_t[kAccessB == Access::kPackedFp4 ? 1 : 2];
  static constexpr int kHalves = kStepK / 32;  // 32-blocks of K a step
  static constexpr int kHmmas = 2 * kHalves;   // HMMAs of K = 16 a step
  using FragA = uint32_t[kHmmas][4];
  template <int kRowBytes>
  using ReaderCols = ReaderB<kAccessB, kRowBytes, NT>;

  // columns: of the tile; what lies beyond them may have any scales
  __device__ WarpMma(int warp_row, int warp_col, int columns = kNoEnd)
      : row_scale_(held(4 * (warp_row + lane_id() / 4))),
        col_scale_(held(4 * (warp_col + fragment_column<kAccessB>(2 * (lane_id() % 4))))) {
    if constexpr (kMindsEnd) {
#pragma unroll
      for (int x = 0; x < 2 * NT; ++x) {
        const int col =
            warp_col + 8 * (x / 2) + fragment_column<kAccessB>(2 * (lane_id() % 4) + x % 2);
        beyond_[x / 2][x % 2] = col < columns ? 0 : kAllUnlike;
      }
    }
  }

  // sfa, sfb: of the CTA's tile
  template <ScaleRead kRead>
  __device__ __forceinline__ void load_scales(uint32_t sfa, uint32_t sfb, uint32_t select_a,
                                              uint32_t select_b) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sfa_[i][h] = read_scale<kRead>(sfa + row_scale_ + 4 * (16 * i + 8 * h), select_a);
      }
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        constexpr int kNext = kAccessB == Access::kPairedFp8 ? 2 : 1;  // column 2t + 1
        sfb_[j][e] = read_scale<kRead>(sfb + col_scale_ + 4 * (8 * j + kNext * e), select_b);
      }
    }
  }

  // Whether every exponent of the warp's block lies in 64 .. 191, that is has two unlike top bits.
  __device__ __forceinline__ bool regular_scales() const {
    uint32_t unlike = kAllUnlike;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < MT; ++i) unlike &= sfa_[i][e] ^ (sfa_[i][e] << 1);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const uint32_t of_col = sfb_[j][e] ^ (sfb_[j][e] << 1);
        unlike &= kMindsEnd ? of_col | beyond_[j][e] : of_col;
      }
    }
    return __all_sync(0xffffffffu, unlike == kAllUnlike);
  }

  // The step's scales as floats, out of the block's words.
  template <class Scaling>
  __device__ __forceinline__ void set_scales(int step) {
    if (Scaling::kPerBlock && step > 0) return;
#pragma unroll
    for (int half = 0; half < (Scaling::kPerBlock ? 1 : kHalves); ++half) {
      constexpr bool kExact = Scaling::kExact;
      const int byte = step * kHalves + half;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          // regular exponents stay below 255, so no carry leaves a byte
          const uint32_t word = kExact ? sfa_[i][e] : sfa_[i][e] + kUnbiasBits * 0x01010101u;
          scale_a_[half][i][e] = exponent<kExact>(word, byte);
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) scale_b_[half][j][e] = exponent<kExact>(sfb_[j][e], byte);
      }
    }
  }

  template <int kStep>
  __device__ __forceinline__ void set_b(const RawB (&raw)[NT]) {
#pragma unroll
    for (int j = 0; j < NT; ++j) convert_b(b_[j], raw[j]);
  }

  // A registers of every HMMA of a step: rows g and g + 8 interleaved. A register of FP8 has two
  // f16 pairs (one HMMA), one of FP4 four (two HMMAs).
  static __device__ __forceinline__ void convert(FragA& a, const RawA& raw) {
    constexpr int kPieces = sizeof(RawA) / 8, kHmmasAPiece = kHmmas / kPieces;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      uint32_t top[4], bottom[4];
      if constexpr (kA == Format::kFp4) {
        fp4_to_f16(top, raw[2 * p]);
        fp4_to_f16(bottom, raw[2 * p + 1]);
      } else {
        fp8_to_f16(top[0], top[1], raw[2 * p]);
        fp8_to_f16(bottom[0], bottom[1], raw[2 * p + 1]);
      }
#pragma unroll
      for (int x = 0; x < kHmmasAPiece; ++x) {
        uint32_t (&hmma)[4] = a[p * kHmmasAPiece + x];
        hmma[0] = top[2 * x], hmma[1] = bottom[2 * x];
        hmma[2] = top[2 * x + 1], hmma[3] = bottom[2 * x + 1];
      }
    }
  }

  template <int kStep, class Scaling>
  __device__ __forceinline__ void multiply(int i, float (&acc)[NT][4], const FragA& a) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if constexpr (Scaling::kPerBlock) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          if (kStep == 0 && half == 0) {
            mma_f16_zero(partial_[i][j], a[0], b_[j][0]);
          } else {
            mma_f16(partial_[i][j], a[2 * half], b_[j][2 * half]);
          }
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          mma_f16(partial_[i][j], a[2 * half + 1], b_[j][2 * half + 1]);
        }
      } else {
        float p[NT][4];
#pragma unroll
        for (int j = 0; j < NT; ++j) mma_f16_zero(p[j], a[2 * half], b_[j][2 * half]);
#pragma unroll
        for (int j = 0; j < NT; ++j) mma_f16(p[j], a[2 * half + 1], b_[j][2 * half + 1]);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          scale_add<Scaling::kExact>(acc[j], p[j], scale_a_[half][i], scale_b_[half][j]);
        }
      }
    }
  }

  // Ends a block: scales what it summed.
  template <class Scaling>
  __device__ __forceinline__ void finish_block(float (&acc)[MT][NT][4]) {
    if constexpr (Scaling::kPerBlock) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          scale_add<Scaling::kExact>(acc[i][j], partial_[i][j], scale_a_[0][i], scale_b_[0][j]);
        }
      }
    }
  }
  __device__ __forceinline__ void next_step() {}  // see KGroupMma
  __device__ __forceinline__ void finish_tile(float (&)[MT][NT][4]) const {}

 protected:
  // B registers of every HMMA of a step
  static __device__ __forceinline__ void convert_b(uint32_t (&b)[kHmmas][2], const RawB& raw) {
    if constexpr (kB == Format::kFp4) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        uint32_t h[4];
        fp4_to_f16(h, raw[half]);
        b[2 * half][0] = h[0], b[2 * half][1] = h[1];
        b[2 * half + 1][0] = h[2], b[2 * half + 1][1] = h[3];
      }
    } else if constexpr (kAccessB == Access::kPlain) {
      fp8_to_f16(b[0][0], b[0][1], raw[0]);
      fp8_to_f16(b[1][0], b[1][1], raw[1]);
    } else {  // bytes k0..k7 paired as fp4_to_f16 pairs its nibbles: (0,4) (1,5) (2,6) (3,7)
      fp8_to_f16(b[0][0], b[0][1], prmt(raw[0], raw[1], 0x5140));
      fp8_to_f16(b[1][0], b[1][1], prmt(raw[0], raw[1], 0x7362));
    }
  }

  // PTX ISA 9.7.9.21 "cvt": e4m3x2 -> f16x2, exact
  static __device__ __forceinline__ void fp8_to_f16(uint32_t& lo, uint32_t& hi, uint32_t v) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\n"
        "cvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(lo), "=r"(hi)
        : "r"(v));
  }

  // e2m1 nibbles n0..n7 -> f16 pairs (n0,n4) (n1,n5) (n2,n6) (n3,n7), each 2^-14 of its value: sign
  // to bit 15, exponent and mantissa bits to 11..9. All that is not zero lies in f16's upper byte:
  // signs and the other bits of four nibbles get to their places in a byte together, and one mask
  // clears what is between them. Shifts to the left are the multiplier's work, so that the integer
  // pipe, which is the busiest, has 7 of the 11 instructions.
  static __device__ __forceinline__ void fp4_to_f16(uint32_t (&h)[4], uint32_t v) {
    constexpr uint32_t kSigns = 0x80808080u, kInHalf = 0x8e008e00u;
    const uint32_t even = bit_select(kSigns, v << 4, v << 1);
    const uint32_t odd = bit_select(kSigns, v, v >> 3);
    h[0] = (even << 8) & kInHalf, h[2] = even & kInHalf;
    h[1] = (odd << 8) & kInHalf, h[3] = odd & kInHalf;
  }

  // 2^(code - 127) of one byte of a word. Code 0 is the subnormal 2^-127; code 0xFF is NaN, which
  // comes of inf * 0 in an otherwise exact multiply-add.
  template <bool kExact>
  static __device__ __forceinline__ float exponent(uint32_t word, int byte) {
    const uint32_t bits = (byte < 3 ? word << (23 - 8 * byte) : word >> 1) & 0x7f800000u;
    if constexpr (!kExact) return __uint_as_float(bits);
    const float scale = __uint_as_float(max(bits, 0x00400000u));
    return fmaf(scale, 0.f, scale);
  }

  // acc: rows g, g + 8 x columns 2t, 2t + 1. Exact: the scales are multiplied first, because 2^-127
  // times 2^127 is 1 for any p. Else p goes first: ptxas would form the scale products of a whole
  // block early, and spill them.
  template <bool kExact>
  static __device__ __forceinline__ void scale_add(float (&acc)[4], const float (&p)[4],
                                                   const float (&a)[2], const float (&b)[2]) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      acc[x] = kExact ? fmaf(p[x] * kUnbias, a[x / 2] * b[x % 2], acc[x])
                      : fmaf(p[x] * a[x / 2], b[x % 2], acc[x]);
    }
  }

  // Beside FP4 rows in a register rather than worked out again in every block; FP8's kernels have
  // none to spare.
  static __device__ __forceinline__ uint32_t held(uint32_t v) {
    return kA == Format::kFp4 ? opaque(v) : v;
  }
  // Few tokens, often fewer than the tile has columns, must not be irregular for the sake of
  // others.
  static constexpr bool kMindsEnd = NT <= 2;
  static constexpr int kNoEnd = 1 << 30;
  static constexpr uint32_t kAllUnlike = 0x80808080u;
  uint32_t beyond_[kMindsEnd ? NT : 1][2];
  // Bytes from the tile's first scale to that of the warp's row g, or column 2t.
  uint32_t row_scale_, col_scale_;
  uint32_t sfa_[MT][2], sfb_[NT][2], b_[NT][kHmmas][2];
  float scale_a_[kHalves][MT][2], scale_b_[kHalves][NT][2];
  float partial_[MT][NT][4];
};

#endif

}  // namespace sm120
