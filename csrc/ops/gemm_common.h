// What the block-scaled GEMM families share: argument checks, the GPU's model, logging.
#pragma once
#include "host/gemm_launch.h"
#include "ops/common.h"

namespace sm120 {

inline constexpr int64_t kMaxRows = (1ll << 31) - 256;  // TMA coordinates are int32

// SM120_OPS_LOG=config: every call prints the configuration it runs with.
bool log_configs();

// `name` as the tests' config ops take it: "mxfp8" or "mxfp4".
OperandFormat parse_format(const char* op, const char* arg, const std::string& name);

// What the choice of a configuration needs to know of the device; an error unless it is supported.
GpuModel gpu_model(const char* op, int32_t device);

// Names of an operand's arguments.
struct OperandArgs {
  const char *data, *scale, *gran;
};

// Checks data [rows, K], or [groups, rows, K] with `grouped`, and its packed scales; gives K.
GemmOperand check_operand(const char* op, const OperandArgs& args, const Tensor& data,
                          const Tensor& scale, int64_t gran_k, bool grouped, int32_t device,
                          int64_t& k);

// D or C: dtype, shape, and contiguous rows.
void check_matrix(const char* op, const char* arg, const Tensor& t, Sizes shape, int32_t device);

// D [m, columns] of any row stride, and C, which is D itself or apart from it. No head split.
GemmOutput check_matrix_output(const char* op, const Tensor& out, const std::optional<Tensor>& c,
                               int64_t m, int64_t columns, int32_t device);

// `out` must share no memory with what is read.
struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};
void check_apart_from(const char* op, const Tensor& out, std::initializer_list<NamedTensor> inputs);

bool is_out_dtype(ScalarType type);

}  // namespace sm120
