// MQA logits of MXFP4 queries and keys
#include "kernels/mqa_instances.cuh"

namespace sm120 {

MqaInstance mqa_instance_fp4(int head_dim, int tiles, int queries) {
  return find_mqa_instance<Format::kFp4>(head_dim, tiles, queries);
}

}  // namespace sm120
