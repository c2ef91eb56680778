#include "copy_rate.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <nvbench/cuda_call.cuh>
#include <nvbench/cuda_stream.cuh>
#include <nvbench/cuda_timer.cuh>
#include <vector>

#include "random.h"

namespace ssmcore::bench {
namespace {

double measure(int device) {
  constexpr int64_t kBytes = int64_t{1} << 30;
  constexpr int kCopies = 20;
  const Context context(Device{DeviceType::cuda, device});
  const Random source(context, -1, 1, {kBytes / 4}, DType::float32),
      target(context, -1, 1, {kBytes / 4}, DType::float32);
  nvbench::cuda_stream stream;
  nvbench::cuda_timer timer;
  std::vector<double> seconds;
  for (int i = 0; i < kCopies + 1; ++i) {
    timer.start(stream);
    NVBENCH_CUDA_CALL(cudaMemcpyAsync(target.view().data, source.view().data, kBytes,
                                      cudaMemcpyDeviceToDevice, stream));
    timer.stop(stream);
    seconds.push_back(timer.get_duration());
  }
  // The first one warms up.
  std::sort(seconds.begin() + 1, seconds.end());
  return 2.0 * kBytes / seconds[1 + kCopies / 2];
}

}  // namespace

double copy_rate(int device) {
  static std::map<int, double> rates;
  const auto known = rates.find(device);
  return known != rates.end() ? known->second : rates[device] = measure(device);
}

}  // namespace ssmcore::bench
