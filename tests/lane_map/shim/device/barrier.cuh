// Of device/barrier.cuh the code under test uses lane_id() alone.
#pragma once
#include "device/arch.cuh"
#include "warp.h"

namespace sm120 {

inline int lane_id() {
  return simulated::warp.lane;
}

}  // namespace sm120
