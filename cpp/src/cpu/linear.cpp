// Matrix products on the CPU, as dot products of rows: both x and the weight are read along their
// contiguous axis, so neither is packed, and a weight is used as stored, whatever its dtype. Few
// rows, as in decoding, stream every weight once; many rows go block by block over panels of the
// weight that stay in cache. An output's bits depend on its own row and weights alone.
#include <cstring>
#include <type_traits>

#include "../linear_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "row.h"

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

// Rows that share one pass over a panel, and outputs of one panel.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kPanel = 96;
// Outputs of one task when the rows are few: the weight then streams from memory.
constexpr int64_t kFewRowsPanel = 24;
// The hardware hardly prefetches across the interleaved rows of a group: asking for the group after
// the next one nearly doubles the rate at which bfloat16 weights stream from memory.
constexpr int64_t kPrefetchedGroups = 2;

// How weights of each dtype are read: kVecs vectors at a time, from x's elements in the order in
// which `arrange` puts them.
template <typename W>
struct WeightReader {
  static constexpr int kVecs = 1;
  static SSMCORE_INLINE void read(const W* from, Vec* vecs) { vecs[0] = load(from); }
  static void arrange(float*, int64_t) {}
};

// Two bfloat16 are the halves of one 32-bit lane: shifting and masking turn them into floats more
// cheaply than widening does. x is then read as even, then odd elements.
template <>
struct WeightReader<bfloat16> {
  static constexpr int kVecs = 2;
  static SSMCORE_INLINE void read(const bfloat16* from, Vec* vecs) {
    UintVec pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    vecs[0] = bit_cast<Vec>(pairs << 16);
    vecs[1] = bit_cast<Vec>(pairs & 0xffff0000u);
  }
  static void arrange(float* x, int64_t padded) {
    float even_odd[2 * kLanes];
    for (int64_t i = 0; i < padded; i += 2 * kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        even_odd[lane] = x[i + 2 * lane];
        even_odd[kLanes + lane] = x[i + 2 * lane + 1];
      }
      std::memcpy(x + i, even_odd, sizeof(even_odd));
    }
  }
};

template <typename W>
constexpr int64_t kStep = WeightReader<W>::kVecs * kLanes;

template <typename W>
int64_t padded(int64_t n) {
  return (n + kStep<W> - 1) / kStep<W> * kStep<W>;
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
template <int kRows, int kOutputs, typename W>
SSMCORE_INLINE void dot_products(const Panel<W>& panel, int64_t begin, const float* x, float* out) {
  using Reader = WeightReader<W>;
  const int64_t x_row_stride = padded<W>(panel.k);
  Vec sum[kRows][kOutputs] = {};
  const auto accumulate = [&](const W* weights, int64_t stride, const float* xs) {
    Vec w[kOutputs][Reader::kVecs];
    for (int o = 0; o < kOutputs; ++o) {
      Reader::read(weights + o * stride, w[o]);
      __builtin_prefetch(weights + o * stride + panel.prefetch_distance);
    }
    for (int v = 0; v < Reader::kVecs; ++v)
      for (int r = 0; r < kRows; ++r) {
        const Vec x_r = in_register(load(xs + r * x_row_stride + v * kLanes));
        for (int o = 0; o < kOutputs; ++o) sum[r][o] += w[o][v] * x_r;
      }
  };
  const W* weight = panel.row(begin);
  int64_t i = 0;
  for (; i + kStep<W> <= panel.k; i += kStep<W>) accumulate(weight + i, panel.row_stride, x + i);
  if (i < panel.k) {
    W rest[kOutputs][kStep<W>] = {};
    for (int o = 0; o < kOutputs; ++o)
      std::memcpy(rest[o], weight + o * panel.row_stride + i, sizeof(W) * (panel.k - i));
    accumulate(rest[0], kStep<W>, x + i);
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

template <int kRows, typename W>
void multiply_rows(const Panel<W>& panel, const float* x, float* out) {
  int64_t o = 0;
  for (; o + kMaxOutputs <= panel.outputs; o += kMaxOutputs)
    dot_products<kRows, kMaxOutputs>(panel, o, x, out);
  for (; o < panel.outputs; ++o) dot_products<kRows, 1>(panel, o, x, out);
}

// `rows` rows, at most kMaxRows, by the panel's outputs into out (rows, kPanel).
template <typename W, int kRows = kMaxRows>
void multiply(int64_t rows, const Panel<W>& panel, const float* x, float* out) {
  if (rows == kRows) return multiply_rows<kRows>(panel, x, out);
  if constexpr (kRows > 1) multiply<W, kRows - 1>(rows, panel, x, out);
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

template <typename W>
void linear_with(const LinearParams& p, const Exec& exec) {
  float* x = static_cast<float*>(exec.workspace);
  const int64_t x_row_stride = padded<W>(p.in_features);
  const auto stage_row = [&](int64_t row, int) {
    float* staged = x + row * x_row_stride;
    load_row(row_of(p.x, p.dtype, row), p.dtype, p.x.stride[1], p.in_features, staged);
    std::memset(staged + p.in_features, 0, sizeof(float) * (x_row_stride - p.in_features));
    WeightReader<W>::arrange(staged, x_row_stride);
  };
  ThreadPool& pool = exec.context.thread_pool();
  const int threads = exec.context.num_threads();
  const bool few_rows = p.rows <= kMaxRows;
  pool.parallel_for(p.rows, few_rows ? 1 : threads, stage_row);
  const int64_t panel_outputs = few_rows ? kFewRowsPanel : kPanel;
  const int64_t prefetch_distance =
      few_rows ? kPrefetchedGroups * kMaxOutputs * p.weight_row_stride : 0;
  const int64_t panels = (p.out_features + panel_outputs - 1) / panel_outputs;
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  pool.parallel_for(panels * blocks, threads, [&](int64_t task, int) {
    const int64_t first_row = task % blocks * kBlockRows;
    const int64_t end_row = min(first_row + kBlockRows, p.rows);
    const int64_t begin = task / blocks * panel_outputs;
    const int64_t count = min(panel_outputs, p.out_features - begin);
    const Panel<W> panel{static_cast<const W*>(p.weight) + begin * p.weight_row_stride,
                         p.weight_row_stride, count, p.in_features, prefetch_distance};
    float out[kMaxRows * kPanel];
    for (int64_t row = first_row; row < end_row; row += kMaxRows) {
      const int64_t rows = min(kMaxRows, end_row - row);
      multiply(rows, panel, x + row * x_row_stride, out);
      for (int64_t r = 0; r < rows; ++r) finish_row(p, out + r * kPanel, row + r, begin, count);
    }
  });
}

}  // namespace

size_t linear_workspace_size(const LinearParams& p, const Context&) {
  return sizeof(float) * static_cast<size_t>(p.rows) * padded<bfloat16>(p.in_features);
}

void linear(const LinearParams& p, const Exec& exec) {
  with_type(p.weight_dtype,
            [&](auto* type) { linear_with<std::remove_pointer_t<decltype(type)>>(p, exec); });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
