// rows K-major, cols MN-major
#include "kernels/bf16_instances.cuh"

namespace sm120 {

#define SM120_MAJORS Bf16Majors::kKMn
SM120_DEFINE_BF16_INSTANCES(bf16_instance_k_mn)

}  // namespace sm120
