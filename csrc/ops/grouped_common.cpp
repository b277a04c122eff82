#include "ops/grouped_common.h"

namespace sm120 {
namespace {

// Elements between rows and between matrices of D or C.
struct MatrixStrides {
  int64_t row, group;
};

MatrixStrides matrix_strides(const Tensor& t) {
  const int64_t rows = t.size(1), columns = t.size(2);
  const int64_t row = rows > 1 ? t.stride(1) : columns;
  return {row, t.size(0) > 1 ? t.stride(0) : 0};
}

bool is_vector(const GemmOutput& d) {
  return is_aligned(d.d, 16) && d.d_stride % 8 == 0 && d.d_group_stride % 8 == 0;
}

}  // namespace

GemmGroups check_groups(const GroupedLayout& layout, const GroupedArgs& args, int64_t tokens,
                        int64_t groups, int32_t device) {
  const char* op = layout.op;
  const int64_t a = args.alignment;
  check(a == 16 || a == 32 || a == 64 || a == 128, op, "alignment", "16, 32, 64 or 128", a);
  check(args.expected_m >= 0, op, "expected_m", "a row count, or 0 for unknown", args.expected_m);
  const Tensor& index = args.index;
  check_on_device(op, layout.index, index, device);
  check(index.scalar_type() == ScalarType::Int, op, layout.index, "dtype torch.int32",
        Dtype(index));
  const int64_t count = layout.schedule == Schedule::kSegments ? tokens : groups;
  if (index.dim() != 1 || index.size(0) != count) {
    fail(op, layout.index, cat("shape [", count, "]"), cat(Shape{index}));
  }
  check(count <= 1 || index.stride(0) == 1, op, layout.index, "a contiguous tensor",
        Strides{index});
  GemmGroups g{};
  g.index = static_cast<const int32_t*>(index.data_ptr());
  g.count = static_cast<int32_t>(groups);
  g.tokens = static_cast<int32_t>(tokens);
  g.alignment = static_cast<int32_t>(a);
  return g;
}

std::vector<int64_t> grouped_output_shape(const GroupedLayout& layout, int64_t groups, int64_t rows,
                                          int64_t columns) {
  if (layout.masked()) return {groups, rows, columns};
  return {rows, columns};
}

GemmOutput check_grouped_output(const GroupedLayout& layout, const Tensor& out, int64_t groups,
                                int64_t rows, int64_t columns, int32_t device) {
  const char* op = layout.op;
  const bool masked = layout.masked();
  check_matrix(op, "out", out, grouped_output_shape(layout, groups, rows, columns), device);
  GemmOutput d{};
  if (out.numel() == 0) return d;
  const int64_t stride = rows > 1 ? out.stride(masked) : columns;
  check(stride >= columns, op, "out", "rows that do not overlap", Strides{out});
  check(!masked || groups == 1 || out.stride(0) >= (rows - 1) * stride + columns, op, "out",
        "groups that do not overlap", Strides{out});
  d.d = out.data_ptr();
  d.d_stride = stride;
  d.d_group_stride = masked && groups > 1 ? out.stride(0) : 0;
  d.fp32 = out.scalar_type() == ScalarType::Float;
  d.vector = is_vector(d);
  return d;
}

Tensor empty_grouped_output(const GroupedLayout& layout, int64_t groups, int64_t rows,
                            int64_t columns, ScalarType dtype, int32_t device) {
  check(is_out_dtype(dtype), layout.op, "out_dtype", "torch.bfloat16 or torch.float32",
        Dtype(dtype));
  Tensor out = empty_cuda(grouped_output_shape(layout, groups, rows, columns), dtype, device);
  if (out.numel() > 0) {
    const DeviceGuard guard(device);
    SM120_OPS_CUDA_CHECK(layout.op,
                         cudaMemsetAsync(out.data_ptr(), 0, out.numel() * out.element_size(),
                                         current_stream(device)));
  }
  return out;
}

const GroupedLayout& find_layout(const char* op,
                                 std::initializer_list<const GroupedLayout*> layouts,
                                 const std::string& name) {
  std::string names;
  size_t left = layouts.size();
  for (const GroupedLayout* layout : layouts) {
    if (name == layout->op) return *layout;
    names += layout->op;
    if (--left > 0) names += left == 1 ? " or " : ", ";
  }
  fail(op, "op", names, name);
}

GemmOutput check_group_outputs(const char* op, const Tensor& out, const std::optional<Tensor>& c,
                               int64_t groups, int64_t m, int64_t n, int32_t device) {
  const std::array<int64_t, 3> shape{groups, m, n};
  check_matrix(op, "out", out, shape, device);
  if (c) {
    check_matrix(op, "c", *c, shape, device);
    check(c->scalar_type() == out.scalar_type(), op, "c", "the dtype of out", Dtype(*c));
  }
  GemmOutput d{};
  if (out.numel() == 0) return d;
  const MatrixStrides to = matrix_strides(out);
  check(to.row >= n, op, "out", "rows that do not overlap", Strides{out});
  check(groups == 1 || to.group >= (m - 1) * to.row + n, op, "out", "groups that do not overlap",
        Strides{out});
  d.d = out.data_ptr();
  d.d_stride = to.row, d.d_group_stride = to.group;
  d.fp32 = out.scalar_type() == ScalarType::Float;
  d.vector = is_vector(d);
  if (c) {
    const MatrixStrides from = matrix_strides(*c);
    d.c = c->data_ptr();
    d.c_stride = from.row, d.c_group_stride = from.group;
    const bool same = d.c == d.d && from.row == to.row && from.group == to.group;
    check(same || !byte_range(out).overlaps(byte_range(*c)), op, "c",
          "out itself or memory apart from it", "a shifted overlap");
  }
  return d;
}

}  // namespace sm120
