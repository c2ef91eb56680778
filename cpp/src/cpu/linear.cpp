// Matrix products on the CPU. A few rows, as in decoding, stream every weight once, whatever its
// dtype; many rows go to BLAS, panel by panel, in float32.
#include <type_traits>

#include "../linear_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "blas.h"
#include "row.h"
#include "ssmcore/context.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

// --- A few rows ---------------------------------------------------------------------------------

constexpr int64_t kMaxFewRows = 8;
constexpr int64_t kTaskOutputs = 32;

int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// kRows x kOutputs dot products of length k: every element of the weight is loaded once. An
// output's bits depend on neither number.
template <int kRows, int kOutputs, typename W>
SSMCORE_INLINE void dot_products(const W* weight, int64_t weight_row_stride, const float* x,
                                 int64_t k, float* out, int64_t out_row_stride) {
  const int64_t x_row_stride = padded(k);
  Vec sum[kOutputs][kRows] = {};
  const auto accumulate = [&](int64_t i, const auto& load_weight) {
    for (int o = 0; o < kOutputs; ++o) {
      const Vec w = load_weight(weight + o * weight_row_stride + i);
      for (int r = 0; r < kRows; ++r) sum[o][r] += w * load(x + r * x_row_stride + i);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) accumulate(i, [](const W* at) { return load(at); });
  if (i < k) accumulate(i, [&](const W* at) { return load_partial(at, k - i); });
  for (int o = 0; o < kOutputs; ++o)
    for (int r = 0; r < kRows; ++r) out[r * out_row_stride + o] = horizontal_sum(sum[o][r]);
}

// The outputs [begin, begin + count) of all rows into `out`, (kRows, kTaskOutputs).
template <int kRows, typename W>
void few_rows(const LinearParams& p, const float* x, int64_t begin, int64_t count, float* out) {
  constexpr int kOutputs = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
  const W* weight = static_cast<const W*>(p.weight) + begin * p.weight_row_stride;
  int64_t o = 0;
  for (; o + kOutputs <= count; o += kOutputs)
    dot_products<kRows, kOutputs>(weight + o * p.weight_row_stride, p.weight_row_stride, x,
                                  p.in_features, out + o, kTaskOutputs);
  for (; o < count; ++o)
    dot_products<kRows, 1>(weight + o * p.weight_row_stride, p.weight_row_stride, x, p.in_features,
                           out + o, kTaskOutputs);
}

template <typename W>
void few_rows(const LinearParams& p, const float* x, int64_t begin, int64_t count, float* out) {
  constexpr void (*kByRows[kMaxFewRows])(const LinearParams&, const float*, int64_t, int64_t,
                                         float*) = {few_rows<1, W>, few_rows<2, W>, few_rows<3, W>,
                                                    few_rows<4, W>, few_rows<5, W>, few_rows<6, W>,
                                                    few_rows<7, W>, few_rows<8, W>};
  kByRows[p.rows - 1](p, x, begin, count, out);
}

// Adds the bias to `count` outputs of one row from output `begin` on, and stores them.
void finish_row(const LinearParams& p, float* values, int64_t row, int64_t begin, int64_t count) {
  if (p.bias) {
    float bias[kTaskOutputs];
    const int64_t bias_size = static_cast<int64_t>(dtype_size(p.bias_dtype));
    for (int64_t done = 0; done < count; done += kTaskOutputs) {
      const int64_t n = min(kTaskOutputs, count - done);
      load_row(
          static_cast<const char*>(p.bias.data) + (begin + done) * p.bias.stride[0] * bias_size,
          p.bias_dtype, p.bias.stride[0], n, bias);
      for (int64_t i = 0; i < n; ++i) values[done + i] += bias[i];
    }
  }
  char* to = row_of(p.out, p.out_dtype, row) +
             begin * p.out.stride[1] * static_cast<int64_t>(dtype_size(p.out_dtype));
  if (to != reinterpret_cast<char*>(values))
    store_row(values, count, to, p.out_dtype, p.out.stride[1]);
}

void linear_few_rows(const LinearParams& p, const Exec& exec) {
  float* x = static_cast<float*>(exec.workspace);
  const int64_t row_stride = padded(p.in_features);
  std::memset(x, 0, sizeof(float) * p.rows * row_stride);
  for (int64_t row = 0; row < p.rows; ++row)
    load_row(row_of(p.x, p.dtype, row), p.dtype, p.x.stride[1], p.in_features,
             x + row * row_stride);

  exec.context.thread_pool().parallel_for(
      (p.out_features + kTaskOutputs - 1) / kTaskOutputs, exec.context.num_threads(),
      [&](int64_t task, int) {
        float out[kMaxFewRows * kTaskOutputs];
        const int64_t begin = task * kTaskOutputs;
        const int64_t count = min(kTaskOutputs, p.out_features - begin);
        with_type(p.weight_dtype, [&](auto* type) {
          few_rows<std::remove_pointer_t<decltype(type)>>(p, x, begin, count, out);
        });
        for (int64_t row = 0; row < p.rows; ++row)
          finish_row(p, out + row * kTaskOutputs, row, begin, count);
      });
}

// --- Many rows ----------------------------------------------------------------------------------

// A task is a block of rows by a panel of outputs. Fixed, so that results do not depend on the
// number of threads.
constexpr int64_t kBlockRows = 256;
constexpr int64_t kPanel = 128;
constexpr int64_t kMaxBlasStride = INT32_MAX;

// BLAS takes float32 matrices of contiguous rows that do not overlap.
bool blas_can_use(DType dtype, int64_t row_stride, int64_t stride, int64_t cols) {
  return dtype == DType::float32 && stride == 1 && row_stride >= cols &&
         row_stride <= kMaxBlasStride;
}

// Where an operand cannot be used in place it is converted: x once, the others per worker.
struct ManyRows {
  bool stage_x, stage_weight, stage_out;

  explicit ManyRows(const LinearParams& p)
      : stage_x(!blas_can_use(p.dtype, p.x.stride[0], p.x.stride[1], p.in_features)),
        stage_weight(!blas_can_use(p.weight_dtype, p.weight_row_stride, 1, p.in_features)),
        stage_out(!blas_can_use(p.out_dtype, p.out.stride[0], p.out.stride[1], p.out_features)) {}

  float* shared(const LinearParams& p, Scratch& scratch) const {
    return scratch.floats(stage_x ? p.rows * p.in_features : 0);
  }
  struct Worker {
    float *weight, *out;
  };
  Worker worker(const LinearParams& p, Scratch& scratch) const {
    float* weight = scratch.floats(stage_weight ? kPanel * p.in_features : 0);
    float* out = scratch.floats(stage_out ? kBlockRows * kPanel : 0);
    return {weight, out};
  }
  size_t shared_bytes(const LinearParams& p) const {
    Scratch scratch = Scratch::nowhere();
    shared(p, scratch);
    return scratch.used();
  }
  size_t worker_bytes(const LinearParams& p) const {
    Scratch scratch = Scratch::nowhere();
    worker(p, scratch);
    return scratch.used();
  }
};

void linear_many_rows(const LinearParams& p, const Exec& exec) {
  const ManyRows plan(p);
  Scratch scratch(exec.workspace);
  float* staged_x = plan.shared(p, scratch);
  ThreadPool& pool = exec.context.thread_pool();
  if (plan.stage_x)
    pool.parallel_for(p.rows, exec.context.num_threads(), [&](int64_t row, int) {
      load_row(row_of(p.x, p.dtype, row), p.dtype, p.x.stride[1], p.in_features,
               staged_x + row * p.in_features);
    });
  const float* x = plan.stage_x ? staged_x : static_cast<const float*>(p.x.data);
  const int64_t ldx = plan.stage_x ? p.in_features : p.x.stride[0];

  char* worker_memory = static_cast<char*>(exec.workspace) + scratch.used();
  const size_t worker_bytes = plan.worker_bytes(p);
  const int workers =
      worker_bytes == 0
          ? exec.context.num_threads()
          : workers_with_scratch(exec.workspace_bytes - scratch.used(), worker_bytes, exec.context);
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel;
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  const int64_t weight_row_bytes =
      p.weight_row_stride * static_cast<int64_t>(dtype_size(p.weight_dtype));
  pool.parallel_for(panels * blocks, workers, [&](int64_t task, int worker) {
    const int64_t row = task % blocks * kBlockRows, rows = min(kBlockRows, p.rows - row);
    const int64_t begin = task / blocks * kPanel, count = min(kPanel, p.out_features - begin);
    Scratch piece(worker_memory + worker * worker_bytes);
    const ManyRows::Worker staged = plan.worker(p, piece);

    const char* panel = static_cast<const char*>(p.weight) + begin * weight_row_bytes;
    if (plan.stage_weight)
      for (int64_t o = 0; o < count; ++o)
        load_row(panel + o * weight_row_bytes, p.weight_dtype, 1, p.in_features,
                 staged.weight + o * p.in_features);
    const float* weight = plan.stage_weight ? staged.weight : reinterpret_cast<const float*>(panel);
    const int64_t ldw = plan.stage_weight ? p.in_features : p.weight_row_stride;
    float* out = plan.stage_out ? staged.out
                                : static_cast<float*>(p.out.data) + row * p.out.stride[0] + begin;
    const int64_t ldo = plan.stage_out ? kPanel : p.out.stride[0];
    sgemm_nt(rows, count, p.in_features, x + row * ldx, ldx, weight, ldw, out, ldo);
    if (plan.stage_out || p.bias)
      for (int64_t r = 0; r < rows; ++r) finish_row(p, out + r * ldo, row + r, begin, count);
  });
}

}  // namespace

size_t linear_workspace_size(const LinearParams& p, const Context& context) {
  if (p.rows <= kMaxFewRows) return sizeof(float) * p.rows * padded(p.in_features);
  const ManyRows plan(p);
  return plan.shared_bytes(p) + plan.worker_bytes(p) * static_cast<size_t>(context.num_threads());
}

void linear(const LinearParams& p, const Exec& exec) {
  if (p.rows <= kMaxFewRows)
    linear_few_rows(p, exec);
  else
    linear_many_rows(p, exec);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
