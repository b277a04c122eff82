// rows MN-major, cols K-major
#include "kernels/bf16_instances.cuh"

namespace sm120 {

#define SM120_MAJORS Bf16Majors::kMnK
SM120_DEFINE_BF16_INSTANCES(bf16_instance_mn_k)

}  // namespace sm120
