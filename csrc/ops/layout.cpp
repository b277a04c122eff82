// CUDA kernels of the layout ops: scale forms, packed FP4. Check, allocate, launch.
// The schemas and the meaning of every argument are in sm120_ops/ops/layout.py.
#include "kernels/layout.h"

#include "ops/common.h"

namespace sm120 {
namespace {

constexpr const char* kFp4Dtypes = "dtype torch.uint8, torch.int8 or torch.float4_e2m1fn_x2";
constexpr const char* kByte = "dtype torch.uint8";

bool is_scale_byte(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Float8_e8m0fnu;
}

const uint8_t* bytes_of(const Tensor& t) {
  return static_cast<const uint8_t*>(t.data_ptr());
}

// ---- pack_scales -------------------------------------------------------------------------------

void check_pack_scales(const Tensor& scale, int64_t rows, int64_t gran_mn, int32_t device) {
  constexpr const char* op = "pack_scales";
  require_supported_device(op, device);
  check_on_device(op, "scale", scale, device);
  check(scale.dim() == 2, op, "scale", "2 dimensions", Shape{scale});
  const ScalarType type = scale.scalar_type();
  check(type == ScalarType::Float || is_scale_byte(type), op, "scale",
        "dtype torch.float32, torch.uint8 or torch.float8_e8m0fnu", Dtype(type));
  check(gran_mn == 1 || gran_mn == 32 || gran_mn == 128, op, "gran_mn", "1, 32 or 128", gran_mn);
  check(rows >= 0, op, "rows", "a row count", rows);
  if (scale.size(0) != ceil_div(rows, gran_mn)) {
    fail(op, "scale",
         cat("shape [", ceil_div(rows, gran_mn), ", groups] (rows=", rows, ", gran_mn=", gran_mn,
             ")"),
         cat(Shape{scale}));
  }
}

void run_pack_scales(const Tensor& scale, int64_t rows, int64_t gran_mn, const Tensor& out,
                     int32_t device) {
  const DeviceGuard guard(device);
  const PlainScales source{scale.data_ptr(), scale.stride(0), scale.stride(1),
                           scale.scalar_type() == ScalarType::Float};
  const PackedScales packed{static_cast<uint32_t*>(out.data_ptr()), packed_scales_stride(out),
                            bytes_behind(out) / 4};
  launch_pack_scales(source, rows, scale.size(1), static_cast<int>(gran_mn), packed,
                     current_stream(device));
  SM120_OPS_LAUNCH_CHECK("pack_scales");
}

Tensor pack_scales(const Tensor& scale, int64_t rows, int64_t gran_mn) {
  const int32_t device = scale.get_device_index();
  check_pack_scales(scale, rows, gran_mn, device);
  const Tensor out = empty_packed_scales(rows, ceil_div(scale.size(1), 4), device);
  run_pack_scales(scale, rows, gran_mn, out, device);
  return out;
}

void pack_scales_out(const Tensor& scale, int64_t rows, int64_t gran_mn, const Tensor& out) {
  const int32_t device = device_of(scale, out);
  check_pack_scales(scale, rows, gran_mn, device);
  check_packed_scales("pack_scales", "out", out, rows, ceil_div(scale.size(1), 4), device);
  check_apart("pack_scales", "out", out, "scale", scale);
  run_pack_scales(scale, rows, gran_mn, out, device);
}

// ---- unpack_scales -----------------------------------------------------------------------------

void check_unpack_scales(const Tensor& scale, int64_t groups, int32_t device) {
  constexpr const char* op = "unpack_scales";
  require_supported_device(op, device);
  check(scale.dim() == 2, op, "scale", "2 dimensions", Shape{scale});
  const int64_t words = scale.size(1);
  check_packed_scales(op, "scale", scale, scale.size(0), words, device);
  if (groups < 0 || ceil_div(groups, 4) != words) {
    fail(op, "groups",
         cat(words > 0 ? 4 * words - 3 : 0, " to ", 4 * words, " groups for ", words,
             " words a row"),
         cat(groups));
  }
}

void run_unpack_scales(const Tensor& scale, int64_t groups, const Tensor& out, int32_t device) {
  const DeviceGuard guard(device);
  launch_unpack_scales(static_cast<const uint32_t*>(scale.data_ptr()), packed_scales_stride(scale),
                       scale.size(0), groups, out.data_ptr(),
                       out.scalar_type() == ScalarType::Float, current_stream(device));
  SM120_OPS_LAUNCH_CHECK("unpack_scales");
}

Tensor unpack_scales(const Tensor& scale, int64_t groups, ScalarType dtype) {
  const int32_t device = scale.get_device_index();
  check_unpack_scales(scale, groups, device);
  check(dtype == ScalarType::Float || is_scale_byte(dtype), "unpack_scales", "dtype",
        "torch.uint8, torch.float8_e8m0fnu or torch.float32", Dtype(dtype));
  const Tensor out = empty_cuda({scale.size(0), groups}, dtype, device);
  run_unpack_scales(scale, groups, out, device);
  return out;
}

void unpack_scales_out(const Tensor& scale, int64_t groups, const Tensor& out) {
  constexpr const char* op = "unpack_scales";
  const int32_t device = device_of(scale, out);
  check_unpack_scales(scale, groups, device);
  const ScalarType dtype = out.scalar_type();
  check_out(op, "out", out, dtype == ScalarType::Float || is_scale_byte(dtype),
            "dtype torch.uint8, torch.float8_e8m0fnu or torch.float32", {scale.size(0), groups},
            device);
  check_apart(op, "out", out, "scale", scale);
  run_unpack_scales(scale, groups, out, device);
}

// ---- packed FP4 --------------------------------------------------------------------------------

// A byte tensor of `like`'s shape with another last dimension.
Tensor empty_bytes(const Tensor& like, int64_t last, int32_t device) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  return empty_cuda(sizes, ScalarType::Byte, device);
}

void check_out_bytes(const char* op, const Tensor& out, const Tensor& like, int64_t last,
                     int32_t device) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  check_out(op, "out", out, out.scalar_type() == ScalarType::Byte, kByte, sizes, device);
}

void check_pack_fp4(const Tensor& codes, int32_t device) {
  constexpr const char* op = "pack_fp4";
  require_supported_device(op, device);
  check_on_device(op, "codes", codes, device);
  check(codes.scalar_type() == ScalarType::Byte, op, "codes", kByte, Dtype(codes));
  check(codes.dim() > 0 && codes.size(codes.dim() - 1) % 2 == 0, op, "codes",
        "an even last dimension", Shape{codes});
  check(codes.is_contiguous(), op, "codes", "a contiguous tensor", Strides{codes});
}

void run_pack_fp4(const Tensor& codes, const Tensor& out, int32_t device) {
  const DeviceGuard guard(device);
  launch_pack_fp4(bytes_of(codes), static_cast<uint8_t*>(out.data_ptr()), out.numel(),
                  current_stream(device));
  SM120_OPS_LAUNCH_CHECK("pack_fp4");
}

Tensor pack_fp4(const Tensor& codes) {
  const int32_t device = codes.get_device_index();
  check_pack_fp4(codes, device);
  const Tensor out = empty_bytes(codes, codes.size(codes.dim() - 1) / 2, device);
  run_pack_fp4(codes, out, device);
  return out;
}

void pack_fp4_out(const Tensor& codes, const Tensor& out) {
  const int32_t device = device_of(codes, out);
  check_pack_fp4(codes, device);
  check_out_bytes("pack_fp4", out, codes, codes.size(codes.dim() - 1) / 2, device);
  check_apart("pack_fp4", "out", out, "codes", codes);
  run_pack_fp4(codes, out, device);
}

void check_unpack_fp4(const Tensor& packed, int32_t device) {
  constexpr const char* op = "unpack_fp4";
  require_supported_device(op, device);
  check_on_device(op, "packed", packed, device);
  check(is_fp4_storage(packed.scalar_type()), op, "packed", kFp4Dtypes, Dtype(packed));
  check(packed.dim() > 0, op, "packed", "at least one dimension", Shape{packed});
  check(packed.is_contiguous(), op, "packed", "a contiguous tensor", Strides{packed});
}

void run_unpack_fp4(const Tensor& packed, const Tensor& out, int32_t device) {
  const DeviceGuard guard(device);
  launch_unpack_fp4(bytes_of(packed), static_cast<uint8_t*>(out.data_ptr()), packed.numel(),
                    current_stream(device));
  SM120_OPS_LAUNCH_CHECK("unpack_fp4");
}

Tensor unpack_fp4(const Tensor& packed) {
  const int32_t device = packed.get_device_index();
  check_unpack_fp4(packed, device);
  const Tensor out = empty_bytes(packed, packed.size(packed.dim() - 1) * 2, device);
  run_unpack_fp4(packed, out, device);
  return out;
}

void unpack_fp4_out(const Tensor& packed, const Tensor& out) {
  const int32_t device = device_of(packed, out);
  check_unpack_fp4(packed, device);
  check_out_bytes("unpack_fp4", out, packed, packed.size(packed.dim() - 1) * 2, device);
  check_apart("unpack_fp4", "out", out, "packed", packed);
  run_unpack_fp4(packed, out, device);
}

void check_transpose_fp4(const Tensor& packed, int32_t device) {
  constexpr const char* op = "transpose_fp4";
  require_supported_device(op, device);
  check_on_device(op, "packed", packed, device);
  check(packed.dim() == 2, op, "packed", "2 dimensions", Shape{packed});
  check(is_fp4_storage(packed.scalar_type()), op, "packed", kFp4Dtypes, Dtype(packed));
  check(packed.size(0) % 2 == 0, op, "packed", "an even number of rows", Shape{packed});
  check(packed.size(1) <= 1 || packed.stride(1) == 1, op, "packed", "stride(1) == 1",
        Strides{packed});
}

void run_transpose_fp4(const Tensor& packed, const Tensor& out, int32_t device) {
  const DeviceGuard guard(device);
  launch_transpose_fp4(bytes_of(packed), packed.stride(0), packed.size(0), packed.size(1),
                       static_cast<uint8_t*>(out.data_ptr()), current_stream(device));
  SM120_OPS_LAUNCH_CHECK("transpose_fp4");
}

Tensor transpose_fp4(const Tensor& packed) {
  const int32_t device = packed.get_device_index();
  check_transpose_fp4(packed, device);
  const Tensor out = empty_cuda({packed.size(1) * 2, packed.size(0) / 2}, ScalarType::Byte, device);
  run_transpose_fp4(packed, out, device);
  return out;
}

void transpose_fp4_out(const Tensor& packed, const Tensor& out) {
  constexpr const char* op = "transpose_fp4";
  const int32_t device = device_of(packed, out);
  check_transpose_fp4(packed, device);
  check_out(op, "out", out, out.scalar_type() == ScalarType::Byte, kByte,
            {packed.size(1) * 2, packed.size(0) / 2}, device);
  check_apart(op, "out", out, "packed", packed);
  run_transpose_fp4(packed, out, device);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("pack_scales", TORCH_BOX(&pack_scales));
  m.impl("pack_scales.out", TORCH_BOX(&pack_scales_out));
  m.impl("unpack_scales", TORCH_BOX(&unpack_scales));
  m.impl("unpack_scales.out", TORCH_BOX(&unpack_scales_out));
  m.impl("pack_fp4", TORCH_BOX(&pack_fp4));
  m.impl("pack_fp4.out", TORCH_BOX(&pack_fp4_out));
  m.impl("unpack_fp4", TORCH_BOX(&unpack_fp4));
  m.impl("unpack_fp4.out", TORCH_BOX(&unpack_fp4_out));
  m.impl("transpose_fp4", TORCH_BOX(&transpose_fp4));
  m.impl("transpose_fp4.out", TORCH_BOX(&transpose_fp4_out));
}

}  // namespace sm120
