// What the scan and its backward in float64 share.
#pragma once

#include "../selective_scan_params.h"
#include "float64.h"

namespace ssmcore::cpu::float64 {

// A row of a batch, or a packed one.
struct Row {
  int64_t batch, begin, end;  // steps [begin, end) of this row of the batch
  int64_t slot;               // of its state; negative: none

  Row(const SelectiveScanFwdParams& s, int64_t row)
      : batch(s.cu_seqlens ? 0 : row),
        begin(s.cu_seqlens ? boundary(s, row) : 0),
        end(s.cu_seqlens ? boundary(s, row + 1) : s.seqlen),
        slot(s.state_indices
                 ? integer_at(s.state_indices.data, DType::int32, row * s.state_indices.stride[0])
                 : row) {}

  // Where packed row `row` begins.
  static int64_t boundary(const SelectiveScanFwdParams& s, int64_t row) {
    return integer(s.cu_seqlens, DType::int32, row);
  }
};

}  // namespace ssmcore::cpu::float64
