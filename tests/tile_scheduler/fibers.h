// A warp on the host: 32 fibers, which meet at every collective.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
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

inline int lane = 0;
inline const int* readable_begin = nullptr;  // the memory that load_readonly() may touch
inline const int* readable_end = nullptr;

struct Warp {
  std::array<ucontext_t, 32> fibers;  // to start them; later switches are jumps, without a syscall
  std::array<jmp_buf, 32> at;
  ucontext_t first_home;
  jmp_buf home;
  std::array<std::vector<char>, 32> stacks;
  std::array<int, 32> sent;
  std::array<bool, 32> done;
  std::function<void()> body;
};
inline Warp warp;

inline void wait_for_all_lanes() {
  if (!_setjmp(warp.at[lane])) _longjmp(warp.home, 1);
}

// What all lanes hand to this collective.
inline std::array<int, 32> exchange(int mine) {
  warp.sent[lane] = mine;
  wait_for_all_lanes();  // every one has sent
  const std::array<int, 32> all = warp.sent;
  wait_for_all_lanes();  // every one has read
  return all;
}

inline void run_fiber() {
  if (!_setjmp(warp.at[lane])) _longjmp(warp.home, 1);
  warp.body();
  warp.done[lane] = true;
  _longjmp(warp.home, 1);
}

// Runs the body as every lane of a warp. All lanes must pass the same collectives.
inline void run_warp(std::function<void()> body) {
  warp.body = std::move(body);
  for (lane = 0; lane < 32; ++lane) {
    warp.stacks[lane].resize(1 << 16);
    warp.done[lane] = false;
    getcontext(&warp.fibers[lane]);
    warp.fibers[lane].uc_stack.ss_sp = warp.stacks[lane].data();
    warp.fibers[lane].uc_stack.ss_size = warp.stacks[lane].size();
    warp.fibers[lane].uc_link = nullptr;
    makecontext(&warp.fibers[lane], run_fiber, 0);
    if (!_setjmp(warp.home)) swapcontext(&warp.first_home, &warp.fibers[lane]);
  }
  static int finished;  // static: its value must survive the jumps
  for (finished = 0; finished == 0;) {
    for (lane = 0; lane < 32; ++lane) {
      if (!_setjmp(warp.home)) _longjmp(warp.at[lane], 1);
      finished += warp.done[lane];
    }
    check(finished == 0 || finished == 32, "lanes part: %d of 32 have returned", finished);
  }
}

}  // namespace simulated
