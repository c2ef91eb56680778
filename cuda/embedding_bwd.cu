// The gradient of token embeddings on the GPU. A stable sort brings the rows of each id together,
// in their order; chunks of sorted rows are summed side by side; and what several chunks have of
// one id is added up, in their order. Ids outside the vocabulary are reported, and their rows left
// out.
#include <cub/device/device_radix_sort.cuh>
#include <string>

#include "../cpp/src/embedding_params.h"
#include "../cpp/src/scratch.h"
#include "any_type.cuh"
#include "launch.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "embedding_bwd";
constexpr int kChunk = 64;        // sorted rows that a thread sums one after the other
constexpr int kAhead = 8;         // of them loaded at a time
constexpr int kMaxThreads = 256;  // of a block, each with some columns
constexpr int kListThreads = 256;

// The rows, sorted by id. Ids outside the vocabulary count as vocab_size, and so come last.
struct SortedRows {
  uint32_t *unsorted_ids, *ids;   // (rows)
  int32_t *unsorted_rows, *rows;  // (rows)
  int32_t* first;                 // (vocab_size + 1), of each id
  float* sums;                    // (chunks, 2, d_model), see chunk_sums_kernel
  void* sort_memory;
  size_t sort_bytes = 0;

  SortedRows(const EmbeddingBwdParams& p, Scratch& scratch) {
    const auto array = [&](int64_t count) {
      return scratch.bytes(Scratch::product(static_cast<size_t>(count), sizeof(int32_t)));
    };
    for (uint32_t** piece : {&unsorted_ids, &ids}) *piece = static_cast<uint32_t*>(array(p.rows));
    for (int32_t** piece : {&unsorted_rows, &rows}) *piece = static_cast<int32_t*>(array(p.rows));
    first = static_cast<int32_t*>(array(p.vocab_size + 1));
    sums = scratch.floats({chunks(p), 2, p.d_model});
    sort(p, nullptr, nullptr);
    sort_memory = scratch.bytes(sort_bytes);
  }

  static int64_t chunks(const EmbeddingBwdParams& p) { return ceil_div(p.rows, kChunk); }

  // Without memory it only finds out how much it takes.
  void sort(const EmbeddingBwdParams& p, void* memory, cudaStream_t stream) {
    int bits = 1;
    while (p.vocab_size >> bits) ++bits;
    check(cub::DeviceRadixSort::SortPairs(memory, sort_bytes, unsorted_ids, ids, unsorted_rows,
                                          rows, static_cast<int>(p.rows), 0, bits, stream),
          kOp);
  }
};

__global__ void __launch_bounds__(kListThreads)
    list_rows_kernel(const __grid_constant__ EmbeddingBwdParams p, uint32_t* ids, int32_t* rows,
                     uint32_t* faults) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kListThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t at = row * p.token_ids.stride[0];
  const int64_t id = p.index_dtype == DType::int32
                         ? static_cast<const int32_t*>(p.token_ids.data)[at]
                         : static_cast<const int64_t*>(p.token_ids.data)[at];
  const bool known = id >= 0 && id < p.vocab_size;
  if (!known) report(faults, Fault::embedding_token_ids);
  ids[row] = static_cast<uint32_t>(known ? id : p.vocab_size);
  rows[row] = static_cast<int32_t>(row);
}

// Where in the sorted rows those of each id begin.
__global__ void __launch_bounds__(kListThreads)
    find_first_kernel(const uint32_t* ids, int rows, int64_t vocab_size, int32_t* first) {
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kListThreads + threadIdx.x;
  if (id > vocab_size) return;
  int low = 0, high = rows;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (ids[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  first[id] = low;
}

// kColumns columns of a row of dweight.
template <int kColumns>
__device__ void store_sum(const EmbeddingBwdParams& p, int64_t id, int64_t column,
                          const float (&sum)[kColumns]) {
  const StridedGradient<2>& to = p.dweight;
  const int64_t at = id * to.stride[0] + column * to.stride[1];
  if constexpr (kColumns == kEight) {
    float total[kEight] = {};
    if (to.accumulate) to_floats(load_raw(to.data, to.dtype, at), to.dtype, total);
#pragma unroll
    for (int i = 0; i < kEight; ++i) total[i] += sum[i];
    store_eight(to.data, to.dtype, at, total);
  } else {
    const float there = to.accumulate ? load_element(to.data, to.dtype, at) : 0.0f;
    store_element(to.data, to.dtype, at, there + sum[0]);
  }
}

// Sums each id's part of a chunk. Of an id with rows in other chunks too that is sums[chunk, 0]
// where its rows began before the chunk, else sums[chunk, 1]; of one that is all here it is done.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kMaxThreads)
    chunk_sums_kernel(const __grid_constant__ EmbeddingBwdParams p, const SortedRows sorted) {
  __shared__ uint32_t ids[kChunk + 2];  // with the chunk's neighbours
  __shared__ int32_t rows[kChunk];
  const int64_t chunk = blockIdx.x, begin = chunk * kChunk;
  const int count = static_cast<int>(min(p.rows - begin, int64_t{kChunk}));
  const uint32_t none = static_cast<uint32_t>(p.vocab_size);
  for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {
    const int64_t at = begin + i - 1;
    ids[i] = at >= 0 && at < p.rows ? sorted.ids[at] : none;
    if (i > 0 && i <= count) rows[i - 1] = sorted.rows[at];
  }
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kColumns;
  if (column >= p.d_model) return;
  const T* dout = static_cast<const T*>(p.dout.data) + column * p.dout.stride[1];

  float sum[kColumns] = {};
  bool whole = ids[0] != ids[1];  // as far as the beginning goes
  for (int i = 0; i < count; i += kAhead) {
    Words<T, kColumns> next[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (i + k < count) next[k] = load_words<kColumns>(dout + rows[i + k] * p.dout.stride[0]);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = i + k;
      if (at >= count || ids[at + 1] == none) break;
      float values[kColumns];
      to_floats(next[k], values);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] += values[c];
      const bool goes_on = ids[at + 2] == ids[at + 1];
      if (goes_on && at + 1 < count) continue;
      if (whole && !goes_on) {
        store_sum(p, ids[at + 1], column, sum);
      } else {
        float* to = sorted.sums + (chunk * 2 + whole) * p.d_model + column;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) to[c] = sum[c];
      }
      whole = true;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] = 0.0f;
    }
  }
}

// A block finishes an id: one with rows in several chunks, or with none.
template <int kColumns>
__global__ void __launch_bounds__(kMaxThreads)
    finish_ids_kernel(const __grid_constant__ EmbeddingBwdParams p, const SortedRows sorted) {
  for (int64_t id = blockIdx.x; id < p.vocab_size; id += gridDim.x) {
    const int begin = sorted.first[id], end = sorted.first[id + 1];
    const int64_t chunk = begin / kChunk, last = (end - 1) / kChunk;
    const bool absent = begin == end;
    if (absent ? p.dweight.accumulate : chunk == last) continue;
    for (int64_t column = threadIdx.x * kColumns; column < p.d_model;
         column += blockDim.x * kColumns) {
      float sum[kColumns] = {};
      const auto add = [&](int64_t part) {
        const float* from = sorted.sums + part * p.d_model + column;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[c] += from[c];
      };
      if (!absent) {
        add(chunk * 2 + 1);
#pragma unroll 8
        for (int64_t i = chunk + 1; i <= last; ++i) add(i * 2);
      }
      store_sum(p, id, column, sum);
    }
  }
}

bool has_vectors(const EmbeddingBwdParams& p) {
  const auto has = [&](const Strided<2>& tensor, DType dtype, int64_t rows) {
    return is_aligned(tensor.data, kEight * dtype_size(dtype)) && tensor.stride[1] == 1 &&
           (rows == 1 || tensor.stride[0] % kEight == 0);
  };
  return p.d_model % kEight == 0 && has(p.dout, p.dout_dtype, p.rows) &&
         has(p.dweight, p.dweight.dtype, p.vocab_size);
}

template <typename T, int kColumns>
void launch_sums(const EmbeddingBwdParams& p, const SortedRows& sorted, const Exec& exec) {
  const int64_t columns = ceil_div(p.d_model, kColumns);
  const int threads = static_cast<int>(std::min<int64_t>(kMaxThreads, ceil_div(columns, 32) * 32));
  dim3 blocks(blocks_for(SortedRows::chunks(p), 1), blocks_for(columns, threads));
  launch_kernel(kOp, chunk_sums_kernel<T, kColumns>, {blocks, threads}, exec, p, sorted);
  launch_kernel(kOp, finish_ids_kernel<kColumns>, {blocks_for(p.vocab_size, 1), threads}, exec, p,
                sorted);
}

void check_sizes(const EmbeddingBwdParams& p) {
  constexpr int64_t kMostRows = INT32_MAX - kChunk, kMostColumns = int64_t{65535} * kMaxThreads;
  if (p.rows > kMostRows || p.vocab_size >= INT32_MAX || p.d_model > kMostColumns)
    throw Error(ErrorCode::unsupported,
                std::string(kOp) +
                    ": on CUDA rows and vocab_size are less than 2^31 and d_model at "
                    "most " +
                    std::to_string(kMostColumns));
}

}  // namespace

size_t embedding_bwd_workspace_size(const EmbeddingBwdParams& p, const Context& context) {
  check_sizes(p);
  const DeviceGuard guard(context.cuda().index());
  Scratch scratch = Scratch::nowhere();
  SortedRows(p, scratch);
  return scratch.used();
}

void embedding_bwd(const EmbeddingBwdParams& p, const Exec& exec) {
  Scratch scratch(exec.workspace);
  SortedRows sorted(p, scratch);
  launch_kernel(kOp, list_rows_kernel, {blocks_for(p.rows, kListThreads), kListThreads}, exec, p,
                sorted.unsorted_ids, sorted.unsorted_rows, exec.context.cuda().faults());
  sorted.sort(p, sorted.sort_memory, static_cast<cudaStream_t>(exec.stream));
  launch_kernel(kOp, find_first_kernel, {blocks_for(p.vocab_size + 1, kListThreads), kListThreads},
                exec, sorted.ids, static_cast<int>(p.rows), p.vocab_size, sorted.first);
  with_type(p.dout_dtype, [&](auto* type) {
    with_bool(has_vectors(p), [&](auto vectors) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch_sums<T, decltype(vectors)::value ? kEight : 1>(p, sorted, exec);
    });
  });
}

}  // namespace ssmcore::cuda
