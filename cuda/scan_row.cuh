// Rows of a scan on the device: where each begins and ends, and which slot its states have.
#pragma once

#include "../cpp/src/selective_scan_params.h"
#include "device/fault.cuh"

namespace ssmcore::cuda {

struct ScanRow {
  int64_t batch, begin, end;  // steps [begin, end) of this row of the batch
  int64_t slot;               // of its state; negative: none
};

__device__ inline int64_t index_at(const Strided<1>& indices, int64_t i) {
  return static_cast<const int32_t*>(indices.data)[i * indices.stride[0]];
}

// The slot of a row's state, negative for none. One that is out of range is reported, and none.
__device__ inline int64_t scan_slot(const SelectiveScanFwdParams& p, int64_t row,
                                    uint32_t* faults) {
  if (p.state_indices.data == nullptr) return row;
  const int64_t slot = index_at(p.state_indices, row);
  if (slot < p.slots) return slot;
  report(faults, Fault::selective_scan_state_indices);
  return -1;
}

// A row whose boundaries are out of range is reported, and treated as empty and without a slot.
__device__ inline ScanRow scan_row(const SelectiveScanFwdParams& p, int64_t row, uint32_t* faults) {
  if (p.cu_seqlens.data == nullptr) return {row, 0, p.seqlen, scan_slot(p, row, faults)};
  const int64_t begin = index_at(p.cu_seqlens, row), end = index_at(p.cu_seqlens, row + 1);
  if (begin < 0 || begin > end || end > p.seqlen || (row == 0 && begin != 0) ||
      (row == p.rows - 1 && end != p.seqlen)) {
    report(faults, Fault::selective_scan_cu_seqlens);
    return {0, 0, 0, -1};
  }
  return {0, begin, end, scan_slot(p, row, faults)};
}

// The row's first entry in chunk_states. Packed rows follow one another: each lane of a warp counts
// for some of the rows before.
__device__ inline int64_t first_chunk_of_row(const SelectiveScanFwdParams& p, int64_t row) {
  if (p.cu_seqlens.data == nullptr) return 0;
  int64_t chunks = 0;
  for (int64_t i = threadIdx.x % 32; i < row; i += 32) {
    const int64_t length = index_at(p.cu_seqlens, i + 1) - index_at(p.cu_seqlens, i);
    if (length > 0) chunks += (length - 1) / p.chunk_size + 1;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) chunks += __shfl_xor_sync(~0u, chunks, lanes);
  return chunks;
}

}  // namespace ssmcore::cuda
