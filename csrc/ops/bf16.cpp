// CUDA entry points of the bf16 family: check -> choose config -> launch. The schemas and the
// meaning of every argument are in sm120_ops/ops/bf16.py.
#include "ops/bf16_common.h"
#include "ops/gemm_common.h"

#include <cstdio>

namespace sm120 {
namespace {

constexpr char kOp[] = "bf16_gemm";

struct Problem {
  int64_t m, n, k;
  Bf16Operand a, b;
};

// A configuration a test or a tuning run asks for, in place of the model's choice.
struct Forced {
  int64_t tile;
  bool swapped, split;
};

Problem check_problem(const Tensor& a, const Tensor& b) {
  const int32_t device = device_of(a, b);
  Problem p{};
  p.a = check_bf16_operand(kOp, "a", a, false, device);
  p.b = check_bf16_operand(kOp, "b", b, false, device);
  p.m = a.size(0), p.n = b.size(0), p.k = a.size(1);
  if (b.size(1) != p.k) fail(kOp, "b", cat("K=", p.k, " as in a"), cat("K=", b.size(1)));
  return p;
}

void run(const Tensor& a, const Tensor& b, const Problem& p, const std::optional<Tensor>& c,
         const Tensor& out, const Forced* forced = nullptr) {
  const int32_t device = a.get_device_index();
  const GpuModel model = gpu_model(kOp, device);
  const GemmOutput d = check_matrix_output(kOp, out, c, p.m, p.n, device);
  check_apart(kOp, "out", out, "a", a);
  check_apart(kOp, "out", out, "b", b);
  if (p.m == 0 || p.n == 0) return;

  Bf16Shape shape{p.m, p.n, p.k};
  shape.a_mn_major = p.a.mn_major, shape.b_mn_major = p.b.mn_major;
  Bf16Config config;
  if (forced) {
    check(forced->tile >= 0 && forced->tile < kNumBf16Tiles &&
              is_legal(static_cast<int>(forced->tile), forced->swapped, forced->split, shape,
                       model.num_sms),
          kOp, "tile, swapped, split", "a compiled tile and a legal combination", forced->tile,
          ", ", forced->swapped, ", ", forced->split);
    config = evaluate_bf16_config(static_cast<int>(forced->tile), forced->swapped, forced->split,
                                  shape, model);
  } else {
    config = choose_bf16_config(shape, model);
  }
  if (log_configs()) {
    std::fprintf(stderr, "sm120_ops.bf16_gemm: m %lld n %lld k %lld: %s\n",
                 static_cast<long long>(p.m), static_cast<long long>(p.n),
                 static_cast<long long>(p.k), config.to_string().c_str());
  }
  run_bf16_gemm(kOp, config, {p.a, p.b, p.k, d, Schedule::kTiles, {}}, device);
}

void bf16_gemm_out(Tensor a, Tensor b, std::optional<Tensor> c, Tensor out) {
  run(a, b, check_problem(a, b), c, out);
}

Tensor bf16_gemm(Tensor a, Tensor b, ScalarType out_dtype, std::optional<Tensor> c) {
  const Problem p = check_problem(a, b);
  check(is_out_dtype(out_dtype), kOp, "out_dtype", "torch.bfloat16 or torch.float32",
        Dtype(out_dtype));
  const Tensor out = empty_cuda({p.m, p.n}, out_dtype, a.get_device_index());
  run(a, b, p, c, out);
  return out;
}

void bf16_gemm_forced(Tensor a, Tensor b, std::optional<Tensor> c, Tensor out, int64_t tile,
                      bool swapped, bool split) {
  const Forced forced{tile, swapped, split};
  run(a, b, check_problem(a, b), c, out, &forced);
}

// What the op would choose, without a GPU.
std::string bf16_gemm_config(int64_t m, int64_t n, int64_t k, int64_t num_sms, bool native,
                             int64_t l2_bytes, int64_t dram_gbps) {
  check(m > 0 && n > 0 && k >= 0 && num_sms > 0, "_bf16_gemm_config", "m, n, k, num_sms",
        "m, n, num_sms > 0 and k >= 0", m, ", ", n, ", ", k, ", ", num_sms);
  const GpuModel model{static_cast<int>(num_sms), native, l2_bytes, static_cast<int>(dram_gbps)};
  return choose_bf16_config({m, n, k}, model).to_string();
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("bf16_gemm", TORCH_BOX(&sm120::bf16_gemm));
  m.impl("bf16_gemm.out", TORCH_BOX(&sm120::bf16_gemm_out));
  m.impl("_bf16_gemm_forced", TORCH_BOX(&sm120::bf16_gemm_forced));
}

STABLE_TORCH_LIBRARY_IMPL(sm120, CompositeExplicitAutograd, m) {
  m.impl("_bf16_gemm_config", TORCH_BOX(&sm120::bf16_gemm_config));
}
