// Instantiates one format pair of the GEMM for every tile of the table.
#pragma once
#include "host/gemm_config.h"
#include "kernels/block_scaled_gemm.cuh"

namespace sm120 {

template <Format kRowsFormat, Format kColsFormat, int kRows, int kCols, int kWarpsDown,
          bool kFp8Only>
GemmInstance make_instance() {
  constexpr bool kBothFp8 = kRowsFormat == Format::kFp8 && kColsFormat == Format::kFp8;
  if constexpr (kFp8Only && !kBothFp8) {
    return {};
  } else {
    using Traits = GemmTraits<kRowsFormat, kColsFormat, kRows, kCols, kWarpsDown>;
    return {block_scaled_gemm<Traits>, Traits::kSmemBytes, Traits::kRowsRowBytes,
            Traits::kColsRowBytes};
  }
}

#define SM120_INSTANCE(...) make_instance<SM120_FORMATS, __VA_ARGS__>(),
#define SM120_DEFINE_INSTANCES(name)                                        \
  GemmInstance name(int tile) {                                             \
    static const GemmInstance table[] = {SM120_GEMM_TILES(SM120_INSTANCE)}; \
    return table[tile];                                                     \
  }

}  // namespace sm120
