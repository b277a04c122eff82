// The emulated block-scaled MMA of FP4 rows with at most two FP8 columns.
//
// Six of the f16 MMA's eight columns would be idle. So a block's four K-groups, which have a scale
// each, are spread over them: MMA column 2s + c is column c of the product with group s of K, and
// zero in place of the other groups. The groups' sums thus stay apart in one accumulator over the
// whole block, lane 4g + t having those of group t, rows g and g + 8, columns 0 and 1. It scales
// four sums a block and fragment where WarpMma scales sixteen, with a quarter of the scales, and
// converts a column's values once a block. At the end of the tile a quad adds up its sums.
//
// Every exponent code is handled exactly: telling which blocks need it would take as long.
#pragma once
#include "device/atom.cuh"
#include "device/warp.cuh"

namespace sm120 {

template <int MT>
class SpreadMma;
template <int MT>
class KGroupMma;

#if !SM120_OPS_NATIVE

// Lane 4n + t reads values 8t .. 8t + 7 of column n % 2, K-group n / 2.
template <int kRowBytes>
class ReaderSpread {
 public:
  __device__ explicit ReaderSpread(int, int first_byte) {
    const int lane = lane_id(), n = lane / 4;
    offset_ = swizzled<kRowBytes>(n % 2, first_byte + 32 * (n / 2) + 8 * (lane % 4));
  }

  // r: all of a block, when its first step comes
  __device__ __forceinline__ void load(uint32_t (&r)[1][2], uint32_t tile, int step) const {
    if (step == 0) lds64(r[0][0], r[0][1], tile + offset_);
  }

 private:
  uint32_t offset_;
};

template <int MT>
class SpreadMma : public WarpMma<Format::kFp4, Format::kFp8, MT, 1, 32> {
 public:
  using Base = WarpMma<Format::kFp4, Format::kFp8, MT, 1, 32>;
  static constexpr int kColumns = 2;
  template <int kRowBytes>
  using ReaderCols = ReaderSpread<kRowBytes>;

  __device__ SpreadMma(int warp_row, int warp_col, int = 0) : Base(warp_row, warp_col) {
#pragma unroll
    for (int s = 0; s < 4; ++s) in_step_[s] = opaque(lane_id() / 8 == s);
  }

  // K-group whose sums this lane has.
  static __device__ __forceinline__ int group() { return lane_id() % 4; }

  // sfa, sfb: of the CTA's tile; kSpread: of this lane's byte in its first words
  template <ScaleRead kRead>
  __device__ __forceinline__ void load_scales(uint32_t sfa, uint32_t sfb, uint32_t select_a,
                                              uint32_t select_b) {
    static_assert(kRead == ScaleRead::kSpread || kRead == ScaleRead::kAny);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        row_code_[i][e] =
            read_scale<kRead>(sfa + this->row_scale_ + 4 * (16 * i + 8 * e), of_group(select_a));
      }
      col_code_[e] = read_scale<kRead>(sfb + 4 * e, of_group(select_b));
    }
  }

  template <class Scaling>
  __device__ __forceinline__ void set_scales(int) {}

  template <int kStep>
  __device__ __forceinline__ void set_b(const typename Base::RawB (&raw)[1]) {
    if constexpr (kStep == 0) Base::convert_b(own_b_, raw[0]);
#pragma unroll
    for (int x = 0; x < 4; ++x) b_[x / 2][x % 2] = own_b_[x / 2][x % 2] * in_step_[kStep];
  }

  template <int kStep, class Scaling>
  __device__ __forceinline__ void multiply(int i, float (&)[1][4], const typename Base::FragA& a) {
    if constexpr (kStep == 0) {
      mma_f16_zero(sums_[i], a[0], b_[0]);
    } else {
      mma_f16(sums_[i], a[0], b_[0]);
    }
    mma_f16(sums_[i], a[1], b_[1]);
  }

  template <class Scaling>
  __device__ __forceinline__ void finish_block(float (&acc)[MT][1][4]) {
    const float b[2] = {scale(col_code_[0]), scale(col_code_[1])};
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const float a[2] = {scale(row_code_[i][0]), scale(row_code_[i][1])};
      Base::template scale_add<true>(acc[i][0], sums_[i], a, b);
    }
  }

  // Adds up the groups, and puts columns 0 and 1 where the MMA's fragment columns 0 and 4 are: in
  // lanes 4g and 4g + 2 (see fragment_column). What the other elements hold is not of the product.
  __device__ __forceinline__ void finish_tile(float (&acc)[MT][1][4]) const {
    const bool second = group() >= 2;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& first = acc[i][0][2 * h];
        const float other = acc[i][0][2 * h + 1];
        const float sum = (second ? other : first) + from_lane_xor(second ? first : other, 2);
        first = add_across(sum, 1);
      }
    }
  }

 private:
  // The selector of one byte, that of this lane's group, out of one for all four.
  static __device__ __forceinline__ uint32_t of_group(uint32_t selector) {
    return (selector >> 4 * group() & 0xf) | 0x5550;
  }
  static __device__ __forceinline__ float scale(uint32_t code) {
    const float scale = fmaxf(__uint_as_float(code << 23), __uint_as_float(0x00400000u));
    return fmaf(scale, 0.f, scale);
  }

  uint32_t in_step_[4];  // whether this lane's column values are of that step: 0 or 1
  uint32_t row_code_[MT][2], col_code_[2], own_b_[2][2], b_[2][2];
  float sums_[MT][4];
};

// For more columns: WarpMma with a sum of its own for each K-group of the blocks. At the end of the
// tile they are added up as a quad adds them, so that a column's bits do not depend on how many
// others there are beside it.
template <int MT>
class KGroupMma : public WarpMma<Format::kFp4, Format::kFp8, MT, 1, 32> {
 public:
  using Base = WarpMma<Format::kFp4, Format::kFp8, MT, 1, 32>;
  using Base::Base;

  template <int kStep, class Scaling>
  __device__ __forceinline__ void multiply(int i, float (&)[1][4], const typename Base::FragA& a) {
    static_assert(!Scaling::kPerBlock);
    Base::template multiply<kStep, Scaling>(i, sums_[kStep][i], a);
  }

  // In a loop over the steps, multiply<0>() adds to the next group's sums from here on.
  __device__ __forceinline__ void next_step() {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const float first = sums_[0][i][0][x];
#pragma unroll
        for (int s = 0; s < 3; ++s) sums_[s][i][0][x] = sums_[s + 1][i][0][x];
        sums_[3][i][0][x] = first;
      }
    }
  }

  __device__ __forceinline__ void finish_tile(float (&acc)[MT][1][4]) const {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        acc[i][0][x] =
            (sums_[0][i][0][x] + sums_[2][i][0][x]) + (sums_[1][i][0][x] + sums_[3][i][0][x]);
      }
    }
  }

 private:
  float sums_[4][MT][1][4] = {};
};

#endif

}  // namespace sm120
