// The MMA of MQA logits: 16 keys at a time against a warp's 8 * NT query columns (heads).
//
// Keys are the MMA's 16-row operand, heads its 8-column one. The query fragments stay in registers
// over the whole key range; the fragments of the next 16 keys are converted, one step at a time,
// between the MMAs of the current ones.
//
// FP8 has no scales inside the product. Natively the block-scaled MMA runs with scales of 1.0: the
// plain one is half as fast on GeForce cards.
// FP4, native: the scale words go to the MMA as they are. Emulated: each row's scales, relative to
// the row's largest one, are multiplied into its f16 fragments, which is exact while they span at
// most 24 octaves; the largest itself is left to the epilogue, since a positive factor commutes
// with relu (keys: row_factor(); queries: column_factor(), folded into the weights). Rows with
// other scales, NaN included, are "irregular": then every 32-block is scaled by itself in FP32.
#pragma once
#include "device/atom.cuh"
#include "device/convert.cuh"
#include "device/warp.cuh"

namespace sm120 {

// Loads 32 bytes a row of 16 rows as ldmatrix gives them: registers 0, 1 are rows g and g + 8 of
// the first 16 bytes, 2, 3 of the others; rows of 16 bytes have no others.
template <int kRowBytes>
__device__ __forceinline__ void load_rows16(uint32_t (&r)[4], uint32_t tile, uint32_t offset,
                                            int step) {
  if constexpr (kRowBytes == 16) {
    ldmatrix<2>(r, tile + offset);
    r[2] = r[3] = 0;
  } else {
    ldmatrix<4>(r, tile + (offset ^ (32 * step)));
  }
}

// f16 multipliers of one row's 32-blocks, twice in a word, and the row's largest scale byte.
template <int kBlocks>
struct RowScale {
  static constexpr int kMaxSpan = 24;
  uint32_t multiplier[kBlocks];
  uint32_t largest;
  bool regular;

  RowScale() = default;
  // e2m1 is moved into f16's bits 2^14 too small, so 2^15 * 2^(b - largest) makes it twice its
  // value relative to the largest scale: 2^-23 at least.
  __device__ __forceinline__ explicit RowScale(uint32_t word) {
    uint32_t low = largest = word & 0xff, byte[kBlocks];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      byte[b] = word >> 8 * b & 0xff;
      largest = max(largest, byte[b]);
      low = min(low, byte[b]);
    }
    regular = low >= 64 && largest <= 191 && largest - low <= kMaxSpan;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      multiplier[b] = (regular ? 30 + byte[b] - largest : 29) * 0x04000400u;
    }
  }
  // What the multiplied fragments lack; 1 for an irregular row, whose fragments are plain values.
  __device__ __forceinline__ float factor() const {
    return regular ? __uint_as_float((largest - 1) << 23) : 1.f;
  }
};

__device__ __forceinline__ uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  const __half2 product =
      __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// max(value, 0) that keeps NaN. PTX ISA "max" (.NaN)
__device__ __forceinline__ float relu(float value) {
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
  return result;
}

// Volatile: hoisted out of the loop over keys, the weights would cost registers it has not.
__device__ __forceinline__ void lds_floats(float& x, float& y, uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x), "=f"(y) : "r"(address));
}

__device__ __forceinline__ void sts_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

template <Format kFormat, int kDim, int NT>
class MqaMma {
 public:
  using Step = WarpMma<kFormat, kFormat, 1, 1>;
  static constexpr bool kFp4 = kFormat == Format::kFp4;
  static constexpr int kRowBytes = kFp4 ? kDim / 2 : kDim;
  static constexpr int kSteps = (kDim + Step::kStepK - 1) / Step::kStepK;
  static constexpr int kMmas = kNative ? 1 : Step::kStepK / 16;  // instructions a step
  static constexpr int kBlocks = kDim / 32;
  static constexpr bool kFoldScales = kFp4 && !kNative;

  __device__ MqaMma()
      : offset_(swizzled<kRowBytes>(lane_id() % 16, kRowBytes > 16 ? lane_id() / 16 * 16 : 0)) {}

  // Queries: 8 * NT rows (heads) at `tile`. words: FP4 scale words of the columns in shared memory.
  __device__ __forceinline__ void load_queries(uint32_t tile, uint32_t words) {
    const int g = lane_id() / 4;
    bool regular = true;
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      typename Step::RawA raw;
      uint32_t word[2] = {};
      if constexpr (kFp4) {
        word[0] = lds32(words + 4 * (8 * j + g)), word[1] = lds32(words + 4 * (8 * j + 8 + g));
      }
#if SM120_OPS_NATIVE
      sfb_[j] = native_word(word[0]), sfb_[j + 1] = native_word(word[1]);
#else
      [[maybe_unused]] const RowScale<kBlocks> top(word[0]), bottom(word[1]);
      if constexpr (kFoldScales) regular &= top.regular & bottom.regular;
#endif
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        load_rows16<kRowBytes>(raw, tile + j * 8 * kRowBytes, offset_, s);
        typename Step::FragA f;
        Step::convert(f, raw);
#if SM120_OPS_NATIVE
        q_[j][s][0][0] = f[0], q_[j][s][0][1] = f[2];
        q_[j + 1][s][0][0] = f[1], q_[j + 1][s][0][1] = f[3];
#else
        if constexpr (kFoldScales) fold(f, s, top, bottom);
#pragma unroll
        for (int m = 0; m < kMmas; ++m) {
          q_[j][s][m][0] = f[m][0], q_[j][s][m][1] = f[m][2];
          q_[j + 1][s][m][0] = f[m][1], q_[j + 1][s][m][1] = f[m][3];
        }
#endif
      }
    }
    if constexpr (kFoldScales) fold_.q_regular = all_lanes(regular);
  }

  // What the weight of a column with this FP4 scale word has to be multiplied by.
  static __device__ __forceinline__ float column_factor(uint32_t word) {
    if constexpr (kFoldScales) return RowScale<kBlocks>(word).factor();
    return 1.f;
  }

  // Products come in three parts, so that the caller can turn to the next keys before the last:
  //   start()        loads the first step of the keys whose rows begin at `rows`
  //   first_steps()  all steps but the last, each of which loads the one after it
  //   last_step()    the last one, while the first step of the next keys is loaded
  // `scales` is the address of the keys' scales, `words` as in load_queries().
  __device__ __forceinline__ void start(uint32_t rows, uint32_t scales) {
    typename Step::RawA raw;
    load_rows16<kRowBytes>(raw, rows, offset_, 0);
    accept(load_scale(scales));
    convert_step(a_[0], raw, 0);
  }

  __device__ __forceinline__ void first_steps(float (&acc)[NT][4], uint32_t rows, uint32_t words) {
    if (is_regular()) {
      static_for<kSteps - 1>([&](auto s) {
        typename Step::RawA raw;
        load_rows16<kRowBytes>(raw, rows, offset_, s + 1);
        multiply_step<s>(acc);
        convert_step(a_[(s + 1) % 2], raw, s + 1);
      });
    } else {
      multiply_irregular(acc, rows, words);
    }
  }

  __device__ __forceinline__ void last_step(float (&acc)[NT][4], uint32_t rows, uint32_t scales) {
    typename Step::RawA raw;
    load_rows16<kRowBytes>(raw, rows, offset_, 0);
    const uint32_t word = load_scale(scales);
    if (is_regular()) multiply_step<kSteps - 1>(acc);
    accept(word);
    convert_step(a_[0], raw, 0);
  }

  // Factor of the current keys' logits, for key g + 8 * (t % 2). To be read before last_step().
  __device__ __forceinline__ float row_factor() const {
    if constexpr (!kFp4) return __uint_as_float(word_);
    if constexpr (kFoldScales) return fold_.factor;
    return 1.f;
  }

 private:
  // Of key g + 8 * (t % 2): FP8 a float, FP4 packed UE8M0.
  static __device__ __forceinline__ uint32_t load_scale(uint32_t scales) {
    return lds32(scales + 4 * (lane_id() / 4 + 8 * (lane_id() % 2)));
  }

#if SM120_OPS_NATIVE
  __device__ __forceinline__ bool is_regular() const { return true; }
  __device__ __forceinline__ void accept(uint32_t word) { word_ = word; }
  __device__ __forceinline__ void convert_step(typename Step::FragA& a,
                                               const typename Step::RawA& raw, int) const {
    Step::convert(a, raw);
  }

  // The second scale of a row that has one block belongs to zeros and must not be NaN.
  static __device__ __forceinline__ uint32_t native_word(uint32_t word) {
    return kDim == 32 ? (word & 0xff) | kNoScale << 8 : word;
  }

  template <int kStep>
  __device__ __forceinline__ void multiply_step(float (&acc)[NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      if constexpr (kStep == 0) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
      if constexpr (kFp4) {
        mma_mxf4<2 * kStep>(acc[j], a_[kStep % 2], q_[j][kStep][0], native_word(word_), sfb_[j]);
      } else {
        mma_mxf8f6f4<kFormat, 0>(acc[j], a_[kStep % 2], q_[j][kStep][0], kNoScale, kNoScale);
      }
    }
  }
  __device__ __forceinline__ void multiply_irregular(float (&)[NT][4], uint32_t, uint32_t) {}

  uint32_t sfb_[NT];
#else
  __device__ __forceinline__ bool is_regular() const {
    return !kFoldScales || (fold_.k_regular && fold_.q_regular);
  }
  // Makes these the scales of the current keys.
  __device__ __forceinline__ void accept(uint32_t word) {
    word_ = word;
    if constexpr (kFoldScales) {
      const uint32_t other = from_lane_xor(word, 1);
      const bool odd = lane_id() % 2;
      fold_.top = RowScale<kBlocks>(odd ? other : word);
      fold_.bottom = RowScale<kBlocks>(odd ? word : other);
      fold_.k_regular = all_lanes(fold_.top.regular && fold_.bottom.regular);
      fold_.factor = odd ? fold_.bottom.factor() : fold_.top.factor();
    }
  }
  __device__ __forceinline__ void convert_step(typename Step::FragA& a,
                                               const typename Step::RawA& raw, int s) const {
    Step::convert(a, raw);
    if constexpr (kFoldScales) fold(a, s, fold_.top, fold_.bottom);
  }

  // Multiplies the rows g (top) and g + 8 (bottom) of a step's fragments; two MMAs are a 32-block.
  static __device__ __forceinline__ void fold(typename Step::FragA& f, int s,
                                              const RowScale<kBlocks>& top,
                                              const RowScale<kBlocks>& bottom) {
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
      const int block = s * kMmas / 2 + m / 2;
      if (block >= kBlocks) break;  // zeros
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        f[m][x] = multiply_f16x2(f[m][x], (x % 2 ? bottom : top).multiplier[block]);
      }
    }
  }

  template <int kStep>
  __device__ __forceinline__ void multiply_step(float (&acc)[NT][4]) {
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
      if (kFp4 && kStep * kMmas / 2 + m / 2 >= kBlocks) break;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        if (kStep == 0 && m == 0) {
          mma_f16_zero(acc[j], a_[0][0], q_[j][0][0]);
        } else {
          mma_f16(acc[j], a_[kStep % 2][m], q_[j][kStep][m]);
        }
      }
    }
  }

  // What a 32-block's product lacks: nothing where the row's scales are in its fragments.
  static __device__ __forceinline__ float block_scale(uint32_t word, int block) {
    return RowScale<kBlocks>(word).regular ? 1.f : scale_value(word >> 8 * block & 0xff);
  }
  // Some row or column is irregular: every 32-block's product is scaled by itself. All steps.
  __device__ __forceinline__ void multiply_irregular(float (&acc)[NT][4], uint32_t rows,
                                                     uint32_t words) {
    const uint32_t other = from_lane_xor(word_, 1);
    const bool odd = lane_id() % 2;
    const uint32_t own[2] = {odd ? other : word_, odd ? word_ : other};  // rows g, g + 8
#pragma unroll
    for (int j = 0; j < NT; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      constexpr int kPerStep = kMmas / 2;  // blocks
      const int s = b / kPerStep, m = b % kPerStep * 2;
      typename Step::RawA raw;
      typename Step::FragA a;
      load_rows16<kRowBytes>(raw, rows, offset_, s);
      convert_step(a, raw, s);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        float p[4], row[2], column[2];
        mma_f16_zero(p, a[m], q_[j][s][m]);
        mma_f16(p, a[m + 1], q_[j][s][m + 1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t q_word = lds32(words + 4 * (8 * j + lane_id() % 4 * 2 + e));
          row[e] = block_scale(own[e], b);
          column[e] = block_scale(q_word, b);
        }
#pragma unroll
        for (int x = 0; x < 4; ++x) acc[j][x] = fmaf(p[x], row[x / 2] * column[x % 2], acc[j][x]);
      }
    }
  }
#endif

  typename Step::FragA a_[2];  // of even and odd steps
  uint32_t q_[NT][kSteps][kMmas][2];
  uint32_t word_, offset_;
  // Emulated FP4: state of the folded scales.
  struct {
    RowScale<kBlocks> top, bottom;  // of rows g and g + 8
    float factor;                   // of key g + 8 * (t % 2)
    bool k_regular, q_regular;
  } fold_;
};

}  // namespace sm120
