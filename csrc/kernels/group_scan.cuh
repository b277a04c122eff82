// Finds the tiles of grouped tokens that have work, from index tensors on the device: a warp reads
// 32 items (segments or groups) a step and counts their tiles, so that tile number i of those that
// have work costs a few shuffles, and an item without rows nothing.
#pragma once
#include "device/barrier.cuh"
#include "device/warp.cuh"
#include "kernels/gemm.h"

namespace sm120 {

// Index -> coordinates in a matrix of down x across tiles: column by column within bands of kBand
// tile rows, so that CTAs running at the same time share operand tiles in L2.
__device__ __forceinline__ void place(int index, int down, int across, int& i, int& j) {
  constexpr int kBand = 16;
  // Divisions take a tenth of a microsecond each, before a CTA's first copy.
  if (across == 1) {
    i = index, j = 0;
    return;
  }
  const int band = down <= kBand ? 0 : index / (kBand * across);
  const int height = min(kBand, down - band * kBand);
  const int inside = index - band * kBand * across;
  j = height == 1 ? inside : inside / height;
  i = band * kBand + inside - j * height;
}

// Order of tiles: item by item, and within an item as place() has it, with tokens down and weights
// across: the token tiles of an expert meet at its weights. Neighbouring segments of one expert
// count as one item, a run. All members are called by a whole warp.
class GroupScan {
 public:
  struct Place {
    int group;
    int token, token_end;  // rows of the token matrix
    int weight_tile;
  };

  __device__ explicit GroupScan(const GemmParams& p)
      : p_(p), weight_tiles_(p.swapped ? p.row_tiles : p.col_tiles) {}

  // Tile `index` of those that have work; false if there are fewer. Indices must not decrease from
  // call to call.
  __device__ __forceinline__ bool find(int index, Place& at) {
    while (index >= first_tile_ + token_tiles_ * weight_tiles_) {
      first_tile_ += token_tiles_ * weight_tiles_;
      if (!load_step()) return false;
    }
    const int inside = index - first_tile_;
    // Lane of a token tile, and the run around it: lanes first .. last.
    const int some_lane = lane_of(inside / weight_tiles_);
    const uint32_t up_to = (2u << some_lane) - 1;
    const int first = highest_bit(run_starts_ & up_to);
    const uint32_t later = run_starts_ & ~up_to;
    const int last = later ? lowest_bit(later) - 1 : 31;
    const int before = tiles_before(first);
    const int count = from_lane(tiles_to_here_, last) - before;
    int tile;
    place(inside - before * weight_tiles_, count, weight_tiles_, tile, at.weight_tile);
    const int lane = lane_of(before + tile);
    at.group = from_lane(group_, lane);
    at.token = from_lane(row_, lane) + (before + tile - tiles_before(lane)) * p_.groups.step;
    at.token_end = min(from_lane(end_, lane), at.token + p_.groups.step);
    return true;
  }

 private:
  static constexpr int kSteps = 4;  // looked at together for a step with rows

  // Whether an item can have rows, and the loads that it takes to tell: none waits for another.
  struct Look {
    int value, before;
  };
  __device__ __forceinline__ Look look(int item) const {
    const GemmGroups& g = p_.groups;
    const bool there = item < g.items;
    const int at = p_.schedule == Schedule::kSegments ? item * g.alignment : item;
    const bool ends = p_.schedule == Schedule::kEnds && item > 0;
    return {there ? load_readonly(g.index + at) : -1,
            there && ends ? load_readonly(g.index + at - 1) : 0};
  }
  __device__ __forceinline__ bool occupied(const Look& seen) const {
    return p_.schedule == Schedule::kSegments ? is_group(seen.value) : seen.value > seen.before;
  }

  // Goes to the next step that has rows.
  __device__ __forceinline__ bool load_step() {
    int found;
    do {
      Look seen[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) seen[s] = look(next_item_ + 32 * s + lane_id());
      found = kSteps;
#pragma unroll
      for (int s = kSteps - 1; s >= 0; --s) {
        if (lanes_where(occupied(seen[s]))) found = s;
      }
      next_item_ += 32 * found;
    } while (found == kSteps && next_item_ < p_.groups.items);
    if (found == kSteps) return false;

    load_item(next_item_ + lane_id());
    next_item_ += 32;
    const int before = from_lane_below(group_, 1);
    run_starts_ = lanes_where(lane_id() == 0 || group_ != before);
    tiles_to_here_ = (max(end_ - row_, 0) + p_.groups.step - 1) / p_.groups.step;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = from_lane_below(tiles_to_here_, delta);
      if (lane_id() >= delta) tiles_to_here_ += below;
    }
    token_tiles_ = from_lane(tiles_to_here_, 31);
    return true;
  }

  // This lane's item: group, first row and end of its valid rows.
  __device__ __forceinline__ void load_item(int item) {
    const GemmGroups& g = p_.groups;
    group_ = -1, row_ = 0, end_ = 0;
    if (p_.schedule == Schedule::kSegments) {
      if (item < p_.groups.items) load_segment(item * g.alignment);
      return;
    }
    if (item < p_.groups.items) {
      group_ = item;
      end_ = min(max(load_readonly(g.index + item), 0), g.tokens);
    }
    if (p_.schedule == Schedule::kEnds) {
      int furthest = end_;  // end of all groups up to this one: bad ends may decrease
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        furthest = max(furthest, from_lane_below(furthest, delta));
      }
      const int below = from_lane_below(furthest, 1);
      row_ = lane_id() > 0 ? max(below, furthest_) : furthest_;
      row_ = (row_ + g.alignment - 1) / g.alignment * g.alignment;
      furthest_ = max(furthest_, from_lane(furthest, 31));
    }
  }

  // The leading rows of a segment that have its first row's index, if that names a group.
  __device__ __forceinline__ void load_segment(int row) {
    const GemmGroups& g = p_.groups;
    const int group = load_readonly(g.index + row), limit = min(row + g.alignment, g.tokens);
    if (!is_group(group)) return;
    group_ = group, row_ = end_ = row;
    constexpr int kAtOnce = 8;
    int same;
    do {
      int of_row[kAtOnce];
      const int* at = g.index + end_;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        of_row[i] = i < limit - end_ ? load_readonly(at + i) : -1;
      }
      same = 0;
#pragma unroll
      for (int i = kAtOnce - 1; i >= 0; --i) same = of_row[i] == group ? same + 1 : 0;
      end_ += same;
    } while (same == kAtOnce && end_ < limit);
  }

  __device__ __forceinline__ bool is_group(int index) const {
    return static_cast<uint32_t>(index) < static_cast<uint32_t>(p_.groups.count);
  }

  __device__ __forceinline__ int lane_of(int token_tile) const {
    return lowest_bit(lanes_where(tiles_to_here_ > token_tile));
  }
  __device__ __forceinline__ int tiles_before(int lane) const {
    const int tiles = from_lane(tiles_to_here_, max(lane - 1, 0));
    return lane > 0 ? tiles : 0;
  }

  const GemmParams& p_;
  const int weight_tiles_;
  int first_tile_ = 0;   // index of the step's first tile
  int token_tiles_ = 0;  // of the step
  int next_item_ = 0;    // first item of the step after it
  int furthest_ = 0;     // kEnds: largest end of the steps before it
  uint32_t run_starts_ = 0;
  // This lane's item
  int group_ = 0, row_ = 0, end_ = 0;
  int tiles_to_here_ = 0;  // token tiles of the items up to this one
};

}  // namespace sm120
