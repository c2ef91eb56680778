// The gradient of token embeddings on the CPU: the rows of each id are found by sorting, and then
// summed in their order.
#include <cstring>

#include "../embedding_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "float64.h"
#include "row.h"
#include "ssmcore/context.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

constexpr int64_t kTaskIds = 16;

// Which rows hold an id: rows[first[id]] to rows[first[id + 1] - 1], ascending.
struct RowsOfIds {
  int64_t* first;  // (vocab_size + 1)
  int64_t* rows;   // (rows)

  RowsOfIds(const EmbeddingBwdParams& p, Scratch& scratch) {
    const auto integers = [&](int64_t count) {
      return static_cast<int64_t*>(
          scratch.bytes(Scratch::product(static_cast<size_t>(count), sizeof(int64_t))));
    };
    first = integers(p.vocab_size + 1);
    rows = integers(p.rows);
  }

  void sort(const EmbeddingBwdParams& p) const {
    const auto id = [&](int64_t row) {
      return integer_at(p.token_ids.data, p.index_dtype, row * p.token_ids.stride[0]);
    };
    std::memset(first, 0, sizeof(int64_t) * (p.vocab_size + 1));
    for (int64_t row = 0; row < p.rows; ++row) ++first[id(row) + 1];
    for (int64_t i = 0; i < p.vocab_size; ++i) first[i + 1] += first[i];
    for (int64_t row = 0; row < p.rows; ++row) rows[first[id(row)]++] = row;
    // Every entry has moved on to the next one's place.
    std::memmove(first + 1, first, sizeof(int64_t) * p.vocab_size);
    first[0] = 0;
  }
};

// One worker's memory.
struct Workspace {
  float *sum, *row;  // (d_model)

  Workspace(const EmbeddingBwdParams& p, Scratch& scratch) {
    for (float** piece : {&sum, &row}) *piece = scratch.floats(p.d_model);
  }

  static size_t bytes(const EmbeddingBwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

}  // namespace

size_t embedding_bwd_workspace_size(const EmbeddingBwdParams& p, const Context& context) {
  if (p.dout_dtype == DType::float64) return 0;
  Scratch scratch = Scratch::nowhere();
  RowsOfIds(p, scratch);
  scratch.bytes(Scratch::product(Workspace::bytes(p), static_cast<size_t>(context.num_threads())));
  return scratch.used();
}

void embedding_bwd(const EmbeddingBwdParams& p, const Exec& exec) {
  if (p.dout_dtype == DType::float64) return embedding_bwd_float64(p);
  Scratch scratch(exec.workspace);
  const RowsOfIds of_ids(p, scratch);
  of_ids.sort(p);
  const Exec rest = scratch.rest(exec);
  const size_t bytes = Workspace::bytes(p);
  exec.context.thread_pool().parallel_for(
      ceil_div(p.vocab_size, kTaskIds),
      workers_with_scratch(rest, bytes, (p.rows + p.vocab_size) * p.d_model),
      [&](int64_t task, int worker) {
        Scratch own(static_cast<char*>(rest.workspace) + worker * bytes);
        const Workspace w(p, own);
        const int64_t end = min((task + 1) * kTaskIds, p.vocab_size);
        for (int64_t id = task * kTaskIds; id < end; ++id) {
          const int64_t first = of_ids.first[id], last = of_ids.first[id + 1];
          if (first == last && p.dweight.accumulate) continue;
          std::memset(w.sum, 0, sizeof(float) * p.d_model);
          for (int64_t i = first; i < last; ++i) {
            load_row(row_of(p.dout, p.dout_dtype, of_ids.rows[i]), p.dout_dtype, p.dout.stride[1],
                     p.d_model, w.row);
            for (int64_t k = 0; k < p.d_model; ++k) w.sum[k] += w.row[k];
          }
          store_gradient_row(w.sum, p.d_model, p.dweight, id);
        }
      });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
