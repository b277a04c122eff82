// Of device/warp.cuh what the code under test uses, with the meaning that the CUDA guide gives it.
#pragma once
#include "fibers.h"

namespace sm120 {

inline constexpr int kWarpSize = 32;

inline int from_lane(int value, int from) {
  simulated::check(from >= 0 && from < 32, "value of lane %d", from);
  return simulated::exchange(value)[from];
}

inline int from_lane_below(int value, int distance) {
  const auto all = simulated::exchange(value);
  return all[simulated::lane < distance ? simulated::lane : simulated::lane - distance];
}

inline uint32_t lanes_where(bool condition) {
  const auto all = simulated::exchange(condition);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
  return bits;
}

inline int lowest_bit(uint32_t bits) {
  return bits ? __builtin_ctz(bits) : -1;
}
inline int highest_bit(uint32_t bits) {
  return bits ? 31 - __builtin_clz(bits) : -1;
}

inline int load_readonly(const int* p) {
  simulated::check(p >= simulated::readable_begin && p < simulated::readable_end,
                   "read at %td of %td", p - simulated::readable_begin,
                   simulated::readable_end - simulated::readable_begin);
  return *p;
}

}  // namespace sm120
