#include "host/hc_prenorm_launch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "host/launch.h"
#include "host/math.h"
#include "host/tensor_map.h"
#include "host/token.h"

namespace sm120 {
namespace {

int64_t partial_bytes(const PrenormProblem& p, const PrenormPlan& plan) {
  const int columns = prenorm_instance(static_cast<int>(p.n)).columns;
  return plan.splits * p.m * prenorm_row_vectors(columns) * sizeof(float4);
}

// Rows that a CTA reduces at a time, and threads that share a vector of them: one round of loads,
// where that is enough for all rows.
void plan_reduction(PrenormParams& p, int grid, int row_vectors) {
  const int most_shares = 16;
  p.group_rows = 1;
  while (p.group_rows * grid < p.m && p.group_rows < kPrenormGroupRows &&
         2 * p.group_rows * row_vectors <= kPrenormMathThreads) {
    p.group_rows *= 2;
  }
  p.sharing = std::min(most_shares, kPrenormMathThreads / (p.group_rows * row_vectors));
}

// Parts of K. Few tiles: as many as run at once, and no more than need be for the longest to be as
// long. Many: what leaves few SMs idle in the last round, at 1 % a part for the sums' way through
// memory and no more than 8 rounds.
int64_t choose_splits(int64_t tiles, int64_t blocks, int num_sms) {
  if (2 * tiles <= num_sms) return ceil_div(blocks, ceil_div(blocks, num_sms / tiles));
  int64_t best = 1;
  double least = INFINITY;
  for (int64_t splits = 1; splits <= std::min<int64_t>(blocks, 8); ++splits) {
    if (splits > 1 && tiles * splits > 8 * num_sms) break;
    const double time =
        static_cast<double>(ceil_div(tiles * splits, num_sms)) / splits * (1 + 0.01 * splits);
    if (time < least) least = time, best = splits;
  }
  return best;
}

}  // namespace

PrenormPlan plan_prenorm(const PrenormProblem& p, int num_sms) {
  const int64_t tiles = ceil_div(p.m, kPrenormRows), blocks = p.k / kPrenormBlockK;
  PrenormPlan plan{};
  plan.splits = p.splits > 0 ? p.splits : choose_splits(tiles, blocks, num_sms);
  plan.reduced = p.splits == 0 && plan.splits > 1;
  plan.grid = static_cast<int>(std::min<int64_t>(num_sms, tiles * plan.splits));
  if (plan.reduced) {
    plan.workspace_bytes = partial_bytes(p, plan) + plan.splits * p.m * sizeof(uint64_t);
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
  p.m = static_cast<int32_t>(problem.m);
  p.n = static_cast<int32_t>(problem.n);
  p.row_tiles = static_cast<int32_t>(ceil_div(problem.m, kPrenormRows));
  p.k_blocks = static_cast<int32_t>(problem.k / kPrenormBlockK);
  p.halves = problem.m > kPrenormRows / 2 ? 2 : 1;
  p.splits = static_cast<int32_t>(plan.splits);
  p.split_blocks = p.k_blocks / p.splits;
  p.longer_splits = p.k_blocks % p.splits;
  p.reduced = plan.reduced;
  if (plan.reduced) {
    p.workspace = static_cast<float4*>(workspace);
    p.flags =
        reinterpret_cast<uint64_t*>(static_cast<char*>(workspace) + partial_bytes(problem, plan));
    p.token = new_token();
    plan_reduction(p, plan.grid, prenorm_row_vectors(instance.columns));
  }
  p.scale = problem.scale;
  p.inverse_k = 1.f / static_cast<float>(problem.k);
  p.eps = problem.eps;
  return launch_kernel(instance.kernel, plan.grid, kPrenormThreads, instance.smem_bytes,
                       plan.reduced, stream, p);
}

}  // namespace sm120
