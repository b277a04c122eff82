// CUDA entry points of the BF16 m-grouped GEMM: check -> choose config -> launch. The schemas and
// the meaning of every argument are in sm120_ops/ops/bf16_grouped.py.
#include "ops/bf16_common.h"
#include "ops/grouped_common.h"

#include <cstdio>

namespace sm120 {
namespace {

constexpr GroupedLayout kContiguous{"bf16_grouped_gemm", "m_indices", Schedule::kSegments};
constexpr GroupedLayout kPsum{"bf16_grouped_gemm_psum", "group_ends", Schedule::kEnds};
constexpr GroupedLayout kMasked{"bf16_grouped_gemm_masked", "masked_m", Schedule::kCounts};

struct Inputs {
  Tensor a, b, index;
  int64_t alignment, expected_m;
};

// A configuration a test or a tuning run asks for, in place of the model's choice.
struct Forced {
  int64_t tile;
  bool swapped;
};

Bf16Problem check_inputs(const GroupedLayout& layout, const Inputs& in) {
  const char* op = layout.op;
  const int32_t device = device_of(in.a, in.b, in.index);
  Bf16Problem p{};
  p.a = check_bf16_operand(op, "a", in.a, layout.masked(), device);
  p.b = check_bf16_operand(op, "b", in.b, true, device);
  p.k = in.b.size(2);
  const int64_t k_a = in.a.size(1 + layout.masked()), groups = in.b.size(0);
  if (k_a != p.k) fail(op, "b", cat("K=", k_a, " as in a"), cat("K=", p.k));
  if (layout.masked() && in.a.size(0) != groups) {
    fail(op, "a", cat(groups, " groups as in b"), cat(Shape{in.a}));
  }
  p.schedule = layout.schedule;
  p.groups =
      check_groups(layout, {in.index, in.alignment, in.expected_m}, p.a.rows, groups, device);
  return p;
}

void run(const GroupedLayout& layout, const Inputs& in, Bf16Problem& p, const Tensor& out,
         const Forced* forced = nullptr) {
  const char* op = layout.op;
  const int32_t device = in.a.get_device_index();
  const GpuModel model = gpu_model(op, device);
  p.out = check_grouped_output(layout, out, p.groups.count, p.a.rows, p.b.rows, device);
  check_apart_from(op, out, {{"a", in.a}, {"b", in.b}, {layout.index, in.index}});
  if (out.numel() == 0 || p.groups.count == 0) return;

  const Bf16Shape whole{p.a.rows, p.b.rows, p.k};
  const GroupedBf16Shape shape =
      expected_shape(layout, whole, p.groups.count, in.alignment, in.expected_m);
  Bf16Config config;
  if (forced) {
    const int tile = static_cast<int>(forced->tile);
    check(forced->tile >= 0 && forced->tile < kNumBf16Tiles &&
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
                 static_cast<long long>(p.a.rows), static_cast<long long>(p.b.rows),
                 static_cast<long long>(p.k), p.groups.count, config.to_string().c_str());
  }
  run_bf16_gemm(op, config, p, device);
}

void run_out(const GroupedLayout& layout, const Inputs& in, const Tensor& out) {
  Bf16Problem p = check_inputs(layout, in);
  run(layout, in, p, out);
}

Tensor run_new(const GroupedLayout& layout, const Inputs& in, ScalarType dtype) {
  Bf16Problem p = check_inputs(layout, in);
  const Tensor out = empty_grouped_output(layout, p.groups.count, p.a.rows, p.b.rows, dtype,
                                          in.a.get_device_index());
  run(layout, in, p, out);
  return out;
}

Tensor grouped(Tensor a, Tensor b, Tensor m_indices, ScalarType out_dtype, int64_t alignment,
               int64_t expected_m) {
  return run_new(kContiguous, {a, b, m_indices, alignment, expected_m}, out_dtype);
}

void grouped_out(Tensor a, Tensor b, Tensor m_indices, int64_t alignment, int64_t expected_m,
                 Tensor out) {
  run_out(kContiguous, {a, b, m_indices, alignment, expected_m}, out);
}

Tensor psum(Tensor a, Tensor b, Tensor group_ends, ScalarType out_dtype, int64_t alignment,
            int64_t expected_m) {
  return run_new(kPsum, {a, b, group_ends, alignment, expected_m}, out_dtype);
}

void psum_out(Tensor a, Tensor b, Tensor group_ends, int64_t alignment, int64_t expected_m,
              Tensor out) {
  run_out(kPsum, {a, b, group_ends, alignment, expected_m}, out);
}

Tensor masked(Tensor a, Tensor b, Tensor masked_m, ScalarType out_dtype, int64_t expected_m) {
  return run_new(kMasked, {a, b, masked_m, kNoAlignment, expected_m}, out_dtype);
}

void masked_out(Tensor a, Tensor b, Tensor masked_m, int64_t expected_m, Tensor out) {
  run_out(kMasked, {a, b, masked_m, kNoAlignment, expected_m}, out);
}

const GroupedLayout& layout_of(const char* op, const std::string& name) {
  return find_layout(op, {&kContiguous, &kPsum, &kMasked}, name);
}

void grouped_forced(std::string op, Tensor a, Tensor b, Tensor index, int64_t alignment, Tensor out,
                    int64_t tile, bool swapped) {
  const GroupedLayout& layout = layout_of("_bf16_grouped_forced", op);
  const Inputs in{a, b, index, alignment, 0};
  Bf16Problem p = check_inputs(layout, in);
  const Forced forced{tile, swapped};
  run(layout, in, p, out, &forced);
}

// What an op would choose, without a GPU. m: rows of A, of one group in the masked layout.
std::string grouped_config(std::string op, int64_t m, int64_t n, int64_t k, int64_t groups,
                           int64_t alignment, int64_t expected_m, int64_t num_sms, bool native,
                           int64_t l2_bytes, int64_t dram_gbps) {
  constexpr char kOp[] = "_bf16_grouped_config";
  check(m > 0 && n > 0 && k >= 0 && groups > 0 && num_sms > 0 && alignment > 0, kOp,
        "m, n, k, groups, alignment, num_sms", "k >= 0 and the others > 0", m, ", ", n, ", ", k,
        ", ", groups, ", ", alignment, ", ", num_sms);
  const GpuModel model{static_cast<int>(num_sms), native, l2_bytes, static_cast<int>(dram_gbps)};
  const Bf16Shape whole{m, n, k};
  const GroupedBf16Shape shape =
      expected_shape(layout_of(kOp, op), whole, groups, alignment, expected_m);
  return choose_grouped_config(shape, model).to_string();
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("bf16_grouped_gemm", TORCH_BOX(&sm120::grouped));
  m.impl("bf16_grouped_gemm.out", TORCH_BOX(&sm120::grouped_out));
  m.impl("bf16_grouped_gemm_psum", TORCH_BOX(&sm120::psum));
  m.impl("bf16_grouped_gemm_psum.out", TORCH_BOX(&sm120::psum_out));
  m.impl("bf16_grouped_gemm_masked", TORCH_BOX(&sm120::masked));
  m.impl("bf16_grouped_gemm_masked.out", TORCH_BOX(&sm120::masked_out));
  m.impl("_bf16_grouped_forced", TORCH_BOX(&sm120::grouped_forced));
}

STABLE_TORCH_LIBRARY_IMPL(sm120, CompositeExplicitAutograd, m) {
  m.impl("_bf16_grouped_config", TORCH_BOX(&sm120::grouped_config));
}
