// What the BF16 GEMM families share: the check of an operand.
#pragma once
#include "host/bf16_launch.h"
#include "ops/common.h"

namespace sm120 {

// A bfloat16 operand [rows, K], or [groups, rows, K] with `grouped`: rows or K with stride 1, the
// other one at multiples of 16 bytes, groups anywhere at such a multiple. Groups 0 apart are one
// matrix, which all share.
Bf16Operand check_bf16_operand(const char* op, const char* arg, const Tensor& t, bool grouped,
                               int32_t device);

}  // namespace sm120
