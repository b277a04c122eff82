#include "host/tensor_map.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sm120 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || entry == nullptr) {
    (void)cudaGetLastError();
    throw std::runtime_error(
        std::string("sm120_ops: the CUDA driver has no cuTensorMapEncodeTiled (") +
        cudaGetErrorString(error) + "); a driver of version 580 or newer is needed");
  }
  return reinterpret_cast<Encode>(entry);
}

CUtensorMap encode(CUtensorMapDataType type, const void* data, uint64_t inner, uint64_t outer,
                   uint64_t stride_bytes, uint32_t box_inner, uint32_t box_outer,
                   CUtensorMapSwizzle swizzle) {
  static const Encode encoder = find_encoder();
  const cuuint64_t sizes[2] = {inner, outer};
  const cuuint64_t strides[1] = {stride_bytes};
  const cuuint32_t box[2] = {box_inner, box_outer};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("sm120_ops: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(result) + " for a [" + std::to_string(outer) + ", " +
                             std::to_string(inner) + "] tensor with rows " +
                             std::to_string(stride_bytes) + " bytes apart");
  }
  return map;
}

}  // namespace

CUtensorMap operand_map(const void* data, int64_t rows, int64_t row_bytes, int64_t stride,
                        int box_rows, int box_bytes) {
  return encode(CU_TENSOR_MAP_DATA_TYPE_UINT8, data, row_bytes, rows, stride, box_bytes, box_rows,
                box_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : CU_TENSOR_MAP_SWIZZLE_32B);
}

CUtensorMap scale_map(const void* data, int64_t rows, int64_t words, int64_t stride, int box_rows) {
  return encode(CU_TENSOR_MAP_DATA_TYPE_INT32, data, rows, words, 4 * stride, box_rows, 1,
                CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace sm120
