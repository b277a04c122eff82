// CUDA entry points of the k-grouped GEMM: check -> workspace -> pack -> choose config -> launch.
// The schema and the meaning of every argument are in sm120_ops/ops/k_grouped.py.
#include "kernels/k_group_pack.h"

#include <cstdio>

#include "ops/grouped_common.h"

namespace sm120 {
namespace {

constexpr char kOp[] = "k_grouped_gemm";

struct Inputs {
  Tensor a, sfa, b, sfb, ks;
  int64_t gran_k_a, gran_k_b;
  std::optional<Tensor> c;
};

struct Problem {
  KGroupPack pack{};
  int64_t m, n;
  int64_t groups;
};

bool is_byte_scale(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Float8_e8m0fnu;
}

// Fills in what the pack kernel needs of the source; gives the rows of K it holds.
int64_t check_source(const OperandArgs& args, const Tensor& data, const Tensor& scale,
                     int64_t gran_k, bool k_major, int32_t device, KGroupOperand& x) {
  check_on_device(kOp, args.data, data, device);
  check_on_device(kOp, args.scale, scale, device);
  x.fp4 = data.scalar_type() != ScalarType::Float8_e4m3fn;
  check(
      !x.fp4 || is_fp4_storage(data.scalar_type()), kOp, args.data,
      "dtype torch.float8_e4m3fn, or packed FP4 (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)",
      Dtype(data));
  check(gran_k == 32 || gran_k == 128, kOp, args.gran, "32 or 128", gran_k);
  const ScalarType type = scale.scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Float || is_byte_scale(type), kOp,
        args.scale, "dtype torch.int32, torch.float32, torch.uint8 or torch.float8_e8m0fnu",
        Dtype(scale));
  check(scale.dim() == 2, kOp, args.scale, "a 2-D tensor [K-groups, rows]", Shape{scale});
  const int64_t rows = scale.size(1), per_byte = x.fp4 ? 2 : 1;
  check(rows <= kMaxRows, kOp, args.scale, "fewer than 2^31 columns", Shape{scale});
  if (scale.numel() > 0) {
    check((rows == 1 || scale.stride(1) == 1) && (scale.size(0) == 1 || scale.stride(0) >= rows),
          kOp, args.scale, "contiguous rows that do not overlap", Strides{scale});
  }
  int64_t total_k = 0;
  if (k_major) {
    check(data.dim() == 1, kOp, args.data, "a 1-D tensor, as a is", Shape{data});
    if (rows > 0) {
      check(data.size(0) * per_byte % rows == 0, kOp, args.data,
            "whole rows of K for the columns of its scales", data.size(0), " bytes for ", rows,
            " rows");
      total_k = data.size(0) * per_byte / rows;
    }
    if (data.numel() > 0) {
      check(data.size(0) == 1 || data.stride(0) == 1, kOp, args.data, "a contiguous tensor",
            Strides{data});
      check(is_aligned(data.data_ptr(), 16), kOp, args.data, "a 16-byte aligned data pointer",
            data.data_ptr());
    }
  } else {
    check(data.dim() == 2, kOp, args.data, "a 2-D tensor, as a is", Shape{data});
    total_k = data.size(0);
    if (data.size(1) * per_byte != rows) {
      fail(kOp, args.data, cat(rows, " columns, as its scales have"), cat(data.size(1) * per_byte));
    }
    if (data.numel() > 0) {
      check((data.size(1) == 1 || data.stride(1) == 1) &&
                (total_k == 1 || data.stride(0) >= data.size(1)),
            kOp, args.data, "contiguous rows that do not overlap", Strides{data});
    }
  }
  x.data = static_cast<const uint8_t*>(data.data_ptr());
  x.stride = k_major ? 0 : total_k > 1 ? data.stride(0) : data.size(1);
  x.vector = is_aligned(x.data, 16) && x.stride % 16 == 0;
  x.scale = scale.data_ptr();
  x.scale_stride = scale.size(0) > 1 ? scale.stride(0) : rows;
  x.scale_rows = scale.size(0);
  x.form = type == ScalarType::Int     ? ScaleForm::kWords
           : type == ScalarType::Float ? ScaleForm::kFloats
                                       : ScaleForm::kBytes;
  x.gran_k = static_cast<int32_t>(gran_k);
  x.rows = static_cast<int32_t>(rows);
  return total_k;
}

Problem check_inputs(const Inputs& in) {
  const int32_t device = device_of(in.a, in.sfa, in.b, in.sfb, in.ks);
  Problem p;
  KGroupPack& pack = p.pack;
  pack.k_major = in.a.dim() == 1;
  const int64_t total_a = check_source({"a", "sfa", "gran_k_a"}, in.a, in.sfa, in.gran_k_a,
                                       pack.k_major, device, pack.operand[0]);
  const int64_t total_b = check_source({"b", "sfb", "gran_k_b"}, in.b, in.sfb, in.gran_k_b,
                                       pack.k_major, device, pack.operand[1]);
  p.m = pack.operand[0].rows, p.n = pack.operand[1].rows;
  pack.step = pack.operand[0].fp4 || pack.operand[1].fp4 ? 32 : 16;
  if (p.m > 0 && p.n > 0) {
    if (total_a != total_b) {
      fail(kOp, "b", cat("the sum of k of a (", total_a, ")"), cat(total_b));
    }
    check(total_a % pack.step == 0, kOp, "a",
          pack.step == 32 ? "a sum of k that is a multiple of 32 (FP4)"
                          : "a sum of k that is a multiple of 16",
          total_a);
  }
  check_on_device(kOp, "ks", in.ks, device);
  check(in.ks.scalar_type() == ScalarType::Int, kOp, "ks", "dtype torch.int32", Dtype(in.ks));
  check(in.ks.dim() == 1, kOp, "ks", "a 1-D tensor", Shape{in.ks});
  p.groups = in.ks.size(0);
  check(p.groups <= 1 || in.ks.stride(0) == 1, kOp, "ks", "a contiguous tensor", Strides{in.ks});
  const int64_t capacity = ceil_div(total_a, kBlockK) + p.groups;
  check(capacity * kBlockK <= kMaxRows, kOp, "a, ks",
        "a sum of k, with 128 for each group, below 2^31", total_a, " and ", p.groups, " groups");
  pack.ks = static_cast<const int32_t*>(in.ks.data_ptr());
  pack.groups = static_cast<int32_t>(p.groups);
  pack.total_k = static_cast<int32_t>(total_a);
  pack.capacity = static_cast<int32_t>(capacity);
  return p;
}

GemmOutput check_outputs(const Inputs& in, const Problem& p, const Tensor& out) {
  const int32_t device = in.a.get_device_index();
  const GemmOutput d = check_group_outputs(kOp, out, in.c, p.groups, p.m, p.n, device);
  check_apart_from(kOp, out,
                   {{"a", in.a}, {"sfa", in.sfa}, {"b", in.b}, {"sfb", in.sfb}, {"ks", in.ks}});
  return d;
}

// One allocation, sized by shapes: both packed operands, their scales, and the groups' ends.
Tensor allocate_packed(Problem& p, int32_t device) {
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t at = bytes;
    bytes += align_up(size, 256);
    return at;
  };
  KGroupPack& pack = p.pack;
  const int64_t k = int64_t{pack.capacity} * kBlockK;
  std::array<int64_t, 2> data_at{}, words_at{};
  for (int i = 0; i < 2; ++i) {
    KGroupOperand& x = pack.operand[i];
    x.packed_stride = x.fp4 ? k / 2 : k;
    x.words_stride = align_up(x.rows, 4);
    data_at[i] = take(x.rows * x.packed_stride);
    words_at[i] = take(4 * x.words_stride * ceil_div(k, 4 * x.gran_k));
  }
  const int64_t ends_at = take(4 * p.groups);
  Tensor workspace = empty_cuda({bytes}, ScalarType::Byte, device);
  uint8_t* base = static_cast<uint8_t*>(workspace.data_ptr());
  for (int i = 0; i < 2; ++i) {
    pack.operand[i].packed = base + data_at[i];
    pack.operand[i].words = reinterpret_cast<uint32_t*>(base + words_at[i]);
  }
  pack.ends = reinterpret_cast<int32_t*>(base + ends_at);
  return workspace;
}

GemmOperand packed_operand(const KGroupOperand& x) {
  GemmOperand operand{};
  operand.data = x.packed;
  operand.stride = x.packed_stride;
  operand.scale = x.words;
  operand.scale_stride = x.words_stride;
  operand.format = x.fp4 ? OperandFormat::kMxfp4 : OperandFormat::kMxfp8;
  operand.gran_k = x.gran_k;
  operand.rows = x.rows;
  operand.groups = 1;
  return operand;
}

void run(const Inputs& in, Problem& p, const Tensor& out) {
  const int32_t device = in.a.get_device_index();
  const GpuModel model = gpu_model(kOp, device);
  const GemmOutput d = check_outputs(in, p, out);
  if (out.numel() == 0) return;
  KGroupPack& pack = p.pack;
  const DeviceGuard guard(device);
  const Tensor workspace = allocate_packed(p, device);

  GemmProblem problem{};
  problem.a = packed_operand(pack.operand[0]);
  problem.b = packed_operand(pack.operand[1]);
  problem.k = int64_t{pack.capacity} * kBlockK;
  problem.out = d;
  problem.schedule = Schedule::kBlocks;
  problem.groups.index = pack.ends;
  problem.groups.count = pack.groups;

  // Sizes are on the device: all groups are taken to be alike, and the whole source to be used.
  const int64_t expected_k = align_up(ceil_div(pack.total_k, p.groups), kBlockK);
  const GemmShape one{p.m,
                      p.n,
                      expected_k,
                      problem.a.format,
                      problem.b.format,
                      pack.operand[0].gran_k,
                      pack.operand[1].gran_k};
  const GroupedShape shape{one, p.groups, 0, p.groups, p.m, p.groups * p.m};
  const GemmConfig config = choose_grouped_config(shape, model);
  check(config.grid > 0, kOp, "ks", "fewer than 2^31 tiles", p.groups, " groups of [", p.m, ", ",
        p.n, "]");
  check(int64_t{pack.capacity} * (ceil_div(p.m, 512) + ceil_div(p.n, 512)) < (1ll << 31), kOp,
        "a, b", "fewer than 2^31 blocks of 128 by 512", Shape{in.a}, " and ", Shape{in.b});
  if (log_configs()) {
    std::fprintf(stderr, "sm120_ops.%s: m %lld n %lld k %d groups %lld: %s\n", kOp,
                 static_cast<long long>(p.m), static_cast<long long>(p.n), pack.total_k,
                 static_cast<long long>(p.groups), config.to_string().c_str());
  }
  const cudaStream_t stream = current_stream(device);
  launch_k_group_pack(pack, stream);
  SM120_OPS_LAUNCH_CHECK(kOp);
  SM120_OPS_CUDA_CHECK(kOp, launch_gemm(config, problem, nullptr, stream));
}

void k_grouped_gemm_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor ks, int64_t gran_k_a,
                        int64_t gran_k_b, std::optional<Tensor> c, Tensor out) {
  const Inputs in{a, sfa, b, sfb, ks, gran_k_a, gran_k_b, c};
  Problem p = check_inputs(in);
  run(in, p, out);
}

Tensor k_grouped_gemm(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor ks, int64_t gran_k_a,
                      int64_t gran_k_b, ScalarType out_dtype, std::optional<Tensor> c) {
  const Inputs in{a, sfa, b, sfb, ks, gran_k_a, gran_k_b, c};
  Problem p = check_inputs(in);
  check(is_out_dtype(out_dtype), kOp, "out_dtype", "torch.bfloat16 or torch.float32",
        Dtype(out_dtype));
  Tensor out = empty_cuda({p.groups, p.m, p.n}, out_dtype, a.get_device_index());
  run(in, p, out);
  return out;
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("k_grouped_gemm", TORCH_BOX(&sm120::k_grouped_gemm));
  m.impl("k_grouped_gemm.out", TORCH_BOX(&sm120::k_grouped_gemm_out));
}
