#include "host/hc_prenorm_launch.h"

#include <algorithm>
#include <cstring>

#include "host/launch.h"
#include "host/math.h"
#include "host/tensor_map.h"

namespace sm120 {
namespace {

// How rows are reduced: what takes the fewest rounds of loads, one after the other, for the rows of
// a CTA. A row has about grid / row_tiles parts.
void plan_reduction(PrenormParams& p, int grid) {
  const int64_t rows = ceil_div(p.m, grid), parts = ceil_div(grid, p.row_tiles) + 1;
  int64_t fewest = INT64_MAX;
  for (const bool many_rows : {false, true}) {
    const PrenormRound round = many_rows ? kPrenormManyRows : kPrenormManyParts;
    for (const int sharing : {1, 2, 4, 8}) {
      const int64_t rounds = ceil_div(rows * sharing, kPrenormMathWarps * round.rows) *
                             ceil_div(parts, sharing * round.parts);
      if (rounds >= fewest) continue;
      fewest = rounds, p.sharing = sharing, p.many_rows = many_rows;
    }
  }
}

// CTAs that share the K-blocks of all row tiles. As many for each tile, where that leaves few SMs
// idle: a CTA then has one part of one tile, and no more CTAs than finish at the same time.
int64_t reduced_grid(int64_t tiles, int64_t blocks, int num_sms) {
  const int64_t parts = num_sms / tiles;
  if (16 * parts * tiles < 15 * num_sms) return std::min<int64_t>(num_sms, tiles * blocks);
  return tiles * ceil_div(blocks, ceil_div(blocks, parts));
}

}  // namespace

PrenormPlan plan_prenorm(const PrenormProblem& p, int num_sms) {
  const int64_t tiles = ceil_div(p.m, kPrenormRows), blocks = p.k / kPrenormBlockK;
  // The kernel counts blocks in 32 bits. So many tiles keep the SMs busy without cutting K.
  const bool countable = tiles * blocks * (num_sms + 1) < (1ll << 32);
  PrenormPlan plan{};
  plan.reduced = p.splits == 0 && countable && tiles * blocks > 1;
  const int64_t items = plan.reduced ? tiles * blocks : tiles * std::max<int64_t>(p.splits, 1);
  plan.grid = static_cast<int>(plan.reduced ? reduced_grid(tiles, blocks, num_sms)
                                            : std::min<int64_t>(num_sms, items));
  if (plan.reduced) {
    plan.workspace_floats = 2ll * plan.grid * std::min<int64_t>(p.m, kPrenormRows) * (p.n + 1);
  }
  return plan;
}

cudaError_t launch_prenorm(const PrenormProblem& problem, const PrenormPlan& plan, void* workspace,
                           cudaStream_t stream) {
  const PrenormInstance instance = prenorm_instance(static_cast<int>(problem.n));
  PrenormParams p;
  std::memset(&p, 0, sizeof(p));
  p.x = operand_map(problem.x, problem.m, 2 * problem.k, problem.x_stride, kPrenormRows / 2, 128);
  p.fn =
      operand_map(problem.fn, problem.n, 4 * problem.k, problem.fn_stride, instance.columns, 128);
  p.d = problem.d;
  p.sqr_sum = problem.sqr_sum;
  p.workspace = static_cast<float*>(workspace);
  p.m = static_cast<int32_t>(problem.m);
  p.n = static_cast<int32_t>(problem.n);
  p.row_tiles = static_cast<int32_t>(ceil_div(problem.m, kPrenormRows));
  p.k_blocks = static_cast<int32_t>(problem.k / kPrenormBlockK);
  p.splits = plan.reduced ? 0 : static_cast<int32_t>(std::max<int64_t>(problem.splits, 1));
  plan_reduction(p, plan.grid);
  p.scale = problem.scale;
  p.inverse_k = 1.f / static_cast<float>(problem.k);
  p.eps = problem.eps;
  return launch_kernel(instance.kernel, plan.grid, kPrenormThreads, instance.smem_bytes,
                       plan.reduced, stream, p);
}

}  // namespace sm120
