// What the m-grouped GEMM families share: the three layouts, checks of their index tensors and
// outputs, and what the host can guess of the groups' sizes.
#pragma once
#include "kernels/gemm.h"
#include "ops/gemm_common.h"

namespace sm120 {

// The layouts differ in what their index tensor says (see Schedule in kernels/gemm.h).
struct GroupedLayout {
  const char* op;
  const char* index;  // name of the index tensor
  Schedule schedule;

  bool masked() const { return schedule == Schedule::kCounts; }
};

// Groups of the masked layout start where they like; any alignment will do.
inline constexpr int64_t kNoAlignment = 128;

struct GroupedArgs {
  const Tensor& index;
  int64_t alignment, expected_m;
};

// Checks the index tensor and the options. tokens: rows of A, or of each of its matrices.
GemmGroups check_groups(const GroupedLayout& layout, const GroupedArgs& args, int64_t tokens,
                        int64_t groups, int32_t device);

// Shape of D; in the masked layout there is a matrix for each group.
std::vector<int64_t> grouped_output_shape(const GroupedLayout& layout, int64_t groups, int64_t rows,
                                          int64_t columns);

// D as it is given; its data pointer is null if nothing is to be written.
GemmOutput check_grouped_output(const GroupedLayout& layout, const Tensor& out, int64_t groups,
                                int64_t rows, int64_t columns, int32_t device);

// A new D whose rows of no group are 0.
Tensor empty_grouped_output(const GroupedLayout& layout, int64_t groups, int64_t rows,
                            int64_t columns, ScalarType dtype, int32_t device);

// What the host can say about the groups. Where the caller does not, a group is expected to have
// the rows that are left when all groups have as much padding as they can, as in a buffer of
// worst-case size; or, if more, what its alignment suggests: 128 is for prompts, less is for
// decoding.
template <class Shape>
Grouped<Shape> expected_shape(const GroupedLayout& layout, const Shape& whole, int64_t groups,
                              int64_t alignment, int64_t expected_m) {
  Grouped<Shape> s{whole, groups, 0, groups, whole.m, whole.m};
  int64_t rows = expected_m;
  if (layout.masked()) {
    s.total_rows = groups * whole.m;
    if (rows == 0) rows = ceil_div(whole.m, 4);
  } else {
    if (rows == 0) {
      const int64_t usual = alignment >= 128 ? 32 : alignment / 8;
      rows = std::max((whole.m - groups * (alignment - 1)) / groups, usual);
    }
    s.groups = std::min(groups, ceil_div(whole.m, std::max(rows, alignment)));
  }
  if (layout.schedule == Schedule::kSegments) {
    s.step = alignment;
    s.most_groups = ceil_div(whole.m, alignment);
    s.most_rows = alignment;
  }
  s.one.m = std::clamp<int64_t>(rows, 1, whole.m);
  return s;
}

// Of `layouts`, the one of the op `name`.
const GroupedLayout& find_layout(const char* op,
                                 std::initializer_list<const GroupedLayout*> layouts,
                                 const std::string& name);

// What grouped K needs: D and C [groups, m, n], C being D itself or apart from it.
GemmOutput check_group_outputs(const char* op, const Tensor& out, const std::optional<Tensor>& c,
                               int64_t groups, int64_t m, int64_t n, int32_t device);

}  // namespace sm120
