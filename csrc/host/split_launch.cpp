#include "host/split_launch.h"

#include <atomic>
#include <random>

namespace sm120 {
namespace {

// 64 random bits, never the same twice: a counter with a random start through a bijection
// (splitmix64). Not 0, which is a flag that is down.
uint64_t new_token() {
  static const uint64_t start = std::random_device{}() | uint64_t{std::random_device{}()} << 32;
  static std::atomic<uint64_t> count{0};
  uint64_t x = start + count.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  return x != 0 ? x : 1;
}

}  // namespace

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
