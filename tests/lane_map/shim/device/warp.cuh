// What the code under test uses of device/warp.cuh.
#pragma once
#include <cstring>

#include "warp.h"

namespace sm120 {

inline float from_lane_xor(float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return __uint_as_float(__shfl_xor_sync(0xffffffffu, bits, mask));
}
inline float add_across(float value, int mask) {
  return value + from_lane_xor(value, mask);
}

}  // namespace sm120
