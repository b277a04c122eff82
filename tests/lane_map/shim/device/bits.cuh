// In place of csrc/device/bits.cuh.
#pragma once
#include <cstdint>

namespace sm120 {

inline uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) {
  return (mask & a) | (~mask & b);
}

}  // namespace sm120
