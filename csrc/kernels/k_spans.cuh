// Which part of K each group has, from the groups' sizes on the device.
#pragma once
#include "device/barrier.cuh"
#include "device/warp.cuh"
#include "kernels/gemm.h"

namespace sm120 {

// A warp adds up 32 sizes a step. Sizes below 0 count as 0, and what goes past the operands' K is
// cut off. find() is called by a whole warp, and groups must not decrease from call to call.
class KSpans {
 public:
  __device__ explicit KSpans(const GemmGroups& groups) : groups_(groups) {}

  __device__ __forceinline__ void find(int group, int32_t& begin, int32_t& end) {
    while (group >= first_ + kLanes) load(first_ + kLanes);
    end = from_lane(end_, group - first_);
    const int before = from_lane(end_, max(group - first_ - 1, 0));
    begin = group > first_ ? before : begin_;
  }

 private:
  static constexpr int kLanes = 32;

  __device__ __forceinline__ void load(int first) {
    begin_ = first > 0 ? from_lane(end_, kLanes - 1) : 0;
    first_ = first;
    const int item = first + lane_id();
    const uint32_t total = groups_.tokens;  // below 2^30: no sum of two wraps around
    uint32_t sum =
        item < groups_.count ? min(max(load_readonly(groups_.index + item), 0), groups_.tokens) : 0;
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const uint32_t below = from_lane_below(sum, distance);
      if (lane_id() >= distance) sum = min(sum + below, total);
    }
    end_ = static_cast<int32_t>(min(begin_ + sum, total));
  }

  const GemmGroups& groups_;
  int first_ = -kLanes;  // group of lane 0
  int begin_ = 0;        // where that group begins
  int end_ = 0;          // where this lane's group ends
};

}  // namespace sm120
