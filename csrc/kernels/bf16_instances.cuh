// Instantiates the BF16 GEMM for one pair of operand layouts and every tile of the table.
#pragma once
#include "host/bf16_config.h"
#include "kernels/bf16_gemm.cuh"

namespace sm120 {

template <Bf16Majors kMajors, int kRows, int kCols, int kWarpsDown, int kSlices, int kBlockK>
GemmInstance make_bf16_instance() {
  using Traits = Bf16Traits<kRows, kCols, kWarpsDown, kSlices, kBlockK, kMajors>;
  return {bf16_gemm<Traits>, Traits::kSmemBytes,
          2 * (Traits::kRowsMajor == Major::kK ? Traits::kKAtom : Traits::kRowsAtom),
          2 * (Traits::kColsMajor == Major::kK ? Traits::kKAtom : Traits::kColsAtom)};
}

#define SM120_INSTANCE(...) make_bf16_instance<SM120_MAJORS, __VA_ARGS__>(),
#define SM120_DEFINE_BF16_INSTANCES(name)                                   \
  GemmInstance name(int tile) {                                             \
    static const GemmInstance table[] = {SM120_BF16_TILES(SM120_INSTANCE)}; \
    return table[tile];                                                     \
  }

}  // namespace sm120
