// Argument checks that the MQA logits and the indexer's other ops share.
#pragma once
#include "ops/common.h"

namespace sm120 {

inline constexpr int64_t kMaxInt = 0x7fffffff;
inline constexpr char kDataDtypes[] =
    "dtype torch.float8_e4m3fn, or packed FP4 (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)";

inline void check_head_dim(const char* op, const char* arg, int64_t dim) {
  check(dim == 32 || dim == 64 || dim == 128, op, arg, "D to be one of [32, 64, 128]", "D=", dim);
}

// A contiguous int32 tensor.
inline void check_ints(const char* op, const char* arg, const Tensor& t, Sizes shape,
                       int32_t device) {
  check_out(op, arg, t, t.scalar_type() == ScalarType::Int, "dtype torch.int32", shape, device);
}

// uint8 [blocks, block_kv, 1, W + 4]: pages of block_kv rows of W data bytes, then their scales.
struct Cache {
  void* data;
  int64_t blocks, stride;
  int32_t block_kv;
};

inline Cache check_cache(const char* op, const Tensor& t, int64_t head_dim, bool fp4,
                         int32_t device) {
  constexpr char arg[] = "kv_cache";
  check_on_device(op, arg, t, device);
  check(t.scalar_type() == ScalarType::Byte, op, arg, "dtype torch.uint8", Dtype(t));
  const int64_t width = (fp4 ? head_dim / 2 : head_dim) + 4;
  if (t.dim() != 4 || t.size(2) != 1 || t.size(3) != width) {
    fail(op, arg, cat("shape [num_blocks, block_kv, 1, ", width, "]"), cat(Shape{t}));
  }
  const int64_t block_kv = t.size(1), page = block_kv * width;
  check(block_kv == 16 || block_kv == 32 || block_kv == 64 || block_kv == 128, op, arg,
        "block_kv (dimension 1) to be one of [16, 32, 64, 128]", Shape{t});
  const int64_t stride = t.size(0) > 1 ? t.stride(0) : page;
  check(t.stride(3) == 1 && t.stride(1) == width && stride % 16 == 0 && stride >= page, op, arg,
        "contiguous pages apart by a multiple of 16 bytes and not overlapping", Strides{t});
  check(is_aligned(t.data_ptr(), 16), op, arg, "a 16-byte aligned data pointer", t.data_ptr());
  check(t.size(0) < kMaxInt, op, arg, "fewer than 2^31 pages", Shape{t});
  return {t.data_ptr(), t.size(0), stride, static_cast<int32_t>(block_kv)};
}

}  // namespace sm120
