// Integer helpers of the host code.
#pragma once
#include <cstdint>

namespace sm120 {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t align_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace sm120
