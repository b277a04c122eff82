// The shared-memory map of MQA logits, and the ring of stages in it.
#pragma once
#include "device/mqa_mma.cuh"
#include "kernels/mqa_schedule.cuh"

namespace sm120 {

// What the producer tells of a segment, before its queries are there. Of a warp, lane 0 alone reads
// it, and a stage's word of pages, and tells the others: then the arrival that gives the stage (of
// the queries) back, lane 0's too, is behind that read in one thread's order, which is all that a
// race checker can see.
struct alignas(16) SegmentInfo {
  int row, rows;  // 0 rows at the end of all work
  int first_key, tiles;
};
// Places for them. The producer writes one when the stage for the segment's queries is free. All
// warps have then given back the queries of kInfos segments ago, for a segment has two stages at
// least and the ring no more than 2 * kInfos: so they have read what stood in the place.
inline constexpr int kInfos = 4;

// kBoxQueries: queries of a box, 0 if a box is half of one. A constant, so that the sums over heads
// are straight-line code.
template <Format kFormat, int kDim, int kTiles, int kBoxQueries>
struct MqaTraits {
  static constexpr int NT = kTiles;
  static constexpr bool kHalves = kBoxQueries == 0;
  static constexpr int kQueries = kHalves ? 1 : kBoxQueries;
  static_assert(kTiles % kQueries == 0);
  static constexpr int kColumns = 8 * NT;  // heads of a query box, the share of a math warp
  using Mma = MqaMma<kFormat, kDim, NT>;
  static constexpr bool kFp4 = Mma::kFp4;
  static constexpr int kRowBytes = Mma::kRowBytes;
  static constexpr int kGroups = kTileKeys / 16;       // groups of 16 keys in a stage
  static constexpr int kBoxes = kTileKeys / kColumns;  // query boxes that fit a stage
  static constexpr int kBoxBytes = kColumns * kRowBytes;

  // Shared-memory map: stages | their scales | column weights and scale words | partner sums |
  // segment infos | full | empty | of infos full | cursors | sums of warps | pages of stages
  static constexpr int kStageBytes = kTileKeys * kRowBytes;
  static constexpr int kScaleBytes = 8 * kTileKeys;  // pages of 16 keys lie 128 bytes apart
  static constexpr int kFixedBytes = kMqaWarps * kColumns * 8 + kMqaWarps / 2 * 2 * 16 * 4 + 320;
  static constexpr int kPerStage = kStageBytes + kScaleBytes + 4 + 16;
  static constexpr int kMostStages = (kSmemLimit - kFixedBytes) / kPerStage;
  static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  static constexpr int kScalesAt = kStages * kStageBytes;
  static constexpr int kColumnsAt = kScalesAt + kStages * kScaleBytes;
  static constexpr int kPartnersAt = kColumnsAt + kMqaWarps * kColumns * 8;
  static constexpr int kInfosAt = kPartnersAt + kMqaWarps / 2 * 2 * 16 * 4;
  static constexpr int kFullAt = kInfosAt + kInfos * static_cast<int>(sizeof(SegmentInfo));
  static constexpr int kEmptyAt = kFullAt + 8 * kStages;
  static constexpr int kToldAt = kEmptyAt + 8 * kStages;
  static constexpr int kCursorsAt = kToldAt + 8 * kInfos;
  static constexpr int kSumsAt = kCursorsAt + 2 * static_cast<int>(sizeof(Cursor));
  static constexpr int kPagesAt = kSumsAt + kMqaThreads / kWarpSize * 8;
  static constexpr int kSmemBytes = kPagesAt + 4 * kStages;
  static_assert(kSmemBytes <= kSmemLimit && kStages >= 4 && kStages <= 2 * kInfos);
  static_assert(kFullAt % 8 == 0 && kScalesAt % 128 == 0 && kInfosAt % 16 == 0, "alignment");
  static_assert(kStageBytes % 1024 == 0 && kBoxBytes % 512 == 0, "swizzle patterns");
};

// A role's position in the ring of stages.
template <class T>
struct MqaRing {
  RingState<T::kStages> at;
  RingState<kInfos> infos;
  uint32_t base;  // shared-memory address of the map

  __device__ uint32_t data() const { return base + at.stage * T::kStageBytes; }
  __device__ uint32_t scales() const { return base + T::kScalesAt + at.stage * T::kScaleBytes; }
  __device__ uint32_t pages() const { return base + T::kPagesAt + 4 * at.stage; }
  // Of lane 0; what the others get means nothing.
  __device__ uint32_t read_pages() const { return lane_id() == 0 ? lds32(pages()) : 0; }
  __device__ uint32_t info() const {
    return base + T::kInfosAt + infos.stage * static_cast<int>(sizeof(SegmentInfo));
  }
  __device__ uint32_t told() const { return base + T::kToldAt + 8 * infos.stage; }
  __device__ SegmentInfo read_segment() {
    mbarrier_wait(told(), infos.parity);
    const int4 v = lane_id() == 0 ? lds128(info()) : int4{};
    infos.advance();
    return {from_lane(v.x, 0), from_lane(v.y, 0), from_lane(v.z, 0), from_lane(v.w, 0)};
  }
  __device__ uint32_t full() const { return base + T::kFullAt + 8 * at.stage; }
  __device__ uint32_t empty() const { return base + T::kEmptyAt + 8 * at.stage; }
  // Whether the stage after this one is full by now.
  __device__ bool next_is_full() const {
    RingState<T::kStages> next = at;
    next.advance();
    return mbarrier_test(base + T::kFullAt + 8 * next.stage, next.parity);
  }
  __device__ void release() {
    release_stage(empty());
    at.advance();
  }
};

}  // namespace sm120
