// MQA logits of E4M3 queries and keys
#include "kernels/mqa_instances.cuh"

namespace sm120 {

MqaInstance mqa_instance_fp8(int head_dim, int tiles, int queries) {
  return find_mqa_instance<Format::kFp8>(head_dim, tiles, queries);
}

}  // namespace sm120
