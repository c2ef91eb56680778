// The gradients of the RMS norm on the CPU, a row at a time. With n = v / sqrt(mean(v²) + eps) and
// y = weight n: dn = weight dy and dv = (dn - n mean(dn n)) / sqrt(mean(v²) + eps).
#include <cstring>

#include "../rms_norm_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "float64.h"
#include "row.h"
#include "vec_math.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

// dweight is summed over blocks of rows, whatever the number of threads, and then over the blocks:
// at most kMaxBlocks, of at least kMinBlockRows.
constexpr int64_t kMinBlockRows = 16, kMaxBlocks = 64;

int64_t block_rows(const RmsNormFwdParams& p) {
  return max(kMinBlockRows, ceil_div(p.rows, kMaxBlocks));
}

// One worker's memory: rows as floats. Vectors may read and write beyond dim, up to a whole one.
struct Workspace {
  float *r, *z, *weight;
  float* n;      // v, then v scaled
  float* d;      // the gradient of what is at hand
  float* other;  // what is added, or dz
  float* scale;  // of each group

  Workspace(const RmsNormFwdParams& p, Scratch& scratch) {
    for (float** piece : {&r, &z, &weight, &n, &d, &other, &scale})
      *piece = scratch.floats(p.dim + kLanes);
  }

  static size_t bytes(const RmsNormFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

float dot(const float* a, const float* b, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(a + i) * load(b + i);
  if (i < n) sum += load_partial(a + i, n - i) * load_partial(b + i, n - i);
  return horizontal_sum(sum);
}

// A row of an operand that may be absent: false then.
bool load_optional(const Strided<2>& tensor, DType dtype, int64_t row, int64_t dim, float* to) {
  if (tensor) load_row(row_of(tensor, dtype, row), dtype, tensor.stride[1], dim, to);
  return static_cast<bool>(tensor);
}

void add(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(to + i) + load(from + i));
}

// The gradients through `out = value SiLU(z)`: that of z, of a row, and w.d times SiLU(z).
void differentiate_gate(const RmsNormBwdParams& p, const Workspace& w, const float* value,
                        int64_t row) {
  for (int64_t i = 0; i < p.fwd.dim; i += kLanes) {
    const Vec z = load(w.z + i), d = load(w.d + i);
    store(w.other + i, d * load(value + i) * silu_slope(z));
    store(w.d + i, d * silu(z));
  }
  store_gradient_row(w.other, p.fwd.dim, p.dz, row);
}

// Adds a row's share to dweight (dim), unless that is null.
void differentiate_row(const RmsNormBwdParams& p, const Workspace& w, int64_t row, float* dweight) {
  const RmsNormFwdParams& fwd = p.fwd;
  const int64_t dim = fwd.dim, group = fwd.group_size;
  load_optional(fwd.x, fwd.dtype, row, dim, w.r);
  if (load_optional(fwd.residual, fwd.residual_dtype, row, dim, w.other)) add(w.r, w.other, dim);
  load_optional(fwd.z, fwd.z_dtype, row, dim, w.z);
  load_optional(p.dout, p.dout_dtype, row, dim, w.d);

  const bool gate_first = fwd.z && !fwd.norm_before_gate;
  for (int64_t i = 0; i < dim; i += kLanes)
    store(w.n + i, gate_first ? load(w.r + i) * silu(load(w.z + i)) : load(w.r + i));
  for (int64_t begin = 0; begin < dim; begin += group) {
    float* n = w.n + begin;
    const float mean = dot(n, n, group) / static_cast<float>(group);
    const float scale = 1.0f / __builtin_sqrtf(mean + fwd.eps);
    for (int64_t i = 0; i < group; ++i) n[i] *= scale;
    w.scale[begin / group] = scale;
  }

  if (fwd.z && fwd.norm_before_gate) {
    for (int64_t i = 0; i < dim; i += kLanes)
      store(w.other + i, load(w.n + i) * (fwd.weight ? load(w.weight + i) : broadcast(1.0f)));
    differentiate_gate(p, w, w.other, row);
  }
  if (dweight)
    for (int64_t i = 0; i < dim; i += kLanes)
      store(dweight + i, load(dweight + i) + load(w.d + i) * load(w.n + i));
  if (fwd.weight)
    for (int64_t i = 0; i < dim; i += kLanes) store(w.d + i, load(w.d + i) * load(w.weight + i));
  for (int64_t begin = 0; begin < dim; begin += group) {
    float *n = w.n + begin, *d = w.d + begin;
    const float mean = dot(d, n, group) / static_cast<float>(group);
    const float scale = w.scale[begin / group];
    for (int64_t i = 0; i < group; ++i) d[i] = scale * (d[i] - n[i] * mean);
  }
  if (gate_first) differentiate_gate(p, w, w.r, row);

  if (load_optional(p.dresidual_out, p.dresidual_out_dtype, row, dim, w.other))
    add(w.d, w.other, dim);
  store_gradient_row(w.d, dim, p.dx, row);
  store_gradient_row(w.d, dim, p.dresidual, row);
}

// The sums over each block of rows, one after the other.
int64_t sum_stride(const RmsNormFwdParams& p) {
  return ceil_div(p.dim, kLanes) * kLanes;
}
float* block_sums(const RmsNormBwdParams& p, int64_t blocks, Scratch& scratch) {
  return p.dweight ? scratch.floats(blocks * sum_stride(p.fwd)) : nullptr;
}

}  // namespace

size_t rms_norm_bwd_workspace_size(const RmsNormBwdParams& p, const Context& context) {
  Scratch scratch = Scratch::nowhere();
  if (p.fwd.dtype == DType::float64) {
    scratch.bytes(Scratch::product(static_cast<size_t>(p.fwd.dim), 3 * sizeof(double)));
    return scratch.used();
  }
  block_sums(p, ceil_div(p.fwd.rows, block_rows(p.fwd)), scratch);
  scratch.bytes(
      Scratch::product(Workspace::bytes(p.fwd), static_cast<size_t>(context.num_threads())));
  return scratch.used();
}

void rms_norm_bwd(const RmsNormBwdParams& p, const Exec& exec) {
  const RmsNormFwdParams& fwd = p.fwd;
  if (fwd.dtype == DType::float64)
    return rms_norm_bwd_float64(p, static_cast<double*>(exec.workspace));
  const int64_t rows_per_block = block_rows(fwd), blocks = ceil_div(fwd.rows, rows_per_block);
  Scratch scratch(exec.workspace);
  float* sums = block_sums(p, blocks, scratch);
  const Exec rest = scratch.rest(exec);
  const size_t bytes = Workspace::bytes(fwd);
  exec.context.thread_pool().parallel_for(
      blocks, workers_with_scratch(rest, bytes, 3 * fwd.rows * fwd.dim),
      [&](int64_t block, int worker) {
        Scratch own(static_cast<char*>(rest.workspace) + worker * bytes);
        const Workspace w(fwd, own);
        std::memset(w.r, 0, bytes);
        if (fwd.weight)
          load_row(fwd.weight.data, fwd.weight_dtype, fwd.weight.stride[0], fwd.dim, w.weight);
        float* dweight = sums ? sums + block * sum_stride(fwd) : nullptr;
        if (dweight) std::memset(dweight, 0, sizeof(float) * sum_stride(fwd));
        const int64_t begin = block * rows_per_block, end = min(begin + rows_per_block, fwd.rows);
        for (int64_t row = begin; row < end; ++row) differentiate_row(p, w, row, dweight);
      });
  if (!sums) return;
  for (int64_t block = 1; block < blocks; ++block)
    add(sums, sums + block * sum_stride(fwd), sum_stride(fwd));
  store_gradient_row(sums, fwd.dim, p.dweight.data, p.dweight.dtype, p.dweight.stride[0],
                     p.dweight.accumulate);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
