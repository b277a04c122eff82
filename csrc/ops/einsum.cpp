// CUDA entry points of the einsum family, products of batches of matrices: check -> choose config
// -> launch. The schemas and the meaning of every argument are in sm120_ops/ops/einsum.py.
#include "ops/bf16_common.h"
#include "ops/gemm_common.h"

#include <array>
#include <cstdio>

namespace sm120 {
namespace {

constexpr char kScaled[] = "batched_gemm", kBf16[] = "bf16_batched_gemm", kSum[] = "bf16_batch_sum";

// A configuration a test or a tuning run asks for, in place of the model's choice.
struct Forced {
  int64_t tile;
  bool swapped, split;
};

// D [batch, m, n], with rows_first [m, batch, n]; of a sum [m, n].
struct Extents {
  int64_t batch, m, n;
  bool rows_first;

  std::array<int64_t, 3> shape() const {
    return rows_first ? std::array{m, batch, n} : std::array{batch, m, n};
  }
  int64_t row_stride(const Tensor& t) const { return m > 1 ? t.stride(rows_first ? 0 : 1) : n; }
  int64_t group_stride(const Tensor& t) const {
    return batch > 1 ? t.stride(rows_first ? 1 : 0) : n;
  }
};

int32_t count_of(int64_t batch) {
  return static_cast<int32_t>(batch);
}

// Matrices and rows of D may lie in either order in memory, none over another.
bool overlap_free(const Tensor& d, const Extents& e) {
  const int64_t row = e.row_stride(d), group = e.group_stride(d);
  const bool rows_inside = group >= row * (e.m - 1) + e.n && row >= e.n;
  const bool groups_inside = row >= group * (e.batch - 1) + e.n && group >= e.n;
  return e.batch == 1 ? row >= e.n : e.m == 1 ? group >= e.n : rows_inside || groups_inside;
}

GemmOutput check_batched_output(const char* op, const Tensor& out, const std::optional<Tensor>& c,
                                const Extents& e, int32_t device) {
  const std::array<int64_t, 3> shape = e.shape();
  check_matrix(op, "out", out, shape, device);
  check(out.numel() == 0 || overlap_free(out, e), op, "out",
        "rows and matrices that do not overlap", Strides{out});
  GemmOutput d{};
  d.d = out.data_ptr();
  d.d_stride = e.row_stride(out), d.d_group_stride = e.batch > 1 ? e.group_stride(out) : 0;
  if (c) {
    check_matrix(op, "c", *c, shape, device);
    check(c->scalar_type() == out.scalar_type(), op, "c", "the dtype of out", Dtype(*c));
    d.c = c->data_ptr();
    d.c_stride = e.row_stride(*c), d.c_group_stride = e.batch > 1 ? e.group_stride(*c) : 0;
    const bool same =
        d.c == d.d && d.c_stride == d.d_stride && d.c_group_stride == d.d_group_stride;
    check(same || !may_overlap(out, *c), op, "c", "out itself or memory apart from it",
          "an overlap with it");
  }
  d.fp32 = out.scalar_type() == ScalarType::Float;
  d.vector = is_aligned(d.d, 16) && d.d_stride % 8 == 0 && d.d_group_stride % 8 == 0;
  return d;
}

template <typename Config, typename Shape>
void report(const char* op, const Config& config, const Shape& s) {
  check(config.grid > 0, op, "a, b", "a product that the kernel can count in 32 bits", "m ", s.m,
        ", n ", s.n, ", k ", s.k, ", batch ", s.batch);
  if (log_configs()) {
    std::fprintf(stderr, "sm120_ops.%s: batch %lld m %lld n %lld k %lld: %s\n", op,
                 static_cast<long long>(s.batch), static_cast<long long>(s.m),
                 static_cast<long long>(s.n), static_cast<long long>(s.k),
                 config.to_string().c_str());
  }
}

template <typename Shape>
int check_forced(const char* op, const Forced& forced, int tiles, const Shape& shape, int num_sms) {
  check(forced.tile >= 0 && forced.tile < tiles &&
            is_legal(static_cast<int>(forced.tile), forced.swapped, forced.split, shape, num_sms),
        op, "tile, swapped, split", "a compiled tile and a legal combination", forced.tile, ", ",
        forced.swapped, ", ", forced.split);
  return static_cast<int>(forced.tile);
}

// ---- FP8 and FP4 --------------------------------------------------------------------------------

struct Inputs {
  Tensor a, sfa, b, sfb;
  int64_t gran_k_a, gran_k_b;
};

struct Scaled {
  Extents extents;
  GemmProblem problem;
};

Scaled check_scaled(const Inputs& in, bool rows_first) {
  const int32_t device = device_of(in.a, in.sfa, in.b, in.sfb);
  Scaled x{};
  GemmProblem& p = x.problem;
  int64_t k_b = 0;
  p.a = check_operand(kScaled, {"a", "sfa", "gran_k_a"}, in.a, in.sfa, in.gran_k_a, true, device,
                      p.k);
  p.b = check_operand(kScaled, {"b", "sfb", "gran_k_b"}, in.b, in.sfb, in.gran_k_b, true, device,
                      k_b);
  if (k_b != p.k) fail(kScaled, "b", cat("K=", p.k, " as in a"), cat("K=", k_b));
  if (p.b.groups != p.a.groups) {
    fail(kScaled, "b", cat(p.a.groups, " matrices as in a"), cat(Shape{in.b}));
  }
  x.extents = {p.a.groups, p.a.rows, p.b.rows, rows_first};
  return x;
}

void run_scaled(const Inputs& in, Scaled& x, const std::optional<Tensor>& c, const Tensor& out,
                const Forced* forced = nullptr) {
  const Extents& e = x.extents;
  const int32_t device = in.a.get_device_index();
  const GpuModel model = gpu_model(kScaled, device);
  GemmProblem& p = x.problem;
  p.out = check_batched_output(kScaled, out, c, e, device);
  check_apart_from(kScaled, out, {{"a", in.a}, {"sfa", in.sfa}, {"b", in.b}, {"sfb", in.sfb}});
  if (out.numel() == 0) return;

  const GemmShape shape{e.m, e.n, p.k, p.a.format, p.b.format, p.a.gran_k, p.b.gran_k, e.batch};
  const GemmConfig config =
      forced ? evaluate_gemm_config(
                   check_forced(kScaled, *forced, kNumGemmTiles, shape, model.num_sms),
                   forced->swapped, forced->split, shape, model)
             : choose_gemm_config(shape, model);
  report(kScaled, config, shape);
  p.schedule = e.batch > 1 ? Schedule::kBatch : Schedule::kTiles;
  p.groups.count = count_of(e.batch);
  const DeviceGuard guard(device);
  std::optional<Tensor> workspace;
  if (const int64_t bytes = gemm_workspace_bytes(config); bytes > 0) {
    workspace = empty_cuda({bytes / 4}, ScalarType::Float, device);
  }
  SM120_OPS_CUDA_CHECK(kScaled, launch_gemm(config, p, workspace ? workspace->data_ptr() : nullptr,
                                            current_stream(device)));
}

void batched_gemm_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int64_t gran_k_a,
                      int64_t gran_k_b, std::optional<Tensor> c, bool rows_first, Tensor out) {
  const Inputs in{a, sfa, b, sfb, gran_k_a, gran_k_b};
  Scaled x = check_scaled(in, rows_first);
  run_scaled(in, x, c, out);
}

Tensor batched_gemm(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int64_t gran_k_a, int64_t gran_k_b,
                    ScalarType out_dtype, std::optional<Tensor> c, bool rows_first) {
  const Inputs in{a, sfa, b, sfb, gran_k_a, gran_k_b};
  Scaled x = check_scaled(in, rows_first);
  check(is_out_dtype(out_dtype), kScaled, "out_dtype", "torch.bfloat16 or torch.float32",
        Dtype(out_dtype));
  const Tensor out = empty_cuda(x.extents.shape(), out_dtype, a.get_device_index());
  run_scaled(in, x, c, out);
  return out;
}

void batched_gemm_forced(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int64_t gran_k_a,
                         int64_t gran_k_b, std::optional<Tensor> c, Tensor out, int64_t tile,
                         bool swapped, bool split) {
  const Inputs in{a, sfa, b, sfb, gran_k_a, gran_k_b};
  Scaled x = check_scaled(in, false);
  const Forced forced{tile, swapped, split};
  run_scaled(in, x, c, out, &forced);
}

// ---- BF16 ---------------------------------------------------------------------------------------

struct Bf16 {
  const char* op;
  Extents extents;
  Bf16Problem problem;
};

// A batch of products, or the sum of them.
Bf16 check_bf16(const char* op, const Tensor& a, const Tensor& b, bool rows_first = false) {
  const int32_t device = device_of(a, b);
  Bf16 x{};
  Bf16Problem& p = x.problem;
  x.op = op;
  p.a = check_bf16_operand(op, "a", a, true, device);
  p.b = check_bf16_operand(op, "b", b, true, device);
  p.k = a.size(2);
  if (b.size(2) != p.k) fail(op, "b", cat("K=", p.k, " as in a"), cat("K=", b.size(2)));
  if (b.size(0) != a.size(0)) {
    fail(op, "b", cat(a.size(0), " matrices as in a"), cat(Shape{b}));
  }
  x.extents = {a.size(0), p.a.rows, p.b.rows, rows_first};
  return x;
}

void run_bf16(const Tensor& a, const Tensor& b, Bf16& x, const std::optional<Tensor>& c,
              const Tensor& out, const Forced* forced = nullptr) {
  const char* op = x.op;
  const Extents& e = x.extents;
  const bool summed = op == kSum;
  const int32_t device = a.get_device_index();
  const GpuModel model = gpu_model(op, device);
  Bf16Problem& p = x.problem;
  p.out = summed ? check_matrix_output(op, out, c, e.m, e.n, device)
                 : check_batched_output(op, out, c, e, device);
  check_apart(op, "out", out, "a", a);
  check_apart(op, "out", out, "b", b);
  check(e.batch * ceil_div(p.k, 32) < 1ll << 31, op, "a, b",
        "fewer than 2^31 blocks of 32 along batch and K", Shape{a});
  if (out.numel() == 0) return;

  if (summed) {
    p.summed = e.batch;
    if (e.batch == 0) p.k = 0;  // D is C, or 0
  }
  const Bf16Shape shape{e.m, e.n, p.k, 0, summed ? 1 : e.batch, summed ? e.batch : 1};
  const Bf16Config config =
      forced ? evaluate_bf16_config(check_forced(op, *forced, kNumBf16Tiles, shape, model.num_sms),
                                    forced->swapped, forced->split, shape, model)
             : choose_bf16_config(shape, model);
  report(op, config, shape);
  p.schedule = shape.batch > 1 ? Schedule::kBatch : Schedule::kTiles;
  p.groups.count = count_of(shape.batch);
  run_bf16_gemm(op, config, p, device);
}

Tensor run_new(const char* op, const Tensor& a, const Tensor& b, ScalarType out_dtype,
               const std::optional<Tensor>& c, bool rows_first = false) {
  Bf16 x = check_bf16(op, a, b, rows_first);
  check(is_out_dtype(out_dtype), op, "out_dtype", "torch.bfloat16 or torch.float32",
        Dtype(out_dtype));
  const Extents& e = x.extents;
  const int32_t device = a.get_device_index();
  const Tensor out = op == kSum ? empty_cuda({e.m, e.n}, out_dtype, device)
                                : empty_cuda(e.shape(), out_dtype, device);
  run_bf16(a, b, x, c, out);
  return out;
}

void bf16_batched_gemm_out(Tensor a, Tensor b, std::optional<Tensor> c, bool rows_first,
                           Tensor out) {
  Bf16 x = check_bf16(kBf16, a, b, rows_first);
  run_bf16(a, b, x, c, out);
}

Tensor bf16_batched_gemm(Tensor a, Tensor b, ScalarType out_dtype, std::optional<Tensor> c,
                         bool rows_first) {
  return run_new(kBf16, a, b, out_dtype, c, rows_first);
}

void bf16_batch_sum_out(Tensor a, Tensor b, std::optional<Tensor> c, Tensor out) {
  Bf16 x = check_bf16(kSum, a, b);
  run_bf16(a, b, x, c, out);
}

Tensor bf16_batch_sum(Tensor a, Tensor b, ScalarType out_dtype, std::optional<Tensor> c) {
  return run_new(kSum, a, b, out_dtype, c);
}

void bf16_batched_forced(Tensor a, Tensor b, std::optional<Tensor> c, Tensor out, int64_t tile,
                         bool swapped, bool split) {
  Bf16 x = check_bf16(out.dim() == 2 ? kSum : kBf16, a, b);
  const Forced forced{tile, swapped, split};
  run_bf16(a, b, x, c, out, &forced);
}

// What an op would choose, without a GPU.
std::string einsum_config(std::string format, int64_t batch, int64_t m, int64_t n, int64_t k,
                          bool summed, int64_t gran_k, int64_t num_sms, bool native,
                          int64_t l2_bytes, int64_t dram_gbps) {
  constexpr char kOp[] = "_einsum_config";
  check(batch > 0 && m > 0 && n > 0 && k >= 0 && num_sms > 0, kOp, "batch, m, n, k, num_sms",
        "k >= 0 and the others > 0", batch, ", ", m, ", ", n, ", ", k, ", ", num_sms);
  const GpuModel model{static_cast<int>(num_sms), native, l2_bytes, static_cast<int>(dram_gbps)};
  if (format == "bf16") {
    const Bf16Shape shape{m, n, k, 0, summed ? 1 : batch, summed ? batch : 1};
    return choose_bf16_config(shape, model).to_string();
  }
  check(!summed, kOp, "summed", "false for FP8 and FP4", summed);
  const OperandFormat f = parse_format(kOp, "format", format);
  const int gran = static_cast<int>(gran_k);
  return choose_gemm_config({m, n, k, f, f, gran, gran, batch}, model).to_string();
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("batched_gemm", TORCH_BOX(&sm120::batched_gemm));
  m.impl("batched_gemm.out", TORCH_BOX(&sm120::batched_gemm_out));
  m.impl("bf16_batched_gemm", TORCH_BOX(&sm120::bf16_batched_gemm));
  m.impl("bf16_batched_gemm.out", TORCH_BOX(&sm120::bf16_batched_gemm_out));
  m.impl("bf16_batch_sum", TORCH_BOX(&sm120::bf16_batch_sum));
  m.impl("bf16_batch_sum.out", TORCH_BOX(&sm120::bf16_batch_sum_out));
  m.impl("_batched_gemm_forced", TORCH_BOX(&sm120::batched_gemm_forced));
  m.impl("_bf16_batched_forced", TORCH_BOX(&sm120::bf16_batched_forced));
}

STABLE_TORCH_LIBRARY_IMPL(sm120, CompositeExplicitAutograd, m) {
  m.impl("_einsum_config", TORCH_BOX(&sm120::einsum_config));
}
