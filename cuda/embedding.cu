// The embedding on the GPU: a block gathers a row. Ids outside the vocabulary give rows of zeros,
// and are reported.
#include "../cpp/src/embedding_params.h"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) embedding_kernel(EmbeddingParams p, uint32_t* faults) {
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t at = row * p.token_ids.stride[0];
    const int64_t id = p.index_dtype == DType::int32
                           ? static_cast<const int32_t*>(p.token_ids.data)[at]
                           : static_cast<const int64_t*>(p.token_ids.data)[at];
    const bool known = id >= 0 && id < p.vocab_size;
    if (!known && threadIdx.x == 0) report(faults, Fault::embedding_token_ids);
    const T* from = static_cast<const T*>(p.weight) + (known ? id : 0) * p.weight_row_stride;
    Out* to = static_cast<Out*>(p.out.data) + row * p.out.stride[0];
    for (int64_t i = threadIdx.x; i < p.d_model; i += kThreads)
      to[i * p.out.stride[1]] = from_float<Out>(known ? to_float(from[i]) : 0.0f);
  }
}

}  // namespace

size_t embedding_workspace_size(const EmbeddingParams&, const Context&) {
  return 0;
}

void embedding(const EmbeddingParams& p, const Exec& exec) {
  with_type(p.weight_dtype, [&](auto* weight) {
    with_type(p.out_dtype, [&](auto* out) {
      using T = std::remove_pointer_t<decltype(weight)>;
      using Out = std::remove_pointer_t<decltype(out)>;
      launch_kernel("embedding", embedding_kernel<T, Out>, {blocks_for(p.rows, 1), kThreads}, exec,
                    p, exec.context.cuda().faults());
    });
  });
}

}  // namespace ssmcore::cuda
