// CUDA entry points of the BF16 k-grouped GEMM: check -> choose config -> launch. The schema and
// the meaning of every argument are in sm120_ops/ops/bf16_k_grouped.py.
#include "ops/bf16_common.h"
#include "ops/grouped_common.h"

#include <algorithm>
#include <cstdio>

namespace sm120 {
namespace {

constexpr char kOp[] = "bf16_k_grouped_gemm";

struct Inputs {
  Tensor a, b, ks;
  std::optional<Tensor> c;
};

// A configuration a test or a tuning run asks for, in place of the model's choice.
struct Forced {
  int64_t tile;
  bool swapped;
};

// [K, rows]: one line a k, at multiples of 16 bytes.
Bf16Operand check_lines(const char* arg, const Tensor& t, int32_t device) {
  check_on_device(kOp, arg, t, device);
  check(t.scalar_type() == ScalarType::BFloat16, kOp, arg, "dtype torch.bfloat16", Dtype(t));
  check(t.dim() == 2, kOp, arg, "2 dimensions", Shape{t});
  const int64_t k = t.size(0), rows = t.size(1);
  check(k <= kMaxRows / 2 && rows <= kMaxRows / 2, kOp, arg, "fewer than 2^30 rows and columns",
        Shape{t});
  Bf16Operand x{nullptr, 16, rows, true};
  if (t.numel() == 0) return x;
  check(
      (rows == 1 || t.stride(1) == 1) && (k == 1 || (t.stride(0) % 8 == 0 && t.stride(0) >= rows)),
      kOp, arg, "contiguous rows, a multiple of 8 apart (16 bytes), without overlap", Strides{t});
  check(is_aligned(t.data_ptr(), 16), kOp, arg, "a 16-byte aligned data pointer", t.data_ptr());
  x.data = t.data_ptr();
  x.stride = k > 1 ? 2 * t.stride(0) : align_up(2 * rows, 16);
  return x;
}

Bf16Problem check_inputs(const Inputs& in) {
  const int32_t device = device_of(in.a, in.b, in.ks);
  Bf16Problem p{};
  p.a = check_lines("a", in.a, device);
  p.b = check_lines("b", in.b, device);
  p.k = in.a.size(0);
  if (in.b.size(0) != p.k) fail(kOp, "b", cat("K=", p.k, " as in a"), cat("K=", in.b.size(0)));
  check_on_device(kOp, "ks", in.ks, device);
  check(in.ks.scalar_type() == ScalarType::Int, kOp, "ks", "dtype torch.int32", Dtype(in.ks));
  check(in.ks.dim() == 1, kOp, "ks", "a 1-D tensor", Shape{in.ks});
  const int64_t groups = in.ks.size(0);
  check(groups <= 1 || in.ks.stride(0) == 1, kOp, "ks", "a contiguous tensor", Strides{in.ks});
  check(groups <= kMaxRows, kOp, "ks", "fewer than 2^31 groups", Shape{in.ks});
  p.schedule = Schedule::kSpans;
  p.groups.index = static_cast<const int32_t*>(in.ks.data_ptr());
  p.groups.count = static_cast<int32_t>(groups);
  p.groups.tokens = static_cast<int32_t>(p.k);
  return p;
}

void run(const Inputs& in, Bf16Problem& p, const Tensor& out, const Forced* forced = nullptr) {
  const int32_t device = in.a.get_device_index();
  const GpuModel model = gpu_model(kOp, device);
  const int64_t groups = p.groups.count, m = p.a.rows, n = p.b.rows;
  p.out = check_group_outputs(kOp, out, in.c, groups, m, n, device);
  check_apart_from(kOp, out, {{"a", in.a}, {"b", in.b}, {"ks", in.ks}});
  if (out.numel() == 0) return;

  // Sizes are on the device: all groups are taken to be alike, and all of K to be used.
  const Bf16Shape one{m, n, ceil_div(p.k, groups), std::max<int64_t>(p.k, 1)};
  const GroupedBf16Shape shape{one, groups, 0, groups, m, groups * m};
  Bf16Config config;
  if (forced) {
    const int tile = static_cast<int>(forced->tile);
    check(forced->tile >= 0 && forced->tile < kNumBf16Tiles &&
              is_legal_grouped(tile, forced->swapped, shape),
          kOp, "tile, swapped", "a compiled tile and a legal combination", forced->tile, ", ",
          forced->swapped);
    config = evaluate_grouped_config(tile, forced->swapped, shape, model);
  } else {
    config = choose_grouped_config(shape, model);
  }
  check(config.grid > 0, kOp, "ks", "fewer than 2^31 tiles", groups, " groups of [", m, ", ", n,
        "]");
  if (log_configs()) {
    std::fprintf(stderr, "sm120_ops.%s: m %lld n %lld k %lld groups %lld: %s\n", kOp,
                 static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(p.k),
                 static_cast<long long>(groups), config.to_string().c_str());
  }
  run_bf16_gemm(kOp, config, p, device);
}

void k_grouped_out(Tensor a, Tensor b, Tensor ks, std::optional<Tensor> c, Tensor out) {
  const Inputs in{a, b, ks, c};
  Bf16Problem p = check_inputs(in);
  run(in, p, out);
}

Tensor k_grouped(Tensor a, Tensor b, Tensor ks, ScalarType out_dtype, std::optional<Tensor> c) {
  const Inputs in{a, b, ks, c};
  Bf16Problem p = check_inputs(in);
  check(is_out_dtype(out_dtype), kOp, "out_dtype", "torch.bfloat16 or torch.float32",
        Dtype(out_dtype));
  const std::vector<int64_t> shape{p.groups.count, p.a.rows, p.b.rows};
  const Tensor out = empty_cuda(shape, out_dtype, a.get_device_index());
  run(in, p, out);
  return out;
}

void k_grouped_forced(Tensor a, Tensor b, Tensor ks, std::optional<Tensor> c, Tensor out,
                      int64_t tile, bool swapped) {
  const Inputs in{a, b, ks, c};
  Bf16Problem p = check_inputs(in);
  const Forced forced{tile, swapped};
  run(in, p, out, &forced);
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("bf16_k_grouped_gemm", TORCH_BOX(&sm120::k_grouped));
  m.impl("bf16_k_grouped_gemm.out", TORCH_BOX(&sm120::k_grouped_out));
  m.impl("_bf16_k_grouped_forced", TORCH_BOX(&sm120::k_grouped_forced));
}
