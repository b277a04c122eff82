// The library's tile scheduler on a simulated warp, for random single and grouped products: the
// CTAs together must compute exactly the rows that are asked for, each once, in even shares.
#include <cuda_runtime.h>  // first: defines __forceinline__ and the like, as nothing

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <tuple>

#include "kernels/gemm.h"

using std::max;
using std::min;

struct Dim {
  unsigned x;
};
static Dim simulated_block, simulated_grid;
#define blockIdx simulated_block
#define gridDim simulated_grid
#include "kernels/tile_scheduler.cuh"
#undef blockIdx
#undef gridDim

using namespace sm120;
using simulated::check;

namespace {

struct Traits {
  static constexpr int kBlockRows = 64, kBlockCols = 16;
  static constexpr bool kAnyK = true, kChains = true;
};

int draw(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

int found_first = 0;  // CTAs whose first tile was known without the scheduler

// Tiles of every CTA, in its order; all lanes must agree on them.
std::vector<std::vector<Tile>> run_all(const GemmParams& p, int grid) {
  std::vector<std::vector<Tile>> tiles(grid);
  simulated_grid.x = grid;
  for (int cta = 0; cta < grid; ++cta) {
    simulated_block.x = cta;
    std::array<std::vector<Tile>, 32> of_lane;
    simulated::run_warp([&] {
      TileScheduler<Traits> scheduler(p);
      for (Tile tile = scheduler.next(); tile.group >= 0; tile = scheduler.next()) {
        of_lane[simulated::lane].push_back(tile);
      }
    });
    for (const auto& other : of_lane) {
      check(other.size() == of_lane[0].size(), "lanes have other tiles");
      check(other.empty() ||
                !std::memcmp(other.data(), of_lane[0].data(), other.size() * sizeof(Tile)),
            "lanes have other tiles");
    }
    tiles[cta] = of_lane[0];
    Tile first;  // as the copying warps find it; a launch has no CTA without a tile
    if (!tiles[cta].empty() && TileScheduler<Traits>::find_first(p, first)) {
      const Tile& t = tiles[cta][0];
      check(first.row == t.row && first.col == t.col && first.group == t.group &&
                first.k_begin == t.k_begin && first.k_end == t.k_end,
            "CTA %d's first tile found at %d, %d", cta, first.row, first.col);
      check(t.k_end <= p.chain, "the first tile is not all of K");
      ++found_first;
    }
  }
  return tiles;
}

struct Run {
  int group, begin, end;
};

// What the layouts mean, in plain words: see ops/grouped.py.
std::vector<Run> segment_runs(const std::vector<int>& index, int groups, int alignment) {
  std::vector<Run> runs;
  const int rows = static_cast<int>(index.size());
  for (int begin = 0; begin < rows; begin += alignment) {
    int end = begin;
    while (end < min(begin + alignment, rows) && index[end] == index[begin]) ++end;
    if (index[begin] >= 0 && index[begin] < groups) runs.push_back({index[begin], begin, end});
  }
  return runs;
}

std::vector<Run> psum_runs(const std::vector<int>& ends, int rows, int alignment) {
  std::vector<Run> runs;
  int start = 0;
  for (int g = 0; g < static_cast<int>(ends.size()); ++g) {
    const int end = min(max(ends[g], 0), rows);
    if (end > start) runs.push_back({g, start, end});
    start = max(start, ceil_div(end, alignment) * alignment);
  }
  return runs;
}

std::vector<Run> masked_runs(const std::vector<int>& counts, int rows) {
  std::vector<Run> runs;
  for (int g = 0; g < static_cast<int>(counts.size()); ++g) {
    if (counts[g] > 0) runs.push_back({g, 0, min(counts[g], rows)});
  }
  return runs;
}

std::vector<int> random_segments(std::mt19937& random, int rows, int groups, int alignment,
                                 bool broken) {
  std::vector<int> index(rows, -1);
  const int empty = draw(random, 0, 10);
  int expert = 0;
  for (int begin = 0; begin < rows; begin += alignment) {
    if (draw(random, 1, 10) <= empty) continue;
    expert = draw(random, 0, 2) ? expert : draw(random, 0, groups - 1);
    const int count = draw(random, 0, 3) ? draw(random, 1, alignment) : alignment;
    for (int i = begin; i < min(begin + count, rows); ++i) index[i] = expert;
  }
  for (int i = 0; broken && i < rows / 20 + 1; ++i) {
    index[draw(random, 0, rows - 1)] = draw(random, -3, groups + 2);
  }
  return index;
}

void check_grouped(std::mt19937& random, Schedule schedule) {
  constexpr int kAlignments[] = {16, 32, 64, 128};
  const int alignment = kAlignments[draw(random, 0, 3)];
  const int groups = draw(random, 0, 3) ? draw(random, 1, 40) : draw(random, 1, 384);
  const int rows = draw(random, 0, 3) ? draw(random, 1, 700) : draw(random, 1, 6000);
  const bool broken = draw(random, 0, 3) == 0;
  auto p = std::make_unique<GemmParams>();
  std::memset(p.get(), 0, sizeof(*p));
  p->schedule = schedule;
  p->swapped = draw(random, 0, 1);
  const int weights = draw(random, 1, 300), k_blocks = draw(random, 0, 3);
  p->k_blocks = k_blocks;
  p->num_rows = p->swapped ? weights : rows;
  p->num_cols = p->swapped ? rows : weights;
  p->row_tiles = ceil_div(p->num_rows, Traits::kBlockRows);
  p->col_tiles = ceil_div(p->num_cols, Traits::kBlockCols);

  std::vector<int> index;
  std::vector<Run> runs;
  if (schedule == Schedule::kSegments) {
    index = random_segments(random, rows, groups, alignment, broken);
    runs = segment_runs(index, groups, alignment);
  } else {
    const int most = draw(random, 0, 3) ? 2 * rows / groups + 1 : 5;
    int end = 0;
    for (int g = 0; g < groups; ++g) {
      const int count = draw(random, 0, 1) ? draw(random, 0, most) : 0;
      if (schedule == Schedule::kEnds) {
        if (count > 0) end = ceil_div(end, alignment) * alignment + count;
        index.push_back(broken ? draw(random, -5, rows + 50) : min(end, rows));
      } else {
        index.push_back(broken ? draw(random, -5, rows + 50) : min(count, rows));
      }
    }
    runs =
        schedule == Schedule::kEnds ? psum_runs(index, rows, alignment) : masked_runs(index, rows);
  }
  p->groups.index = index.data();
  p->groups.count = groups;
  p->groups.tokens = rows;
  p->groups.alignment = alignment;
  set_token_tiles(p->groups, schedule, p->swapped ? Traits::kBlockCols : Traits::kBlockRows);
  simulated::readable_begin = index.data();
  simulated::readable_end = index.data() + index.size();

  const int grid = draw(random, 1, 40);
  const auto tiles = run_all(*p, grid);
  using Key = std::tuple<int, int, int, int>;  // group, first token, end, first weight
  std::map<Key, int> wanted;
  const int weight_step = p->swapped ? Traits::kBlockRows : Traits::kBlockCols;
  for (const Run& run : runs) {
    for (int token = run.begin; token < run.end; token += p->groups.step) {
      for (int weight = 0; weight < weights; weight += weight_step) {
        ++wanted[{run.group, token, min(run.end, token + p->groups.step), weight}];
      }
    }
  }
  size_t most = 0, least = ~size_t{0};
  for (const auto& of_cta : tiles) {
    most = max(most, of_cta.size()), least = min(least, of_cta.size());
    for (const Tile& t : of_cta) {
      check(t.k_begin == 0 && t.k_end == k_blocks && t.others == 0, "not all of K");
      check((p->swapped ? t.row_end : t.col_end) == weights, "end of the weights");
      const Key key{t.group, p->swapped ? t.col : t.row, p->swapped ? t.col_end : t.row_end,
                    p->swapped ? t.row : t.col};
      const auto found = wanted.find(key);
      check(found != wanted.end() && found->second == 1, "group %d, tokens %d .. %d, weight %d",
            std::get<0>(key), std::get<1>(key), std::get<2>(key), std::get<3>(key));
      wanted.erase(found);
    }
  }
  check(wanted.empty(), "%zu tiles are missing, schedule %d, %d rows, %d groups, alignment %d",
        wanted.size(), static_cast<int>(schedule), rows, groups, alignment);
  check(most - least <= 1, "CTAs have %zu to %zu tiles", least, most);
}

// Tiles that run at the same time share weights: the CTAs' n-th tiles, next to one another, have
// few different weight tiles.
void check_order() {
  constexpr int kExperts = 8, kRowsEach = 512, kGrid = 132;
  std::vector<int> index;
  for (int e = 0; e < kExperts; ++e) index.insert(index.end(), kRowsEach, e);
  auto p = std::make_unique<GemmParams>();
  std::memset(p.get(), 0, sizeof(*p));
  p->schedule = Schedule::kSegments;
  p->k_blocks = 1, p->num_rows = kExperts * kRowsEach, p->num_cols = 1024;
  p->row_tiles = p->num_rows / Traits::kBlockRows, p->col_tiles = 1024 / Traits::kBlockCols;
  p->groups = {index.data(), kExperts, p->num_rows, 128};
  set_token_tiles(p->groups, p->schedule, Traits::kBlockRows);
  simulated::readable_begin = index.data(), simulated::readable_end = index.data() + index.size();
  const auto tiles = run_all(*p, kGrid);
  check(!tiles.back().empty(), "no tiles");
  for (size_t wave = 0; wave < tiles.back().size(); ++wave) {
    std::set<std::pair<int, int>> weights;
    for (const auto& of_cta : tiles) weights.insert({of_cta[wave].group, of_cta[wave].col});
    // 132 tiles, 8 token tiles an expert
    check(weights.size() <= kGrid / 8 + 2, "a wave reads %zu weight tiles", weights.size());
  }
}

// Of a tile that was cut, the CTA with the first K-block is told how many others there are. They
// are the ones after it, in the order of K, and each hands its part over before it waits for
// anybody.
void check_hand_over(const std::vector<std::vector<Tile>>& tiles, int k_blocks) {
  int handed_over = 0, expected = 0;
  for (size_t cta = 0; cta < tiles.size(); ++cta) {
    for (const Tile& t : tiles[cta]) {
      if (t.k_begin > 0) {
        check(t.others == kHandedOver && &t == &tiles[cta][0], "not handed over at once");
        ++handed_over;
        continue;
      }
      check(t.others >= 0 && cta + t.others < tiles.size(), "waits for CTAs that are not there");
      int k = t.k_end;
      for (int i = 1; i <= t.others; ++i, ++expected) {
        const Tile& part = tiles[cta + i][0];
        check(part.row == t.row && part.col == t.col && part.group == t.group && part.k_begin == k,
              "waits for another tile's part");
        k = part.k_end;
      }
      check(k == k_blocks, "does not wait for all of K");
    }
  }
  check(handed_over == expected, "%d parts, %d are waited for", handed_over, expected);
}

void check_single(std::mt19937& random, Schedule schedule) {
  auto p = std::make_unique<GemmParams>();
  std::memset(p.get(), 0, sizeof(*p));
  p->schedule = schedule;
  p->num_rows = draw(random, 1, 3000), p->num_cols = draw(random, 1, 500);
  if (draw(random, 0, 2) == 0) p->num_rows = draw(random, 1, Traits::kBlockRows);
  if (draw(random, 0, 2) == 0) p->num_cols = draw(random, 1, Traits::kBlockCols);
  p->row_tiles = ceil_div(p->num_rows, Traits::kBlockRows);
  p->col_tiles = ceil_div(p->num_cols, Traits::kBlockCols);
  p->k_blocks = draw(random, 1, 9);
  p->chain = draw(random, 0, 2) ? 1 << 30 : draw(random, 1, 9);
  const bool by_blocks = schedule == Schedule::kBlocks, spans = schedule == Schedule::kSpans;
  const bool single = schedule == Schedule::kTiles;
  const int groups = spans ? draw(random, 1, 100) : single ? 1 : draw(random, 1, 6);
  const int total_blocks = groups * p->row_tiles * p->col_tiles * p->k_blocks;
  std::vector<int> ends, sizes;
  for (int g = 0, end = 0; g < groups; ++g) ends.push_back(end += draw(random, 0, 3));
  if (spans) {  // sizes that may be negative, or more than there is
    const int total = draw(random, 0, 3) ? 200 * groups : 100;
    p->groups.tokens = total;
    ends.clear();
    for (int g = 0, end = 0; g < groups; ++g) {
      sizes.push_back(draw(random, 0, 9)   ? draw(random, 0, 200)
                      : draw(random, 0, 1) ? -7
                                           : 1 << 30);
      end = static_cast<int>(std::min<int64_t>(total, int64_t{end} + max(sizes.back(), 0)));
      ends.push_back(end);
    }
  }
  const std::vector<int>& index = spans ? sizes : ends;
  p->groups.index = index.data(), p->groups.count = groups;
  simulated::readable_begin = index.data(), simulated::readable_end = index.data() + index.size();
  const int units = schedule == Schedule::kSplit ? total_blocks : 1 << 30;
  const int grid = min(draw(random, 1, 140), units);
  p->range_blocks = total_blocks / grid, p->longer_ranges = total_blocks % grid;
  const auto tiles = run_all(*p, grid);
  std::map<std::tuple<int, int, int>, std::vector<std::pair<int, int>>> parts;
  for (const auto& of_cta : tiles) {
    for (const Tile& t : of_cta) {
      check(t.row_end == p->num_rows && t.col_end == p->num_cols, "ends of the product");
      parts[{t.group, t.row, t.col}].push_back({t.k_begin, t.k_end});
    }
  }
  check(parts.size() == static_cast<size_t>(groups) * p->row_tiles * p->col_tiles, "tiles missing");
  for (auto& [place, ranges] : parts) {
    const int group = std::get<0>(place);
    const bool own_k = by_blocks || spans;
    int at = own_k && group > 0 ? ends[group - 1] : 0;
    std::sort(ranges.begin(), ranges.end());
    for (const auto& [begin, end] : ranges) {
      check(begin == at, "K-blocks %d .. %d missing", at, begin);
      at = end;
    }
    check(at == (own_k ? ends[group] : p->k_blocks), "the last K-blocks are missing");
  }
  if (schedule == Schedule::kSplit) check_hand_over(tiles, p->k_blocks);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int i = 0; i < 100; ++i) {
    check_grouped(random, Schedule::kSegments);
    check_grouped(random, Schedule::kEnds);
    check_grouped(random, Schedule::kCounts);
    check_single(random, Schedule::kTiles);
    check_single(random, Schedule::kSplit);
    check_single(random, Schedule::kBatch);
    check_single(random, Schedule::kBlocks);
    check_single(random, Schedule::kSpans);
  }
  check_order();
  check(found_first > 500, "%d first tiles found", found_first);
  printf("every tile once\n");
}
