#include "ops/gemm_common.h"

#include <array>
#include <cstdlib>
#include <cstring>

namespace sm120 {
namespace {

OperandFormat format_of(const char* op, const char* arg, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float8_e4m3fn) return OperandFormat::kMxfp8;
  check(
      is_fp4_storage(t.scalar_type()), op, arg,
      "dtype torch.float8_e4m3fn, or packed FP4 (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)",
      Dtype(t));
  return OperandFormat::kMxfp4;
}

// Scales of grouped operands: int32 [groups, rows, words].
void check_group_scales(const char* op, const char* arg, const Tensor& scale, int64_t groups,
                        int64_t rows, int64_t words, int32_t device) {
  check_on_device(op, arg, scale, device);
  check(scale.scalar_type() == ScalarType::Int, op, arg, "dtype torch.int32 (packed UE8M0)",
        Dtype(scale));
  if (scale.dim() != 3 || scale.size(0) != groups || scale.size(1) != rows ||
      scale.size(2) != words) {
    fail(op, arg, cat("packed scales of shape [", groups, ", ", rows, ", ", words, "]"),
         cat(Shape{scale}));
  }
  if (scale.numel() == 0) return;
  const auto apart = [](int64_t stride) { return stride > 0 && stride % 4 == 0; };
  check((rows == 1 || scale.stride(1) == 1) && (words == 1 || apart(scale.stride(2))) &&
            (groups == 1 || apart(scale.stride(0))),
        op, arg, "strides [a multiple of 4, 1, a multiple of 4], none 0", Strides{scale});
  check(is_aligned(scale.data_ptr(), 16), op, arg, "a 16-byte aligned data pointer",
        scale.data_ptr());
}

}  // namespace

bool log_configs() {
  static const bool on = [] {
    const char* value = std::getenv("SM120_OPS_LOG");
    return value != nullptr && std::strcmp(value, "config") == 0;
  }();
  return on;
}

OperandFormat parse_format(const char* op, const char* arg, const std::string& name) {
  check(name == "mxfp8" || name == "mxfp4", op, arg, "\"mxfp8\" or \"mxfp4\"", name);
  return name == "mxfp4" ? OperandFormat::kMxfp4 : OperandFormat::kMxfp8;
}

GpuModel gpu_model(const char* op, int32_t device) {
  const DeviceProperties& gpu = require_supported_device(op, device);
  return {gpu.sm_count, gpu.major == 12, gpu.l2_bytes, gpu.dram_gbps};
}

GemmOperand check_operand(const char* op, const OperandArgs& args, const Tensor& data,
                          const Tensor& scale, int64_t gran_k, bool grouped, int32_t device,
                          int64_t& k) {
  const char* arg = args.data;
  check_on_device(op, arg, data, device);
  check(data.dim() == (grouped ? 3 : 2), op, arg, grouped ? "a 3-D tensor" : "a 2-D tensor",
        Shape{data});
  const int64_t groups = grouped ? data.size(0) : 1;
  const int64_t rows = data.size(grouped), row_bytes = data.size(1 + grouped);
  const OperandFormat format = format_of(op, arg, data);
  const bool fp4 = format == OperandFormat::kMxfp4;
  check(gran_k == 32 || gran_k == 128, op, args.gran, "32 or 128", gran_k);
  k = row_bytes * (fp4 ? 2 : 1);
  check(k % (fp4 ? 32 : 16) == 0, op, arg,
        fp4 ? "K to be a multiple of 32 (rows of 16 bytes)" : "K to be a multiple of 16",
        "K = ", k);
  check(rows <= kMaxRows && k <= kMaxRows, op, arg, "fewer than 2^31 rows and columns",
        Shape{data});
  const int64_t stride = rows > 1 ? data.stride(grouped) : align_up(row_bytes, 16);
  if (data.numel() > 0) {
    check(row_bytes == 1 || data.stride(1 + grouped) == 1, op, arg,
          grouped ? "K-major rows (stride(2) == 1)" : "K-major rows (stride(1) == 1)",
          Strides{data});
    check(stride % 16 == 0 && stride >= row_bytes, op, arg,
          "rows apart by a multiple of 16 bytes and not overlapping", Strides{data});
    check(groups == 1 || (data.stride(0) % 16 == 0 && data.stride(0) > 0), op, arg,
          "a group stride that is a multiple of 16 bytes, not 0", Strides{data});
    check(is_aligned(data.data_ptr(), 16), op, arg, "a 16-byte aligned data pointer",
          data.data_ptr());
  }
  const int64_t words = ceil_div(k, 4 * gran_k);
  if (grouped) {
    check_group_scales(op, args.scale, scale, groups, rows, words, device);
  } else {
    check_packed_scales(op, args.scale, scale, rows, words, device);
  }
  GemmOperand x{};
  x.data = data.data_ptr();
  x.stride = stride;
  x.scale = scale.data_ptr();
  // With a single word its stride says nothing.
  x.scale_stride = words > 1 ? scale.stride(1 + grouped) : align_up(rows, 4);
  x.format = format;
  x.gran_k = static_cast<int>(gran_k);
  x.rows = rows;
  x.groups = groups;
  x.group_stride = grouped ? data.stride(0) : 0;
  x.scale_group_stride = grouped ? scale.stride(0) : 0;
  return x;
}

bool is_out_dtype(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Float;
}

void check_matrix(const char* op, const char* arg, const Tensor& t, Sizes shape, int32_t device) {
  check_on_device(op, arg, t, device);
  check(is_out_dtype(t.scalar_type()), op, arg, "dtype torch.bfloat16 or torch.float32", Dtype(t));
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    std::ostringstream requirement;
    print_list(requirement << "shape ", shape);
    fail(op, arg, requirement.str(), cat(Shape{t}));
  }
  if (t.numel() == 0) return;
  const int64_t last = t.dim() - 1;
  check(t.size(last) == 1 || t.stride(last) == 1, op, arg, "contiguous rows (last stride 1)",
        Strides{t});
}

GemmOutput check_matrix_output(const char* op, const Tensor& out, const std::optional<Tensor>& c,
                               int64_t m, int64_t columns, int32_t device) {
  const std::array<int64_t, 2> matrix{m, columns};
  check_matrix(op, "out", out, matrix, device);
  check(m <= 1 || out.numel() == 0 || out.stride(0) >= columns, op, "out",
        "rows that do not overlap", Strides{out});
  GemmOutput d{};
  d.d = out.data_ptr();
  d.d_stride = d.c_stride = columns;
  if (m > 1) d.d_stride = out.stride(0);
  if (c) {
    check_matrix(op, "c", *c, matrix, device);
    check(c->scalar_type() == out.scalar_type(), op, "c", "the dtype of out", Dtype(*c));
    const bool same = c->data_ptr() == out.data_ptr() && (m <= 1 || c->stride(0) == out.stride(0));
    check(same || !may_overlap(out, *c), op, "c", "out itself or memory apart from it",
          "a shifted overlap");
    d.c = c->data_ptr();
    if (m > 1) d.c_stride = c->stride(0);
  }
  d.fp32 = out.scalar_type() == ScalarType::Float;
  d.vector = is_aligned(d.d, 16) && d.d_stride % 8 == 0;
  return d;
}

void check_apart_from(const char* op, const Tensor& out,
                      std::initializer_list<NamedTensor> inputs) {
  const ByteRange written = byte_range(out);
  for (const NamedTensor& input : inputs) {
    check(!written.overlaps(byte_range(input.tensor)), op, "out", "memory apart from the inputs",
          "overlap with ", input.name);
  }
}

}  // namespace sm120
