// Matrix products on the CPU, as dot products of rows: both x and the weight are read along their
// contiguous axis, so neither is packed, and a weight is used as stored, whatever its dtype. Few
// rows, as in decoding, stream every weight once; many rows go block by block over panels of the
// weight that stay in cache. An output's bits depend on its own row and weights alone.
#include <cstring>
#include <type_traits>

#include "../linear_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "float64.h"
#include "product.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

// Rows and outputs whose sums are kept in registers together, beside the operands of a step: 24
// sums with 32 registers, 12 with 16.
#if defined(__AVX512F__)
constexpr int kMaxRows = 8;
#else
constexpr int kMaxRows = 4;
#endif
constexpr int kMaxOutputs = 3;
// So few rows are less work than reading the weights is: they take one output after another, as a
// plain stream of memory, which the hardware fetches ahead best by itself.
constexpr int kStreamedRows = 2;

// Rows that share one pass over a panel, and outputs of one panel.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kPanel = 96;
// Panels for each worker, at least, when the rows are few, so that none waits long for another.
constexpr int64_t kPanelsPerWorker = 4;
// What reading a weight from memory costs beside its products, in multiply-adds.
constexpr int64_t kWorkOfStreaming = 4;
// The hardware does not recognise the interleaved rows of several outputs as a stream. Asking for
// their memory in order of address, this far ahead, doubles the rate at which one thread reads
// them. It is asked into the second-level cache: x needs the first.
constexpr int64_t kPrefetchBytes = 12288;
constexpr int kPrefetchLevel = 2;

template <typename Product>
int64_t padded(int64_t n) {
  return (n + Product::kStep - 1) / Product::kStep * Product::kStep;
}

// Some rows of the weight, and how far ahead of its use to fetch it.
template <typename W>
struct Panel {
  const W* weight;
  int64_t row_stride, outputs, k;
  int64_t prefetch_distance;  // elements; 0 where the panel is in cache already

  const W* row(int64_t output) const { return weight + output * row_stride; }
};

// kRows x kOutputs dot products, of rows of x and outputs from `begin` on, into out (kRows,
// kPanel).
template <typename Product, int kRows, int kOutputs>
SSMCORE_INLINE void dot_products(const Panel<typename Product::W>& panel, int64_t begin,
                                 const typename Product::X* x, float* out) {
  using W = typename Product::W;
  using X = typename Product::X;
  constexpr int kRegisters = Product::kRegisters;
  const int64_t x_row_stride = padded<Product>(panel.k);
  Vec sum[kRows][kOutputs] = {};
  using Registers = typename Product::Register[kOutputs][kRegisters];
  const auto accumulate = [&](const Registers& w, const X* xs) {
    for (int v = 0; v < kRegisters; ++v)
      for (int r = 0; r < kRows; ++r) {
        const auto x_r = Product::read_x(xs + r * x_row_stride + v * kLanes);
        for (int o = 0; o < kOutputs; ++o) sum[r][o] = Product::add(sum[r][o], w[o][v], x_r);
      }
  };
  const W* weight = panel.row(begin);
  const W* ahead = weight + panel.prefetch_distance;
  Registers w;
  int64_t i = 0;
  for (; i + Product::kStep <= panel.k; i += Product::kStep) {
    for (int o = 0; o < kOutputs; ++o) {
      Product::read(weight + o * panel.row_stride + i, w[o]);
      if constexpr (kOutputs > 1) {
        __builtin_prefetch(ahead, 0, kPrefetchLevel);
        ahead += Product::kStep;
      }
    }
    accumulate(w, x + i);
  }
  if (i < panel.k) {
    for (int o = 0; o < kOutputs; ++o) {
      W rest[Product::kStep];
      read_partial(weight + o * panel.row_stride + i, panel.k - i, rest);
      Product::read(rest, w[o]);
    }
    accumulate(w, x + i);
  }

  const Vec* sums = &sum[0][0];
  constexpr int kSums = kRows * kOutputs;
  for (int s = 0; s < kSums; s += 4) {
    const auto at = [&](int j) { return sums[s + j < kSums ? s + j : s]; };
    const Quad quad = horizontal_sums(at(0), at(1), at(2), at(3));
    for (int j = 0; j < 4 && s + j < kSums; ++j)
      out[(s + j) / kOutputs * kPanel + begin + (s + j) % kOutputs] = quad[j];
  }
}

template <typename Product, int kRows>
void multiply_rows(const Panel<typename Product::W>& panel, const typename Product::X* x,
                   float* out) {
  int64_t o = 0;
  if constexpr (kRows > kStreamedRows)
    for (; o + kMaxOutputs <= panel.outputs; o += kMaxOutputs)
      dot_products<Product, kRows, kMaxOutputs>(panel, o, x, out);
  for (; o < panel.outputs; ++o) dot_products<Product, kRows, 1>(panel, o, x, out);
}

// `rows` rows, at most kMaxRows, by the panel's outputs into out (rows, kPanel).
template <typename Product, int kRows = kMaxRows>
void multiply(int64_t rows, const Panel<typename Product::W>& panel, const typename Product::X* x,
              float* out) {
  if (rows == kRows) return multiply_rows<Product, kRows>(panel, x, out);
  if constexpr (kRows > 1) multiply<Product, kRows - 1>(rows, panel, x, out);
}

// Adds the bias to the outputs [begin, begin + count) of one row, and stores them.
void finish_row(const LinearParams& p, float* values, int64_t row, int64_t begin, int64_t count) {
  if (p.bias) {
    float bias[kPanel];
    const int64_t bias_size = static_cast<int64_t>(dtype_size(p.bias_dtype));
    load_row(static_cast<const char*>(p.bias.data) + begin * p.bias.stride[0] * bias_size,
             p.bias_dtype, p.bias.stride[0], count, bias);
    for (int64_t i = 0; i < count; ++i) values[i] += bias[i];
  }
  char* to = row_of(p.out, p.out_dtype, row) +
             begin * p.out.stride[1] * static_cast<int64_t>(dtype_size(p.out_dtype));
  store_row(values, count, to, p.out_dtype, p.out.stride[1]);
}

template <typename Product>
void linear_with(const LinearParams& p, const Exec& exec) {
  using W = typename Product::W;
  auto* x = static_cast<typename Product::X*>(exec.workspace);
  const int64_t x_row_stride = padded<Product>(p.in_features);
  const auto stage_row = [&](int64_t row, int) {
    auto* staged = x + row * x_row_stride;
    std::memset(staged, 0, sizeof(*staged) * x_row_stride);
    Product::stage(row_of(p.x, p.dtype, row), p.dtype, p.x.stride[1], p.in_features, staged);
  };
  ThreadPool& pool = exec.context.thread_pool();
  const bool few_rows = p.rows <= kMaxRows;
  const int64_t work_per_weight = few_rows ? p.rows + kWorkOfStreaming : p.rows;
  const int workers =
      useful_workers(work_per_weight * p.in_features * p.out_features, exec.context);
  pool.parallel_for(p.rows, few_rows ? 1 : workers, stage_row);

  int64_t panel_outputs = kPanel;
  if (few_rows) {
    const int64_t group = p.rows > kStreamedRows ? kMaxOutputs : 1;
    const int64_t groups = ceil_div(p.out_features, kPanelsPerWorker * workers * group);
    panel_outputs = min(kPanel, groups * group);
  }
  const int64_t prefetch_distance = few_rows ? kPrefetchBytes / static_cast<int64_t>(sizeof(W)) : 0;
  const int64_t panels = (p.out_features + panel_outputs - 1) / panel_outputs;
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  pool.parallel_for(panels * blocks, workers, [&](int64_t task, int) {
    const int64_t first_row = task % blocks * kBlockRows;
    const int64_t end_row = min(first_row + kBlockRows, p.rows);
    const int64_t begin = task / blocks * panel_outputs;
    const int64_t count = min(panel_outputs, p.out_features - begin);
    const Panel<W> panel{static_cast<const W*>(p.weight) + begin * p.weight_row_stride,
                         p.weight_row_stride, count, p.in_features, prefetch_distance};
    float out[kMaxRows * kPanel];
    for (int64_t row = first_row; row < end_row; row += kMaxRows) {
      const int64_t rows = min(kMaxRows, end_row - row);
      multiply<Product>(rows, panel, x + row * x_row_stride, out);
      for (int64_t r = 0; r < rows; ++r) finish_row(p, out + r * kPanel, row + r, begin, count);
    }
  });
}

}  // namespace

size_t linear_workspace_size(const LinearParams& p, const Context&) {
  const size_t row = static_cast<size_t>(padded<FloatProduct<bfloat16>>(p.in_features));
  return Scratch::product(Scratch::product(sizeof(float), row), static_cast<size_t>(p.rows));
}

void linear(const LinearParams& p, const Exec& exec) {
  if (p.dtype == DType::float64) return linear_float64(p);
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bfloat16 && p.weight_dtype == DType::bfloat16)
    return linear_with<Bfloat16Product>(p, exec);
#endif
  with_type(p.weight_dtype, [&](auto* type) {
    linear_with<FloatProduct<std::remove_pointer_t<decltype(type)>>>(p, exec);
  });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
