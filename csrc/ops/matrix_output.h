// Checks of D and C that the GEMM families share.
#pragma once
#include <cstdlib>
#include <cstring>

#include "kernels/gemm.h"
#include "ops/common.h"

namespace sm120 {

inline bool log_configs() {
  static const bool on = [] {
    const char* value = std::getenv("SM120_OPS_LOG");
    return value != nullptr && std::strcmp(value, "config") == 0;
  }();
  return on;
}

inline void check_out_dtype(const char* op, ScalarType dtype) {
  check(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, op, "out_dtype",
        "torch.bfloat16 or torch.float32", Dtype(dtype));
}

inline void check_matrix(const char* op, const char* arg, const Tensor& t, int64_t m,
                         int64_t columns, int32_t device) {
  check_on_device(op, arg, t, device);
  check(t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Float, op, arg,
        "dtype torch.bfloat16 or torch.float32", Dtype(t));
  if (t.dim() != 2 || t.size(0) != m || t.size(1) != columns) {
    fail(op, arg, cat("shape [", m, ", ", columns, "]"), cat(Shape{t}));
  }
  if (t.numel() == 0) return;
  check(columns == 1 || t.stride(1) == 1, op, arg, "contiguous rows (stride(1) == 1)", Strides{t});
}

// D [m, columns] of any row stride, and C, which is D itself or apart from it. No head split.
inline GemmOutput check_matrix_output(const char* op, const Tensor& out,
                                      const std::optional<Tensor>& c, int64_t m, int64_t columns,
                                      int32_t device) {
  check_matrix(op, "out", out, m, columns, device);
  check(m <= 1 || out.numel() == 0 || out.stride(0) >= columns, op, "out",
        "rows that do not overlap", Strides{out});
  GemmOutput d{};
  d.d = out.data_ptr();
  d.d_stride = d.c_stride = columns;
  if (m > 1) d.d_stride = out.stride(0);
  if (c) {
    check_matrix(op, "c", *c, m, columns, device);
    check(c->scalar_type() == out.scalar_type(), op, "c", "the dtype of out", Dtype(*c));
    const bool same = c->data_ptr() == out.data_ptr() && (m <= 1 || c->stride(0) == out.stride(0));
    check(same || !may_overlap(out, *c), op, "c", "out itself or memory apart from it",
          "a shifted overlap");
    d.c = c->data_ptr();
    if (m > 1) d.c_stride = c->stride(0);
  }
  d.fp32 = out.scalar_type() == ScalarType::Float;
  d.vector = is_aligned(d.d, 16) && d.d_stride % 8 == 0;
  return d;
}

}  // namespace sm120
