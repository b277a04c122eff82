// How the work of MQA logits is divided: the key tiles of all cells, each cell's behind its
// overhead, are laid end to end and cut into equal ranges, one a CTA. A cursor (cell, tile) is
// where a range starts. Cursors come from the metadata op, or each CTA finds its own two: the same
// code does both. Of 32 cells at most a CTA's producer warp finds them alone (SegmentWalk).
#pragma once
#include "device/arch.cuh"
#include "device/barrier.cuh"
#include "device/math.cuh"
#include "device/warp.cuh"
#include "kernels/mqa.h"

namespace sm120 {

struct KeyRange {
  int begin, end;  // empty unless begin < end
};

// Ragged: the keys from `start` on, before `end`.
__device__ __forceinline__ KeyRange window(const MqaRows& r, int start, int end) {
  const int begin = max(start, 0);
  end = max(min(end, r.limit), 0);
  if (r.width > 0 && end - begin > r.width) end = begin + r.width;
  return {begin, max(end, begin)};
}

// The keys that a row sees.
__device__ __forceinline__ KeyRange row_keys(const MqaRows& r, int row) {
  if (r.starts != nullptr) return window(r, r.starts[row], r.ends[row]);
  if (r.length_a_row) return {0, min(r.ends[row], r.limit)};
  // One length a sequence is its last row's; the others see one key less each.
  const int sequence = row / r.cell_rows;
  const int back = r.cell_rows - 1 - (row - sequence * r.cell_rows);
  return {0, min(max(r.ends[sequence], 0) - back, r.limit)};
}

struct Cell {
  int row;   // the first
  int rows;  // 0: the rows belong to an earlier cell
};

__device__ __forceinline__ Cell cell_at(const MqaRows& r, int cell) {
  if (r.indices == nullptr) {
    const int row = cell * r.cell_rows;
    return {row, min(r.cell_rows, r.num_rows - row)};
  }
  const int last = min((cell / r.cell_rows + 1) * r.cell_rows, r.cells);
  if (cell % r.cell_rows != 0 && r.indices[cell - 1] == r.indices[cell]) return {cell, 0};
  int end = cell + 1;
#pragma unroll 1
  while (end < last && r.indices[end] == r.indices[cell]) ++end;
  return {cell, end - cell};
}

inline constexpr int kRowsAtOnce = 4;  // of a cell, whose windows are loaded together

// All keys that some row of a cell sees; it starts at a multiple of 16, so that stores are aligned.
__device__ __forceinline__ KeyRange cell_keys(const MqaRows& r, const Cell& cell) {
  if (cell.rows == 0) return {0, 0};
  KeyRange keys{0x7fffffff, 0};
  const int last = cell.row + cell.rows - 1;
  if (r.starts == nullptr && !r.length_a_row) {
    keys = {0, row_keys(r, last).end};
  } else {
    const int32_t* starts = r.starts != nullptr ? r.starts : r.ends;
#pragma unroll 1
    for (int first = cell.row; first <= last; first += kRowsAtOnce) {
      int start[kRowsAtOnce], end[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        start[i] = first + i <= last ? starts[first + i] : 0;
        end[i] = first + i <= last ? r.ends[first + i] : 0;
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const KeyRange row = window(r, r.starts != nullptr ? start[i] : 0, end[i]);
        if (row.begin < row.end) keys.begin = min(keys.begin, row.begin);
        keys.end = max(keys.end, row.begin < row.end ? row.end : 0);
      }
    }
  }
  if (keys.begin >= keys.end) return {0, 0};
  return {keys.begin / 16 * 16, keys.end};
}

// Most often a cell's length stands in `ends`: then few instructions are enough.
__host__ __device__ __forceinline__ bool has_length_a_cell(const MqaRows& r) {
  return r.starts == nullptr && r.indices == nullptr && (!r.length_a_row || r.cell_rows == 1);
}
__device__ __forceinline__ KeyRange keys_of_length(const MqaRows& r, int length) {
  return {0, max(min(length, r.limit), 0)};
}

// The keys of a cell by its number.
__device__ __forceinline__ KeyRange cell_keys(const MqaRows& r, int cell) {
  if (has_length_a_cell(r)) return keys_of_length(r, r.ends[cell]);
  return cell_keys(r, cell_at(r, cell));
}

__device__ __forceinline__ int tiles_of(const KeyRange& keys) {
  return static_cast<uint32_t>(keys.end - keys.begin + kTileKeys - 1) / kTileKeys;
}

// Tiles and overhead.
__device__ __forceinline__ int units_of(const MqaRows& r, const KeyRange& keys) {
  const int tiles = tiles_of(keys);
  return tiles > 0 ? tiles + r.overhead : 0;
}

struct Cursor {
  int cell, tile;
};

// c * total / parts for any c, by what is worked out once: total < 2^63, parts < 2^16.
struct EqualParts {
  uint32_t parts, rest;
  int64_t each;

  // total / parts digit by digit, which is much less code than a division of 64 bits.
  __device__ __forceinline__ EqualParts(int64_t total, uint32_t count)
      : parts(count), rest(0), each(0) {
    if (total >> 32 == 0) {
      each = static_cast<uint32_t>(total) / parts, rest = static_cast<uint32_t>(total) % parts;
      return;
    }
#pragma unroll 1
    for (int digit = 2; digit >= 0; --digit) {
      const int64_t upper = digit == 2 ? total >> 32 : total >> 16 * digit & 0xffff;
      const uint32_t n = rest << 16 | static_cast<uint32_t>(upper);
      each = each << 16 | n / parts;
      rest = n % parts;
    }
  }
  struct Start {
    int64_t at;
    uint32_t fraction;  // of `parts`
  };
  __device__ __forceinline__ Start start(int c) const {
    const uint32_t over = static_cast<uint32_t>(c) * rest;
    return {c * each + over / parts, over % parts};
  }
  // From one start to the next, without a division.
  __device__ __forceinline__ void advance(Start& start) const {
    start.fraction += rest;
    const bool carries = start.fraction >= parts;
    start.at += each + carries;
    if (carries) start.fraction -= parts;
  }
};

// Sum over the warp's lanes up to this one.
template <typename Sum>
__device__ __forceinline__ Sum prefix_of_warp(Sum value) {
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const Sum below = from_lane_below(value, d);
    if (lane_id() >= d) value += below;
  }
  return value;
}

// Writes the cursors of ranges first .. last of `ctas` to out[0 ..]; range c starts at unit
// c * total / ctas. Every thread of a block of kWarps warps must call it; `sums` is shared memory.
// kLengthACell: of rows with has_length_a_cell() alone, whose lengths can be loaded many at a time.
template <int kWarps, bool kLengthACell = false>
__device__ __forceinline__ void find_cursors(const MqaRows& r, int ctas, int first, int last,
                                             Cursor* out, int64_t (&sums)[kWarps]) {
  constexpr uint32_t kThreads = kWarps * kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = lane_id();
  // Each thread takes a contiguous part of the cells.
  const uint32_t cells = r.cells, part = (cells + kThreads - 1) / kThreads;
  const int begin = min(threadIdx.x * part, cells), end = min(begin + part, cells);
  const auto units_at = [&](int cell) {
    return units_of(r, kLengthACell ? keys_of_length(r, r.ends[cell]) : cell_keys(r, cell));
  };
  constexpr int kAtOnce = kLengthACell ? 8 : 1;
  int64_t sum = 0;
#pragma unroll 1
  for (int cell = begin; cell < end; cell += kAtOnce) {
    if constexpr (kLengthACell) {
      int length[kAtOnce], units = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) length[i] = cell + i < end ? r.ends[cell + i] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) units += units_of(r, keys_of_length(r, length[i]));
      sum += units;
    } else {
      sum += units_at(cell);
    }
  }
  const int64_t upto = prefix_of_warp(sum);
  if (lane == kWarpSize - 1) sums[warp] = upto;
  __syncthreads();
  const int64_t warps = prefix_of_warp(lane < kWarps ? sums[lane] : int64_t{0});
  const int64_t total = from_lane(warps, kWarpSize - 1);
  const int64_t below = from_lane(warps, max(warp - 1, 0));
  int64_t before = upto - sum + (warp > 0 ? below : 0);
  const EqualParts ranges(total, ctas);
  // Ranges that start behind the last unit: the one after all, or each if there is no unit.
#pragma unroll 1
  for (int c = first + static_cast<int>(threadIdx.x); c <= last; c += kThreads) {
    if (c == ctas || total == 0) out[c - first] = {r.cells, 0};
  }
  if (sum == 0) return;
  // The first range that does not start before this part does, or a little less, by an estimate.
  const float about = static_cast<float>(before) *
                      rough_quotient(static_cast<float>(ctas), static_cast<float>(total));
  int c = max(first, static_cast<int>(about * (1 - 0x1p-20f)) - 1), cell = begin;
  auto start = ranges.start(c);
#pragma unroll 1
  for (; c <= last && start.at < before + sum; ++c, ranges.advance(start)) {
    if (start.at < before) continue;
    // The last cell of the part has what is left, so it is not loaded again.
    for (; cell + 1 < end; ++cell) {
      const int units = units_at(cell);
      if (start.at < before + units) break;
      before += units, sum -= units;
    }
    out[c - first] = {cell, max(static_cast<int>(start.at - before) - r.overhead, 0)};
  }
}

// One CTA's share of a cell.
struct Segment {
  Cell cell;
  int number;     // of the cell
  int first_key;  // of tile `tile`
  int end;        // of the cell's keys
  int tile, tiles;
};

// Walks from one cursor to another; all lanes of a warp together, each looking at one of the next
// 32 cells. Cursors may be anything: they are cut to the cells and tiles there are.
class SegmentWalk {
 public:
  __device__ SegmentWalk(const MqaRows& r, Cursor from, Cursor to)
      : at_{max(from.cell, 0), max(from.tile, 0)}, to_(to), seen_(-kWarpSize) {
    if (to_.cell >= r.cells) to_ = {r.cells, 0};
  }

  // This CTA's range of 32 cells at most, which the first call of next() works out. The block would
  // find the same one, by twice as many steps that wait for each other.
  __device__ SegmentWalk() : at_{0, -1}, to_{1, 0}, seen_(-kWarpSize) {}

  __device__ bool next(const MqaRows& r, Segment& s) {
    while (at_.cell < to_.cell || (at_.cell == to_.cell && at_.tile < to_.tile)) {
      if (at_.cell >= seen_ + kWarpSize) {
        seen_ = at_.cell;
        const int cell = seen_ + lane_id();
        keys_ = cell < r.cells ? cell_keys(r, cell) : KeyRange{0, 0};
        if (at_.tile < 0) {
          find_range(r);
          continue;
        }
      }
      const int skipped = at_.cell - seen_;
      const uint32_t rest = lanes_where(keys_.end > keys_.begin) >> skipped;
      if (rest == 0) {
        at_ = {seen_ + kWarpSize, 0};
        continue;
      }
      const int lane = skipped + __ffs(rest) - 1;
      if (lane > skipped) at_ = {seen_ + lane, 0};
      const KeyRange keys{from_lane(keys_.begin, lane), from_lane(keys_.end, lane)};
      int stop = tiles_of(keys);
      if (at_.cell > to_.cell) return false;
      if (at_.cell == to_.cell) stop = min(stop, to_.tile);
      s.tile = at_.tile;
      s.tiles = stop - at_.tile;
      const int cell = at_.cell;
      at_ = {cell + 1, 0};
      if (s.tiles <= 0) continue;
      s.number = cell;
      s.cell = cell_at(r, cell);
      s.first_key = keys.begin + s.tile * kTileKeys;
      s.end = keys.end;
      return true;
    }
    return false;
  }

 private:
  __device__ __forceinline__ void find_range(const MqaRows& r) {
    const int units = units_of(r, keys_), upto = prefix_of_warp(units);
    // Lane 0 has the range's start, lane 1 that of the next one.
    const uint32_t ctas = gridDim.x, c = blockIdx.x + lane_id();
    const uint32_t total = from_lane(upto, kWarpSize - 1), each = total / ctas;
    const int starts = c * each + c * (total - each * ctas) / ctas;
    const auto cursor = [&](int lane) {
      const int start = from_lane(starts, lane);
      const uint32_t behind = lanes_where(upto > start);
      const int cell = behind != 0 ? lowest_bit(behind) : kWarpSize - 1;
      const int tile = max(start - from_lane(upto - units, cell) - r.overhead, 0);
      return behind != 0 ? Cursor{cell, tile} : Cursor{r.cells, 0};
    };
    at_ = cursor(0), to_ = cursor(1);
  }

  Cursor at_, to_;
  int seen_;       // cell of lane 0
  KeyRange keys_;  // of this lane's cell
};

}  // namespace sm120
