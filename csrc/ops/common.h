// Helpers for the op entry points. Torch is used through its stable ABI only (target 2.11), so that
// one binary serves CPU-only and CUDA builds of torch; kernels and launchers never see a torch
// type.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "host/driver.h"
#include "host/math.h"

// Defined in libtorch_cuda. Weak, so that the library also loads under a CPU-only torch, where no
// CUDA kernel is ever called.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));

namespace sm120 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::accelerator::DeviceGuard;

// ---- Errors ------------------------------------------------------------------------------------
// Every message reads `sm120_ops.<op>: <arg>: expected <requirement>, got <got>`. Standard
// exceptions reach Python with exactly this text (STD_TORCH_CHECK would put function, file and line
// in front): std::invalid_argument as a ValueError, std::runtime_error as a RuntimeError.

[[noreturn]] inline void fail(const char* op, const char* arg, std::string_view requirement,
                              std::string_view got) {
  std::ostringstream text;
  text << "sm120_ops." << op << ": " << arg << ": expected " << requirement << ", got " << got;
  throw std::invalid_argument(text.str());
}

// Strings together anything with operator<<.
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The parts of `got` are formatted only when the check fails.
template <typename... Got>
inline void check(bool ok, const char* op, const char* arg, const char* requirement,
                  const Got&... got) {
  if (!ok) fail(op, arg, requirement, cat(got...));
}

// Printable views, cheap to construct, for the `got` side of check().
struct Shape {
  const Tensor& tensor;
};

struct Strides {
  const Tensor& tensor;
};

struct Dtype {
  ScalarType type;
  explicit Dtype(ScalarType t) : type(t) {}
  explicit Dtype(const Tensor& t) : type(t.scalar_type()) {}
};

struct DeviceOf {
  const Tensor& tensor;
};

inline std::ostream& print_list(std::ostream& os, Sizes list) {
  os << '[';
  for (size_t i = 0; i < list.size(); ++i) os << (i ? ", " : "") << list[i];
  return os << ']';
}

inline std::ostream& operator<<(std::ostream& os, Shape s) {
  return print_list(os, s.tensor.sizes());
}

inline std::ostream& operator<<(std::ostream& os, Strides s) {
  return print_list(os << "strides ", s.tensor.strides());
}

inline std::ostream& operator<<(std::ostream& os, DeviceOf d) {
  if (d.tensor.is_cuda()) return os << "cuda:" << d.tensor.get_device_index();
  return os << (d.tensor.is_cpu() ? "cpu" : "another device type");
}

inline std::ostream& operator<<(std::ostream& os, Dtype d) {
  switch (d.type) {
    case ScalarType::Byte:
      return os << "torch.uint8";
    case ScalarType::Char:
      return os << "torch.int8";
    case ScalarType::Short:
      return os << "torch.int16";
    case ScalarType::Int:
      return os << "torch.int32";
    case ScalarType::Long:
      return os << "torch.int64";
    case ScalarType::Half:
      return os << "torch.float16";
    case ScalarType::BFloat16:
      return os << "torch.bfloat16";
    case ScalarType::Float:
      return os << "torch.float32";
    case ScalarType::Double:
      return os << "torch.float64";
    case ScalarType::Float8_e4m3fn:
      return os << "torch.float8_e4m3fn";
    case ScalarType::Float8_e8m0fnu:
      return os << "torch.float8_e8m0fnu";
    case ScalarType::Float4_e2m1fn_x2:
      return os << "torch.float4_e2m1fn_x2";
    default:
      return os << torch::headeronly::toString(d.type);
  }
}

// ---- Tensors -----------------------------------------------------------------------------------

inline bool is_fp4_storage(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Char ||
         type == ScalarType::Float4_e2m1fn_x2;
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// The device of the first CUDA tensor among an op's arguments. The dispatcher sends a call here
// when any of them is on CUDA; check_on_device() then names the ones that are not.
template <typename... Tensors>
int32_t device_of(const Tensor& first, const Tensors&... others) {
  if constexpr (sizeof...(others) > 0) {
    if (!first.is_cuda()) return device_of(others...);
  }
  return first.get_device_index();
}

inline void check_on_device(const char* op, const char* arg, const Tensor& t, int32_t device) {
  if (!t.is_cuda() || t.get_device_index() != device) {
    fail(op, arg, cat("a tensor on cuda:", device), cat("one on ", DeviceOf{t}));
  }
}

// Addresses [begin, end) that the elements of a tensor span; empty for a tensor without elements.
struct ByteRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  bool overlaps(ByteRange other) const { return begin < other.end && other.begin < end; }
};

inline ByteRange byte_range(const Tensor& t) {
  if (t.numel() == 0) return {};
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {begin, begin + (last + 1) * t.element_size()};
}

// Checks a contiguous output tensor. `dtype_name` spells out the accepted dtypes.
inline void check_out(const char* op, const char* arg, const Tensor& out, bool dtype_ok,
                      const char* dtype_name, Sizes shape, int32_t device) {
  check_on_device(op, arg, out, device);
  check(dtype_ok, op, arg, dtype_name, Dtype(out));
  const auto sizes = out.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    std::ostringstream requirement;
    print_list(requirement << "shape ", shape);
    fail(op, arg, requirement.str(), cat(Shape{out}));
  }
  check(out.is_contiguous(), op, arg, "a contiguous tensor", Strides{out});
}

// True unless the elements of a and b surely share no memory. Beside disjoint address ranges it
// knows two matrices that are disjoint column slices of one row-major buffer.
inline bool may_overlap(const Tensor& a, const Tensor& b) {
  const ByteRange x = byte_range(a), y = byte_range(b);
  if (!x.overlaps(y)) return false;
  if (a.dim() != 2 || b.dim() != 2 || a.stride(1) != 1 || b.stride(1) != 1) return true;
  const int64_t row = a.stride(0) * static_cast<int64_t>(a.element_size());
  if (row <= 0 || row != b.stride(0) * static_cast<int64_t>(b.element_size())) return true;
  const int64_t a_width = a.size(1) * static_cast<int64_t>(a.element_size());
  const int64_t b_width = b.size(1) * static_cast<int64_t>(b.element_size());
  const int64_t distance = static_cast<int64_t>(y.begin - x.begin) % row;
  const int64_t offset = distance < 0 ? distance + row : distance;
  return offset < a_width || offset + b_width > row;
}

inline void check_apart(const char* op, const char* arg, const Tensor& out, const char* other_arg,
                        const Tensor& other) {
  if (may_overlap(out, other)) {
    fail(op, arg, cat("memory apart from ", other_arg), "overlapping memory");
  }
}

// Uninitialised and contiguous. The stable ABI drops torch's own error text, out of memory being
// the one to expect here.
inline Tensor empty_cuda(Sizes shape, ScalarType dtype, int32_t device) {
  try {
    return torch::stable::empty(shape, dtype, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
  } catch (const std::exception&) {
    std::ostringstream text;
    print_list(text << "sm120_ops: could not allocate ", shape);
    text << " of " << Dtype(dtype) << " on cuda:" << device << " (out of memory?)";
    throw std::runtime_error(text.str());
  }
}

// The canonical scale tensor: int32, logical [rows, words], MN-major, with storage for rows padded
// to a multiple of 4 in every word column.
inline Tensor empty_packed_scales(int64_t rows, int64_t words, int32_t device) {
  const int64_t padded = align_up(rows, 4);
  const Tensor storage = empty_cuda({words, padded}, ScalarType::Int, device);
  const std::array<int64_t, 2> sizes{rows, words};
  const std::array<int64_t, 2> strides{1, padded > 0 ? padded : 1};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(storage.get(), 2, sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

// Checks that `scale` is a canonical scale tensor for `rows` rows and `words` words a row.
inline void check_packed_scales(const char* op, const char* arg, const Tensor& scale, int64_t rows,
                                int64_t words, int32_t device) {
  check_on_device(op, arg, scale, device);
  check(scale.scalar_type() == ScalarType::Int, op, arg, "dtype torch.int32 (packed UE8M0)",
        Dtype(scale));
  if (scale.dim() != 2 || scale.size(0) != rows || scale.size(1) != words) {
    fail(op, arg, cat("packed scales of shape [", rows, ", ", words, "]"), cat(Shape{scale}));
  }
  if (scale.numel() == 0) return;
  const bool unit = rows == 1 || scale.stride(0) == 1;
  const int64_t column = scale.stride(1);
  const bool columns = words == 1 || (column >= align_up(rows, 4) && column % 4 == 0);
  if (!unit || !columns) {
    fail(op, arg, cat("MN-major strides [1, a multiple of 4 >= ", align_up(rows, 4), "]"),
         cat(Strides{scale}));
  }
  check(is_aligned(scale.data_ptr(), 16), op, arg, "a 16-byte aligned data pointer",
        scale.data_ptr());
}

// Distance in words between the columns of a tensor that passed check_packed_scales(). With a
// single column its stride says nothing, and the padded row count is used.
inline int64_t packed_scales_stride(const Tensor& scale) {
  return scale.size(1) > 1 ? scale.stride(1) : align_up(scale.size(0), 4);
}

// Bytes of storage from the first element on. The padding rows of the last column may lie past it:
// a tensor made by empty_strided, as torch.compile does, ends at the last logical element.
inline int64_t bytes_behind(const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes - t.storage_offset() * static_cast<int64_t>(t.element_size());
}

// ---- Device ------------------------------------------------------------------------------------

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("sm120_ops: torch has no current CUDA stream for cuda:" +
                             std::to_string(device) + "; is this a CUDA build of torch?");
  }
  return static_cast<cudaStream_t>(stream);
}

[[noreturn]] inline void fail_cuda(const char* op, const char* what, cudaError_t error) {
  throw std::runtime_error(cat("sm120_ops.", op, ": ", what, " failed: ", cudaGetErrorString(error),
                               " (", cudaGetErrorName(error), ")", cure(error)));
}

// Both take the error away from the runtime, so that the next call does not report it again.
#define SM120_OPS_CUDA_CHECK(op, call)       \
  do {                                       \
    const cudaError_t error_ = (call);       \
    if (error_ != cudaSuccess) {             \
      (void)cudaGetLastError();              \
      ::sm120::fail_cuda(op, #call, error_); \
    }                                        \
  } while (0)

#define SM120_OPS_LAUNCH_CHECK(op)                         \
  do {                                                     \
    const cudaError_t error_ = cudaGetLastError();         \
    if (error_ != cudaSuccess) {                           \
      ::sm120::fail_cuda(op, "the kernel launch", error_); \
    }                                                      \
  } while (0)

struct DeviceProperties {
  int sm_count = 0;
  int major = 0;
  int minor = 0;
  int l2_bytes = 0;
  int dram_gbps = 0;  // from memory clock and bus width; 0 where the driver does not tell them
};

inline DeviceProperties query_device_properties(const char* op, int32_t device) {
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    SM120_OPS_CUDA_CHECK(op, cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  };
  DeviceProperties p;
  p.sm_count = get(cudaDevAttrMultiProcessorCount);
  p.major = get(cudaDevAttrComputeCapabilityMajor);
  p.minor = get(cudaDevAttrComputeCapabilityMinor);
  p.l2_bytes = get(cudaDevAttrL2CacheSize);
  // Two transfers a clock; the clock is in kHz and the width in bits.
  p.dram_gbps = static_cast<int>(2.0 * get(cudaDevAttrMemoryClockRate) *
                                 get(cudaDevAttrGlobalMemoryBusWidth) / 8 / 1e6);
  return p;
}

inline const DeviceProperties& device_properties(const char* op, int32_t device) {
  constexpr int kMaxDevices = 128;  // torch's device index is an int8
  static std::array<DeviceProperties, kMaxDevices> properties;
  static std::array<std::once_flag, kMaxDevices> once;
  // A failed query throws out of call_once and is tried again by the next call.
  std::call_once(once.at(device),
                 [&] { properties[device] = query_device_properties(op, device); });
  return properties[device];
}

// Compute capability 12.x runs the native kernels, 9.0 the emulated ones; the library holds no
// code for anything else.
inline const DeviceProperties& require_supported_device(const char* op, int32_t device) {
  const DeviceProperties& p = device_properties(op, device);
  if (p.major != 12 && !(p.major == 9 && p.minor == 0)) {
    fail(op, "device", "a GPU of compute capability 12.x (native) or 9.0 (emulated)",
         cat("cuda:", device, " of compute capability ", p.major, ".", p.minor));
  }
  return p;
}

}  // namespace sm120
