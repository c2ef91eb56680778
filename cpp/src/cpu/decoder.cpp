// A decoder's rows on the CPU: the copies between slots and the rows of a step.
#include <cstring>

#include "../decoder_params.h"
#include "ssmcore/context.h"

namespace ssmcore::cpu {

size_t decoder_gather_workspace_size(const DecoderRowsParams&, const Context&) {
  return 0;
}

size_t decoder_scatter_workspace_size(const DecoderRowsParams&, const Context&) {
  return 0;
}

void decoder_gather(const DecoderRowsParams& p, const Exec&) {
  for (int64_t i = 0; i < p.rows; ++i) {
    p.of_step[i] = p.by_slot[p.slots[i]];
    if (p.history_capacity > 0)
      std::memcpy(p.history_of_step + i * p.history_capacity,
                  p.history_by_slot + p.slots[i] * p.history_capacity,
                  sizeof(int32_t) * static_cast<size_t>(p.history_capacity));
  }
}

void decoder_scatter(const DecoderRowsParams& p, const Exec&) {
  int64_t* drawn = p.drawn + *p.num_drawn % 2 * static_cast<uint64_t>(p.max_rows);
  for (int64_t i = 0; i < p.rows; ++i) {
    DecoderRow& row = p.by_slot[p.slots[i]];
    drawn[i] = row.token_id = p.of_step[i].token_id;
    ++row.position;
    if (p.history_capacity > 0)
      p.history_by_slot[p.slots[i] * p.history_capacity + row.history_length++] =
          static_cast<int32_t>(row.token_id);
  }
  ++*p.num_drawn;
}

}  // namespace ssmcore::cpu
