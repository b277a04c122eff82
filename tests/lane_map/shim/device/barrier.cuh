// What the code under test uses of device/barrier.cuh.
#pragma once
#include "device/arch.cuh"
#include "warp.h"

namespace sm120 {

inline int lane_id() {
  return simulated::warp.lane;
}
inline uint32_t opaque(uint32_t v) {
  return v;
}
inline uint32_t kept(uint32_t v) {
  return v;
}

}  // namespace sm120
