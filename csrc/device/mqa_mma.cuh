// The MMA of MQA logits: 16 keys at a time against a warp's 8 * NT query columns (heads).
//
// Keys are the MMA's 16-row operand, heads its 8-column one. The query fragments stay in registers
// over the whole key range. A step's fragments of keys are loaded and converted while the step
// before is multiplied: only two steps' are ever held, which leaves registers for the sums of all
// NT tiles, so that NT MMAs without a dependency follow one another.
//
// FP8 has no scales inside the product. Natively the block-scaled MMA runs with scales of 1.0: the
// plain one is half as fast on GeForce cards.
// FP4, native: the scale words go to the MMA as they are. Emulated, values become bf16, which has
// the range to be what few instructions make of them. Each row's scales, relative to that of its
// first block, are multiplied into its fragments, from 16 octaves below to 15 above; that of the
// first block is left to the epilogue, since a positive factor commutes with relu (keys:
// row_factor(); queries: column_factor(), folded into the weights). Rows with other scales, NaN
// included, are "irregular": then every 32-block is scaled by itself in FP32.
#pragma once
#include "device/atom.cuh"
#include "device/bits.cuh"
#include "device/convert.cuh"
#include "device/row_scale.cuh"
#include "device/warp.cuh"

namespace sm120 {

// Loads 32 bytes of 16 rows, the step-th, as ldmatrix gives them: registers 0, 1 are rows g and
// g + 8 of the first 16 bytes, 2, 3 of the others, or zero where there are none.
template <int kRowBytes>
__device__ __forceinline__ void load_rows16(uint32_t (&r)[4], uint32_t tile, uint32_t offset,
                                            int step) {
  if constexpr (kRowBytes == 16) {
    ldmatrix<2>(r, tile + offset);
    r[2] = r[3] = 0;
  } else {
    ldmatrix<4>(r, (tile + offset) ^ (32 * step));
  }
}

// max(value, 0) that keeps NaN. PTX ISA "max" (.NaN)
__device__ __forceinline__ float relu(float value) {
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
  return result;
}

// Volatile: hoisted out of the loop over keys, the weights would cost registers it has not.
__device__ __forceinline__ void lds_floats(float (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address));
}

__device__ __forceinline__ void sts_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

template <Format kFormat, int kDim, int NT>
class MqaMma {
 public:
  static constexpr bool kFp4 = kFormat == Format::kFp4;
  // Emulated, FP4 has FP8's steps, of 32 of K.
  using Step = std::conditional_t<kNative, WarpMma<kFormat, kFormat, 1, 1>,
                                  WarpMma<Format::kFp8, Format::kFp8, 1, 1>>;
  static constexpr int kRowBytes = kFp4 ? kDim / 2 : kDim;
  static constexpr int kSteps = (kDim + Step::kStepK - 1) / Step::kStepK;
  static constexpr int kMmas = kNative ? 1 : Step::kStepK / 16;  // instructions a step
  static constexpr int kStepBytes = kFp4 ? Step::kStepK / 2 : Step::kStepK;
  static constexpr int kBlocks = kDim / 32;
  // Steps that one ldmatrix brings.
  static constexpr int kTogether = kStepBytes == 16 && kRowBytes > 16 ? 2 : 1;
  static constexpr bool kFoldScales = kFp4 && !kNative;

  __device__ MqaMma()
      : offset_(
            opaque(swizzled<kRowBytes>(lane_id() % 16, kRowBytes > 16 ? lane_id() / 16 * 16 : 0))),
        own_key_(opaque(lane_id() / 4 + 8 * (lane_id() % 2))) {}

  // Queries: 8 * NT rows (heads) at `tile`. words: FP4 scale words of the columns in shared memory.
  __device__ __forceinline__ void load_queries(uint32_t tile, uint32_t words) {
    const int g = lane_id() / 4;
    bool regular = true;
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t loaded[4];
      typename Step::RawA raw;
      uint32_t word[2] = {};
      if constexpr (kFp4) {
        word[0] = lds32(words + 4 * (8 * j + g)), word[1] = lds32(words + 4 * (8 * j + 8 + g));
      }
#if SM120_OPS_NATIVE
      sfb_[j] = native_word(word[0]), sfb_[j + 1] = native_word(word[1]);
#else
      const RowScale<kBlocks> top(word[0]), bottom(word[1]);
      regular &= top.regular & bottom.regular;
#endif
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s % kTogether == 0) load(loaded, tile + j * 8 * kRowBytes, s);
        take(raw, loaded, s);
        typename Step::FragA f;
#if SM120_OPS_NATIVE
        Step::convert(f, raw);
        q_[j][s][0][0] = f[0], q_[j][s][0][1] = f[2];
        q_[j + 1][s][0][0] = f[1], q_[j + 1][s][0][1] = f[3];
#else
        convert_queries(f, raw, s, top.used(), bottom.used());
#pragma unroll
        for (int m = 0; m < kMmas; ++m) {
          q_[j][s][m][0] = f[m][0], q_[j][s][m][1] = f[m][2];
          q_[j + 1][s][m][0] = f[m][1], q_[j + 1][s][m][1] = f[m][3];
        }
#endif
      }
    }
    if constexpr (kFoldScales) {
      fold_.q_regular = all_lanes(regular);
      __syncwarp();  // all words are read: keep what is left of them
      for (int c = lane_id(); c < 8 * NT; c += kWarpSize) {
        const uint32_t word = lds32(words + 4 * c);
        sts_float(words + 4 * c, __uint_as_float(RowScale<kBlocks>(word).rest(word)));
      }
      __syncwarp();
    }
  }

  // What the weight of a column with this FP4 scale word has to be multiplied by.
  static __device__ __forceinline__ float column_factor(uint32_t word) {
    if constexpr (kFoldScales) return RowScale<kBlocks>(word).factor();
    return 1.f;
  }

  // Products come in parts, so that the caller can turn to the next keys before the last:
  //   start()        loads the first step of the keys whose rows begin at `rows`
  //   first_steps()  all steps but the last, each of which loads the one after it
  //   correct()      all over again, where that would be wrong; a rare branch
  //   last_step()    the last one, while the first step of the next keys is loaded
  // `scales` is the address of the keys' scales, `words` as in load_queries().
  __device__ __forceinline__ void start(uint32_t rows, uint32_t scales) {
    load(loaded_, rows, 0);
    accept(load_scale(scales));
    convert_keys(0);
  }

  __device__ __forceinline__ void first_steps(float (&acc)[NT][4], uint32_t rows) {
    if constexpr (kSteps == 1) clear(acc);
    static_for<kSteps - 1>([&](auto s) {
      if constexpr ((s + 1) % kTogether == 0) load(loaded_, rows, s + 1);
      multiply_step<s>(acc);
      convert_keys(s + 1);
    });
  }

  __device__ __forceinline__ void correct(float (&acc)[NT][4], uint32_t rows, uint32_t scales,
                                          uint32_t words) {
    if constexpr (kFoldScales) {
      if (!fold_.regular) multiply_irregular(acc, rows, load_scale(scales), words);
    }
  }

  __device__ __forceinline__ void last_step(float (&acc)[NT][4], uint32_t rows, uint32_t scales) {
    load(loaded_, rows, 0);
    const uint32_t word = load_scale(scales);
    multiply_step<kSteps - 1>(acc);
    accept(word);
    convert_keys(0);
  }

  // The same where no keys follow.
  __device__ __forceinline__ void last_step(float (&acc)[NT][4]) { multiply_step<kSteps - 1>(acc); }

  // Of 16 keys, the one whose scale this lane has: g + 8 * (t % 2).
  __device__ __forceinline__ int own_key() const { return own_key_; }
  // Factor of the logit of the current keys' own one. To be read before last_step().
  __device__ __forceinline__ float row_factor() const {
    if constexpr (!kFp4) return __uint_as_float(word_);
    if constexpr (kFoldScales) return fold_.factor;
    return 1.f;
  }

 private:
  static __device__ __forceinline__ void clear(float (&acc)[NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
  }

  // Loads the kTogether steps from step s on.
  __device__ __forceinline__ void load(uint32_t (&loaded)[4], uint32_t rows, int s) const {
    load_rows16<kRowBytes>(loaded, rows, offset_, s / kTogether);
  }
  static __device__ __forceinline__ void take(typename Step::RawA& raw, const uint32_t (&loaded)[4],
                                              int s) {
    const int first = s % kTogether * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i] = kStepBytes == 16 && i >= 2 ? 0 : loaded[(first + i) % 4];
  }
  // Step s, which is loaded.
  __device__ __forceinline__ void convert_keys(int s) {
    typename Step::RawA raw;
    take(raw, loaded_, s);
    convert_keys(a_[s % 2], raw, s);
  }

  // Of the own key: FP8 a float, FP4 packed UE8M0.
  __device__ __forceinline__ uint32_t load_scale(uint32_t scales) const {
    return lds32(scales + 4 * own_key_);
  }

#if SM120_OPS_NATIVE
  __device__ __forceinline__ void accept(uint32_t word) { word_ = word; }
  __device__ __forceinline__ void convert_keys(typename Step::FragA& a,
                                               const typename Step::RawA& raw, int) const {
    Step::convert(a, raw);
  }

  // The second scale of a row that has one block belongs to zeros and must not be NaN.
  static __device__ __forceinline__ uint32_t native_word(uint32_t word) {
    return kDim == 32 ? (word & 0xff) | kNoScale << 8 : word;
  }

  template <int kStep>
  __device__ __forceinline__ void multiply_step(float (&acc)[NT][4]) {
    if constexpr (kStep == 0 && kSteps > 1) clear(acc);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      if constexpr (kFp4) {
        mma_mxf4<2 * kStep>(acc[j], a_[kStep % 2], q_[j][kStep][0], native_word(word_), sfb_[j]);
      } else {
        mma_mxf8f6f4<kFormat, 0>(acc[j], a_[kStep % 2], q_[j][kStep][0], kNoScale, kNoScale);
      }
    }
  }

  uint32_t sfb_[NT];
#else
  // Makes these the scales of the current keys. Each lane works out those of one row.
  __device__ __forceinline__ void accept(uint32_t word) {
    if constexpr (!kFoldScales) {
      word_ = word;
    } else {
      const RowScale<kBlocks> own(word);
      const uint32_t other = from_lane_xor(own.multipliers, 1);
      const bool odd = own_key_ & 8;
      fold_.top = odd ? other : own.multipliers;
      fold_.bottom = odd ? own.multipliers : other;
      fold_.regular = all_lanes(own.regular) && fold_.q_regular;
      fold_.factor = __uint_as_float((own.first + 6) << 23);
    }
  }
  __device__ __forceinline__ void convert_keys(typename Step::FragA& a,
                                               const typename Step::RawA& raw, int s) const {
    convert(a, raw, s, fold_.top, fold_.bottom);
  }

  // e2m1 nibbles n0..n7 -> bf16 pairs (n0,n4) (n1,n5) (n2,n6) (n3,n7), each 2^-126 of its value:
  // sign to bit 15, exponent and mantissa bits to 8..6. Those of n0 and n2 come with their
  // neighbours, four bits below, and one mask clears what is between.
  static __device__ __forceinline__ void expand(uint32_t (&h)[4], uint32_t v) {
    constexpr uint32_t kSigns = 0x88008800u, kInHalf = 0x81c081c0u;
    const uint32_t low = bit_select(kSigns, v << 8, v << 2);
    const uint32_t high = bit_select(kSigns, v, v >> 6);
    h[0] = (low << 4) & kInHalf, h[1] = low & kInHalf;
    h[2] = (high << 4) & kInHalf, h[3] = high & kInHalf;
  }

  // The fragments of step s, which is 32-block s: rows g (top) and g + 8 (bottom). Those of block 0
  // stay as they are expanded: 2^-126 of their values, subnormals included.
  static __device__ __forceinline__ void convert(typename Step::FragA& f,
                                                 const typename Step::RawA& raw, int s,
                                                 uint32_t top, uint32_t bottom) {
    if constexpr (kFp4) {
      uint32_t h[2][4];
      expand(h[0], raw[0]);
      expand(h[1], raw[1]);
      const uint32_t scale[2] = {RowScale<kBlocks>::multiplier(top, s),
                                 RowScale<kBlocks>::multiplier(bottom, s)};
#pragma unroll
      for (int m = 0; m < kMmas; ++m) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const uint32_t pair = h[x % 2][2 * m + x / 2];
          f[m][x] = s == 0 ? pair : multiply_bf16x2(pair, scale[x % 2]);
        }
      }
    } else {
      Step::convert(f, raw);
    }
  }

  // The same of queries, which have what keys lack: 2^114 of the values in block 0, 2^97 times the
  // relative scale in others.
  static __device__ __forceinline__ void convert_queries(typename Step::FragA& f,
                                                         const typename Step::RawA& raw, int s,
                                                         uint32_t top, uint32_t bottom) {
    constexpr uint32_t kMore = 79 * RowScale<kBlocks>::kEach;
    convert(f, raw, s, top + kMore, bottom + kMore);
    if constexpr (kFp4) {
#pragma unroll
      for (int m = 0; m < kMmas; ++m) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          f[m][x] = multiply_bf16x2(f[m][x], 0x7f007f00);              // 2^127
          if (s == 0) f[m][x] = multiply_bf16x2(f[m][x], 0x78007800);  // 2^113
        }
      }
    }
  }

  static __device__ __forceinline__ void mma_zero(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    if constexpr (kFp4) {
      mma_bf16_zero(d, a, b);
    } else {
      mma_f16_zero(d, a, b);
    }
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    if constexpr (kFp4) {
      mma_bf16(d, a, b);
    } else {
      mma_f16(d, a, b);
    }
  }

  template <int kStep>
  __device__ __forceinline__ void multiply_step(float (&acc)[NT][4]) {
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        if (kStep == 0 && m == 0 && kSteps > 1) {
          mma_zero(acc[j], a_[0][0], q_[j][0][0]);
        } else {
          mma(acc[j], a_[kStep % 2][m], q_[j][kStep][m]);
        }
      }
    }
  }

  // Some row or column is irregular: every 32-block's product is scaled by itself. All steps; the
  // last one that follows adds nothing.
  __device__ __forceinline__ void multiply_irregular(float (&acc)[NT][4], uint32_t rows,
                                                     uint32_t word, uint32_t words) {
    const uint32_t other = from_lane_xor(word, 1);
    const bool odd = lane_id() % 2;
    const uint32_t own[2] = {odd ? other : word, odd ? word : other};  // rows g, g + 8
    clear(acc);
    fold_.factor = __uint_as_float((127 + 6) << 23);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      typename Step::RawA raw;
      typename Step::FragA a;
      if (s % kTogether == 0) load(loaded_, rows, s);
      take(raw, loaded_, s);
      convert(a, raw, s, RowScale<kBlocks>::kNone, RowScale<kBlocks>::kNone);
      const float row[2] = {scale_value(own[0] >> 8 * s & 0xff),
                            scale_value(own[1] >> 8 * s & 0xff)};
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        float p[4], column[2];
        mma_zero(p, a[0], q_[j][s][0]);
        mma(p, a[1], q_[j][s][1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          column[e] = scale_value(lds8(words + 4 * (8 * j + lane_id() % 4 * 2 + e) + s));
        }
#pragma unroll
        for (int x = 0; x < 4; ++x) acc[j][x] = fmaf(p[x], row[x / 2] * column[x % 2], acc[j][x]);
      }
    }
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
#pragma unroll
      for (int x = 0; x < 4; ++x) a_[(kSteps - 1) % 2][m][x] = 0;
    }
  }
#endif

  typename Step::FragA a_[2];  // of even and odd steps
  uint32_t loaded_[4];         // of the keys, next to be converted
  uint32_t q_[NT][kSteps][kMmas][2];
  uint32_t word_;
  uint32_t offset_, own_key_;  // opaque: else they are worked out again for all keys
  // Emulated FP4: state of the folded scales.
  struct {
    uint32_t top, bottom;     // multipliers of rows g and g + 8
    float factor;             // of the own key
    bool q_regular, regular;  // all queries; and all of the current keys
  } fold_;
};

}  // namespace sm120
