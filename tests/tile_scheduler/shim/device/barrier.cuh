// Of device/barrier.cuh the code under test uses lane_id() alone.
#pragma once
#include "fibers.h"

namespace sm120 {

inline int lane_id() {
  return simulated::lane;
}

}  // namespace sm120
