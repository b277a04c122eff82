// CUDA entry points of the MQA logits: check -> choose -> launch.
// The schemas and the meaning of every argument are in sm120_ops/ops/mqa.py.
#include "host/mqa_launch.h"
#include "ops/mqa_check.h"

namespace sm120 {
namespace {

constexpr char kRagged[] = "mqa_logits";
constexpr char kPaged[] = "paged_mqa_logits";
constexpr char kMetadata[] = "paged_mqa_metadata";
constexpr int kMaxNextN = 8;
constexpr int kVarlenGroup = 8;
constexpr int64_t kMaxCtas = 65535;

struct Problem {
  MqaParams params{};
  MqaQueries q{};
  MqaKeys k{};
  int ctas = 0;
  int32_t device = 0;
};

// q [..., H, D'], its scales and the weights.
void check_queries(const char* op, Problem& x, const Tensor& q,
                   const std::optional<Tensor>& q_scale, const Tensor& weights, int64_t rank) {
  check(q.dim() == rank, op, "q", rank == 3 ? "3 dimensions" : "4 dimensions", Shape{q});
  const bool fp4 = q.scalar_type() != ScalarType::Float8_e4m3fn;
  check(!fp4 || is_fp4_storage(q.scalar_type()), op, "q", kDataDtypes, Dtype(q));
  const int64_t heads = q.size(rank - 2), dim = q.size(rank - 1) * (fp4 ? 2 : 1);
  check(heads == 8 || heads == 16 || heads == 32 || heads == 64 || heads == 128, op, "q",
        "H to be one of [8, 16, 32, 64, 128]", "H=", heads);
  check_head_dim(op, "q", dim);
  check(q.is_contiguous(), op, "q", "a contiguous tensor", Strides{q});
  check(is_aligned(q.data_ptr(), 16), op, "q", "a 16-byte aligned data pointer", q.data_ptr());
  const int64_t rows = rank == 3 ? q.size(0) : q.size(0) * q.size(1);
  check(rows * heads < kMaxInt, op, "q", "fewer than 2^31 heads in all", Shape{q});
  check_on_device(op, "weights", weights, x.device);
  check(weights.scalar_type() == ScalarType::Float, op, "weights", "dtype torch.float32",
        Dtype(weights));
  if (weights.dim() != 2 || weights.size(0) != rows || weights.size(1) != heads) {
    fail(op, "weights", cat("shape [", rows, ", ", heads, "]"), cat(Shape{weights}));
  }
  check(weights.stride(1) == 1, op, "weights", "stride(1) == 1", Strides{weights});
  check(fp4 == q_scale.has_value(), op, "q_scale",
        fp4 ? "packed UE8M0 scales, q being FP4" : "None, q being FP8", fp4 ? "None" : "a tensor");
  if (fp4) {
    const Sizes sizes = q.sizes();
    check_ints(op, "q_scale", *q_scale, Sizes(sizes.data(), sizes.size() - 1), x.device);
    x.params.q_scale = static_cast<const uint32_t*>(q_scale->data_ptr());
  }
  x.q = {q.data_ptr(), static_cast<int>(dim), fp4};
  x.params.heads = static_cast<int32_t>(heads);
  x.params.weights = static_cast<const float*>(weights.data_ptr());
  x.params.weights_stride = rows > 1 ? weights.stride(0) : heads;
  x.params.rows.num_rows = static_cast<int32_t>(rows);
}

Problem check_ragged(const Tensor& q, const std::optional<Tensor>& q_scale, const Tensor& k,
                     const Tensor& k_scale, const Tensor& weights, const Tensor& starts,
                     const Tensor& ends) {
  Problem x;
  x.device = device_of(q, k, k_scale, weights, starts, ends);
  x.ctas = require_supported_device(kRagged, x.device).sm_count;
  check_on_device(kRagged, "q", q, x.device);
  check_queries(kRagged, x, q, q_scale, weights, 3);
  const int64_t width = x.q.fp4 ? x.q.head_dim / 2 : x.q.head_dim;
  check_on_device(kRagged, "k", k, x.device);
  check(x.q.fp4 ? is_fp4_storage(k.scalar_type()) : k.scalar_type() == ScalarType::Float8_e4m3fn,
        kRagged, "k", x.q.fp4 ? "packed FP4, as q" : "dtype torch.float8_e4m3fn, as q", Dtype(k));
  if (k.dim() != 2 || k.size(1) != width) {
    fail(kRagged, "k", cat("shape [SKV, ", width, "]"), cat(Shape{k}));
  }
  const int64_t keys = k.size(0), stride = keys > 1 ? k.stride(0) : width;
  check(keys < kMaxInt - kTileKeys, kRagged, "k", "fewer than 2^31 rows", Shape{k});
  check(k.stride(1) == 1 && stride % 16 == 0 && stride >= width, kRagged, "k",
        "K-major rows apart by a multiple of 16 bytes and not overlapping", Strides{k});
  check(is_aligned(k.data_ptr(), 16), kRagged, "k", "a 16-byte aligned data pointer", k.data_ptr());
  check_on_device(kRagged, "k_scale", k_scale, x.device);
  check(k_scale.scalar_type() == (x.q.fp4 ? ScalarType::Int : ScalarType::Float), kRagged,
        "k_scale", x.q.fp4 ? "dtype torch.int32" : "dtype torch.float32", Dtype(k_scale));
  if (k_scale.dim() != 1 || k_scale.size(0) != keys) {
    fail(kRagged, "k_scale", cat("shape [", keys, "]"), cat(Shape{k_scale}));
  }
  check(k_scale.is_contiguous() && is_aligned(k_scale.data_ptr(), 16), kRagged, "k_scale",
        "a contiguous, 16-byte aligned tensor", Strides{k_scale});
  check_ints(kRagged, "starts", starts, {x.params.rows.num_rows}, x.device);
  check_ints(kRagged, "ends", ends, {x.params.rows.num_rows}, x.device);
  x.k = {k.data_ptr(), keys, stride, k_scale.data_ptr()};
  x.params.rows.starts = static_cast<const int32_t*>(starts.data_ptr());
  x.params.rows.ends = static_cast<const int32_t*>(ends.data_ptr());
  x.params.rows.limit = static_cast<int32_t>(keys);
  return x;
}

// Context lengths [B] or [B, next_n] and varlen indices, as rows of next_n a sequence.
void check_lengths(const char* op, MqaRows& rows, const Tensor& lengths,
                   const std::optional<Tensor>& indices, int64_t next_n, int32_t device) {
  check(lengths.dim() == 1 || lengths.dim() == 2, op, "context_lens", "shape [B] or [B, next_n]",
        Shape{lengths});
  check_ints(op, "context_lens", lengths, lengths.sizes(), device);
  const int64_t batch = lengths.size(0);
  if (indices) {
    check(lengths.dim() == 1 || lengths.size(1) == 1, op, "context_lens",
          "shape [B] or [B, 1] with indices", Shape{lengths});
    check_ints(op, "indices", *indices, {batch}, device);
    rows.indices = static_cast<const int32_t*>(indices->data_ptr());
  }
  check(batch * next_n < kMaxInt, op, "context_lens", "fewer than 2^31 rows", Shape{lengths});
  rows.ends = static_cast<const int32_t*>(lengths.data_ptr());
  rows.num_rows = static_cast<int32_t>(batch * next_n);
  rows.cells = static_cast<int32_t>(batch);
  rows.cell_rows = indices ? kVarlenGroup : static_cast<int32_t>(next_n);
  rows.length_a_row = lengths.dim() == 2 || next_n == 1;
}

void check_schedule(const char* op, const char* arg, const Tensor& t, int32_t device) {
  check_on_device(op, arg, t, device);
  check(t.scalar_type() == ScalarType::Int, op, arg, "dtype torch.int32", Dtype(t));
  check(t.dim() == 2 && t.size(1) == 2 && t.size(0) >= 2 && t.size(0) <= kMaxCtas + 1, op, arg,
        "shape [num_ctas + 1, 2], num_ctas <= 65535", Shape{t});
  check(t.is_contiguous(), op, arg, "a contiguous tensor", Strides{t});
}

Problem check_paged(const Tensor& q, const std::optional<Tensor>& q_scale, const Tensor& kv_cache,
                    const Tensor& weights, const Tensor& context_lens, const Tensor& block_table,
                    int64_t columns, const std::optional<Tensor>& metadata,
                    const std::optional<Tensor>& indices) {
  Problem x;
  x.device = device_of(q, kv_cache, weights, context_lens, block_table);
  x.ctas = require_supported_device(kPaged, x.device).sm_count;
  check_on_device(kPaged, "q", q, x.device);
  check_queries(kPaged, x, q, q_scale, weights, 4);
  const int64_t batch = q.size(0), next_n = q.size(1), most = indices ? 1 : kMaxNextN;
  check(next_n >= 1 && next_n <= most, kPaged, "q",
        indices ? "next_n in 1 .. 1 with indices" : "next_n in 1 .. 8", "next_n=", next_n);
  const Cache cache = check_cache(kPaged, kv_cache, x.q.head_dim, x.q.fp4, x.device);
  check_lengths(kPaged, x.params.rows, context_lens, indices, next_n, x.device);
  check(
      context_lens.size(0) == batch && (context_lens.dim() == 1 || context_lens.size(1) == next_n),
      kPaged, "context_lens", "shape [B] or [B, next_n]", Shape{context_lens});
  check_on_device(kPaged, "block_table", block_table, x.device);
  check(block_table.scalar_type() == ScalarType::Int, kPaged, "block_table", "dtype torch.int32",
        Dtype(block_table));
  check(block_table.dim() == 2 && block_table.size(0) == batch, kPaged, "block_table",
        "a row for each sequence", Shape{block_table});
  check(block_table.size(1) <= 1 || block_table.stride(1) == 1, kPaged, "block_table",
        "stride(1) == 1", Strides{block_table});
  if (metadata) {
    check_schedule(kPaged, "metadata", *metadata, x.device);
    x.params.metadata = static_cast<const int32_t*>(metadata->data_ptr());
    x.ctas = static_cast<int>(metadata->size(0) - 1);
  }
  x.k = {cache.data, cache.blocks, cache.stride, nullptr};
  x.params.block_kv = cache.block_kv;
  x.params.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  x.params.table_stride = batch > 1 ? block_table.stride(0) : block_table.size(1);
  x.params.rows.limit = static_cast<int32_t>(
      std::min({columns, block_table.size(1) * cache.block_kv, kMaxInt - kTileKeys}));
  return x;
}

void run(const char* op, Problem& x, const Tensor& out, bool clean) {
  check_on_device(op, "out", out, x.device);
  check(out.scalar_type() == ScalarType::BFloat16 || out.scalar_type() == ScalarType::Float, op,
        "out", "dtype torch.float32 or torch.bfloat16", Dtype(out));
  const int64_t rows = x.params.rows.num_rows, columns = out.size(1);
  if (rows == 0 || columns == 0) return;
  check((columns == 1 || out.stride(1) == 1) && (rows == 1 || out.stride(0) >= columns), op, "out",
        "stride(1) == 1 and rows that do not overlap", Strides{out});
  x.params.out = out.data_ptr();
  x.params.out_stride = rows > 1 ? out.stride(0) : columns;
  x.params.columns = static_cast<int32_t>(columns);
  x.params.bf16 = out.scalar_type() == ScalarType::BFloat16;
  x.params.clean = clean;
  const DeviceGuard guard(x.device);
  SM120_OPS_CUDA_CHECK(op, launch_mqa_logits(x.params, x.q, x.k, x.ctas, current_stream(x.device)));
}

void check_out_shape(const char* op, const Tensor& out, int64_t rows, int64_t columns) {
  if (out.dim() != 2 || out.size(0) != rows || out.size(1) != columns) {
    fail(op, "out", cat("shape [", rows, ", ", columns, "]"), cat(Shape{out}));
  }
}

template <typename... Inputs>
void check_out_apart(const char* op, const Tensor& out, const Inputs&... inputs) {
  const auto one = [&](const Tensor& input) { check_apart(op, "out", out, "the inputs", input); };
  (one(inputs), ...);
}

Tensor mqa_logits(Tensor q, std::optional<Tensor> q_scale, Tensor k, Tensor k_scale, Tensor weights,
                  Tensor starts, Tensor ends, int64_t max_seqlen_k, bool clean,
                  ScalarType out_dtype) {
  Problem x = check_ragged(q, q_scale, k, k_scale, weights, starts, ends);
  check(max_seqlen_k >= 0 && max_seqlen_k < kMaxInt, kRagged, "max_seqlen_k",
        "a width >= 1, or 0 for logits of all keys", max_seqlen_k);
  const DeviceGuard guard(x.device);
  x.params.rows.width = static_cast<int32_t>(max_seqlen_k);
  const int64_t columns = max_seqlen_k > 0 ? max_seqlen_k : k.size(0);
  const Tensor out = empty_cuda({q.size(0), columns}, out_dtype, x.device);
  run(kRagged, x, out, clean || max_seqlen_k > 0);
  return out;
}

void mqa_logits_out(Tensor q, std::optional<Tensor> q_scale, Tensor k, Tensor k_scale,
                    Tensor weights, Tensor starts, Tensor ends, bool compressed, bool clean,
                    Tensor out) {
  Problem x = check_ragged(q, q_scale, k, k_scale, weights, starts, ends);
  check(out.dim() == 2 && out.size(1) < kMaxInt, kRagged, "out", "2 dimensions", Shape{out});
  check_out_shape(kRagged, out, q.size(0), compressed ? out.size(1) : k.size(0));
  check_out_apart(kRagged, out, q, k, k_scale, weights, starts, ends);
  if (q_scale) check_out_apart(kRagged, out, *q_scale);
  x.params.rows.width = compressed ? static_cast<int32_t>(out.size(1)) : 0;
  run(kRagged, x, out, clean || compressed);
}

Tensor paged_mqa_logits(Tensor q, std::optional<Tensor> q_scale, Tensor kv_cache, Tensor weights,
                        Tensor context_lens, Tensor block_table, int64_t max_context_len,
                        std::optional<Tensor> metadata, std::optional<Tensor> indices, bool clean,
                        ScalarType out_dtype) {
  check(max_context_len >= 0 && max_context_len < kMaxInt, kPaged, "max_context_len",
        "a width >= 0", max_context_len);
  Problem x = check_paged(q, q_scale, kv_cache, weights, context_lens, block_table, max_context_len,
                          metadata, indices);
  const DeviceGuard guard(x.device);
  const Tensor out = empty_cuda({q.size(0) * q.size(1), max_context_len}, out_dtype, x.device);
  run(kPaged, x, out, clean);
  return out;
}

void paged_mqa_logits_out(Tensor q, std::optional<Tensor> q_scale, Tensor kv_cache, Tensor weights,
                          Tensor context_lens, Tensor block_table, std::optional<Tensor> metadata,
                          std::optional<Tensor> indices, bool clean, Tensor out) {
  check(out.dim() == 2 && out.size(1) < kMaxInt, kPaged, "out", "2 dimensions", Shape{out});
  Problem x = check_paged(q, q_scale, kv_cache, weights, context_lens, block_table, out.size(1),
                          metadata, indices);
  check_out_shape(kPaged, out, q.size(0) * q.size(1), out.size(1));
  check_out_apart(kPaged, out, q, kv_cache, weights, context_lens, block_table);
  for (const std::optional<Tensor>* t : {&q_scale, &metadata, &indices}) {
    if (*t) check_out_apart(kPaged, out, **t);
  }
  run(kPaged, x, out, clean);
}

void run_metadata(const Tensor& context_lens, const std::optional<Tensor>& indices,
                  const Tensor& out, int32_t device) {
  MqaRows rows{};
  const int64_t next_n = context_lens.dim() == 2 ? context_lens.size(1) : 1;
  check_lengths(kMetadata, rows, context_lens, indices, next_n, device);
  rows.limit = static_cast<int32_t>(kMaxInt - kTileKeys);
  check_schedule(kMetadata, "out", out, device);
  SM120_OPS_CUDA_CHECK(kMetadata, launch_mqa_metadata(rows, static_cast<int>(out.size(0) - 1),
                                                      static_cast<int32_t*>(out.data_ptr()),
                                                      current_stream(device)));
}

Tensor paged_mqa_metadata(Tensor context_lens, int64_t num_ctas, std::optional<Tensor> indices) {
  const int32_t device = device_of(context_lens);
  require_supported_device(kMetadata, device);
  check(num_ctas >= 1 && num_ctas <= kMaxCtas, kMetadata, "num_ctas", "a CTA count in 1 .. 65535",
        num_ctas);
  const DeviceGuard guard(device);
  const Tensor out = empty_cuda({num_ctas + 1, 2}, ScalarType::Int, device);
  run_metadata(context_lens, indices, out, device);
  return out;
}

void paged_mqa_metadata_out(Tensor context_lens, std::optional<Tensor> indices, Tensor out) {
  const int32_t device = device_of(context_lens, out);
  require_supported_device(kMetadata, device);
  check_out_apart(kMetadata, out, context_lens);
  if (indices) check_out_apart(kMetadata, out, *indices);
  const DeviceGuard guard(device);
  run_metadata(context_lens, indices, out, device);
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("mqa_logits", TORCH_BOX(&sm120::mqa_logits));
  m.impl("mqa_logits.out", TORCH_BOX(&sm120::mqa_logits_out));
  m.impl("paged_mqa_logits", TORCH_BOX(&sm120::paged_mqa_logits));
  m.impl("paged_mqa_logits.out", TORCH_BOX(&sm120::paged_mqa_logits_out));
  m.impl("paged_mqa_metadata", TORCH_BOX(&sm120::paged_mqa_metadata));
  m.impl("paged_mqa_metadata.out", TORCH_BOX(&sm120::paged_mqa_metadata_out));
}
