#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <nvbench/cuda_call.cuh>

#include "random.h"

namespace ssmcore::bench {
namespace {

// The finaliser of SplitMix64: every bit of the counter reaches every bit of the result.
__device__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

template <typename T>
__global__ void fill_kernel(T* data, int64_t size, float least, float range, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step)
    data[i] = static_cast<T>(least + range * (mix(seed + i) >> 40) * 0x1p-24f);
}

template <typename T>
void fill(const TensorView& view, float least, float most) {
  static uint64_t tensors = 0;
  fill_kernel<<<1024, 256>>>(view.as<T>(), view.numel(), least, most - least, ++tensors << 40);
  NVBENCH_CUDA_CALL(cudaGetLastError());
}

}  // namespace

Random::Random(const Context& context, float least, float most,
               std::initializer_list<int64_t> shape, DType dtype)
    : memory_(context.allocator(), TensorView(nullptr, dtype, shape).numel() * dtype_size(dtype),
              "a benchmark"),
      view_(memory_.view(dtype, shape)) {
  if (dtype == DType::float32) fill<float>(view_, least, most);
  if (dtype == DType::bfloat16) fill<__nv_bfloat16>(view_, least, most);
  if (dtype == DType::int32) fill<int32_t>(view_, least, most);
  if (dtype == DType::int64) fill<int64_t>(view_, least, most);
  context.synchronize();
}

}  // namespace ssmcore::bench
