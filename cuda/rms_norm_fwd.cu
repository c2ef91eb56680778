// The RMS norm on the GPU, limited by memory: what is read of a row stays in registers until the
// mean of its squares is known.
#include "../cpp/src/rms_norm_params.h"
#include "any_type.cuh"
#include "device/lanes.cuh"
#include "device/math.cuh"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "rms_norm";
constexpr int kMaxThreads = 512;      // of a block of vectors
constexpr int kElementThreads = 256;  // of a block of single elements

// A thread's place: the group of a row whose mean it helps with, and which of its lanes it is.
struct Place {
  int64_t row, first;  // element `first` of the row begins the group
  int lane;

  __device__ Place(const RmsNormFwdParams& p, int lanes) {
    const unsigned in_block = threadIdx.x / lanes;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + in_block;
    const int64_t groups = p.group_size == p.dim ? 1 : p.dim / p.group_size;
    row = groups == 1 ? item : item / groups;
    first = groups == 1 ? 0 : (item - row * groups) * p.group_size;
    lane = static_cast<int>(threadIdx.x - in_block * lanes);
  }
};

// kPlain: neither residual nor gate. So little is loaded of a row that there must be many rows at a
// time.
template <int kVectors, bool kPlain>
__global__ void __launch_bounds__(kVectors == 1 || kPlain ? kMaxThreads / 2 : kMaxThreads,
                                  kPlain ? 5 : 0)
    rms_norm_fwd_kernel(const __grid_constant__ RmsNormFwdParams p, int lanes) {
  const bool has_residual = !kPlain && p.residual.data, has_gate = !kPlain && p.z.data;
  const Place place(p, lanes);
  const auto begin = [&](int j) { return static_cast<int64_t>(place.lane + j * lanes) * kEight; };
  const auto is_inside = [&](int j) { return place.row < p.rows && begin(j) < p.group_size; };
  const auto at = [&](const Strided<2>& tensor, int j) {
    return place.row * tensor.stride[0] + place.first + begin(j);
  };

  Raw x[kVectors], residual[kVectors], z[kVectors], weight[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!is_inside(j)) continue;
    x[j] = load_raw(p.x.data, p.dtype, at(p.x, j));
    if (has_residual) residual[j] = load_raw(p.residual.data, p.residual_dtype, at(p.residual, j));
    if (has_gate) z[j] = load_raw(p.z.data, p.z_dtype, at(p.z, j));
    if (kPlain && p.weight.data)
      weight[j] = load_raw(p.weight.data, p.weight_dtype, place.first + begin(j));
  }

  float r[kVectors][kEight], squares[1] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!is_inside(j)) continue;
    to_floats(x[j], p.dtype, r[j]);
    if (has_residual) {
      float values[kEight];
      to_floats(residual[j], p.residual_dtype, values);
#pragma unroll
      for (int i = 0; i < kEight; ++i) r[j][i] += values[i];
    }
    if (!kPlain && p.residual_out.data)
      store_eight(p.residual_out.data, p.residual_out_dtype, at(p.residual_out, j), r[j]);
    if (has_gate && !p.norm_before_gate) {
      float values[kEight];
      to_floats(z[j], p.z_dtype, values);
#pragma unroll
      for (int i = 0; i < kEight; ++i) r[j][i] *= silu(values[i]);
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) squares[0] += r[j][i] * r[j][i];
  }
  sum_over_lanes(squares, lanes);
  const float scale = 1.0f / sqrtf(squares[0] / static_cast<float>(p.group_size) + p.eps);

#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!is_inside(j)) continue;
#pragma unroll
    for (int i = 0; i < kEight; ++i) r[j][i] *= scale;
    float values[kEight];
    if (p.weight.data) {
      to_floats(
          kPlain ? weight[j] : load_raw(p.weight.data, p.weight_dtype, place.first + begin(j)),
          p.weight_dtype, values);
#pragma unroll
      for (int i = 0; i < kEight; ++i) r[j][i] *= values[i];
    }
    if (has_gate && p.norm_before_gate) {
      to_floats(z[j], p.z_dtype, values);
#pragma unroll
      for (int i = 0; i < kEight; ++i) r[j][i] *= silu(values[i]);
    }
    store_eight(p.out.data, p.out_dtype, at(p.out, j), r[j]);
  }
}

// Any strides, alignment and size, element by element; a long row is read twice.
__global__ void __launch_bounds__(kElementThreads)
    rms_norm_fwd_elements_kernel(const __grid_constant__ RmsNormFwdParams p, int lanes) {
  const Place place(p, lanes);
  const int64_t end = place.row < p.rows ? p.group_size : 0;
  const auto at = [&](const Strided<2>& tensor, int64_t i) {
    return place.row * tensor.stride[0] + (place.first + i) * tensor.stride[1];
  };
  const auto gate = [&](int64_t i) { return silu(load_element(p.z.data, p.z_dtype, at(p.z, i))); };
  const auto sum = [&](int64_t i) {
    float r = load_element(p.x.data, p.dtype, at(p.x, i));
    if (p.residual.data) r += load_element(p.residual.data, p.residual_dtype, at(p.residual, i));
    return r;
  };

  float squares[1] = {};
  for (int64_t i = place.lane; i < end; i += lanes) {
    float v = sum(i);
    if (p.z.data && !p.norm_before_gate) v *= gate(i);
    squares[0] += v * v;
  }
  sum_over_lanes(squares, lanes);
  const float scale = 1.0f / sqrtf(squares[0] / static_cast<float>(p.group_size) + p.eps);

  for (int64_t i = place.lane; i < end; i += lanes) {
    float v = sum(i);
    if (p.residual_out.data)
      store_element(p.residual_out.data, p.residual_out_dtype, at(p.residual_out, i), v);
    if (p.z.data) v *= gate(i);
    v *= scale;
    if (p.weight.data)
      v *= load_element(p.weight.data, p.weight_dtype, (place.first + i) * p.weight.stride[0]);
    store_element(p.out.data, p.out_dtype, at(p.out, i), v);
  }
}

// Whether rows can be read by vectors.
bool has_vectors(const RmsNormFwdParams& p) {
  const auto has = [&](const Strided<2>& tensor) {
    return !tensor || ((tensor.stride[1] == 1 || p.dim == 1) && is_aligned(tensor.data, 16) &&
                       (p.rows == 1 || tensor.stride[0] % kEight == 0));
  };
  return p.group_size % kEight == 0 && has(p.x) && has(p.residual) && has(p.residual_out) &&
         has(p.z) && has(p.out) &&
         (!p.weight || (p.weight.stride[0] == 1 && is_aligned(p.weight.data, 16)));
}

void launch_rms_norm_fwd(void (*kernel)(RmsNormFwdParams, int), const RmsNormFwdParams& p,
                         int lanes, const Exec& exec) {
  constexpr int kSmallThreads = 128;
  const int threads = threads_for(lanes, kSmallThreads);
  launch_kernel(kOp, kernel,
                {blocks_for(p.rows * (p.dim / p.group_size), threads / lanes), threads}, exec, p,
                lanes);
}

}  // namespace

size_t rms_norm_fwd_workspace_size(const RmsNormFwdParams&, const Context&) {
  return 0;
}

void rms_norm_fwd(const RmsNormFwdParams& p, const Exec& exec) {
  const int64_t vectors = p.group_size / kEight;
  if (!has_vectors(p) || vectors > 4 * kMaxThreads)
    launch_rms_norm_fwd(rms_norm_fwd_elements_kernel, p, lanes_for(p.group_size, kElementThreads),
                        exec);
  else if (vectors <= kMaxThreads / 2)
    launch_rms_norm_fwd(rms_norm_fwd_kernel<1, false>, p, lanes_for(vectors, kMaxThreads), exec);
  else if (vectors <= kMaxThreads && !p.residual && !p.residual_out && !p.z)
    launch_rms_norm_fwd(rms_norm_fwd_kernel<2, true>, p,
                        lanes_for(ceil_div(vectors, 2), kMaxThreads), exec);
  else if (vectors <= 2 * kMaxThreads)
    launch_rms_norm_fwd(rms_norm_fwd_kernel<2, false>, p,
                        lanes_for(ceil_div(vectors, 2), kMaxThreads), exec);
  else
    launch_rms_norm_fwd(rms_norm_fwd_kernel<4, false>, p,
                        lanes_for(ceil_div(vectors, 4), kMaxThreads), exec);
}

}  // namespace ssmcore::cuda
