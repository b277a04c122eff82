// A warp on the host: 32 lanes run one after the other, collectives exchange what lanes handed in.
//
// A body runs for every lane again and again until no collective is handed anything new. That
// settles after as many passes as collectives depend on one another, because what a lane hands to
// its n-th collective depends on the results of collectives before it alone.
#pragma once
#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace simulated {

inline void check(bool good, const char* format, ...) {
  if (good) return;
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
  std::exit(1);
}

enum class MmaKind { kF16, kMxf8f6f4, kMxf4 };

// What one lane hands to one MMA.
struct MmaCall {
  MmaKind kind;
  uint32_t a[4], b[2];
  uint32_t sfa, sfb;  // scale words, block-scaled kinds only, and the first byte in use
  int byte;
};

struct Warp {
  std::vector<uint8_t> memory;  // shared memory
  int lane = 0;
  std::array<std::vector<MmaCall>, 32> calls;  // [lane], in program order
  int active_mma = -1;  // the one MMA whose products count: it adds 1 to each of its sums

  template <class Body>
  void run(Body&& body) {
    sent_.clear();
    do {
      changed_ = false;
      for (lane = 0; lane < 32; ++lane) {
        next_ = 0;
        calls[lane].clear();
        body(lane);
      }
    } while (changed_);
  }

  // What all lanes hand to this collective.
  const std::array<uint32_t, 32>& exchange(uint32_t mine) {
    if (next_ == sent_.size()) sent_.emplace_back(), changed_ = true;
    std::array<uint32_t, 32>& all = sent_[next_++];
    if (all[lane] != mine) all[lane] = mine, changed_ = true;
    return all;
  }

  // The word `offset` bytes after an address of the given alignment.
  uint32_t load32(uint32_t address, uint32_t alignment, uint32_t offset = 0) const {
    check(address % alignment == 0, "lane %d: address %u is not a multiple of %u", lane, address,
          alignment);
    check(address + offset + 4 <= memory.size(), "lane %d: address %u is outside", lane, address);
    uint32_t v;
    std::memcpy(&v, &memory[address + offset], 4);
    return v;
  }

  // Records an MMA.
  void mma(float (&d)[4], const MmaCall& call) {
    const bool active = static_cast<int>(calls[lane].size()) == active_mma;
    calls[lane].push_back(call);
    if (active) {
      for (float& sum : d) sum += 1.f;
    }
  }

 private:
  std::vector<std::array<uint32_t, 32>> sent_;  // [collective][lane]
  size_t next_ = 0;
  bool changed_ = false;
};

inline Warp warp;

}  // namespace simulated

// Device intrinsics that the code under test uses, with their PTX meaning.

// prmt, default mode: selector nibble i picks byte i of the result from b:a.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 7;
    result |= static_cast<uint32_t>(bytes >> 8 * from & 0xff) << 8 * i;
  }
  return result;
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t v, int lane_mask) {
  return simulated::warp.exchange(v)[simulated::warp.lane ^ lane_mask];
}

inline int __all_sync(unsigned, int predicate) {
  int all = 1;
  for (uint32_t one : simulated::warp.exchange(predicate != 0)) all &= one;
  return all;
}

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<uint32_t>(bits));
}
