// Instantiates MQA logits of one format: for every head_dim, with 4 and 8 tiles of columns a warp,
// and every number of queries that share them.
#pragma once
#include "kernels/mqa_logits.cuh"

namespace sm120 {

template <Format kFormat, int kDim>
MqaInstance find_mqa_instance(int tiles, int queries) {
  MqaInstance found;
  const auto offer = [&](auto traits) {
    using T = decltype(traits);
    if (T::NT == tiles && (T::kHalves ? 0 : T::kQueries) == queries)
      found = {mqa_logits<T>, T::kSmemBytes};
  };
  offer(MqaTraits<kFormat, kDim, 8, 0>{});
  offer(MqaTraits<kFormat, kDim, 8, 1>{});
  offer(MqaTraits<kFormat, kDim, 8, 2>{});
  offer(MqaTraits<kFormat, kDim, 8, 4>{});
  offer(MqaTraits<kFormat, kDim, 8, 8>{});
  offer(MqaTraits<kFormat, kDim, 4, 1>{});
  offer(MqaTraits<kFormat, kDim, 4, 2>{});
  offer(MqaTraits<kFormat, kDim, 4, 4>{});
  return found;
}

template <Format kFormat>
MqaInstance find_mqa_instance(int head_dim, int tiles, int queries) {
  if (head_dim == 128) return find_mqa_instance<kFormat, 128>(tiles, queries);
  if (head_dim == 64) return find_mqa_instance<kFormat, 64>(tiles, queries);
  if (head_dim == 32) return find_mqa_instance<kFormat, 32>(tiles, queries);
  return {};
}

}  // namespace sm120
