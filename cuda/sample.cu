// Sampling on the GPU, a block a row. Nothing is sorted: the filters bisect for the value, and
// among equal values the id, down to which they keep. Sums run in an order that depends on the size
// of the vocabulary alone.
#include <cfloat>
#include <cmath>

#include "../cpp/src/sample_params.h"
#include "device/block_totals.cuh"
#include "device/math.cuh"
#include "device/philox.cuh"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr int kWarps = BlockTotals::kWarps, kThreads = 32 * kWarps;
constexpr unsigned kQuad = 4;  // neighbouring ids that a thread takes at a time
constexpr unsigned kAllIds = ~0u;
constexpr unsigned kFew = 256;  // values that are compared one with the other

// Unsigned integers in the order of the floats they stand for.
__device__ __forceinline__ unsigned key_of(float value) {
  const int bits = __float_as_int(value);
  return static_cast<unsigned>(bits) ^ (bits < 0 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float value_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

template <typename T>
__device__ T value_or(const Strided<1>& setting, int64_t row, T absent) {
  return setting.data != nullptr ? static_cast<const T*>(setting.data)[row * setting.stride[0]]
                                 : absent;
}

// What a filter keeps: values above `value`, and of those equal to it the ones of ids up to `id`.
struct Cut {
  float value;
  unsigned id;

  __device__ bool keeps(float v, unsigned i) const { return v > value || (v == value && i <= id); }
};

constexpr Cut kEverything{-INFINITY, kAllIds};

// The values that a filter has yet to decide about, once they are few.
struct Undecided {
  unsigned count;
  unsigned ids[kFew];
  float values[kFew];
  double weights[kFew];  // what each adds to the number or sum that the filter is after
  Cut cut;
};

struct Memory {  // shared
  BlockTotals::Memory totals;
  Undecided undecided;
};

// One row's logits after the penalty, then its weights: probabilities over the largest one. Each
// warp has a run of ids. Beyond vocab_size, up to a multiple of 4, are values nothing keeps.
class Row {
 public:
  __device__ Row(float* values, unsigned size, Memory& memory)
      : values(values), size(size), totals(memory.totals), undecided(memory.undecided) {
    per_warp = (size + 128 * kWarps - 1) / (128 * kWarps) * 128;
    begin = threadIdx.x / 32 * per_warp + threadIdx.x % 32 * kQuad;
    end = min(size, (threadIdx.x / 32 + 1) * per_warp);
  }

  // Copies logits, -inf beyond them. Returns the largest, NaN if there is one.
  __device__ float load(const float* from, int64_t stride, unsigned vocab_size) {
    float mine = -INFINITY;
    bool has_nan = false;
    const auto keep = [&](const Quad& quad, unsigned i) {
      for (const float v : quad.value) {
        has_nan |= v != v;
        mine = fmaxf(mine, v);
      }
      store_vector(values + i, quad);
    };
    if (stride == 1 && vocab_size % kQuad == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      for_each_quad([&](unsigned i) { return load_vector<kQuad>(from + i); }, keep);
    } else {
      for_each_quad(
          [&](unsigned i) {
            Quad quad;
            for (unsigned k = 0; k < kQuad; ++k)
              quad.value[k] = i + k < vocab_size ? from[(i + k) * stride] : -INFINITY;
            return quad;
          },
          keep);
    }
    const unsigned key = totals.largest(has_nan ? kAllIds : key_of(mine));
    return key == kAllIds ? NAN : value_of(key);
  }

  __device__ float largest() {
    float mine = -INFINITY;
    for_each_quad([&](const auto& quad, unsigned) {
      for (const float v : quad.value) mine = fmaxf(mine, v);
    });
    return value_of(totals.largest(key_of(mine)));
  }

  __device__ unsigned first_equal(float value) {
    unsigned first = kAllIds;
    for_each_quad([&](const auto& quad, unsigned i) {
      for (unsigned k = 0; k < kQuad; ++k)
        if (quad.value[k] == value) first = min(first, i + k);
    });
    return totals.smallest(first);
  }

  // The cut that keeps the fewest of the largest values, lower ids first among equals, whose number
  // (kWeighted: sum) is at least `target`. The values in [lowest, largest] are enough; `number`
  // says how many they are.
  template <bool kWeighted>
  __device__ Cut cut(double target, float lowest, float largest, unsigned number) {
    const auto enough = [&](const Total& total) {
      return (kWeighted ? total.sum : total.count) >= target;
    };
    // Values from `low` on are enough, those from `high` on are not
    // (+ 0.0f: nothing equals -0 and lies below its successor, +0).
    unsigned low = key_of(lowest), high = key_of(largest + 0.0f) + 1;
    Total at_low{number, 0}, at_high{0, 0};
    unsigned stride = 1u << 22;  // half an octave: what is looked for is near the largest
    while (high - low > 1 && at_low.count - at_high.count > kFew) {
      const unsigned middle = high - min(stride, (high - low) / 2);
      const float pivot = value_of(middle);
      const Total total = measure<kWeighted>([&](float v, unsigned) { return v >= pivot; });
      (enough(total) ? low : high) = middle;
      (enough(total) ? at_low : at_high) = total;
      stride = enough(total) || stride >> 31 ? ~0u : 2 * stride;
    }
    if (at_low.count - at_high.count <= kFew) {
      find_undecided<kWeighted>(value_of(low), value_of(high));
      return cut_undecided(target - (kWeighted ? at_high.sum : at_high.count));
    }
    // Some of many equal values. Ids up to `last` are enough, those up to `first` are not.
    Cut cut{value_of(low), kAllIds};
    int64_t first = -1, last = size - 1;
    while (last - first > 1) {
      cut.id = static_cast<unsigned>((first + last) / 2);
      const Total total = measure<kWeighted>([&](float v, unsigned i) { return cut.keeps(v, i); });
      (enough(total) ? last : first) = cut.id;
    }
    cut.id = static_cast<unsigned>(last);
    return cut;
  }

  // Replaces every value by function(value, id), a weight. Returns the number and sum of those
  // above 0; totals has the sums of the warps.
  template <typename Function>
  __device__ Total replace(const Function& function) {
    unsigned positive = 0;
    float sum = 0;
    for_each_quad([&](Quad quad, unsigned i) {
      for (unsigned k = 0; k < kQuad; ++k) {
        quad.value[k] = function(quad.value[k], i + k);
        positive += quad.value[k] > 0;
      }
      sum += (quad.value[0] + quad.value[1]) + (quad.value[2] + quad.value[3]);
      store_vector(values + i, quad);
    });
    return totals.total(positive, sum);
  }

  // The inverse of the cumulative distribution, of which `left` has to be used up: which warp's ids
  // first, from the sums that replace() left, then which id.
  __device__ unsigned draw(double left) {
    const double up_to_warp = warp_scan(totals.sum_of_warp());
    unsigned warps = __ballot_sync(~0u, left < up_to_warp);
    if (warps != 0) {
      const int warp = __ffs(warps) - 1;
      if (warp > 0) left -= __shfl_sync(~0u, up_to_warp, warp - 1);
      warps = 1u << warp;
    } else {  // rounding used up the sum: the last id that can be drawn at all
      warps = __ballot_sync(~0u, totals.sum_of_warp() > 0);
      left = INFINITY;
    }
    const unsigned from = (31 - __clz(warps)) * per_warp;
    const unsigned per_thread = (per_warp + kThreads - 1) / kThreads;
    const unsigned first = min(size, from + threadIdx.x * per_thread);
    const unsigned last = min(min(size, from + per_warp), first + per_thread);
    float sum = 0;
    for (unsigned i = first; i < last; ++i) sum += values[i];
    left -= totals.sum_before(sum);
    unsigned drawn = kAllIds, last_positive = 0;
    for (unsigned i = first; i < last; ++i) {
      if (values[i] <= 0) continue;
      left -= values[i];
      last_positive = i;
      if (left < 0 && drawn == kAllIds) drawn = i;
    }
    drawn = totals.smallest(drawn);
    last_positive = totals.largest(last_positive);
    return drawn == kAllIds ? last_positive : drawn;
  }

 private:
  using Quad = Vector<float, kQuad>;

  // Calls body(load(id), id) for this thread's ids, several loads ahead.
  template <typename Load, typename Body>
  __device__ void for_each_quad(const Load& load, const Body& body) const {
    constexpr unsigned kAtOnce = 4, kApart = 32 * kQuad;
    for (unsigned i = begin; i < end; i += kAtOnce * kApart) {
      Quad quads[kAtOnce];
#pragma unroll
      for (unsigned k = 0; k < kAtOnce; ++k)
        if (i + k * kApart < end) quads[k] = load(i + k * kApart);
#pragma unroll
      for (unsigned k = 0; k < kAtOnce; ++k)
        if (i + k * kApart < end) body(quads[k], i + k * kApart);
    }
  }
  template <typename Body>
  __device__ void for_each_quad(const Body& body) const {
    for_each_quad([&](unsigned i) { return load_vector<kQuad>(values + i); }, body);
  }

  // How many values `keeps` takes; kWeighted: also their sum.
  template <bool kWeighted, typename Keeps>
  __device__ Total measure(const Keeps& keeps) {
    unsigned count = 0;
    float sum = 0;
    for_each_quad([&](const auto& quad, unsigned i) {
      float of_quad[kQuad];
      for (unsigned k = 0; k < kQuad; ++k) {
        const bool kept = keeps(quad.value[k], i + k);
        count += kept;
        of_quad[k] = kept ? quad.value[k] : 0;
      }
      if (kWeighted) sum += (of_quad[0] + of_quad[1]) + (of_quad[2] + of_quad[3]);
    });
    if constexpr (kWeighted) return totals.total(count, sum);
    return {totals.count(count), 0};
  }

  // Lists the values from `low` to below `high`, in any order. Of weights that are multiples of
  // 2^-42 every sum is exact, and so the same in any order.
  template <bool kWeighted>
  __device__ void find_undecided(float low, float high) {
    if (threadIdx.x == 0) undecided.count = 0;
    __syncthreads();
    for_each_quad([&](const auto& quad, unsigned i) {
      for (unsigned k = 0; k < kQuad; ++k) {
        const float v = quad.value[k];
        if (v < low || v >= high) continue;
        const unsigned at = atomicAdd(&undecided.count, 1u);
        undecided.ids[at] = i + k;
        undecided.values[at] = v;
        undecided.weights[at] = kWeighted ? rint(v * 0x1p42) * 0x1p-42 : 1;
      }
    });
    __syncthreads();
  }

  // The cut that keeps the fewest of the undecided values whose weights add up to `target`; all of
  // them where rounding lets none do.
  __device__ Cut cut_undecided(double target) {
    const unsigned count = undecided.count;
    unsigned rank = kAllIds;
    Cut mine{};
    if (threadIdx.x < count) {
      mine = {undecided.values[threadIdx.x], undecided.ids[threadIdx.x]};
      double sum = 0;
      unsigned kept = 0;
      for (unsigned i = 0; i < count; ++i)
        if (mine.keeps(undecided.values[i], undecided.ids[i])) {
          sum += undecided.weights[i];
          ++kept;
        }
      if (sum >= target || kept == count) rank = kept;
    }
    if (totals.smallest(rank) == rank && rank != kAllIds) undecided.cut = mine;
    __syncthreads();
    return undecided.cut;
  }

  float* values;
  const unsigned size;
  BlockTotals totals;
  Undecided& undecided;
  unsigned per_warp, begin, end;  // this thread's first quad, and where its warp's ids end
};

struct Settings {
  float repetition_penalty, temperature, top_p, min_p;
  int32_t top_k;

  __device__ Settings(const SampleParams& p, int64_t row)
      : repetition_penalty(value_or(p.repetition_penalty, row, 1.0f)),
        temperature(value_or(p.temperature, row, 1.0f)),
        top_p(value_or(p.top_p, row, 1.0f)),
        min_p(value_or(p.min_p, row, 0.0f)),
        top_k(value_or<int32_t>(p.top_k, row, 0)) {}

  __device__ bool valid() const {
    return repetition_penalty > 0 && isfinite(repetition_penalty) && temperature >= 0 &&
           isfinite(temperature) && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1 &&
           top_k >= 0;
  }
};

// Each id is penalised once however often it occurs: always from the stored logit.
__device__ void apply_repetition_penalty(const SampleParams& p, int64_t row, const float* stored,
                                         float penalty, float* values, uint32_t* faults) {
  for (int64_t i = threadIdx.x; i < p.history_length; i += kThreads) {
    const int64_t at = row * p.history.stride[0] + i * p.history.stride[1];
    const int64_t id = p.history_dtype == DType::int32
                           ? static_cast<const int32_t*>(p.history.data)[at]
                           : static_cast<const int64_t*>(p.history.data)[at];
    if (id >= p.vocab_size) report(faults, Fault::sample_history);
    if (id < 0 || id >= p.vocab_size) continue;
    const float logit = stored[id * p.logits.stride[1]];
    values[id] = logit > 0 ? logit / penalty : logit * penalty;
  }
}

__device__ unsigned sample_row(const SampleParams& p, int64_t b, unsigned size, float* values,
                               Memory& memory, uint32_t* faults) {
  const Settings settings(p, b);
  const float* stored = static_cast<const float*>(p.logits.data) + b * p.logits.stride[0];
  Row row(values, size, memory);
  float largest = row.load(stored, p.logits.stride[1], static_cast<unsigned>(p.vocab_size));
  if (!settings.valid() || !isfinite(largest)) {
    if (threadIdx.x == 0)
      report(faults, settings.valid() ? Fault::sample_logits : Fault::sample_setting);
    return 0;
  }
  if (p.history_length > 0) {
    apply_repetition_penalty(p, b, stored, settings.repetition_penalty, values, faults);
    __syncthreads();
    largest = row.largest();
  }
  if (settings.temperature == 0 || !isfinite(largest))  // a penalty can make it infinite
    return row.first_equal(largest);

  Cut top_k = kEverything;
  if (settings.top_k > 0 && settings.top_k < p.vocab_size)
    top_k = row.cut<false>(settings.top_k, -INFINITY, largest, size);
  // Shifted first, so that a small temperature cannot overflow the largest.
  const float scale = fminf(kLog2e / settings.temperature, FLT_MAX);
  Total weights = row.replace([&](float v, unsigned i) {
    return top_k.keeps(v, i) ? exp2_approx((v - largest) * scale) : 0.0f;
  });
  if (settings.top_p < 1 || settings.min_p > 0) {
    Cut top_p = kEverything;
    if (settings.top_p < 1)
      top_p = row.cut<true>(settings.top_p * weights.sum, FLT_MIN, 1.0f, weights.count);
    weights = row.replace(
        [&](float w, unsigned i) { return top_p.keeps(w, i) && w >= settings.min_p ? w : 0.0f; });
  }
  const auto seed = static_cast<uint64_t>(value_or<int64_t>(p.seed, b, b));
  const auto position = static_cast<uint64_t>(value_or<int64_t>(p.position, b, 0));
  return row.draw(philox_uniform(seed, position) * weights.sum);
}

// The values of a row are in shared memory where they fit, else in the workspace.
template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(SampleParams p, unsigned size, float* workspace, uint32_t* faults) {
  extern __shared__ float4 shared_values[];
  __shared__ Memory memory;
  float* values = kShared ? reinterpret_cast<float*>(shared_values)
                          : workspace + static_cast<int64_t>(blockIdx.x) * size;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    const unsigned id = sample_row(p, b, size, values, memory, faults);
    if (threadIdx.x == 0) {
      const int64_t at = b * p.out.stride[0];
      if (p.out_dtype == DType::int32)
        static_cast<int32_t*>(p.out.data)[at] = static_cast<int32_t>(id);
      else
        static_cast<int64_t*>(p.out.data)[at] = id;
    }
    __syncthreads();  // before the next row overwrites the memory
  }
}

size_t row_bytes(const SampleParams& p) {
  return sizeof(float) * kQuad * static_cast<size_t>(ceil_div(p.vocab_size, kQuad));
}

bool fits_shared_memory(const SampleParams& p, const Context& context) {
  return row_bytes(p) + sizeof(Memory) <= context.cuda().shared_memory_per_block();
}

unsigned blocks_of(const SampleParams& p, const Context& context) {
  return blocks_for(std::min<int64_t>(p.batch, 2 * context.cuda().num_sms()), 1);
}

}  // namespace

size_t sample_workspace_size(const SampleParams& p, const Context& context) {
  return fits_shared_memory(p, context) ? 0 : blocks_of(p, context) * row_bytes(p);
}

void sample(const SampleParams& p, const Exec& exec) {
  with_bool(fits_shared_memory(p, exec.context), [&](auto is_shared) {
    constexpr bool kShared = decltype(is_shared)::value;
    launch_kernel("sample", sample_kernel<kShared>,
                  {blocks_of(p, exec.context), kThreads, kShared ? row_bytes(p) : 0}, exec, p,
                  row_bytes(p) / sizeof(float), static_cast<float*>(exec.workspace),
                  exec.context.cuda().faults());
  });
}

}  // namespace ssmcore::cuda
