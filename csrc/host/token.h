// Values that tell a launch's flags (device/flag.cuh) from whatever else memory may hold.
#pragma once
#include <cstdint>

namespace sm120 {

// 64 bits that memory does not hold by chance, others each time. Not 0, which is a flag that is
// down.
uint64_t new_token();

}  // namespace sm120
