// A decoder's rows on the GPU: the copies between slots and the rows of a step.
#include "../cpp/src/decoder_params.h"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr int kThreads = 256;

// A block a row.
__global__ void __launch_bounds__(kThreads) decoder_gather_kernel(DecoderRowsParams p) {
  const int64_t i = blockIdx.x;
  const int32_t slot = p.slots[i];
  if (threadIdx.x == 0) p.of_step[i] = slot < 0 ? kNoDecoderRow : p.by_slot[slot];
  for (int64_t at = threadIdx.x; at < p.history_capacity; at += kThreads)
    p.history_of_step[i * p.history_capacity + at] =
        slot < 0 ? -1 : p.history_by_slot[slot * p.history_capacity + at];
}

// One block, since all wait for the count.
__global__ void __launch_bounds__(kThreads) decoder_scatter_kernel(DecoderRowsParams p) {
  const uint64_t count = *p.num_drawn;
  int64_t* drawn = p.drawn + count % 2 * p.max_rows;
  for (int64_t i = threadIdx.x; i < p.rows; i += kThreads) {
    const int32_t slot = p.slots[i];
    if (slot < 0) continue;
    DecoderRow& row = p.by_slot[slot];
    drawn[i] = row.token_id = p.of_step[i].token_id;
    ++row.position;
    if (p.history_capacity > 0)
      p.history_by_slot[slot * p.history_capacity + row.history_length++] =
          static_cast<int32_t>(row.token_id);
  }
  __syncthreads();
  if (threadIdx.x == 0) *p.num_drawn = count + 1;
}

}  // namespace

size_t decoder_gather_workspace_size(const DecoderRowsParams&, const Context&) {
  return 0;
}

size_t decoder_scatter_workspace_size(const DecoderRowsParams&, const Context&) {
  return 0;
}

void decoder_gather(const DecoderRowsParams& p, const Exec& exec) {
  launch_kernel("decoder", decoder_gather_kernel, {static_cast<unsigned>(p.rows), kThreads}, exec,
                p);
}

void decoder_scatter(const DecoderRowsParams& p, const Exec& exec) {
  launch_kernel("decoder", decoder_scatter_kernel, {1, kThreads}, exec, p);
}

}  // namespace ssmcore::cuda
