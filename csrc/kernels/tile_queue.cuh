// How tiles get from the warp that schedules to those that copy and multiply: a short queue in
// shared memory. A kernel's Traits say where it is (kQueueAt, a multiple of 16).
#pragma once
#include "device/barrier.cuh"
#include "device/launch.cuh"
#include "device/ldmatrix.cuh"
#include "kernels/tile_scheduler.cuh"

namespace sm120 {

inline constexpr int kTileBytes = sizeof(Tile), kTileSlots = 4;
inline constexpr int kQueueBytes = kTileSlots * (kTileBytes + 16);  // tiles | full | empty
static_assert(kTileBytes % 16 == 0);

// Position of one role in the queue, which one warp fills and others read: those that copy and
// those that multiply.
template <class Traits>
struct TileQueue {
  static constexpr int kFullAt = Traits::kQueueAt + kTileSlots * kTileBytes;
  static constexpr int kEmptyAt = kFullAt + 8 * kTileSlots;
  static_assert(Traits::kQueueAt % 16 == 0);

  uint32_t count = 0;  // of tiles so far: one register instead of RingState's two
  uint32_t base;       // shared-memory address of the kernel's map

  static_assert((kTileSlots & (kTileSlots - 1)) == 0);
  __device__ uint32_t slot() const { return count % kTileSlots; }
  __device__ uint32_t parity() const { return count / kTileSlots % 2; }
  __device__ uint32_t full() const { return base + kFullAt + 8 * slot(); }
  __device__ uint32_t empty() const { return base + kEmptyAt + 8 * slot(); }
  __device__ uint32_t tile() const { return base + Traits::kQueueAt + kTileBytes * slot(); }

  // By one thread, before all others use it.
  __device__ void init_barriers(int readers) const {
    for (int s = 0; s < kTileSlots; ++s) {
      mbarrier_init(base + kFullAt + 8 * s, 1);
      mbarrier_init(base + kEmptyAt + 8 * s, readers);
    }
    mbarrier_init_fence();
  }

  __device__ void write(const Tile& t) const {
    sts128(tile(), make_int4(t.row, t.col, t.row_end, t.col_end));
    sts128(tile() + 16,
           make_int4(t.k_begin, t.k_end, t.group, (t.others & 0xffff) | t.chain << 16));
  }
  __device__ Tile read() const {
    const int4 place = lds128(tile()), work = lds128(tile() + 16);
    return {place.x,
            place.y,
            place.z,
            place.w,
            work.x,
            work.y,
            work.z,
            static_cast<int16_t>(work.w),
            static_cast<int16_t>(work.w >> 16)};
  }
  // The same, once it is there.
  __device__ Tile wait() const {
    mbarrier_wait(full(), parity());
    return read();
  }
};

// The barriers of a kernel's ring of stages, by one thread: one for each barrier would take longer,
// since the address must be uniform. Traits say where they are (kFullAt, kEmptyAt).
template <class Traits>
__device__ __forceinline__ void init_ring(uint32_t base, int full_arrivals) {
#pragma unroll
  for (int s = 0; s < Traits::kStages; ++s) {
    mbarrier_init(base + Traits::kFullAt + 8 * s, full_arrivals);
    mbarrier_init(base + Traits::kEmptyAt + 8 * s, kMathWarps);
  }
  mbarrier_init_fence();
}

// Ends a CTA's setup, for every warp at a place of its own: all barriers are there, and global
// memory may be touched.
__device__ __forceinline__ void finish_setup() {
  named_barrier<0, kGemmThreads>();
  pdl_wait();
}

// Scheduler: one warp, ahead of the others as far as the queue allows. With kChains, a tile whose
// sums are longer than one chain goes out as several, one after the other.
template <class T>
__device__ __forceinline__ void schedule(const GemmParams& p, TileQueue<T> queue) {
  finish_setup();
  TileScheduler<T> scheduler(p);
  Tile tile;
  do {
    tile = scheduler.next();
    const int k_end = tile.k_end;
    do {
      if constexpr (T::kChains) {
        tile.k_end = k_end - tile.k_begin > p.chain ? tile.k_begin + p.chain : k_end;
        tile.chain |= tile.k_end < k_end ? kMore : 0;
      }
      if (lane_id() == 0) {
        mbarrier_wait(queue.empty(), queue.parity() ^ 1);
        queue.write(tile);
        mbarrier_arrive(queue.full());
      }
      ++queue.count;
      tile.k_begin = tile.k_end, tile.chain = kCarried;
    } while (T::kChains && tile.k_begin < k_end);
  } while (tile.group >= 0);
}

}  // namespace sm120
