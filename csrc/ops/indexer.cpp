// CUDA entry points of sm120::indexer_topk and sm120::mqa_cache_write: check -> launch.
// The schemas and the meaning of every argument are in sm120_ops/ops/indexer.py.
#include "kernels/indexer.h"

#include "ops/mqa_check.h"

namespace sm120 {
namespace {

constexpr char kTopk[] = "indexer_topk";
constexpr char kWrite[] = "mqa_cache_write";
constexpr int64_t kMaxK = 2048;

TopkArgs topk_args(const Tensor& logits, const std::optional<Tensor>& starts, const Tensor& ends,
                   int64_t k, bool relative, const std::optional<Tensor>& block_table,
                   int64_t block_kv, int32_t device) {
  const DeviceProperties& gpu = require_supported_device(kTopk, device);
  TopkArgs args{};
  check_on_device(kTopk, "logits", logits, device);
  check(logits.dim() == 2, kTopk, "logits", "2 dimensions", Shape{logits});
  args.bf16 = logits.scalar_type() == ScalarType::BFloat16;
  check(args.bf16 || logits.scalar_type() == ScalarType::Float, kTopk, "logits",
        "dtype torch.float32 or torch.bfloat16", Dtype(logits));
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check(rows < kMaxInt && columns < kMaxInt - 4096, kTopk, "logits",
        "fewer than 2^31 rows and columns", Shape{logits});
  check(columns <= 1 || logits.stride(1) == 1, kTopk, "logits", "stride(1) == 1", Strides{logits});
  args.logits = logits.data_ptr();
  args.stride = rows > 1 ? logits.stride(0) : columns;
  args.rows = static_cast<int32_t>(rows);
  args.columns = static_cast<int32_t>(columns);
  check_ints(kTopk, "ends", ends, {rows}, device);
  args.ends = static_cast<const int32_t*>(ends.data_ptr());
  if (starts) {
    check_ints(kTopk, "starts", *starts, {rows}, device);
    args.starts = static_cast<const int32_t*>(starts->data_ptr());
  }
  check(starts.has_value() || !relative, kTopk, "starts", "a tensor, for relative=True", "None");
  args.relative = relative;
  check(k >= 1 && k <= kMaxK, kTopk, "k", "1 .. 2048", k);
  args.k = static_cast<int32_t>(k);
  args.parts = topk_parts(args.rows, args.columns, args.k, gpu.sm_count);
  if (block_table) {
    check_on_device(kTopk, "block_table", *block_table, device);
    check(block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2, kTopk,
          "block_table", "a 2-D tensor of dtype torch.int32", Shape{*block_table});
    const int64_t batch = block_table->size(0), width = block_table->size(1);
    check(rows == 0 || (batch > 0 && rows % batch == 0), kTopk, "block_table",
          "a number of rows that divides that of logits", Shape{*block_table});
    check(width <= 1 || block_table->stride(1) == 1, kTopk, "block_table", "stride(1) == 1",
          Strides{*block_table});
    check(block_kv == 16 || block_kv == 32 || block_kv == 64 || block_kv == 128, kTopk, "block_kv",
          "16, 32, 64 or 128", block_kv);
    args.block_table = static_cast<const int32_t*>(block_table->data_ptr());
    args.table_stride = batch > 1 ? block_table->stride(0) : width;
    args.table_width = static_cast<int32_t>(std::min(width, kMaxInt));
    args.rows_a_table = static_cast<int32_t>(rows > 0 ? rows / batch : 1);
    args.block_kv = static_cast<int32_t>(block_kv);
  }
  return args;
}

void run_topk(TopkArgs& args, const Tensor& out, int32_t device) {
  args.out = static_cast<int32_t*>(out.data_ptr());
  std::optional<Tensor> columns, logits;  // chosen in the parts
  if (args.parts > 1) {
    const int64_t chosen = int64_t{args.rows} * args.parts * args.k;
    columns = empty_cuda({chosen}, ScalarType::Int, device);
    logits = empty_cuda({chosen}, args.bf16 ? ScalarType::BFloat16 : ScalarType::Float, device);
    args.part_columns = static_cast<int32_t*>(columns->data_ptr());
    args.part_logits = logits->data_ptr();
  }
  launch_indexer_topk(args, current_stream(device));
  SM120_OPS_LAUNCH_CHECK(kTopk);
}

Tensor indexer_topk(Tensor logits, std::optional<Tensor> starts, Tensor ends, int64_t k,
                    bool relative, std::optional<Tensor> block_table, int64_t block_kv) {
  const int32_t device = device_of(logits, ends);
  TopkArgs args = topk_args(logits, starts, ends, k, relative, block_table, block_kv, device);
  const DeviceGuard guard(device);
  const Tensor out = empty_cuda({args.rows, k}, ScalarType::Int, device);
  run_topk(args, out, device);
  return out;
}

void indexer_topk_out(Tensor logits, std::optional<Tensor> starts, Tensor ends, int64_t k,
                      bool relative, std::optional<Tensor> block_table, int64_t block_kv,
                      Tensor out) {
  const int32_t device = device_of(logits, ends, out);
  TopkArgs args = topk_args(logits, starts, ends, k, relative, block_table, block_kv, device);
  check_ints(kTopk, "out", out, {args.rows, k}, device);
  check_apart(kTopk, "out", out, "logits", logits);
  check_apart(kTopk, "out", out, "ends", ends);
  if (starts) check_apart(kTopk, "out", out, "starts", *starts);
  if (block_table) check_apart(kTopk, "out", out, "block_table", *block_table);
  const DeviceGuard guard(device);
  run_topk(args, out, device);
}

void mqa_cache_write(Tensor k, Tensor slots, Tensor kv_cache, std::string format) {
  const int32_t device = device_of(k, slots, kv_cache);
  require_supported_device(kWrite, device);
  check(format == "mxfp8" || format == "mxfp4", kWrite, "format", "'mxfp8' or 'mxfp4'", '\'',
        format, '\'');
  CacheWriteArgs args{};
  args.fp4 = format == "mxfp4";
  check_on_device(kWrite, "k", k, device);
  check(k.scalar_type() == ScalarType::BFloat16, kWrite, "k", "dtype torch.bfloat16", Dtype(k));
  check(k.dim() == 2, kWrite, "k", "2 dimensions", Shape{k});
  check_head_dim(kWrite, "k", k.size(1));
  args.k = k.data_ptr();
  args.rows = k.size(0);
  args.dim = static_cast<int32_t>(k.size(1));
  args.stride = args.rows > 1 ? k.stride(0) : k.size(1);
  check(k.stride(1) == 1 && args.stride % 8 == 0 && is_aligned(args.k, 16), kWrite, "k",
        "stride(1) == 1 and rows at multiples of 16 bytes", Strides{k});
  check(args.rows < kMaxInt, kWrite, "k", "fewer than 2^31 rows", Shape{k});
  check_on_device(kWrite, "slots", slots, device);
  args.long_slots = slots.scalar_type() == ScalarType::Long;
  check(args.long_slots || slots.scalar_type() == ScalarType::Int, kWrite, "slots",
        "dtype torch.int32 or torch.int64", Dtype(slots));
  if (slots.dim() != 1 || slots.size(0) != args.rows) {
    fail(kWrite, "slots", cat("shape [", args.rows, "]"), cat(Shape{slots}));
  }
  check(slots.is_contiguous(), kWrite, "slots", "a contiguous tensor", Strides{slots});
  args.slots = slots.data_ptr();
  const Cache cache = check_cache(kWrite, kv_cache, args.dim, args.fp4, device);
  check_apart(kWrite, "kv_cache", kv_cache, "k", k);
  check_apart(kWrite, "kv_cache", kv_cache, "slots", slots);
  args.cache = static_cast<uint8_t*>(cache.data);
  args.pages = cache.blocks;
  args.page_stride = cache.stride;
  args.block_kv = cache.block_kv;
  const DeviceGuard guard(device);
  launch_mqa_cache_write(args, current_stream(device));
  SM120_OPS_LAUNCH_CHECK(kWrite);
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("indexer_topk", TORCH_BOX(&sm120::indexer_topk));
  m.impl("indexer_topk.out", TORCH_BOX(&sm120::indexer_topk_out));
  m.impl("mqa_cache_write", TORCH_BOX(&sm120::mqa_cache_write));
}
