// Instantiates one format pair of the GEMM for every tile of the table.
#pragma once
#include "host/gemm_config.h"
#include "kernels/block_scaled_gemm.cuh"

namespace sm120 {

constexpr OperandFormat operand_format(Format format) {
  return format == Format::kFp8 ? OperandFormat::kMxfp8 : OperandFormat::kMxfp4;
}

template <Format kRowsFormat, Format kColsFormat, int kRows, int kCols, int kWarpsDown,
          TileFormats kFormats>
GemmInstance make_instance() {
  if constexpr (!has_instance(kFormats, operand_format(kRowsFormat), operand_format(kColsFormat))) {
    return {};
  } else {
    using Traits = GemmTraits<kRowsFormat, kColsFormat, kRows, kCols, kWarpsDown>;
    return {block_scaled_gemm<Traits>, Traits::kSmemBytes, Traits::kRowsRowBytes,
            Traits::kColsRowBytes, Traits::kDeep};
  }
}

#define SM120_INSTANCE(...) make_instance<SM120_FORMATS, __VA_ARGS__>(),
#define SM120_DEFINE_INSTANCES(name)                                        \
  GemmInstance name(int tile) {                                             \
    static const GemmInstance table[] = {SM120_GEMM_TILES(SM120_INSTANCE)}; \
    return table[tile];                                                     \
  }

}  // namespace sm120
