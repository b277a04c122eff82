// Groups of products, as the choice of a configuration knows them: what every GEMM's cost model
// shares.
#pragma once
#include <algorithm>
#include <cstdint>

#include "host/math.h"

namespace sm120 {

// Grouped tokens. The true numbers are on the device; a wrong guess costs time only.
template <class Shape>
struct Grouped {
  Shape one;       // of a group; m: rows that a group with rows is expected to have, at least 1
  int64_t groups;  // groups expected to have rows, at least 1
  int64_t step;    // most rows a tile can serve: the alignment of segments; 0 for no limit
  // Upper bounds: groups (or segments), rows of one, rows of all
  int64_t most_groups, most_rows, total_rows;
};

// The kernel counts tiles in 32 bits, and a CTA looks one grid ahead.
inline constexpr double kMostTiles = (1ll << 31) - (1 << 16);

// Tokens of a tile: as many as it has, or as a segment has.
template <class Tile>
int64_t token_step(const Tile& tile, bool swapped, int64_t limit) {
  const int64_t extent = swapped ? tile.cols : tile.rows;
  return limit > 0 ? std::min(extent, limit) : extent;
}

template <class Tile, class Shape>
int64_t weight_tiles(const Tile& tile, bool swapped, const Grouped<Shape>& s) {
  return ceil_div(s.one.n, swapped ? tile.rows : tile.cols);
}

// Tiles of the groups expected to have rows.
template <class Tile, class Shape>
int64_t expected_tiles(const Tile& tile, bool swapped, const Grouped<Shape>& s) {
  return s.groups * ceil_div(s.one.m, token_step(tile, swapped, s.step)) *
         weight_tiles(tile, swapped, s);
}

// Upper bound of the tiles of all groups.
template <class Tile, class Shape>
double most_tiles(const Tile& tile, bool swapped, const Grouped<Shape>& s) {
  const int64_t step = token_step(tile, swapped, s.step);
  const int64_t token_tiles =
      std::min(s.most_groups * ceil_div(s.most_rows, step), s.most_groups + s.total_rows / step);
  return static_cast<double>(token_tiles) * weight_tiles(tile, swapped, s);
}

}  // namespace sm120
