// Quantises key rows into a paged cache. A thread has eight values of a row, so D / 8 neighbouring
// lanes a row; the arithmetic is that of quantize (rule "deepgemm").
#include "device/convert.cuh"
#include "device/warp.cuh"
#include "kernels/indexer.h"

namespace sm120 {
namespace {

constexpr int kThreads = 256;

template <bool kFp4>
__global__ void __launch_bounds__(kThreads) mqa_cache_write(CacheWriteArgs args, ScaleRule rule) {
  const int lanes = args.dim / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / lanes;
  const int chunk = static_cast<int>(index % lanes);
  int64_t slot = -1;
  uint32_t w[4] = {};
  if (row < args.rows) {
    slot = args.long_slots ? static_cast<const int64_t*>(args.slots)[row]
                           : static_cast<const int32_t*>(args.slots)[row];
    const auto* source = static_cast<const __nv_bfloat16*>(args.k) + row * args.stride;
    const uint4 v = load_readonly(reinterpret_cast<const uint4*>(source) + chunk);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }
  uint32_t amax = chunk_amax<__nv_bfloat16>(w);
  for (int mask = 1; mask < (kFp4 ? 4 : lanes); mask *= 2) amax = max_across(amax, mask);
  const uint32_t byte = scale_byte(amax, rule);
  uint32_t scale = bits_of(scale_value(byte));
  if constexpr (kFp4) {  // the bytes of all 32-blocks
    scale = byte << 8 * (chunk / 4);
    for (int mask = 4; mask < lanes; mask *= 2) scale = or_across(scale, mask);
  }
  if (slot < 0 || slot >= args.pages * args.block_kv) return;

  const int width = kFp4 ? args.dim / 2 : args.dim;
  uint8_t* page = args.cache + slot / args.block_kv * args.page_stride;
  const int64_t place = slot % args.block_kv;
  float f[8];
  chunk_to_float<__nv_bfloat16>(w, f);
  if constexpr (kFp4) {
    reinterpret_cast<uint32_t*>(page + place * width)[chunk] = chunk_to_e2m1<false>(f, byte, 0);
  } else {
    reinterpret_cast<uint2*>(page + place * width)[chunk] = chunk_to_e4m3(f, inverse_scale(byte));
  }
  if (chunk == 0) reinterpret_cast<uint32_t*>(page + args.block_kv * width)[place] = scale;
}

}  // namespace

void launch_mqa_cache_write(const CacheWriteArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  const int64_t threads = args.rows * (args.dim / 8);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  if (args.fp4) {
    mqa_cache_write<true><<<blocks, kThreads, 0, stream>>>(args, scale_rule(true, false));
  } else {
    mqa_cache_write<false><<<blocks, kThreads, 0, stream>>>(args, scale_rule(false, false));
  }
}

}  // namespace sm120
