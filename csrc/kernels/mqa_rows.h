// Which query rows there are, how they are grouped, and which keys each of them sees.
#pragma once
#include <cstdint>

namespace sm120 {

// Rows come in cells that share a pass over the keys: ragged, blocks of cell_rows rows; paged, the
// next_n rows of a sequence; varlen, the rows of one index within an aligned group of cell_rows.
struct MqaRows {
  const int32_t* starts;   // ragged: [rows], else nullptr
  const int32_t* ends;     // ragged: [rows]; paged: context lengths, a row or a sequence
  const int32_t* indices;  // varlen: [rows], else nullptr
  int32_t num_rows;
  int32_t cells, cell_rows;
  bool length_a_row;  // paged: a length for each row, not only each sequence's
  int32_t limit;      // keys there are (ragged) or that can be reached (paged)
  int32_t width;      // compressed logits: the longest window, else 0
  int32_t overhead;   // key tiles that could be multiplied while a CTA turns to another cell
};

}  // namespace sm120
