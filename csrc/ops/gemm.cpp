// CUDA entry points of the gemm family: check -> choose config -> launch.
#include "ops/gemm_common.h"

#include <cstdio>

namespace sm120 {
namespace {

constexpr char kOp[] = "gemm";

struct Problem {
  int64_t m, n, k, columns;  // columns: of D, larger than n with a head split
  GemmOperand a, b;
};

// A configuration a test or a tuning run asks for, in place of the model's choice.
struct Forced {
  int64_t tile;
  bool swapped, split;
};

Problem check_problem(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                      int64_t gran_k_a, int64_t gran_k_b, const std::vector<int64_t>& splits) {
  check(a.is_cuda(), kOp, "a", "a CUDA tensor", DeviceOf{a});
  const int32_t device = a.get_device_index();
  Problem p;
  int64_t k_b = 0;
  p.a = check_operand(kOp, {"a", "sfa", "gran_k_a"}, a, sfa, gran_k_a, false, device, p.k);
  p.b = check_operand(kOp, {"b", "sfb", "gran_k_b"}, b, sfb, gran_k_b, false, device, k_b);
  if (k_b != p.k) fail(kOp, "b", cat("the K of a (", p.k, ")"), cat("K = ", k_b));
  p.m = a.size(0), p.n = b.size(0), p.columns = p.n;
  if (!splits.empty()) {
    check(splits.size() == 3 && splits[0] >= 0 && splits[1] >= 0 && splits[2] >= 0 &&
              splits[0] + splits[2] > 0 && splits[0] + splits[1] + splits[2] < kMaxRows,
          kOp, "head_splits", "[left, mid, right], none negative, left + right > 0", splits.size(),
          " numbers");
    const int64_t period = splits[0] + splits[2];
    if (p.n % period != 0) {
      fail(kOp, "head_splits", cat("left + right to divide N = ", p.n), cat(period));
    }
    p.columns = p.n + p.n / period * splits[1];
  }
  return p;
}

void run(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, const Problem& p,
         const std::optional<Tensor>& c, const std::vector<int64_t>& splits, const Tensor& out,
         const Forced* forced = nullptr) {
  const int32_t device = a.get_device_index();
  const GpuModel model = gpu_model(kOp, device);
  GemmOutput d = check_matrix_output(kOp, out, c, p.m, p.columns, device);
  check_apart_from(kOp, out, {{"a", a}, {"sfa", sfa}, {"b", b}, {"sfb", sfb}});
  if (p.m == 0 || p.columns == 0) return;

  if (!splits.empty()) {
    d.left = static_cast<int32_t>(splits[0]);
    d.mid = static_cast<int32_t>(splits[1]);
    d.period = static_cast<int32_t>(splits[0] + splits[2]);
  }
  d.vector &= d.left % 8 == 0 && d.mid % 8 == 0 && d.period % 8 == 0;

  const GemmShape shape{p.m, p.n, p.k, p.a.format, p.b.format, p.a.gran_k, p.b.gran_k};
  GemmConfig config;
  if (forced) {
    check(forced->tile >= 0 && forced->tile < kNumGemmTiles &&
              is_legal(static_cast<int>(forced->tile), forced->swapped, forced->split, shape,
                       model.num_sms),
          kOp, "tile, swapped, split", "a compiled tile and a legal combination", forced->tile,
          ", ", forced->swapped, ", ", forced->split);
    config = evaluate_gemm_config(static_cast<int>(forced->tile), forced->swapped, forced->split,
                                  shape, model);
  } else {
    config = choose_gemm_config(shape, model);
  }
  if (log_configs()) {
    std::fprintf(stderr, "sm120_ops.gemm: m %lld n %lld k %lld: %s\n", static_cast<long long>(p.m),
                 static_cast<long long>(p.n), static_cast<long long>(p.k),
                 config.to_string().c_str());
  }
  const DeviceGuard guard(device);
  void* workspace = nullptr;
  std::optional<Tensor> buffer;
  if (const int64_t bytes = gemm_workspace_bytes(config); bytes > 0) {
    buffer = empty_cuda({bytes / 4}, ScalarType::Float, device);
    workspace = buffer->data_ptr();
  }
  const GemmProblem problem{p.a, p.b, p.k, d, Schedule::kTiles, {}};
  SM120_OPS_CUDA_CHECK(kOp, launch_gemm(config, problem, workspace, current_stream(device)));
}

void gemm_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int64_t gran_k_a, int64_t gran_k_b,
              std::optional<Tensor> c, std::vector<int64_t> head_splits, Tensor out) {
  const Problem p = check_problem(a, sfa, b, sfb, gran_k_a, gran_k_b, head_splits);
  run(a, sfa, b, sfb, p, c, head_splits, out);
}

Tensor gemm(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int64_t gran_k_a, int64_t gran_k_b,
            ScalarType out_dtype, std::optional<Tensor> c, std::vector<int64_t> head_splits) {
  const Problem p = check_problem(a, sfa, b, sfb, gran_k_a, gran_k_b, head_splits);
  check(is_out_dtype(out_dtype), kOp, "out_dtype", "torch.bfloat16 or torch.float32",
        Dtype(out_dtype));
  const int32_t device = a.get_device_index();
  Tensor out = empty_cuda({p.m, p.columns}, out_dtype, device);
  if (p.columns != p.n && out.numel() > 0) {  // the columns between the heads
    const DeviceGuard guard(device);
    SM120_OPS_CUDA_CHECK(kOp, cudaMemsetAsync(out.data_ptr(), 0, out.numel() * out.element_size(),
                                              current_stream(device)));
  }
  run(a, sfa, b, sfb, p, c, head_splits, out);
  return out;
}

void gemm_forced(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int64_t gran_k_a, int64_t gran_k_b,
                 std::optional<Tensor> c, std::vector<int64_t> head_splits, Tensor out,
                 int64_t tile, bool swapped, bool split) {
  const Problem p = check_problem(a, sfa, b, sfb, gran_k_a, gran_k_b, head_splits);
  const Forced forced{tile, swapped, split};
  run(a, sfa, b, sfb, p, c, head_splits, out, &forced);
}

// What the op would choose, without a GPU: for tests and for SM120_OPS_LOG's readers.
std::string gemm_config(int64_t m, int64_t n, int64_t k, std::string format_a, std::string format_b,
                        int64_t gran_k_a, int64_t gran_k_b, int64_t num_sms, bool native,
                        int64_t l2_bytes, int64_t dram_gbps) {
  check(m > 0 && n > 0 && k >= 0 && num_sms > 0, "_gemm_config", "m, n, k, num_sms",
        "m, n, num_sms > 0 and k >= 0", m, ", ", n, ", ", k, ", ", num_sms);
  const GemmShape shape{m,
                        n,
                        k,
                        parse_format("_gemm_config", "format_a", format_a),
                        parse_format("_gemm_config", "format_b", format_b),
                        static_cast<int>(gran_k_a),
                        static_cast<int>(gran_k_b)};
  const GpuModel model{static_cast<int>(num_sms), native, l2_bytes, static_cast<int>(dram_gbps)};
  return choose_gemm_config(shape, model).to_string();
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("gemm", TORCH_BOX(&sm120::gemm));
  m.impl("gemm.out", TORCH_BOX(&sm120::gemm_out));
  m.impl("_gemm_forced", TORCH_BOX(&sm120::gemm_forced));
}

STABLE_TORCH_LIBRARY_IMPL(sm120, CompositeExplicitAutograd, m) {
  m.impl("_gemm_config", TORCH_BOX(&sm120::gemm_config));
}
