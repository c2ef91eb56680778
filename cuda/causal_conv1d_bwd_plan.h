// How the backward of the causal convolution is spread over the device.
#pragma once

#include "causal_conv1d_taps.cuh"

namespace ssmcore::cuda {

// Steps are cut into tiles; tile i of row b of the batch is item b · tiles + i. Walkers take items
// one after another, each for its channels, and keep the sums of dweight and dbias over them.
struct CausalConv1dBwdPlan {
  CausalConv1dFwdPlan fwd;  // its tiles: steps, or vectors of steps, of a tile
  int64_t items;
  int64_t groups;   // of walkers, whose sums over the items are kept apart
  int64_t blocks;   // of threads, of all groups
  int lanes;        // neighbouring threads with neighbouring channels
  bool dx_vectors;  // dx is of x's type and to be overwritten, by vectors of channels
  float* sums;      // (groups, width + 1, dim): dweight, then dbias
};

}  // namespace ssmcore::cuda
