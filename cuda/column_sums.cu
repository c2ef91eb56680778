// Sums over the rows of a matrix, in two stages where there are many: over chunks of rows, and then
// over the chunks.
#include "any_type.cuh"
#include "column_sums.h"
#include "device/lanes.cuh"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int64_t kMinChunkRows = 512, kMaxChunks = 64;

int64_t chunk_rows(int64_t rows) {
  return std::max(kMinChunkRows, ceil_div(rows, kMaxChunks));
}

struct ColumnSums {
  Strided<2> matrix;
  int64_t rows, cols, chunk_rows;
  StridedGradient<2> out;  // (chunks, cols)
};

// A block sums a chunk of kWide columns a lane: its warps take turns with the rows.
template <typename T, int kWide>
__global__ void __launch_bounds__(kWarps* kWarp)
    column_sums_kernel(const __grid_constant__ ColumnSums p, int64_t tiles) {
  __shared__ float sums[kWarps][kWarp * kWide];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t chunk = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * (kWarp * kWide), col = first + lane * kWide;
  const int64_t end = min((chunk + 1) * p.chunk_rows, p.rows);
  const T* matrix = static_cast<const T*>(p.matrix.data) + col * p.matrix.stride[1];

  float sum[kWide] = {};
  if (col < p.cols) {
#pragma unroll 4
    for (int64_t row = chunk * p.chunk_rows + warp; row < end; row += kWarps) {
      float values[kWide];
      to_floats(load_words<kWide>(matrix + row * p.matrix.stride[0]), values);
#pragma unroll
      for (int i = 0; i < kWide; ++i) sum[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) sums[warp][lane * kWide + i] = sum[i];
  __syncthreads();

  const int at = threadIdx.x;
  if (at >= kWarp * kWide || first + at >= p.cols) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += sums[i][at];
  const int64_t to = chunk * p.out.stride[0] + (first + at) * p.out.stride[1];
  if (p.out.accumulate) total += load_element(p.out.data, p.out.dtype, to);
  store_element(p.out.data, p.out.dtype, to, total);
}

void launch(const char* op, const ColumnSums& p, DType dtype, const Exec& exec) {
  constexpr int kMostWide = 4;
  const size_t bytes = kMostWide * dtype_size(dtype);
  const bool wide = p.cols % kMostWide == 0 && p.matrix.stride[1] == 1 &&
                    p.matrix.stride[0] % kMostWide == 0 && is_aligned(p.matrix.data, bytes);
  with_type(dtype, [&](auto* type) {
    with_bool(wide, [&](auto is_wide) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int kWide = decltype(is_wide)::value ? kMostWide : 1;
      const int64_t tiles = ceil_div(p.cols, kWarp * kWide);
      const unsigned blocks = blocks_for(tiles * ceil_div(p.rows, p.chunk_rows), 1);
      launch_kernel(op, column_sums_kernel<T, kWide>, {blocks, kWarps * kWarp}, exec, p, tiles);
    });
  });
}

}  // namespace

size_t column_sums_workspace_size(int64_t rows, int64_t cols) {
  const int64_t chunks = ceil_div(rows, chunk_rows(rows));
  return chunks == 1 ? 0 : static_cast<size_t>(chunks) * static_cast<size_t>(cols) * sizeof(float);
}

void launch_column_sums(const char* op, const Strided<2>& matrix, DType dtype, int64_t rows,
                        int64_t cols, const StridedGradient<1>& out, const Exec& exec) {
  ColumnSums last{matrix, rows, cols, rows, {}};
  if (const int64_t per_chunk = chunk_rows(rows); per_chunk < rows) {
    ColumnSums first{matrix, rows, cols, per_chunk, {}};
    first.out.data = exec.workspace;
    first.out.stride[0] = cols;
    first.out.stride[1] = 1;
    launch(op, first, dtype, exec);
    last.matrix = first.out;
    last.rows = last.chunk_rows = ceil_div(rows, per_chunk);
    dtype = DType::float32;
  }
  last.out.data = out.data;
  last.out.stride[1] = out.stride[0];
  last.out.dtype = out.dtype;
  last.out.accumulate = out.accumulate;
  launch(op, last, dtype, exec);
}

}  // namespace ssmcore::cuda
