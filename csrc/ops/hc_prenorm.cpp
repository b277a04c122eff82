// CUDA entry points of the hc_prenorm family: check -> plan -> launch. The schemas and the meaning
// of every argument are in sm120_ops/ops/hc_prenorm.py.
#include "host/hc_prenorm_launch.h"

#include <cmath>

#include "ops/common.h"

namespace sm120 {
namespace {

constexpr char kOp[] = "hc_prenorm";
constexpr int64_t kMaxRows = (1ll << 31) - 65536;  // tile coordinates and row counters are int32

void check_matrix(const char* arg, const Tensor& t, ScalarType dtype, const char* dtype_name,
                  int32_t device) {
  check_on_device(kOp, arg, t, device);
  check(t.scalar_type() == dtype, kOp, arg, dtype_name, Dtype(t));
  check(t.dim() == 2, kOp, arg, "2 dimensions", Shape{t});
  if (t.numel() == 0) return;
  check(t.stride(1) == 1, kOp, arg, "stride(1) == 1", Strides{t});
  const int64_t bytes = t.element_size();
  check(t.size(0) == 1 || (t.stride(0) >= t.size(1) && t.stride(0) * bytes % 16 == 0), kOp, arg,
        "rows apart by a multiple of 16 bytes and not overlapping", Strides{t});
  check(is_aligned(t.data_ptr(), 16), kOp, arg, "a 16-byte aligned data pointer", t.data_ptr());
}

int64_t row_bytes(const Tensor& t) {
  return (t.size(0) > 1 ? t.stride(0) : t.size(1)) * static_cast<int64_t>(t.element_size());
}

PrenormProblem check_problem(const Tensor& x, const Tensor& fn, std::optional<int64_t> num_splits,
                             std::optional<double> eps) {
  const int32_t device = device_of(x, fn);
  check_matrix("x", x, ScalarType::BFloat16, "dtype torch.bfloat16", device);
  check_matrix("fn", fn, ScalarType::Float, "dtype torch.float32", device);
  PrenormProblem p{};
  p.m = x.size(0), p.n = fn.size(0), p.k = x.size(1);
  check(p.m < kMaxRows, kOp, "x", "fewer than 2^31 - 65536 rows", Shape{x});
  check(p.k > 0 && p.k % kPrenormBlockK == 0 && p.k < (1ll << 28), kOp, "x",
        "K to be a multiple of 64, 64 to 2^28", "K=", p.k);
  if (fn.size(1) != p.k) fail(kOp, "fn", cat("K=", p.k, " as in x"), cat("K=", fn.size(1)));
  check(p.n > 0 && p.n % 8 == 0 && p.n <= 128, kOp, "fn", "N to be a multiple of 8, 8 to 128",
        "N=", p.n);
  p.splits = num_splits.value_or(0);
  if (num_splits && (*num_splits < 1 || *num_splits > p.k / kPrenormBlockK)) {
    fail(kOp, "num_splits", cat("None or 1 to K / 64 = ", p.k / kPrenormBlockK), cat(*num_splits));
  }
  if (eps) {
    check(std::isfinite(*eps) && *eps >= 0, kOp, "eps", "None or a finite number >= 0", *eps);
    check(!num_splits, kOp, "eps", "None with num_splits (a part of K has no norm)", *eps);
    p.scale = true, p.eps = static_cast<float>(*eps);
  }
  p.x = x.data_ptr(), p.fn = fn.data_ptr();
  p.x_stride = row_bytes(x), p.fn_stride = row_bytes(fn);
  return p;
}

std::vector<int64_t> d_shape(const PrenormProblem& p) {
  if (p.splits > 0) return {p.splits, p.m, p.n};
  return {p.m, p.n};
}

std::vector<int64_t> sqr_sum_shape(const PrenormProblem& p) {
  if (p.splits > 0) return {p.splits, p.m};
  return {p.m};
}

void run(PrenormProblem& p, const Tensor& d, const Tensor& sqr_sum, int32_t device) {
  const DeviceProperties& gpu = require_supported_device(kOp, device);
  if (p.m == 0) return;
  p.d = static_cast<float*>(d.data_ptr());
  p.sqr_sum = static_cast<float*>(sqr_sum.data_ptr());
  const PrenormPlan plan = plan_prenorm(p, gpu.sm_count);
  const DeviceGuard guard(device);
  std::optional<Tensor> workspace;
  if (plan.reduced) workspace = empty_cuda({plan.workspace_bytes / 4}, ScalarType::Float, device);
  SM120_OPS_CUDA_CHECK(kOp, launch_prenorm(p, plan, workspace ? workspace->data_ptr() : nullptr,
                                           current_stream(device)));
}

std::tuple<Tensor, Tensor> hc_prenorm(Tensor x, Tensor fn, std::optional<int64_t> num_splits,
                                      std::optional<double> eps) {
  PrenormProblem p = check_problem(x, fn, num_splits, eps);
  const int32_t device = x.get_device_index();
  const Tensor d = empty_cuda(d_shape(p), ScalarType::Float, device);
  const Tensor sqr_sum = empty_cuda(sqr_sum_shape(p), ScalarType::Float, device);
  run(p, d, sqr_sum, device);
  return {d, sqr_sum};
}

void hc_prenorm_out(Tensor x, Tensor fn, std::optional<int64_t> num_splits,
                    std::optional<double> eps, Tensor d, Tensor sqr_sum) {
  PrenormProblem p = check_problem(x, fn, num_splits, eps);
  const int32_t device = x.get_device_index();
  check_out(kOp, "d", d, d.scalar_type() == ScalarType::Float, "dtype torch.float32", d_shape(p),
            device);
  check_out(kOp, "sqr_sum", sqr_sum, sqr_sum.scalar_type() == ScalarType::Float,
            "dtype torch.float32", sqr_sum_shape(p), device);
  check_apart(kOp, "d", d, "x", x);
  check_apart(kOp, "d", d, "fn", fn);
  check_apart(kOp, "d", d, "sqr_sum", sqr_sum);
  check_apart(kOp, "sqr_sum", sqr_sum, "x", x);
  check_apart(kOp, "sqr_sum", sqr_sum, "fn", fn);
  run(p, d, sqr_sum, device);
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("hc_prenorm", TORCH_BOX(&sm120::hc_prenorm));
  m.impl("hc_prenorm.out", TORCH_BOX(&sm120::hc_prenorm_out));
}
