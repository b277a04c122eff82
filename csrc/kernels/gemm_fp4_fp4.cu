// rows MXFP4, cols MXFP4
#include "kernels/gemm_instances.cuh"

namespace sm120 {

#define SM120_FORMATS Format::kFp4, Format::kFp4
SM120_DEFINE_INSTANCES(gemm_instance_fp4_fp4)

}  // namespace sm120
