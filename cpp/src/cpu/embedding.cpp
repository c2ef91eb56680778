// Token embeddings on the CPU.
#include <type_traits>

#include "../embedding_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "float64.h"
#include "row.h"
#include "ssmcore/context.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

constexpr int64_t kTaskRows = 16;

// Converts through a buffer of one vector, whatever the two dtypes.
void copy_row(const EmbeddingParams& p, const char* from, char* to) {
  const int64_t from_size = static_cast<int64_t>(dtype_size(p.weight_dtype));
  const int64_t to_size = static_cast<int64_t>(dtype_size(p.out_dtype));
  float lanes[kLanes];
  for (int64_t i = 0; i < p.d_model; i += kLanes) {
    const int64_t n = min(kLanes, p.d_model - i);
    load_row(from + i * from_size, p.weight_dtype, 1, n, lanes);
    store_row(lanes, n, to + i * p.out.stride[1] * to_size, p.out_dtype, p.out.stride[1]);
  }
}

}  // namespace

size_t embedding_workspace_size(const EmbeddingParams&, const Context&) {
  return 0;
}

void embedding(const EmbeddingParams& p, const Exec& exec) {
  if (p.weight_dtype == DType::float64) return embedding_float64(p);
  const int64_t row_bytes = p.weight_row_stride * static_cast<int64_t>(dtype_size(p.weight_dtype));
  exec.context.thread_pool().parallel_for(
      (p.rows + kTaskRows - 1) / kTaskRows, useful_workers(p.rows * p.d_model, exec.context),
      [&](int64_t task, int) {
        const int64_t begin = task * kTaskRows, end = min(begin + kTaskRows, p.rows);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t id =
              integer_at(p.token_ids.data, p.index_dtype, row * p.token_ids.stride[0]);
          copy_row(p, static_cast<const char*>(p.weight) + id * row_bytes,
                   row_of(p.out, p.out_dtype, row));
        }
      });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
