// Parts of a scan's tensors that a block works on.
#pragma once

#include "../cpp/src/strided.h"

namespace ssmcore::cuda {

// Element (i, t) at data + i stride_i + t stride_t.
template <typename T>
struct Plane {
  T* data = nullptr;
  int64_t stride_i = 0, stride_t = 0;

  __device__ T& at(int64_t i, int64_t t) const { return data[i * stride_i + t * stride_t]; }
};

template <typename T>
__device__ Plane<T> plane_of(const Strided<4>& tensor, int64_t i, int64_t j) {
  if (tensor.data == nullptr) return {};
  return {static_cast<T*>(tensor.data) + i * tensor.stride[0] + j * tensor.stride[1],
          tensor.stride[2], tensor.stride[3]};
}

// For all i < width and t < steps: use(i, t, load(i, t)), neighbouring threads of kThreads on
// neighbouring memory, kAtOnce loads in flight. `width` and `block_l` are powers of two, steps ≤
// block_l. Calls with the same sizes give a thread the same elements.
template <int kThreads, int kAtOnce, typename Load, typename Use>
__device__ void for_each_element(int width, int block_l, int steps, bool along_t, const Load& load,
                                 const Use& use) {
  const int inner = along_t ? block_l : width, shift = __ffs(inner) - 1;
  const int elements = along_t ? width * block_l : width * steps;
  for (int first = threadIdx.x; first < elements; first += kAtOnce * kThreads) {
    decltype(load(0, 0)) loaded[kAtOnce];
    const auto for_each_of_these = [&](const auto& body) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int e = first + k * kThreads, low = e & (inner - 1), high = e >> shift;
        const int i = along_t ? high : low, t = along_t ? low : high;
        if (e < elements && t < steps) body(k, i, t);
      }
    };
    for_each_of_these([&](int k, int i, int t) { loaded[k] = load(i, t); });
    for_each_of_these([&](int k, int i, int t) { use(i, t, loaded[k]); });
  }
}

}  // namespace ssmcore::cuda
