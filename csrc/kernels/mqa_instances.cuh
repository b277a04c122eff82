// Instantiates MQA logits of one format: for every head_dim, with 4 and 8 tiles of columns a warp.
#pragma once
#include "kernels/mqa_logits.cuh"

namespace sm120 {

template <Format kFormat>
MqaInstance find_mqa_instance(int head_dim, int tiles) {
  MqaInstance found;
  const auto offer = [&](auto traits, int dim, int nt) {
    using T = decltype(traits);
    if (dim == head_dim && nt == tiles) found = {mqa_logits<T>, T::kSmemBytes};
  };
  offer(MqaTraits<kFormat, 128, 8>{}, 128, 8);
  offer(MqaTraits<kFormat, 128, 4>{}, 128, 4);
  offer(MqaTraits<kFormat, 64, 8>{}, 64, 8);
  offer(MqaTraits<kFormat, 64, 4>{}, 64, 4);
  offer(MqaTraits<kFormat, 32, 8>{}, 32, 8);
  offer(MqaTraits<kFormat, 32, 4>{}, 32, 4);
  return found;
}

}  // namespace sm120
