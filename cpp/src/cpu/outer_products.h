// C(m, n) = Σ_k A(k, m) B(k, n) as sums of outer products. Both operands are packed into panels as
// floats, whatever their dtypes and strides, a block of k at a time. Every element of C is summed
// in the same order, however C is divided into tiles.
#pragma once

#include <type_traits>

#include "../scratch.h"
#include "../strided.h"
#include "vec.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// Element (k, i) of an operand is at data + k stride_k + i stride.
struct Factor {
  const void* data;
  DType dtype;
  int64_t stride_k, stride;
};

// Rows of C, and vectors of its columns, whose sums are kept in registers together: 24 sums with 32
// registers, 12 with 16.
#if defined(__AVX512F__)
inline constexpr int64_t kTileRows = 12;
#else
inline constexpr int64_t kTileRows = 6;
#endif
inline constexpr int kTileVectors = 2;
inline constexpr int64_t kTileColumns = kTileVectors * kLanes;
// Steps of k that are packed together, so that a panel of B stays in the first-level cache, and the
// most rows and columns of C that share what is packed, which stay in the second.
inline constexpr int64_t kBlockK = 128, kMaxBlockRows = 96, kMaxBlockColumns = 384;

// k in [k, k + steps) and i in [begin, begin + count), in panels of kPanel: (⌈count / kPanel⌉,
// steps, kPanel), with zeros after the last.
template <int64_t kPanel>
void pack(const Factor& factor, int64_t k, int64_t steps, int64_t begin, int64_t count,
          float* panels) {
  with_type(factor.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from =
        static_cast<const T*>(factor.data) + k * factor.stride_k + begin * factor.stride;
    for (int64_t i = 0; i < count; i += kPanel, panels += steps * kPanel) {
      const int64_t width = min(kPanel, count - i);
      const T* column = from + i * factor.stride;
      if (width < kPanel)
        for (int64_t j = 0; j < steps * kPanel; ++j) panels[j] = 0;
      if (factor.stride == 1) {
        for (int64_t j = 0; j < steps; ++j) {
          const T* row = column + j * factor.stride_k;
          int64_t p = 0;
          for (; p + kLanes <= width; p += kLanes) store(panels + j * kPanel + p, load(row + p));
          for (; p < width; ++p) panels[j * kPanel + p] = to_float(row[p]);
        }
      } else {
        for (int64_t p = 0; p < width; ++p)
          for (int64_t j = 0; j < steps; ++j)
            panels[j * kPanel + p] = to_float(column[j * factor.stride_k + p * factor.stride]);
      }
    }
  });
}

// Adds the products of one panel of each to kTileRows rows of C.
inline void add_tile(const float* a, const float* b, int64_t steps, float* c, int64_t row_stride) {
  Vec sum[kTileRows][kTileVectors] = {};
  for (int64_t k = 0; k < steps; ++k, a += kTileRows, b += kTileColumns) {
    Vec b_k[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) b_k[v] = load(b + v * kLanes);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += a[r] * b_k[v];
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = c + r * row_stride + v * kLanes;
      store(to, load(to) + sum[r][v]);
    }
}

// How C is divided among the workers.
struct Tiling {
  int64_t rows, columns;              // of C
  int64_t block_rows, block_columns;  // of one task's share

  Tiling(int64_t rows, int64_t columns, int workers)
      : rows(rows),
        columns(columns),
        block_rows(min(kMaxBlockRows, ceil_div(rows, kTileRows) * kTileRows)),
        block_columns(min(kMaxBlockColumns, ceil_div(columns, kTileColumns) * kTileColumns)) {
    // Several shares to a worker, so that none waits long for another, but no thin ones: packing
    // would cost more than it saves.
    constexpr int64_t kTasksPerWorker = 8, kLeastColumns = 4 * kTileColumns;
    while (tasks() < kTasksPerWorker * workers && block_columns > kLeastColumns)
      block_columns = ceil_div(block_columns / 2, kTileColumns) * kTileColumns;
    while (tasks() < workers && block_rows > kTileRows)
      block_rows = ceil_div(block_rows / 2, kTileRows) * kTileRows;
  }
  int64_t tasks() const { return ceil_div(rows, block_rows) * ceil_div(columns, block_columns); }
};

// One worker's memory.
struct ProductWorkspace {
  float* a;  // (block rows / kTileRows, kBlockK, kTileRows)
  float* b;  // (block columns / kTileColumns, kBlockK, kTileColumns)
  float* c;  // (block rows, kMaxBlockColumns)

  explicit ProductWorkspace(Scratch& scratch) {
    a = scratch.floats(kMaxBlockRows * kBlockK);
    b = scratch.floats(kMaxBlockColumns * kBlockK);
    c = scratch.floats(kMaxBlockRows * kMaxBlockColumns);
  }

  static size_t bytes() {
    Scratch scratch = Scratch::nowhere();
    ProductWorkspace{scratch};
    return scratch.used();
  }
};

// Sums share number `task` of C over all k, and calls finish(row, column, values, count) for each
// of its rows.
template <typename Finish>
void multiply_share(const Tiling& tiling, const Factor& a, const Factor& b, int64_t k, int64_t task,
                    const ProductWorkspace& w, const Finish& finish) {
  const int64_t column_blocks = ceil_div(tiling.columns, tiling.block_columns);
  const int64_t row = task / column_blocks * tiling.block_rows;
  const int64_t column = task % column_blocks * tiling.block_columns;
  const int64_t rows = min(tiling.block_rows, tiling.rows - row);
  const int64_t columns = min(tiling.block_columns, tiling.columns - column);
  const int64_t row_panels = ceil_div(rows, kTileRows);
  const int64_t column_panels = ceil_div(columns, kTileColumns);
  const int64_t row_stride = column_panels * kTileColumns;
  for (int64_t i = 0; i < row_panels * kTileRows * row_stride; ++i) w.c[i] = 0;
  for (int64_t begin = 0; begin < k; begin += kBlockK) {
    const int64_t steps = min(kBlockK, k - begin);
    pack<kTileRows>(a, begin, steps, row, rows, w.a);
    pack<kTileColumns>(b, begin, steps, column, columns, w.b);
    for (int64_t j = 0; j < column_panels; ++j)
      for (int64_t i = 0; i < row_panels; ++i)
        add_tile(w.a + i * steps * kTileRows, w.b + j * steps * kTileColumns, steps,
                 w.c + i * kTileRows * row_stride + j * kTileColumns, row_stride);
  }
  for (int64_t i = 0; i < rows; ++i) finish(row + i, column, w.c + i * row_stride, columns);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
