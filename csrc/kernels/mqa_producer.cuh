// The producer warp of MQA logits: copies queries and keys of a CTA's segments into the ring.
#pragma once
#include "device/launch.cuh"
#include "device/tma.cuh"
#include "kernels/mqa_schedule.cuh"
#include "kernels/mqa_stages.cuh"

namespace sm120 {

__device__ __forceinline__ void prefetch_weights(const MqaParams& p, int row, int rows) {
  const int line_shift = max(p.heads_shift - 5, 0);  // 128 bytes a lane
#pragma unroll 1
  for (int i = lane_id(); i < rows << line_shift; i += kWarpSize) {
    const int64_t at = row + (i >> line_shift);
    prefetch_l2(p.weights + at * p.weights_stride + 32 * (i & ((1 << line_shift) - 1)));
  }
}

// While a CTA waits for the lengths: what it, or another one, is about to need, as if all cells had
// the same length. Read only through the L2, so a wrong guess costs nothing but its traffic.
template <class T>
__device__ __forceinline__ void prefetch_start(const MqaParams& p) {
  const int cta = blockIdx.x, lane = lane_id();
  const int head = static_cast<int>(static_cast<float>(cta) * p.boxes_a_cta) * T::kColumns;
  const int row = head >> p.heads_shift;
  if (row < p.rows.num_rows) {
    if (lane == 0) tma_prefetch_2d(&p.q, 0, head);
    prefetch_weights(p, row, min(T::kQueries, p.rows.num_rows - row));
  }
  if (p.rows.starts != nullptr) {
    const int key = cta * kTileKeys;
    if (lane == 0 && key < p.rows.limit) tma_prefetch_2d(&p.k, 0, key);
  } else {
    const int in_part = 32 * lane;  // a line of 32 entries each
    const int64_t entry = cta * p.entries_a_cta + in_part;
    if (in_part < p.entries_a_cta && entry < p.table_entries) prefetch_l2(p.block_table + entry);
  }
}

// Describes a segment and copies its queries, those of `rows` rows from `row` on.
template <class T>
__device__ __forceinline__ void copy_queries(const MqaParams& p, MqaRing<T>& ring, const Segment& s,
                                             int row, int rows) {
  const int boxes = (rows * p.heads + T::kColumns - 1) / T::kColumns;
#pragma unroll 1
  for (int box = 0; box == 0 || box < boxes; box += T::kBoxes) {
    mbarrier_wait(ring.empty(), ring.at.parity ^ 1);
    if (lane_id() == 0) {
      if (box == 0) {
        *static_cast<SegmentInfo*>(smem_pointer(ring.info())) = {row, rows, s.first_key, s.tiles};
        mbarrier_arrive(ring.told());
      }
      const int count = min(T::kBoxes, boxes - box);
      mbarrier_expect_tx(ring.full(), count * T::kBoxBytes);
#pragma unroll 1
      for (int b = 0; b < count; ++b) {
        tma_load_2d(ring.data() + b * T::kBoxBytes, &p.q, ring.full(), 0,
                    row * p.heads + (box + b) * T::kColumns);
      }
    }
    __syncwarp();
    ring.at.advance();
  }
  ring.infos.advance();
}

template <class T>
__device__ __forceinline__ void copy_ragged_keys(const MqaParams& p, MqaRing<T>& ring,
                                                 const Segment& s) {
#pragma unroll 1
  for (int tile = 0; tile < s.tiles; ++tile) {
    mbarrier_wait(ring.empty(), ring.at.parity ^ 1);
    if (lane_id() == 0) {
      *static_cast<uint32_t*>(smem_pointer(ring.pages())) = 1;
      mbarrier_expect_tx(ring.full(), T::kStageBytes + 4 * kTileKeys);
      const int key = s.first_key + tile * kTileKeys;
      tma_load_2d(ring.data(), &p.k, ring.full(), 0, key);
      tma_load_2d(ring.scales(), &p.k_scale, ring.full(), key, 0);
    }
    __syncwarp();
    ring.at.advance();
  }
}

// The cache blocks of a segment's pages, tile by tile: lane i has that of the tile's page i, -1
// where there is none. One tile ahead, since it takes a while to load them.
struct PageWalk {
  const int32_t* table;
  int in_tile, page, pages;
  int block;

  __device__ PageWalk(const MqaParams& p, const Segment& s) {
    int sequence = s.number;
    if (p.rows.indices != nullptr) {  // varlen: the row that sees most has the longest table
      sequence = s.cell.row;
#pragma unroll 1
      for (int i = 1; i < s.cell.rows; ++i) {
        if (p.rows.ends[s.cell.row + i] > p.rows.ends[sequence]) sequence = s.cell.row + i;
      }
    }
    table = p.block_table + static_cast<int64_t>(sequence) * p.table_stride;
    in_tile = kTileKeys >> p.page_shift;
    pages = (s.end + p.block_kv - 1) >> p.page_shift;
    page = s.tile * in_tile + lane_id();
    load();
  }
  __device__ void load() {
    block = lane_id() < in_tile && page < pages ? table[page] : -1;
    page += in_tile;
  }
};

// Lane i copies page i of a tile. A block id outside the cache copies nothing; the consumers see it
// in the stage's word of pages.
template <class T>
__device__ __forceinline__ void copy_paged_keys(const MqaParams& p, MqaRing<T>& ring,
                                                const Segment& s, PageWalk& walk) {
  const int page_bytes = p.block_kv * T::kRowBytes;
#pragma unroll 1
  for (int tile = 0; tile < s.tiles; ++tile) {
    const int block = walk.block;
    const bool known = block >= 0 && block < p.num_blocks;
    const uint32_t copied = lanes_where(known);
    walk.load();
    mbarrier_wait(ring.empty(), ring.at.parity ^ 1);
    if (lane_id() == 0) {
      *static_cast<uint32_t*>(smem_pointer(ring.pages())) = copied;
      mbarrier_expect_tx(ring.full(), count_lanes(copied) * (page_bytes + 4 * p.block_kv));
    }
    __syncwarp();
    if (known) {
      tma_load_3d(ring.data() + lane_id() * page_bytes, &p.k, ring.full(), 0, 0, block);
      tma_load_2d(ring.scales() + lane_id() * max(4 * p.block_kv, 128), &p.k_scale, ring.full(), 0,
                  block);
    }
    ring.at.advance();
  }
}

template <class T>
__device__ __forceinline__ void produce_mqa(const MqaParams& p, MqaRing<T> ring,
                                            SegmentWalk segments) {
  const int most_rows = kMqaWarps * T::kColumns >> p.heads_shift;  // a pass
  bool starts = true;
  for (Segment s; segments.next(p.rows, s);) {
#pragma unroll 1
    for (int first = 0; first < s.cell.rows; first += most_rows) {
      const int row = s.cell.row + first, rows = min(most_rows, s.cell.rows - first);
      // Of the first segment the math warps ask for them while the queries are under way.
      if (!starts) prefetch_weights(p, row, rows);
      starts = false;
      if (p.rows.starts != nullptr) {
        copy_queries(p, ring, s, row, rows);
        copy_ragged_keys(p, ring, s);
      } else {
        PageWalk walk(p, s);  // its load is under way while the queries are copied
        copy_queries(p, ring, s, row, rows);
        copy_paged_keys(p, ring, s, walk);
      }
    }
  }
  copy_queries(p, ring, Segment{}, 0, 0);
  pdl_launch_dependents();
}

}  // namespace sm120
