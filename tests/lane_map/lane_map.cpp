// Proof, on the host, that the lane maps of the library's warp tiles are those of CuTe's
// MMA_Traits.
//
// The library's own ReaderA, ReaderB, WarpMma and store_fragments run over a simulated warp
// (warp.h; shim/ replaces PTX alone). Shared memory holds in every element of a tile a tag that
// names its row and k. What the lanes hand to each MMA is laid out by CuTe's ALayout, BLayout,
// SFALayout and SFBLayout, and then must be one 16-row fragment times one 8-column fragment with
// the same k's and the scales that belong to them. Compiled with SIMULATE_NATIVE = 1 it is the
// block-scaled MMA of sm_120f that is checked, with 0 the f16 MMAs that emulate it.
#include "warp_tile.h"

namespace {

using namespace lane_map;

// ---- What the lanes hand to the MMAs ------------------------------------------------------------

// Four bits of a tag out of an MMA register's element, which must hold nothing else.
template <class T, Format kFormat>
uint32_t decode(uint32_t element) {
  if (kFormat == Format::kFp8 || (kSimulateNative && T::kBothFp4)) {
    check(element < 16, "stray bits in element %x", element);
    return element;
  }
  if (kSimulateNative) {  // e2m1 in bits 5..2 of a byte
    check((element & ~0x3cu) == 0, "stray bits in padded e2m1 %x", element);
    return element >> 2;
  }
  check((element & ~0x8e00u) == 0, "stray bits in f16 %x", element);  // s e e m in 15, 11..9
  return (element >> 12 & 8) | (element >> 9 & 7);
}

template <class T, Format kFormat>
void add_plane(std::vector<uint32_t>& tags, const uint32_t* registers, int plane) {
  constexpr int kBits = !kSimulateNative ? 16 : T::kBothFp4 ? 4 : 8;
  for (size_t v = 0; v < tags.size(); ++v) {
    const int bit = kBits * static_cast<int>(v);
    const uint32_t element = registers[bit / 32] >> bit % 32 & ((1u << kBits) - 1);
    tags[v] |= decode<T, kFormat>(element) << 4 * plane;
  }
}

// An MMA's operand as CuTe lays it out: tags of [MN, K] out of the lanes' values.
template <class Layout, int kMN, int kK>
struct Matrix {
  uint32_t tags[kMN][kK];

  static constexpr int kValues = kMN * kK / 32;
  static_assert(cute::size(Layout{}) == kMN * kK && cute::size<1>(Layout{}) == kValues);

  explicit Matrix(const std::vector<uint32_t>* lanes) {  // [lane][value]
    std::set<int> seen;
    for (int lane = 0; lane < 32; ++lane) {
      for (int v = 0; v < kValues; ++v) {
        const int at = Layout{}(lane, v);
        check(seen.insert(at).second, "CuTe's layout names element %d twice", at);
        tags[at % kMN][at / kMN] = lanes[lane][v];
      }
    }
  }
};

struct Product {  // what one MMA multiplies
  int i, j;       // fragments
  int block;      // 32-block of K, the first if two
};

template <class T>
std::vector<Product> check_operands(int warp_row, int warp_col) {
  using Cute = typename T::Cute;
  using Shape = typename Cute::Shape_MNK;
  constexpr int kK = cute::size<2>(Shape{});
  static_assert(cute::size<0>(Shape{}) == 16 && cute::size<1>(Shape{}) == 8);
  using A = Matrix<typename Cute::ALayout, 16, kK>;
  using B = Matrix<typename Cute::BLayout, 8, kK>;

  typename T::Acc acc[32];
  std::vector<std::array<std::vector<uint32_t>, 32>> a, b;  // [call][lane][value]
  for (int plane = 0; plane < kPlanes; ++plane) {
    fill_tile<T::kA, T::kRowsBytes>(kRowsAt, T::kTileRows, plane, T::first_row_byte());
    fill_tile<T::kB, T::kColsBytes>(kColsAt, T::kTileCols, plane, T::first_col_byte());
    T::template run<ScalingMode<false, false>>(acc, warp_row, warp_col);
    const size_t count = warp.calls[0].size();
    a.resize(count), b.resize(count);
    for (int lane = 0; lane < 32; ++lane) {
      check(warp.calls[lane].size() == count, "lane %d: other MMAs than lane 0", lane);
      for (size_t n = 0; n < count; ++n) {
        a[n][lane].resize(A::kValues), b[n][lane].resize(B::kValues);
        add_plane<T, T::kA>(a[n][lane], warp.calls[lane][n].a, plane);
        add_plane<T, T::kB>(b[n][lane], warp.calls[lane][n].b, plane);
      }
    }
  }

  std::vector<Product> products;
  std::set<int> multiplied[T::MT][T::NT];  // k's of each pair of fragments
  for (size_t n = 0; n < a.size(); ++n) {
    const A rows(a[n].data());
    const B cols(b[n].data());
    const int i = (tag_row(rows.tags[0][0]) - warp_row) / 16;
    const int j = (tag_row(cols.tags[0][0]) - warp_col) / 8;
    const int first_k = kK * (tag_k(rows.tags[0][0]) / kK);
    check(i >= 0 && i < T::MT && j >= 0 && j < T::NT, "MMA %zu: fragments %d, %d", n, i, j);
    for (int kk = 0; kk < kK; ++kk) {
      const int k = tag_k(rows.tags[0][kk]);
      for (int m = 0; m < 16; ++m) {
        const uint32_t got = rows.tags[m][kk], wanted = tag(warp_row + 16 * i + m, k);
        check(got == wanted, "MMA %zu: A(%d, %d) is row %d, k %d, not %d, %d", n, m, kk,
              tag_row(got), tag_k(got), tag_row(wanted), tag_k(wanted));
      }
      for (int c = 0; c < 8; ++c) {
        const uint32_t got = cols.tags[c][kk], wanted = tag(warp_col + 8 * j + T::column(c), k);
        check(got == wanted, "MMA %zu: B(%d, %d) is row %d, k %d, not %d, %d", n, c, kk,
              tag_row(got), tag_k(got), tag_row(wanted), tag_k(wanted));
      }
      // Like formats on the block-scaled MMA keep CuTe's order of k exactly. Else any order will
      // do, as long as no k leaves the 32-block that its scale belongs to.
      const bool in_order = kSimulateNative && !T::kMixed;
      const int block = tag_k(rows.tags[0][0]) / 32 + kk / 32;
      check(in_order ? k == first_k + kk : k / 32 == block, "MMA %zu: k %d at %d", n, k, kk);
      check(multiplied[i][j].insert(k).second, "fragments %d, %d: k %d twice", i, j, k);
    }
    products.push_back({i, j, tag_k(rows.tags[0][0]) / 32});
  }
  for (auto& row : multiplied) {
    for (auto& ks : row) check(ks.size() == kBlockK, "only %zu k's multiplied", ks.size());
  }
  return products;
}

// Scale words of the block-scaled MMAs recorded last, by SFALayout and SFBLayout. Every lane is
// checked, not just those the thread-id selectors 0 name: 4g, 4g + 1 for A and 4n for B.
#if SIMULATE_NATIVE
template <class T>
void check_scale_words(const std::vector<Product>& products, int warp_row, int warp_col) {
  using Cute = typename T::Cute;
  constexpr int kK = cute::size<2>(typename Cute::Shape_MNK{});
  typename Cute::SFALayout a_layout;
  typename Cute::SFBLayout b_layout;
  for (size_t n = 0; n < products.size(); ++n) {
    const Product& p = products[n];
    std::set<int> a_rows[4], b_cols[4];  // found, by lane of the quad
    for (int lane = 0; lane < 32; ++lane) {
      const MmaCall& call = warp.calls[lane][n];
      check(call.kind == (T::kBothFp4 ? MmaKind::kMxf4 : MmaKind::kMxf8f6f4), "wrong MMA");
      for (int kk = 0; kk < kK; ++kk) {
        const int a_at = a_layout(lane, kk), b_at = b_layout(lane, kk);
        check(a_at / 16 == kk && b_at / 8 == kk, "CuTe's scale layout has another order of k");
        const int m = a_at % 16, c = b_at % 8, block = p.block + kk / 32;
        const int byte = call.byte + kk / Cute::SFVecSize;
        const int a_wanted = scale_code(kRowsScaleAt, warp_row + 16 * p.i + m, block);
        const int b_wanted = scale_code(kColsScaleAt, warp_col + 8 * p.j + T::column(c), block);
        check(static_cast<int>(call.sfa >> 8 * byte & 0xff) == a_wanted,
              "MMA %zu: scale of A row %d in lane %d", n, m, lane);
        check(static_cast<int>(call.sfb >> 8 * byte & 0xff) == b_wanted,
              "MMA %zu: scale of B column %d in lane %d", n, c, lane);
        a_rows[lane % 4].insert(m), b_cols[lane % 4].insert(c);
      }
    }
    check(a_rows[0].size() == 8 && a_rows[1].size() == 8, "A scales: not one row a lane");
    a_rows[0].merge(a_rows[1]);
    check(a_rows[0].size() == 16, "lanes 4g and 4g + 1 lack rows of A's scales");
    check(b_cols[0].size() == 8, "lanes 4n lack columns of B's scales");
  }
}
#endif

// Where each MMA's sums end up, by CLayout, and how the emulation scales them.
template <class T, class Scaling, class Mma = typename T::Mma>
void check_sums(const std::vector<Product>& products, int warp_row, int warp_col,
                std::mt19937& random) {
  fill_scales(kRowsScaleAt, T::kTileRows, Scaling::kPerBlock, random);
  fill_scales(kColsScaleAt, T::kTileCols, Scaling::kPerBlock, random);
  typename T::Cute::CLayout layout;
  static_assert(cute::size(decltype(layout){}) == 16 * 8);
  constexpr int kFp4 = (T::kA == Format::kFp4) + (T::kB == Format::kFp4);
  typename T::Acc acc[32];
  for (size_t n = 0; n < products.size(); ++n) {
    const Product& p = products[n];
    warp.active_mma = static_cast<int>(n);
    T::template run<Scaling, Mma>(acc, warp_row, warp_col);
    for (int lane = 0; lane < 32; ++lane) {
      for (int x = 0; x < 4 * T::MT * T::NT; ++x) {
        const int i = x / 4 / T::NT, j = x / 4 % T::NT, at = layout(lane, x % 4);
        const int row = warp_row + 16 * i + at % 16;
        const int col = warp_col + 8 * j + T::column(at / 16);
        float wanted = i == p.i && j == p.j;
        if (!kSimulateNative) {
          const int exponent = scale_code(kRowsScaleAt, row, p.block) - 127 +
                               scale_code(kColsScaleAt, col, p.block) - 127;
          wanted *= std::ldexp(1.f, exponent + 14 * kFp4);  // an e2m1 in f16 is 2^-14 of its value
        }
        const float got = acc[lane][i][j][x % 4];
        check(got == wanted, "MMA %zu: sum (%d, %d) of lane %d is %g, not %g", n, row, col, lane,
              got, wanted);
      }
    }
  }
  warp.active_mma = -1;
}

// ---- Tiles of two columns (SpreadMma) -----------------------------------------------------------

#if !SIMULATE_NATIVE
// Each MMA has one 32-block of K: of a 16-row fragment, and of tile rows 0 and 1 of the columns, as
// B columns 2s and 2s + 1 for block s, beside zeros. Lane 4g + t scales what it has of a fragment,
// rows g and g + 8 of columns 0 and 1, by block t. At the end the sum over t is where C has it.
template <class T, ScaleRead kRead>
void check_spread(int warp_row, std::mt19937& random) {
  using Spread = SpreadMma<T::MT>;
  using Scaling = ScalingMode<false, true>;
  using A = Matrix<typename T::Cute::ALayout, 16, 16>;
  using B = Matrix<typename T::Cute::BLayout, 8, 16>;
  typename T::Acc acc[32];
  const auto run = [&] {
    T::template run_blocks<Spread, Scaling, kRead>(
        acc, warp_row, 0, [](int lane) { return kRead == ScaleRead::kSpread ? lane % 4 : 0; },
        [](const Spread&, auto&) {});
  };
  constexpr int kMmas = kBlockK / 16 * T::MT;
  std::vector<std::array<std::vector<uint32_t>, 32>> a(kMmas), b(kMmas);
  for (int plane = 0; plane < kPlanes; ++plane) {
    fill_tile<T::kA, T::kRowsBytes>(kRowsAt, T::kTileRows, plane, T::first_row_byte());
    fill_tile<T::kB, T::kColsBytes>(kColsAt, T::kTileCols, plane, T::first_col_byte());
    run();
    for (int lane = 0; lane < 32; ++lane) {
      check(warp.calls[lane].size() == kMmas, "lane %d: other MMAs than %d", lane, kMmas);
      for (int n = 0; n < kMmas; ++n) {
        a[n][lane].resize(A::kValues), b[n][lane].resize(B::kValues);
        add_plane<T, T::kA>(a[n][lane], warp.calls[lane][n].a, plane);
        add_plane<T, T::kB>(b[n][lane], warp.calls[lane][n].b, plane);
      }
    }
  }
  std::set<int> multiplied[T::MT];
  std::vector<int> fragment(kMmas);
  for (int n = 0; n < kMmas; ++n) {
    const A rows(a[n].data());
    const B cols(b[n].data());
    const int i = fragment[n] = (tag_row(rows.tags[0][0]) - warp_row) / 16;
    const int block = tag_k(rows.tags[0][0]) / 32;
    for (int kk = 0; kk < 16; ++kk) {
      const int k = tag_k(rows.tags[0][kk]);
      check(k / 32 == block && multiplied[i].insert(k).second, "MMA %d: k %d", n, k);
      for (int m = 0; m < 16; ++m) {
        check(rows.tags[m][kk] == tag(warp_row + 16 * i + m, k), "MMA %d: A(%d, %d)", n, m, kk);
      }
      for (int c = 0; c < 8; ++c) {
        const uint32_t wanted = c / 2 == block ? tag(c % 2, k) : 0;
        check(cols.tags[c][kk] == wanted, "MMA %d: B(%d, %d)", n, c, kk);
      }
    }
  }
  for (const auto& ks : multiplied) check(ks.size() == kBlockK, "only %zu k's", ks.size());

  fill_scales(kRowsScaleAt, T::kTileRows, false, random);
  fill_scales(kColsScaleAt, T::kTileCols, false, random);
  typename T::Cute::CLayout layout;
  for (int n = 0; n < kMmas; ++n) {
    warp.active_mma = n;
    run();
    for (int lane = 0; lane < 32; ++lane) {
      for (int x = 0; x < 4 * T::MT; ++x) {
        const int at = layout(lane, x % 4), row = warp_row + x / 4 * 16 + at % 16, c = at / 16;
        const int exponent = scale_code(kRowsScaleAt, row, c / 2) - 127 +
                             scale_code(kColsScaleAt, c % 2, c / 2) - 127 + 14;
        const float wanted = x / 4 == fragment[n] ? std::ldexp(1.f, exponent) : 0.f;
        check(acc[lane][x / 4][0][x % 4] == wanted, "MMA %d: sum %d of lane %d", n, x, lane);
      }
    }
  }
  warp.active_mma = -1;

  const auto sum = [](int row, int c, int t) { return static_cast<float>((8 * row + c) << 2 * t); };
  typename T::Acc ends[32];
  warp.run([&](int lane) {
    for (int x = 0; x < 4 * T::MT; ++x) {
      const int at = layout(lane, x % 4);
      ends[lane][x / 4][0][x % 4] = sum(x / 4 * 16 + at % 16, at / 16 % 2, at / 16 / 2);
    }
    Spread(warp_row, 0).finish_tile(ends[lane]);
  });
  int found = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int x = 0; x < 4 * T::MT; ++x) {
      const int at = layout(lane, x % 4), row = x / 4 * 16 + at % 16, c = T::column(at / 16);
      if (c >= Spread::kColumns) continue;
      float wanted = 0;
      for (int t = 0; t < 4; ++t) wanted += sum(row, c, t);
      check(ends[lane][x / 4][0][x % 4] == wanted, "sum of row %d, column %d", row, c);
      ++found;
    }
  }
  check(found == 16 * T::MT * Spread::kColumns, "%d sums", found);
}
#endif

// ---- From accumulators to D ---------------------------------------------------------------------

float to_float(float v) {
  return v;
}
float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

// Every path of the epilogue puts sum (m, n) of CLayout at its row and column of D.
template <class T, class TOut>
void check_store(int warp_row, int warp_col, bool swapped, bool vector) {
  typename T::Cute::CLayout layout;
  const int height = swapped ? T::kTileCols : T::kTileRows;
  const int width = swapped ? T::kTileRows : T::kTileCols;
  for (bool name_row : {false, true}) {  // D[r, c] = r, then = c
    typename T::Acc acc[32];
    for (int lane = 0; lane < 32; ++lane) {
      for (int x = 0; x < 4 * T::MT * T::NT; ++x) {
        const int i = x / 4 / T::NT, j = x / 4 % T::NT, at = layout(lane, x % 4);
        const int row = warp_row + 16 * i + at % 16;
        const int col = warp_col + 8 * j + T::column(at / 16);
        acc[lane][i][j][x % 4] = static_cast<float>(name_row ? row : col);
      }
    }
    // 16-byte vectors, aligned as D must be
    std::vector<uint4> d((height * width * sizeof(TOut) + 15) / 16);
    TOut* out = reinterpret_cast<TOut*>(d.data());
    std::fill(out, out + height * width, TOut(-1.f));
    auto p = std::make_unique<GemmParams>();
    p->out = {};
    p->out.d = out;
    p->out.d_stride = width;
    p->out.fp32 = sizeof(TOut) == 4;
    p->out.vector = vector;
    p->swapped = swapped;
    const Tile tile{0, 0, T::kTileRows, T::kTileCols, 0, 1, 0, -1};
    warp.run([&](int lane) {
      store_fragments<T::Mma::kAccessB, true>(*p, tile, acc[lane], warp_row, warp_col);
    });
    for (int r = 0; r < T::kTileRows; ++r) {
      for (int c = 0; c < T::kTileCols; ++c) {
        const bool inside =
            r >= warp_row && r < warp_row + 16 * T::MT && c >= warp_col && c < warp_col + 8 * T::NT;
        const float wanted = inside ? static_cast<float>(name_row ? r : c) : -1.f;
        const float got = to_float(out[swapped ? c * width + r : r * width + c]);
        check(got == wanted, "D of product (%d, %d), swapped %d, vectors %d: %g, not %g", r, c,
              swapped, vector, got, wanted);
      }
    }
  }
}

// ---- All of it, for every tile that is compiled -------------------------------------------------

template <class T>
void check_tile(const char* name) {
  std::mt19937 random(1);
  warp.memory.assign(kMemory, 0xff);
  int mmas = 0;
  for (int w = 0; w < 8; ++w) {
    T::slice = w / T::kSliceWarps;
    const int warp_row = w % T::kSliceWarps / T::kAcross * T::MT * 16;
    const int warp_col = w % T::kAcross * T::NT * 8;
    fill_scales(kRowsScaleAt, T::kTileRows, false, random);
    fill_scales(kColsScaleAt, T::kTileCols, false, random);
    const std::vector<Product> products = check_operands<T>(warp_row, warp_col);
    mmas += static_cast<int>(products.size());
#if SIMULATE_NATIVE
    check_scale_words<T>(products, warp_row, warp_col);
    if (w == 5) check_sums<T, ScalingMode<false, true>>(products, warp_row, warp_col, random);
#else
    if (w == 5) {
      check_sums<T, ScalingMode<false, false>>(products, warp_row, warp_col, random);
      check_sums<T, ScalingMode<false, true>>(products, warp_row, warp_col, random);
      check_sums<T, ScalingMode<true, true>>(products, warp_row, warp_col, random);
    }
    if constexpr (T::kA == Format::kFp4 && T::kMixed && T::NT == 1) {
      using Wide = KGroupMma<T::MT>;
      check_sums<T, ScalingMode<false, false>, Wide>(products, warp_row, warp_col, random);
      check_sums<T, ScalingMode<false, true>, Wide>(products, warp_row, warp_col, random);
      check_spread<T, ScaleRead::kSpread>(warp_row, random);
      check_spread<T, ScaleRead::kAny>(warp_row, random);
    }
#endif
    for (int way = 0; way < 4; ++way) {
      check_store<T, float>(warp_row, warp_col, way & 1, way & 2);
      check_store<T, __nv_bfloat16>(warp_row, warp_col, way & 1, way & 2);
    }
  }
  printf("%s %d x %d: %d MMAs\n", name, T::kTileRows, T::kTileCols, mmas);
}

template <int kRows, int kCols, int kDown, TileFormats kFormats>
void check_formats() {
  check_tile<WarpTile<Format::kFp8, Format::kFp8, kRows, kCols, kDown>>("fp8 x fp8");
  if constexpr (has_instance(kFormats, OperandFormat::kMxfp4, OperandFormat::kMxfp4)) {
    check_tile<WarpTile<Format::kFp4, Format::kFp4, kRows, kCols, kDown>>("fp4 x fp4");
  }
  if constexpr (has_instance(kFormats, OperandFormat::kMxfp4, OperandFormat::kMxfp8)) {
    check_tile<WarpTile<Format::kFp4, Format::kFp8, kRows, kCols, kDown>>("fp4 x fp8");
  }
}

}  // namespace

int main() {
#define CHECK_FORMATS(...) check_formats<__VA_ARGS__>();
  SM120_GEMM_TILES(CHECK_FORMATS)
  printf("%s: lane maps equal CuTe's\n", kSimulateNative ? "block-scaled MMA" : "f16 MMA");
}
