#include "host/tensor_map.h"

#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "host/driver.h"

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
        cudaGetErrorString(error) + "); a driver of version " + kMinDriver + " or newer is needed");
  }
  return reinterpret_cast<Encode>(entry);
}

struct Dimension {
  uint64_t size, stride_bytes;  // the stride of the first, contiguous one is not used
  uint32_t box;
};

CUtensorMap encode(CUtensorMapDataType type, const void* data,
                   std::initializer_list<Dimension> list, CUtensorMapSwizzle swizzle) {
  static const Encode encoder = find_encoder();
  constexpr int kMost = 4;
  cuuint64_t sizes[kMost], strides[kMost];
  cuuint32_t box[kMost];
  const cuuint32_t steps[kMost] = {1, 1, 1, 1};
  int rank = 0;
  for (const Dimension& d : list) {
    sizes[rank] = d.size;
    box[rank] = d.box;
    if (rank > 0) strides[rank - 1] = d.stride_bytes;
    ++rank;
  }
  CUtensorMap map;
  const CUresult result =
      encoder(&map, type, rank, const_cast<void*>(data), sizes, strides, box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::string text = "sm120_ops: cuTensorMapEncodeTiled failed with error " +
                       std::to_string(result) + " for a tensor of";
    for (const Dimension& d : list) {
      text += " " + std::to_string(d.size) + " every " + std::to_string(d.stride_bytes) + " bytes,";
    }
    throw std::runtime_error(text);
  }
  return map;
}

CUtensorMapSwizzle swizzle_of(int64_t row_bytes) {
  switch (row_bytes) {
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

CUtensorMap operand_map(const void* data, int64_t rows, int64_t row_bytes, int64_t stride,
                        int box_rows, int box_bytes) {
  return encode(CU_TENSOR_MAP_DATA_TYPE_UINT8, data,
                {{uint64_t(row_bytes), 0, uint32_t(box_bytes)},
                 {uint64_t(rows), uint64_t(stride), uint32_t(box_rows)}},
                swizzle_of(box_bytes));
}

CUtensorMap operand_map(const void* data, int64_t groups, int64_t rows, int64_t row_bytes,
                        int64_t group_stride, int64_t stride, int box_rows, int box_bytes) {
  return encode(CU_TENSOR_MAP_DATA_TYPE_UINT8, data,
                {{uint64_t(row_bytes), 0, uint32_t(box_bytes)},
                 {uint64_t(rows), uint64_t(stride), uint32_t(box_rows)},
                 {uint64_t(groups), uint64_t(group_stride), 1}},
                swizzle_of(box_bytes));
}

CUtensorMap lines_map(const void* data, int64_t groups, int64_t lines, int64_t line_bytes,
                      int64_t group_stride, int64_t stride, int box_lines, int box_bytes,
                      int box_atoms) {
  const bool whole = box_atoms > 0;
  return encode(CU_TENSOR_MAP_DATA_TYPE_UINT8, data,
                {{uint64_t(whole ? box_bytes : line_bytes), 0, uint32_t(box_bytes)},
                 {uint64_t(lines), uint64_t(stride), uint32_t(box_lines)},
                 {uint64_t(whole ? line_bytes / box_bytes : 1), uint64_t(box_bytes),
                  uint32_t(whole ? box_atoms : 1)},
                 {uint64_t(groups), uint64_t(group_stride), 1}},
                swizzle_of(box_bytes));
}

CUtensorMap scale_map(const void* data, int64_t rows, int64_t words, int64_t stride, int box_rows) {
  return encode(
      CU_TENSOR_MAP_DATA_TYPE_INT32, data,
      {{uint64_t(rows), 0, uint32_t(box_rows)}, {uint64_t(words), 4 * uint64_t(stride), 1}},
      CU_TENSOR_MAP_SWIZZLE_NONE);
}

CUtensorMap scale_map(const void* data, int64_t groups, int64_t rows, int64_t words,
                      int64_t group_stride, int64_t stride, int box_rows, int box_words) {
  return encode(CU_TENSOR_MAP_DATA_TYPE_INT32, data,
                {{uint64_t(rows), 0, uint32_t(box_rows)},
                 {uint64_t(words), 4 * uint64_t(stride), uint32_t(box_words)},
                 {uint64_t(groups), 4 * uint64_t(group_stride), 1}},
                CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace sm120
