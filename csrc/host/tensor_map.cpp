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

CUtensorMap encode(CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[3],
                   const cuuint64_t (&strides)[2], const cuuint32_t (&box)[3],
                   CUtensorMapSwizzle swizzle) {
  static const Encode encoder = find_encoder();
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder(&map, type, 3, const_cast<void*>(data), sizes, strides, box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("sm120_ops: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(result) + " for a [" + std::to_string(sizes[2]) + ", " +
                             std::to_string(sizes[1]) + ", " + std::to_string(sizes[0]) +
                             "] tensor of strides " + std::to_string(strides[1]) + " and " +
                             std::to_string(strides[0]) + " bytes");
  }
  return map;
}

cuuint64_t unsigned_size(int64_t v) {
  return static_cast<cuuint64_t>(v);
}

}  // namespace

CUtensorMap operand_map(const void* data, int64_t groups, int64_t rows, int64_t row_bytes,
                        int64_t group_stride, int64_t stride, int box_rows, int box_bytes) {
  return encode(CU_TENSOR_MAP_DATA_TYPE_UINT8, data,
                {unsigned_size(row_bytes), unsigned_size(rows), unsigned_size(groups)},
                {unsigned_size(stride), unsigned_size(group_stride)},
                {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows), 1},
                box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

CUtensorMap scale_map(const void* data, int64_t groups, int64_t rows, int64_t words,
                      int64_t group_stride, int64_t stride, int box_rows) {
  return encode(CU_TENSOR_MAP_DATA_TYPE_INT32, data,
                {unsigned_size(rows), unsigned_size(words), unsigned_size(groups)},
                {unsigned_size(4 * stride), unsigned_size(4 * group_stride)},
                {static_cast<cuuint32_t>(box_rows), 1, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace sm120
