// Bit operations whose exact form matters.
#pragma once
#include <cstdint>

namespace sm120 {

// Bits of a where the mask has ones, of b elsewhere, as one instruction. Written with operators it
// may become two: the compiler narrows the mask to the bits that are used later. PTX ISA 9.7.8.6
// "lop3".
__device__ __forceinline__ uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

}  // namespace sm120
