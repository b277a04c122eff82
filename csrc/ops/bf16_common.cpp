#include "ops/bf16_common.h"

#include "ops/gemm_common.h"

namespace sm120 {

Bf16Operand check_bf16_operand(const char* op, const char* arg, const Tensor& t, bool grouped,
                               int32_t device) {
  check_on_device(op, arg, t, device);
  check(t.scalar_type() == ScalarType::BFloat16, op, arg, "dtype torch.bfloat16", Dtype(t));
  check(t.dim() == (grouped ? 3 : 2), op, arg, grouped ? "3 dimensions" : "2 dimensions", Shape{t});
  const int row_dim = grouped, k_dim = 1 + grouped;
  check(t.size(row_dim) <= kMaxRows && t.size(k_dim) <= kMaxRows / 2 &&
            (!grouped || t.size(0) <= kMaxRows),
        op, arg, "fewer than 2^31 rows (and groups) and 2^30 columns", Shape{t});
  Bf16Operand x{nullptr, 16, t.size(row_dim), false};
  if (t.numel() == 0) return x;
  // Lines along `inner`; a single line's stride says nothing.
  const auto lines = [&](int inner, int outer) {
    const bool apart = t.stride(outer) % 8 == 0 && t.stride(outer) >= t.size(inner);
    return (t.stride(inner) == 1 || t.size(inner) == 1) && (t.size(outer) == 1 || apart);
  };
  const bool k_major = lines(k_dim, row_dim);
  check(k_major || lines(row_dim, k_dim), op, arg,
        "one stride to be 1 and the other a multiple of 8 (16-byte rows), without overlap",
        Strides{t});
  check(is_aligned(t.data_ptr(), 16), op, arg, "a 16-byte aligned data pointer", t.data_ptr());
  const int outer = k_major ? row_dim : k_dim, inner = k_major ? k_dim : row_dim;
  x.data = t.data_ptr();
  x.stride = t.size(outer) > 1 ? 2 * t.stride(outer) : align_up(2 * t.size(inner), 16);
  x.mn_major = !k_major;
  if (grouped && t.size(0) > 1 && t.stride(0) != 0) {
    check(t.stride(0) > 0 && t.stride(0) % 8 == 0, op, arg,
          "a group stride that is a multiple of 8 (16 bytes)", Strides{t});
    x.groups = t.size(0), x.group_stride = 2 * t.stride(0);
  }
  return x;
}

}  // namespace sm120
