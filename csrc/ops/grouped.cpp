// CUDA entry points of the m-grouped family: check -> choose config -> launch.
#include "ops/grouped_common.h"

#include <cstdio>

namespace sm120 {
namespace {

constexpr GroupedLayout kContiguous{"grouped_gemm", "m_indices", Schedule::kSegments};
constexpr GroupedLayout kPsum{"grouped_gemm_psum", "group_ends", Schedule::kEnds};
constexpr GroupedLayout kMasked{"grouped_gemm_masked", "masked_m", Schedule::kCounts};

struct Inputs {
  Tensor a, sfa, b, sfb, index;
  int64_t gran_k_a, gran_k_b, alignment, expected_m;
};

// A configuration a test or a tuning run asks for, in place of the model's choice.
struct Forced {
  int64_t tile;
  bool swapped;
};

GemmProblem check_inputs(const GroupedLayout& layout, const Inputs& in) {
  const char* op = layout.op;
  const int32_t device = device_of(in.a, in.sfa, in.b, in.sfb, in.index);
  GemmProblem p{};
  int64_t k_b = 0;
  p.a = check_operand(op, {"a", "sfa", "gran_k_a"}, in.a, in.sfa, in.gran_k_a, layout.masked(),
                      device, p.k);
  p.b = check_operand(op, {"b", "sfb", "gran_k_b"}, in.b, in.sfb, in.gran_k_b, true, device, k_b);
  if (k_b != p.k) fail(op, "b", cat("the K of a (", p.k, ")"), cat("K = ", k_b));
  if (layout.masked() && p.a.groups != p.b.groups) {
    fail(op, "a", cat(p.b.groups, " groups as in b"), cat(Shape{in.a}));
  }
  p.schedule = layout.schedule;
  p.groups =
      check_groups(layout, {in.index, in.alignment, in.expected_m}, p.a.rows, p.b.groups, device);
  return p;
}

void run(const GroupedLayout& layout, const Inputs& in, GemmProblem& p, const Tensor& out,
         const Forced* forced = nullptr) {
  const char* op = layout.op;
  const int32_t device = in.a.get_device_index();
  const GpuModel model = gpu_model(op, device);
  const int64_t rows = p.a.rows, columns = p.b.rows;
  p.out = check_grouped_output(layout, out, p.a.groups, rows, columns, device);
  check_apart_from(
      op, out,
      {{"a", in.a}, {"sfa", in.sfa}, {"b", in.b}, {"sfb", in.sfb}, {layout.index, in.index}});
  if (out.numel() == 0 || p.groups.count == 0) return;

  const GemmShape whole{rows, columns, p.k, p.a.format, p.b.format, p.a.gran_k, p.b.gran_k};
  const GroupedShape shape =
      expected_shape(layout, whole, p.groups.count, in.alignment, in.expected_m);
  GemmConfig config;
  if (forced) {
    const int tile = static_cast<int>(forced->tile);
    check(forced->tile >= 0 && forced->tile < kNumGemmTiles &&
              is_legal_grouped(tile, forced->swapped, shape),
          op, "tile, swapped", "a compiled tile and a legal combination", forced->tile, ", ",
          forced->swapped);
    config = evaluate_grouped_config(tile, forced->swapped, shape, model);
  } else {
    config = choose_grouped_config(shape, model);
  }
  check(config.grid > 0, op, "a, b", "fewer than 2^31 tiles", Shape{in.a}, " and ", Shape{in.b});
  if (log_configs()) {
    std::fprintf(stderr, "sm120_ops.%s: m %lld n %lld k %lld groups %d: %s\n", op,
                 static_cast<long long>(rows), static_cast<long long>(columns),
                 static_cast<long long>(p.k), p.groups.count, config.to_string().c_str());
  }
  const DeviceGuard guard(device);
  SM120_OPS_CUDA_CHECK(op, launch_gemm(config, p, nullptr, current_stream(device)));
}

void run_out(const GroupedLayout& layout, const Inputs& in, const Tensor& out) {
  GemmProblem p = check_inputs(layout, in);
  run(layout, in, p, out);
}

Tensor run_new(const GroupedLayout& layout, const Inputs& in, ScalarType dtype) {
  GemmProblem p = check_inputs(layout, in);
  const Tensor out =
      empty_grouped_output(layout, p.a.groups, p.a.rows, p.b.rows, dtype, in.a.get_device_index());
  run(layout, in, p, out);
  return out;
}

Tensor grouped_gemm(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor m_indices, int64_t gran_k_a,
                    int64_t gran_k_b, ScalarType out_dtype, int64_t alignment, int64_t expected_m) {
  return run_new(kContiguous,
                 {a, sfa, b, sfb, m_indices, gran_k_a, gran_k_b, alignment, expected_m}, out_dtype);
}

void grouped_gemm_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor m_indices,
                      int64_t gran_k_a, int64_t gran_k_b, int64_t alignment, int64_t expected_m,
                      Tensor out) {
  run_out(kContiguous, {a, sfa, b, sfb, m_indices, gran_k_a, gran_k_b, alignment, expected_m}, out);
}

Tensor grouped_gemm_psum(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor group_ends,
                         int64_t gran_k_a, int64_t gran_k_b, ScalarType out_dtype,
                         int64_t alignment, int64_t expected_m) {
  return run_new(kPsum, {a, sfa, b, sfb, group_ends, gran_k_a, gran_k_b, alignment, expected_m},
                 out_dtype);
}

void grouped_gemm_psum_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor group_ends,
                           int64_t gran_k_a, int64_t gran_k_b, int64_t alignment,
                           int64_t expected_m, Tensor out) {
  run_out(kPsum, {a, sfa, b, sfb, group_ends, gran_k_a, gran_k_b, alignment, expected_m}, out);
}

Tensor grouped_gemm_masked(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m,
                           int64_t gran_k_a, int64_t gran_k_b, ScalarType out_dtype,
                           int64_t expected_m) {
  return run_new(kMasked, {a, sfa, b, sfb, masked_m, gran_k_a, gran_k_b, kNoAlignment, expected_m},
                 out_dtype);
}

void grouped_gemm_masked_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m,
                             int64_t gran_k_a, int64_t gran_k_b, int64_t expected_m, Tensor out) {
  run_out(kMasked, {a, sfa, b, sfb, masked_m, gran_k_a, gran_k_b, kNoAlignment, expected_m}, out);
}

const GroupedLayout& layout_of(const char* op, const std::string& name) {
  return find_layout(op, {&kContiguous, &kPsum, &kMasked}, name);
}

void grouped_forced(std::string op, Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor index,
                    int64_t gran_k_a, int64_t gran_k_b, int64_t alignment, Tensor out, int64_t tile,
                    bool swapped) {
  const GroupedLayout& layout = layout_of("_grouped_forced", op);
  const Inputs in{a, sfa, b, sfb, index, gran_k_a, gran_k_b, alignment, 0};
  GemmProblem p = check_inputs(layout, in);
  const Forced forced{tile, swapped};
  run(layout, in, p, out, &forced);
}

// What an op would choose, without a GPU: for tests and for SM120_OPS_LOG's readers. m: rows of A,
// of one group in the masked layout.
std::string grouped_config(std::string op, int64_t m, int64_t n, int64_t k, int64_t groups,
                           int64_t alignment, int64_t expected_m, std::string format_a,
                           std::string format_b, int64_t gran_k_a, int64_t gran_k_b,
                           int64_t num_sms, bool native, int64_t l2_bytes, int64_t dram_gbps) {
  constexpr char kOp[] = "_grouped_config";
  check(m > 0 && n > 0 && k >= 0 && groups > 0 && num_sms > 0 && alignment > 0, kOp,
        "m, n, k, groups, alignment, num_sms", "k >= 0 and the others > 0", m, ", ", n, ", ", k,
        ", ", groups, ", ", alignment, ", ", num_sms);
  const GemmShape whole{m,
                        n,
                        k,
                        parse_format(kOp, "format_a", format_a),
                        parse_format(kOp, "format_b", format_b),
                        static_cast<int>(gran_k_a),
                        static_cast<int>(gran_k_b)};
  const GpuModel model{static_cast<int>(num_sms), native, l2_bytes, static_cast<int>(dram_gbps)};
  const GroupedShape shape =
      expected_shape(layout_of(kOp, op), whole, groups, alignment, expected_m);
  return choose_grouped_config(shape, model).to_string();
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("grouped_gemm", TORCH_BOX(&sm120::grouped_gemm));
  m.impl("grouped_gemm.out", TORCH_BOX(&sm120::grouped_gemm_out));
  m.impl("grouped_gemm_psum", TORCH_BOX(&sm120::grouped_gemm_psum));
  m.impl("grouped_gemm_psum.out", TORCH_BOX(&sm120::grouped_gemm_psum_out));
  m.impl("grouped_gemm_masked", TORCH_BOX(&sm120::grouped_gemm_masked));
  m.impl("grouped_gemm_masked.out", TORCH_BOX(&sm120::grouped_gemm_masked_out));
  m.impl("_grouped_forced", TORCH_BOX(&sm120::grouped_forced));
}

STABLE_TORCH_LIBRARY_IMPL(sm120, CompositeExplicitAutograd, m) {
  m.impl("_grouped_config", TORCH_BOX(&sm120::grouped_config));
}
