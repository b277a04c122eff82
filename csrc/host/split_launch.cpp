#include "host/split_launch.h"

#include "host/math.h"
#include "host/token.h"

namespace sm120 {

int64_t split_bytes(int grid, int64_t tile_bytes) {
  return grid * (tile_bytes + static_cast<int64_t>(sizeof(*GemmParams::flags)));
}

double hand_over_us(int grid, int64_t tiles, double tile_bytes) {
  constexpr double kHandOverUs = 2.0;       // sums written, flag raised and seen
  constexpr double kHandedBytesAUs = 65e3;  // sums read by the CTA that adds them up
  // A tile's first K-block may lie anywhere in a range.
  const int64_t others = grid % tiles == 0 ? grid / tiles - 1 : ceil_div(grid, tiles);
  return kHandOverUs + static_cast<double>(others) * tile_bytes / kHandedBytesAUs;
}

void set_split(GemmParams& p, int64_t blocks, int grid, void* workspace, int64_t tile_bytes) {
  p.range_blocks = static_cast<int32_t>(blocks / grid);
  p.longer_ranges = static_cast<int32_t>(blocks % grid);
  p.workspace = static_cast<float*>(workspace);
  p.flags = reinterpret_cast<uint64_t*>(static_cast<char*>(workspace) + grid * tile_bytes);
  p.token = new_token();
}

}  // namespace sm120
