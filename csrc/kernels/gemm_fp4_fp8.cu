// rows MXFP4, cols MXFP8
#include "kernels/gemm_instances.cuh"

namespace sm120 {

#define SM120_FORMATS Format::kFp4, Format::kFp8
SM120_DEFINE_INSTANCES(gemm_instance_fp4_fp8)

}  // namespace sm120
