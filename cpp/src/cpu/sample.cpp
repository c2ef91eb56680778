// Sampling on the CPU, a row at a time.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "../kernels.h"
#include "../largest.h"
#include "../philox.h"
#include "../scratch.h"
#include "../thread_pool.h"

namespace ssmcore::cpu {

SSMCORE_DECLARE_KERNEL(sample, SampleParams)

namespace {

template <typename T>
T value_or(const Strided<1>& setting, int64_t row, T absent) {
  return setting ? static_cast<const T*>(setting.data)[row * setting.stride[0]] : absent;
}

// One row's values and the candidates still in play.
struct Row {
  const float* stored;
  int64_t stride;
  // (vocab_size): logits after the penalty, then weights: probabilities over the largest one.
  float* values;
  int32_t* ids;  // (count)
  int64_t count;

  // Larger values first, lower ids among equals.
  bool before(int32_t a, int32_t b) const {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  }
  double sum() const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[ids[i]];
    return total;
  }
};

// Each id is penalised once however often it occurs: always from the stored logit.
void apply_repetition_penalty(const SampleParams& p, Row& row, int64_t b, float penalty) {
  for (int64_t i = 0; i < p.history_length; ++i) {
    const int64_t id = integer_at(p.history.data, p.history_dtype,
                                  b * p.history.stride[0] + i * p.history.stride[1]);
    if (id < 0) continue;
    const float logit = row.stored[id * row.stride];
    row.values[id] = logit > 0 ? logit / penalty : logit * penalty;
  }
}

void keep_top_k(Row& row, int64_t k) {
  if (k == 0 || k >= row.count) return;
  std::nth_element(row.ids, row.ids + k, row.ids + row.count,
                   [&](int32_t a, int32_t b) { return row.before(a, b); });
  row.count = k;
}

// Pops the largest off a heap until they hold p of the probability. They end up behind the heap,
// from where they become the candidates.
void keep_top_p(Row& row, double p) {
  if (p >= 1) return;
  const auto after = [&](int32_t a, int32_t b) { return row.before(b, a); };
  const double total = row.sum();
  std::make_heap(row.ids, row.ids + row.count, after);
  int64_t heap = row.count;
  for (double kept = 0; heap > 0 && kept < p * total; --heap) {
    std::pop_heap(row.ids, row.ids + heap, after);
    kept += row.values[row.ids[heap - 1]];
  }
  std::copy(row.ids + heap, row.ids + row.count, row.ids);
  row.count -= heap;
}

void keep_min_p(Row& row, float min_p) {
  if (min_p <= 0) return;
  int32_t* end = std::remove_if(row.ids, row.ids + row.count,
                                [&](int32_t id) { return row.values[id] < min_p; });
  row.count = end - row.ids;
}

// The inverse of the cumulative distribution over the candidates in order of id.
int32_t draw(Row& row, double uniform) {
  if (!std::is_sorted(row.ids, row.ids + row.count)) std::sort(row.ids, row.ids + row.count);
  double left = uniform * row.sum();
  for (int64_t i = 0; i < row.count; ++i) {
    left -= row.values[row.ids[i]];
    if (left < 0) return row.ids[i];
  }
  // Rounding used up the sum: the last candidate that can be drawn at all.
  for (int64_t i = row.count; i-- > 0;)
    if (row.values[row.ids[i]] > 0) return row.ids[i];
  return row.ids[0];
}

int32_t sample_row(const SampleParams& p, Row& row, int64_t b) {
  for (int64_t i = 0; i < p.vocab_size; ++i) row.values[i] = row.stored[i * row.stride];
  const float penalty = value_or(p.repetition_penalty, b, 1.0f);
  if (penalty != 1) apply_repetition_penalty(p, row, b, penalty);

  const float* end = row.values + p.vocab_size;
  const float largest = largest_of(row.values, p.vocab_size);
  const float temperature = value_or(p.temperature, b, 1.0f);
  if (temperature == 0 || !std::isfinite(largest))  // a penalty can make it infinite
    return static_cast<int32_t>(std::find(static_cast<const float*>(row.values), end, largest) -
                                row.values);

  std::iota(row.ids, row.ids + p.vocab_size, 0);
  row.count = p.vocab_size;
  keep_top_k(row, value_or<int32_t>(p.top_k, b, 0));
  // Shifted first, so that dividing by a small temperature cannot overflow the largest.
  for (int64_t i = 0; i < row.count; ++i) {
    float& value = row.values[row.ids[i]];
    value = std::exp((value - largest) / temperature);
  }
  keep_top_p(row, value_or(p.top_p, b, 1.0f));
  keep_min_p(row, value_or(p.min_p, b, 0.0f));
  const uint64_t seed = static_cast<uint64_t>(value_or<int64_t>(p.seed, b, b));
  const uint64_t position = static_cast<uint64_t>(value_or<int64_t>(p.position, b, 0));
  return draw(row, philox_uniform(seed, position));
}

// One worker's memory.
struct Workspace {
  float* values;
  int32_t* ids;

  Workspace(const SampleParams& p, Scratch& scratch)
      : values(scratch.floats(p.vocab_size)),
        ids(static_cast<int32_t*>(scratch.bytes(p.vocab_size * sizeof(int32_t)))) {}

  static size_t bytes(const SampleParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

}  // namespace

size_t sample_workspace_size(const SampleParams& p, const Context& context) {
  return Scratch::product(Workspace::bytes(p), static_cast<size_t>(context.num_threads()));
}

void sample(const SampleParams& p, const Exec& exec) {
  constexpr int64_t kPerCandidate = 50;  // multiply-adds that one exponential is worth
  const size_t bytes = Workspace::bytes(p);
  const int workers = workers_with_scratch(exec, bytes, p.batch * p.vocab_size * kPerCandidate);
  exec.context.thread_pool().parallel_for(p.batch, workers, [&](int64_t b, int worker) {
    Scratch scratch(static_cast<char*>(exec.workspace) + worker * bytes);
    const Workspace w(p, scratch);
    Row row{static_cast<const float*>(p.logits.data) + b * p.logits.stride[0], p.logits.stride[1],
            w.values, w.ids, 0};
    const int32_t id = sample_row(p, row, b);
    const int64_t at = b * p.out.stride[0];
    if (p.out_dtype == DType::int32)
      static_cast<int32_t*>(p.out.data)[at] = id;
    else
      static_cast<int64_t*>(p.out.data)[at] = id;
  });
}

}  // namespace ssmcore::cpu
