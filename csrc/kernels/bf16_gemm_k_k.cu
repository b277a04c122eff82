// rows K-major, cols K-major
#include "kernels/bf16_instances.cuh"

namespace sm120 {

#define SM120_MAJORS Bf16Majors::kKK
SM120_DEFINE_BF16_INSTANCES(bf16_instance_k_k)

}  // namespace sm120
