// What the scan and its backward in float64 share.
#pragma once

#include <cmath>

#include "../selective_scan_params.h"

namespace ssmcore::cpu {

template <int Rank, typename... Index>
double* at(const Strided<Rank>& tensor, Index... index) {
  static_assert(sizeof...(Index) == Rank);
  int64_t offset = 0;
  int dim = 0;
  ((offset += index * tensor.stride[dim++]), ...);
  return static_cast<double*>(tensor.data) + offset;
}

inline double softplus64(double x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}

// A row of a batch, or a packed one.
struct Row64 {
  int64_t batch, begin, end;  // steps [begin, end) of this row of the batch
  int64_t slot;               // of its state; negative: none

  Row64(const SelectiveScanFwdParams& s, int64_t row)
      : batch(s.cu_seqlens ? 0 : row),
        begin(s.cu_seqlens ? boundary(s, row) : 0),
        end(s.cu_seqlens ? boundary(s, row + 1) : s.seqlen),
        slot(s.state_indices
                 ? integer_at(s.state_indices.data, DType::int32, row * s.state_indices.stride[0])
                 : row) {}

  // Where packed row `row` begins.
  static int64_t boundary(const SelectiveScanFwdParams& s, int64_t row) {
    return integer_at(s.cu_seqlens.data, DType::int32, row * s.cu_seqlens.stride[0]);
  }
};

}  // namespace ssmcore::cpu
