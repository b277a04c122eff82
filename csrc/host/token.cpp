#include "host/token.h"

#include <atomic>
#include <random>

namespace sm120 {

// A counter with a random start through a bijection (splitmix64).
uint64_t new_token() {
  static const uint64_t start = std::random_device{}() | uint64_t{std::random_device{}()} << 32;
  static std::atomic<uint64_t> count{0};
  uint64_t x = start + count.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  return x != 0 ? x : 1;
}

}  // namespace sm120
