// CUDA kernels of sm120::quantize and sm120::dequantize: check, allocate, launch.
// The schemas and the meaning of every argument are in sm120_ops/ops/quantize.py.
#include "kernels/quantize.h"

#include <tuple>

#include "ops/common.h"

namespace sm120 {
namespace {

std::optional<SourceType> source_type(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return SourceType::kBf16;
    case ScalarType::Half:
      return SourceType::kFp16;
    case ScalarType::Float:
      return SourceType::kFp32;
    default:
      return std::nullopt;
  }
}

constexpr const char* kFloatDtypes = "dtype torch.bfloat16, torch.float16 or torch.float32";
constexpr const char* kFp8Dtype = "dtype torch.float8_e4m3fn";
constexpr const char* kFp4Dtypes = "dtype torch.uint8, torch.int8 or torch.float4_e2m1fn_x2";

// Kernels count columns in 32 bits.
constexpr int64_t kMaxCols = int64_t{1} << 31;

void check_gran_k(const char* op, int64_t gran_k) {
  check(gran_k == 32 || gran_k == 128, op, "gran_k", "32 or 128", gran_k);
}

// ---- quantize ----------------------------------------------------------------------------------

// Everything but the outputs.
QuantizeArgs quantize_args(const Tensor& x, const std::string& format, int64_t gran_k,
                           int64_t gran_mn, const std::string& rule, int32_t device) {
  constexpr const char* op = "quantize";
  require_supported_device(op, device);
  check(format == "mxfp8" || format == "mxfp4", op, "format", "'mxfp8' or 'mxfp4'", '\'', format,
        '\'');
  check_gran_k(op, gran_k);
  check(gran_mn == 1 || gran_mn == 32 || gran_mn == 128, op, "gran_mn", "1, 32 or 128", gran_mn);
  check(rule == "deepgemm" || rule == "ocp", op, "rule", "'deepgemm' or 'ocp'", '\'', rule, '\'');
  check_on_device(op, "x", x, device);
  check(x.dim() == 2, op, "x", "2 dimensions", Shape{x});
  const auto type = source_type(x.scalar_type());
  check(type.has_value(), op, "x", kFloatDtypes, Dtype(x));

  QuantizeArgs args{};
  args.fp4 = format == "mxfp4";
  const int64_t cols = x.size(1);
  check(cols % (args.fp4 ? 32 : 16) == 0, op, "x",
        args.fp4 ? "K to be a multiple of 32 for mxfp4" : "K to be a multiple of 16 for mxfp8",
        "K=", cols);
  check(cols < kMaxCols, op, "x", "K below 2^31", "K=", cols);
  check(x.stride(0) == 1 || x.stride(1) == 1, op, "x", "one stride to be 1", Strides{x});
  args.x = x.data_ptr();
  args.type = *type;
  args.rows = x.size(0);
  args.cols = static_cast<uint32_t>(cols);
  args.transposed = x.stride(1) != 1;
  // The stride of a single row says nothing.
  args.stride = args.transposed ? x.stride(1) : args.rows > 1 ? x.stride(0) : cols;
  args.ocp_rule = rule == "ocp";
  args.gran_k = static_cast<uint32_t>(gran_k);
  args.gran_mn = static_cast<uint32_t>(gran_mn);
  return args;
}

void run_quantize(QuantizeArgs& args, const Tensor& data, const Tensor& scale, int32_t device) {
  args.data = data.data_ptr();
  args.scale = {static_cast<uint32_t*>(scale.data_ptr()), packed_scales_stride(scale),
                bytes_behind(scale) / 4};
  launch_quantize(args, current_stream(device));
  SM120_OPS_LAUNCH_CHECK("quantize");
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x, const std::string& format, int64_t gran_k,
                                    int64_t gran_mn, const std::string& rule) {
  const int32_t device = x.get_device_index();
  QuantizeArgs args = quantize_args(x, format, gran_k, gran_mn, rule, device);
  const DeviceGuard guard(device);
  const Tensor data = empty_cuda({args.rows, args.fp4 ? args.cols / 2 : args.cols},
                                 args.fp4 ? ScalarType::Byte : ScalarType::Float8_e4m3fn, device);
  const Tensor scale = empty_packed_scales(args.rows, ceil_div(args.cols, 4 * gran_k), device);
  run_quantize(args, data, scale, device);
  return {data, scale};
}

void quantize_out(const Tensor& x, const std::string& format, int64_t gran_k, int64_t gran_mn,
                  const std::string& rule, const Tensor& out, const Tensor& out_scale) {
  constexpr const char* op = "quantize";
  const int32_t device = device_of(x, out, out_scale);
  QuantizeArgs args = quantize_args(x, format, gran_k, gran_mn, rule, device);
  const ScalarType dtype = out.scalar_type();
  check_out(op, "out", out, args.fp4 ? is_fp4_storage(dtype) : dtype == ScalarType::Float8_e4m3fn,
            args.fp4 ? kFp4Dtypes : kFp8Dtype, {args.rows, args.fp4 ? args.cols / 2 : args.cols},
            device);
  check(is_aligned(out.data_ptr(), 16), op, "out", "a 16-byte aligned data pointer",
        out.data_ptr());
  check_packed_scales(op, "out_scale", out_scale, args.rows, ceil_div(args.cols, 4 * gran_k),
                      device);
  check_apart(op, "out", out, "x", x);
  check_apart(op, "out", out, "out_scale", out_scale);
  check_apart(op, "out_scale", out_scale, "x", x);
  const DeviceGuard guard(device);
  run_quantize(args, out, out_scale, device);
}

// ---- dequantize --------------------------------------------------------------------------------

DequantizeArgs dequantize_args(const Tensor& data, const Tensor& scale, int64_t gran_k,
                               ScalarType dtype, int32_t device) {
  constexpr const char* op = "dequantize";
  require_supported_device(op, device);
  check_gran_k(op, gran_k);
  const auto type = source_type(dtype);
  check(type.has_value(), op, "dtype", "torch.bfloat16, torch.float16 or torch.float32",
        Dtype(dtype));
  check(data.dim() == 2, op, "data", "2 dimensions", Shape{data});
  check_on_device(op, "data", data, device);
  DequantizeArgs args{};
  args.fp4 = data.scalar_type() != ScalarType::Float8_e4m3fn;
  check(!args.fp4 || is_fp4_storage(data.scalar_type()), op, "data",
        "dtype torch.float8_e4m3fn, torch.uint8, torch.int8 or torch.float4_e2m1fn_x2",
        Dtype(data));
  check(data.size(1) <= 1 || data.stride(1) == 1, op, "data", "stride(1) == 1 (K-major)",
        Strides{data});
  const int64_t cols = args.fp4 ? data.size(1) * 2 : data.size(1);
  check(cols < kMaxCols, op, "data", "K below 2^31", "K=", cols);
  args.data = data.data_ptr();
  args.rows = data.size(0);
  args.cols = static_cast<uint32_t>(cols);
  args.stride = args.rows > 1 ? data.stride(0) : data.size(1);
  args.gran_k = static_cast<uint32_t>(gran_k);
  check_packed_scales(op, "scale", scale, args.rows, ceil_div(cols, 4 * gran_k), device);
  args.scale = static_cast<const uint32_t*>(scale.data_ptr());
  args.scale_stride = packed_scales_stride(scale);
  args.type = *type;
  return args;
}

void run_dequantize(DequantizeArgs& args, const Tensor& out, int32_t device) {
  args.out = out.data_ptr();
  launch_dequantize(args, current_stream(device));
  SM120_OPS_LAUNCH_CHECK("dequantize");
}

Tensor dequantize(const Tensor& data, const Tensor& scale, int64_t gran_k, ScalarType dtype) {
  const int32_t device = device_of(data, scale);
  DequantizeArgs args = dequantize_args(data, scale, gran_k, dtype, device);
  const DeviceGuard guard(device);
  const Tensor out = empty_cuda({args.rows, args.cols}, dtype, device);
  run_dequantize(args, out, device);
  return out;
}

void dequantize_out(const Tensor& data, const Tensor& scale, int64_t gran_k, const Tensor& out) {
  constexpr const char* op = "dequantize";
  check(source_type(out.scalar_type()).has_value(), op, "out", kFloatDtypes, Dtype(out));
  const int32_t device = device_of(data, scale, out);
  DequantizeArgs args = dequantize_args(data, scale, gran_k, out.scalar_type(), device);
  check_out(op, "out", out, true, kFloatDtypes, {args.rows, args.cols}, device);
  check_apart(op, "out", out, "data", data);
  check_apart(op, "out", out, "scale", scale);
  const DeviceGuard guard(device);
  run_dequantize(args, out, device);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize.out", TORCH_BOX(&quantize_out));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize.out", TORCH_BOX(&dequantize_out));
}

}  // namespace sm120
