// CUDA entry points of the moe family: check, allocate, launch.
// The schemas and the meaning of every argument are in sm120_ops/ops/moe.py.
#include "kernels/moe.h"

#include <limits>
#include <tuple>

#include "ops/common.h"

namespace sm120 {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

SourceType float_type(const char* op, const char* arg, ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return SourceType::kBf16;
    case ScalarType::Half:
      return SourceType::kFp16;
    case ScalarType::Float:
      return SourceType::kFp32;
    default:
      fail(op, arg, "dtype torch.bfloat16, torch.float16 or torch.float32", cat(Dtype(type)));
  }
}

// A contiguous, 16-byte aligned input with `dim` dimensions.
void check_input(const char* op, const char* arg, const Tensor& t, int64_t dim, int32_t device) {
  check_on_device(op, arg, t, device);
  if (t.dim() != dim) fail(op, arg, cat(dim, " dimensions"), cat(Shape{t}));
  check(t.is_contiguous(), op, arg, "a contiguous tensor", Strides{t});
  check(is_aligned(t.data_ptr(), 16), op, arg, "a 16-byte aligned data pointer", t.data_ptr());
}

void check_shape(const char* op, const char* arg, const Tensor& t, Sizes shape) {
  const auto sizes = t.sizes();
  if (std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) return;
  std::ostringstream requirement;
  print_list(requirement << "shape ", shape);
  fail(op, arg, requirement.str(), cat(Shape{t}));
}

// bfloat16 or float32: true for the latter.
bool check_bf16_or_fp32(const char* op, const char* arg, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::BFloat16 || type == ScalarType::Float, op, arg,
        "dtype torch.bfloat16 or torch.float32", Dtype(t));
  return type == ScalarType::Float;
}

// Contiguous ids [tokens, topk]: true for int64.
bool check_ids(const char* op, const Tensor& ids, int32_t device) {
  check_on_device(op, "topk_ids", ids, device);
  const ScalarType type = ids.scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Long, op, "topk_ids",
        "dtype torch.int32 or torch.int64", Dtype(ids));
  check(ids.dim() == 2, op, "topk_ids", "2 dimensions", Shape{ids});
  check(ids.is_contiguous(), op, "topk_ids", "a contiguous tensor", Strides{ids});
  check(ids.size(1) >= 1 && ids.size(1) <= kMoeMaxTopk, op, "topk_ids", "1 to 32 slots a token",
        Shape{ids});
  return type == ScalarType::Long;
}

void check_alignment(const char* op, int64_t alignment) {
  check(alignment == 16 || alignment == 32 || alignment == 64 || alignment == 128, op, "alignment",
        "16, 32, 64 or 128", alignment);
}

// Format, gran_k and width of rows to be quantised.
MoeQuantized quantized_of(const char* op, const char* arg, const std::string& format,
                          int64_t gran_k, int64_t cols) {
  check(format == "mxfp8" || format == "mxfp4", op, "format", "'mxfp8' or 'mxfp4'", '\'', format,
        '\'');
  check(gran_k == 32 || gran_k == 128, op, "gran_k", "32 or 128", gran_k);
  MoeQuantized q{};
  q.fp4 = format == "mxfp4";
  check(cols % (q.fp4 ? 32 : 16) == 0, op, arg,
        q.fp4 ? "K to be a multiple of 32 for mxfp4" : "K to be a multiple of 16 for mxfp8",
        "K=", cols);
  check(cols < kMaxInt32, op, arg, "K below 2^31", "K=", cols);
  q.cols = static_cast<uint32_t>(cols);
  q.gran_k = static_cast<uint32_t>(gran_k);
  return q;
}

struct QuantizedTensors {
  Tensor data, scale;
};

QuantizedTensors empty_quantized(const MoeQuantized& q, int64_t rows, int32_t device) {
  return {empty_cuda({rows, q.fp4 ? q.cols / 2 : q.cols},
                     q.fp4 ? ScalarType::Byte : ScalarType::Float8_e4m3fn, device),
          empty_packed_scales(rows, ceil_div(q.cols, 4 * q.gran_k), device)};
}

void check_quantized(const char* op, const MoeQuantized& q, int64_t rows, const Tensor& out,
                     const Tensor& out_scale, int32_t device) {
  const ScalarType type = out.scalar_type();
  check_out(op, "out", out, q.fp4 ? is_fp4_storage(type) : type == ScalarType::Float8_e4m3fn,
            q.fp4 ? "dtype torch.uint8, torch.int8 or torch.float4_e2m1fn_x2"
                  : "dtype torch.float8_e4m3fn",
            {rows, q.fp4 ? q.cols / 2 : q.cols}, device);
  check(is_aligned(out.data_ptr(), 16), op, "out", "a 16-byte aligned data pointer",
        out.data_ptr());
  check_packed_scales(op, "out_scale", out_scale, rows, ceil_div(q.cols, 4 * q.gran_k), device);
}

void set_output(MoeQuantized& q, const Tensor& data, const Tensor& scale) {
  q.data = data.data_ptr();
  q.scale = static_cast<uint32_t*>(scale.data_ptr());
  q.scale_stride = packed_scales_stride(scale);
}

// ---- moe_route ---------------------------------------------------------------------------------

struct RouteProblem {
  MoeRouteArgs args{};
  int64_t capacity = 0;
  int32_t device = 0;
};

RouteProblem check_route(const Tensor& x, const Tensor& topk_ids, int64_t num_experts,
                         const std::string& format, int64_t gran_k, int64_t alignment) {
  constexpr const char* op = "moe_route";
  RouteProblem p;
  p.device = device_of(x, topk_ids);
  require_supported_device(op, p.device);
  check_input(op, "x", x, 2, p.device);
  MoeRouteArgs& a = p.args;
  a.type = float_type(op, "x", x.scalar_type());
  a.ids64 = check_ids(op, topk_ids, p.device);
  check(topk_ids.size(0) == x.size(0), op, "topk_ids", "as many rows as x", Shape{topk_ids});
  check(num_experts >= 1 && num_experts <= kMoeMaxExperts, op, "num_experts", "1 to 1024",
        num_experts);
  check_alignment(op, alignment);
  a.out = quantized_of(op, "x", format, gran_k, x.size(1));
  const int64_t slots = topk_ids.numel();
  p.capacity = moe_capacity(slots, num_experts, alignment);
  check(p.capacity <= kMaxInt32, op, "topk_ids", "fewer than 2^31 rows of all experts",
        Shape{topk_ids});
  a.x = x.data_ptr();
  a.tokens = static_cast<int32_t>(x.size(0));
  a.ids = topk_ids.data_ptr();
  a.topk = static_cast<int32_t>(topk_ids.size(1));
  a.experts = static_cast<int32_t>(num_experts);
  a.alignment = static_cast<int32_t>(alignment);
  return p;
}

void run_route(RouteProblem& p, const Tensor& out, const Tensor& out_scale,
               const Tensor& group_ends, const Tensor& rows) {
  constexpr const char* op = "moe_route";
  set_output(p.args.out, out, out_scale);
  p.args.group_ends = static_cast<int32_t*>(group_ends.data_ptr());
  p.args.rows = static_cast<int32_t*>(rows.data_ptr());
  const int sms = device_properties(op, p.device).sm_count;
  SM120_OPS_CUDA_CHECK(op, launch_moe_route(p.args, sms, current_stream(p.device)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_route(Tensor x, Tensor topk_ids, int64_t num_experts,
                                                     std::string format, int64_t gran_k,
                                                     int64_t alignment) {
  RouteProblem p = check_route(x, topk_ids, num_experts, format, gran_k, alignment);
  const DeviceGuard guard(p.device);
  const auto [data, scale] = empty_quantized(p.args.out, p.capacity, p.device);
  const Tensor ends = empty_cuda({num_experts}, ScalarType::Int, p.device);
  const Tensor rows = empty_cuda(topk_ids.sizes(), ScalarType::Int, p.device);
  run_route(p, data, scale, ends, rows);
  return {data, scale, ends, rows};
}

void moe_route_out(Tensor x, Tensor topk_ids, int64_t num_experts, std::string format,
                   int64_t gran_k, int64_t alignment, Tensor out, Tensor out_scale,
                   Tensor group_ends, Tensor rows) {
  constexpr const char* op = "moe_route";
  RouteProblem p = check_route(x, topk_ids, num_experts, format, gran_k, alignment);
  check_quantized(op, p.args.out, p.capacity, out, out_scale, p.device);
  constexpr const char* kInt = "dtype torch.int32";
  check_out(op, "group_ends", group_ends, group_ends.scalar_type() == ScalarType::Int, kInt,
            {num_experts}, p.device);
  check_out(op, "rows", rows, rows.scalar_type() == ScalarType::Int, kInt, topk_ids.sizes(),
            p.device);
  const std::pair<const char*, const Tensor*> tensors[] = {
      {"out", &out}, {"out_scale", &out_scale}, {"group_ends", &group_ends}, {"rows", &rows},
      {"x", &x},     {"topk_ids", &topk_ids}};
  for (int i = 0; i < 4; ++i) {
    for (int j = i + 1; j < 6; ++j) {
      check_apart(op, tensors[i].first, *tensors[i].second, tensors[j].first, *tensors[j].second);
    }
  }
  const DeviceGuard guard(p.device);
  run_route(p, out, out_scale, group_ends, rows);
}

// ---- moe_activation ----------------------------------------------------------------------------

struct ActivationProblem {
  MoeActivationArgs args{};
  int32_t device = 0;
};

ActivationProblem check_activation(const Tensor& gate_up, const Tensor& group_ends,
                                   const std::string& format, int64_t gran_k, int64_t alignment,
                                   const std::optional<Tensor>& bias, double alpha,
                                   double up_offset, std::optional<double> limit,
                                   bool interleaved) {
  constexpr const char* op = "moe_activation";
  ActivationProblem p;
  p.device = device_of(gate_up, group_ends);
  require_supported_device(op, p.device);
  check_input(op, "gate_up", gate_up, 2, p.device);
  MoeActivationArgs& a = p.args;
  a.fp32 = check_bf16_or_fp32(op, "gate_up", gate_up);
  check(gate_up.size(1) % 2 == 0, op, "gate_up", "an even number of columns", Shape{gate_up});
  check_on_device(op, "group_ends", group_ends, p.device);
  check(group_ends.scalar_type() == ScalarType::Int, op, "group_ends", "dtype torch.int32",
        Dtype(group_ends));
  check(group_ends.dim() == 1 && group_ends.is_contiguous() && group_ends.numel() < kMaxInt32, op,
        "group_ends", "a contiguous tensor of 1 dimension", Shape{group_ends});
  check_alignment(op, alignment);
  a.out = quantized_of(op, "gate_up", format, gran_k, gate_up.size(1) / 2);
  check(gate_up.size(0) <= kMaxInt32, op, "gate_up", "fewer than 2^31 rows", Shape{gate_up});
  check(ceil_div(gate_up.size(0), 16) * ceil_div(a.out.cols, 256) <= kMaxInt32, op, "gate_up",
        "fewer than 2^31 tiles of 16 x 256", Shape{gate_up});
  if (bias) {
    check_input(op, "bias", *bias, 2, p.device);
    a.bias_fp32 = check_bf16_or_fp32(op, "bias", *bias);
    check_shape(op, "bias", *bias, {group_ends.numel(), gate_up.size(1)});
    a.bias = bias->data_ptr();
  }
  check(!limit || *limit > 0, op, "limit", "a positive number or None", limit.value_or(0));
  a.gate_up = gate_up.data_ptr();
  a.rows = gate_up.size(0);
  a.groups = {static_cast<const int32_t*>(group_ends.data_ptr()),
              static_cast<int32_t>(group_ends.numel()), static_cast<int32_t>(alignment)};
  a.interleaved = interleaved;
  a.alpha = static_cast<float>(alpha);
  a.up_offset = static_cast<float>(up_offset);
  a.limit = limit ? static_cast<float>(*limit) : std::numeric_limits<float>::infinity();
  return p;
}

void run_activation(ActivationProblem& p, const Tensor& out, const Tensor& out_scale) {
  set_output(p.args.out, out, out_scale);
  SM120_OPS_CUDA_CHECK("moe_activation", launch_moe_activation(p.args, current_stream(p.device)));
}

std::tuple<Tensor, Tensor> moe_activation(Tensor gate_up, Tensor group_ends, std::string format,
                                          int64_t gran_k, int64_t alignment,
                                          std::optional<Tensor> bias, double alpha,
                                          double up_offset, std::optional<double> limit,
                                          bool interleaved) {
  ActivationProblem p = check_activation(gate_up, group_ends, format, gran_k, alignment, bias,
                                         alpha, up_offset, limit, interleaved);
  const DeviceGuard guard(p.device);
  const auto [data, scale] = empty_quantized(p.args.out, p.args.rows, p.device);
  run_activation(p, data, scale);
  return {data, scale};
}

void moe_activation_out(Tensor gate_up, Tensor group_ends, std::string format, int64_t gran_k,
                        int64_t alignment, std::optional<Tensor> bias, double alpha,
                        double up_offset, std::optional<double> limit, bool interleaved, Tensor out,
                        Tensor out_scale) {
  constexpr const char* op = "moe_activation";
  ActivationProblem p = check_activation(gate_up, group_ends, format, gran_k, alignment, bias,
                                         alpha, up_offset, limit, interleaved);
  check_quantized(op, p.args.out, p.args.rows, out, out_scale, p.device);
  check_apart(op, "out", out, "gate_up", gate_up);
  check_apart(op, "out", out, "group_ends", group_ends);
  check_apart(op, "out", out, "out_scale", out_scale);
  check_apart(op, "out_scale", out_scale, "gate_up", gate_up);
  check_apart(op, "out_scale", out_scale, "group_ends", group_ends);
  if (bias) {
    check_apart(op, "out", out, "bias", *bias);
    check_apart(op, "out_scale", out_scale, "bias", *bias);
  }
  const DeviceGuard guard(p.device);
  run_activation(p, out, out_scale);
}

// ---- moe_combine -------------------------------------------------------------------------------

struct CombineProblem {
  MoeCombineArgs args{};
  int32_t device = 0;
};

CombineProblem check_combine(const Tensor& x, const Tensor& rows, const Tensor& weights,
                             const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& topk_ids, ScalarType out_dtype) {
  constexpr const char* op = "moe_combine";
  CombineProblem p;
  p.device = device_of(x, rows, weights);
  require_supported_device(op, p.device);
  check_input(op, "x", x, 2, p.device);
  MoeCombineArgs& a = p.args;
  a.x_fp32 = check_bf16_or_fp32(op, "x", x);
  check(x.size(1) % 8 == 0 && x.size(1) < kMaxInt32, op, "x", "a multiple of 8 columns", Shape{x});
  check_on_device(op, "rows", rows, p.device);
  check(rows.scalar_type() == ScalarType::Int, op, "rows", "dtype torch.int32", Dtype(rows));
  check(rows.dim() == 2 && rows.is_contiguous() && rows.numel() <= kMaxInt32, op, "rows",
        "a contiguous tensor of 2 dimensions", Shape{rows});
  check_on_device(op, "topk_weights", weights, p.device);
  a.weights_fp32 = check_bf16_or_fp32(op, "topk_weights", weights);
  check_shape(op, "topk_weights", weights, rows.sizes());
  check(weights.is_contiguous(), op, "topk_weights", "a contiguous tensor", Strides{weights});
  check(rows.size(0) * ceil_div(x.size(1), 1024) <= kMaxInt32, op, "rows",
        "fewer than 2^31 blocks of 1024 outputs", Shape{rows});
  if (bias) {
    check_input(op, "bias", *bias, 2, p.device);
    a.bias_fp32 = check_bf16_or_fp32(op, "bias", *bias);
    check_shape(op, "bias", *bias, {bias->size(0), x.size(1)});
    check(topk_ids.has_value(), op, "topk_ids", "the experts of the slots, with a bias", "None");
    a.ids64 = check_ids(op, *topk_ids, p.device);
    check_shape(op, "topk_ids", *topk_ids, rows.sizes());
    a.bias = bias->data_ptr();
    a.ids = topk_ids->data_ptr();
    a.experts = static_cast<int32_t>(std::min(bias->size(0), kMaxInt32));
  }
  a.y_type = float_type(op, "out_dtype", out_dtype);
  a.x = x.data_ptr();
  a.x_rows = x.size(0);
  a.cols = static_cast<uint32_t>(x.size(1));
  a.rows = static_cast<const int32_t*>(rows.data_ptr());
  a.weights = weights.data_ptr();
  a.tokens = static_cast<int32_t>(rows.size(0));
  a.topk = static_cast<int32_t>(rows.size(1));
  return p;
}

void run_combine(CombineProblem& p, const Tensor& out) {
  p.args.y = out.data_ptr();
  SM120_OPS_CUDA_CHECK("moe_combine", launch_moe_combine(p.args, current_stream(p.device)));
}

Tensor moe_combine(Tensor x, Tensor rows, Tensor weights, std::optional<Tensor> bias,
                   std::optional<Tensor> topk_ids, ScalarType out_dtype) {
  CombineProblem p = check_combine(x, rows, weights, bias, topk_ids, out_dtype);
  const DeviceGuard guard(p.device);
  const Tensor out = empty_cuda({p.args.tokens, p.args.cols}, out_dtype, p.device);
  run_combine(p, out);
  return out;
}

void moe_combine_out(Tensor x, Tensor rows, Tensor weights, std::optional<Tensor> bias,
                     std::optional<Tensor> topk_ids, Tensor out) {
  constexpr const char* op = "moe_combine";
  float_type(op, "out", out.scalar_type());
  CombineProblem p = check_combine(x, rows, weights, bias, topk_ids, out.scalar_type());
  check_out(op, "out", out, true, "", {p.args.tokens, p.args.cols}, p.device);
  check(is_aligned(out.data_ptr(), 16), op, "out", "a 16-byte aligned data pointer",
        out.data_ptr());
  check_apart(op, "out", out, "x", x);
  check_apart(op, "out", out, "rows", rows);
  check_apart(op, "out", out, "topk_weights", weights);
  if (bias) {
    check_apart(op, "out", out, "bias", *bias);
    check_apart(op, "out", out, "topk_ids", *topk_ids);
  }
  const DeviceGuard guard(p.device);
  run_combine(p, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route.out", TORCH_BOX(&moe_route_out));
  m.impl("moe_activation", TORCH_BOX(&moe_activation));
  m.impl("moe_activation.out", TORCH_BOX(&moe_activation_out));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
  m.impl("moe_combine.out", TORCH_BOX(&moe_combine_out));
}

}  // namespace sm120
