#include "host/split_launch.h"

#include "host/token.h"

namespace sm120 {

int64_t split_bytes(int grid, int64_t tile_bytes) {
  return grid * (tile_bytes + kMathWarps * static_cast<int64_t>(sizeof(*GemmParams::flags)));
}

void set_split(GemmParams& p, int64_t blocks, int grid, void* workspace, int64_t tile_bytes) {
  p.range_blocks = static_cast<int32_t>(blocks / grid);
  p.longer_ranges = static_cast<int32_t>(blocks % grid);
  p.workspace = static_cast<float*>(workspace);
  p.flags = reinterpret_cast<uint64_t*>(static_cast<char*>(workspace) + grid * tile_bytes);
  p.token = new_token();
}

}  // namespace sm120
