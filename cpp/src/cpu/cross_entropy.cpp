// The cross entropy on the CPU, a row at a time, in pieces that stay in the first-level cache.
#include "../cross_entropy_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "float64.h"
#include "row.h"
#include "vec_math.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

constexpr int64_t kPiece = 1024;
constexpr int64_t kTaskRows = 4;
// What an exponential costs, in multiply-adds.
constexpr int64_t kWorkOfExp = 16;

int64_t target_of(const CrossEntropyFwdParams& p, int64_t row) {
  return integer_at(p.targets.data, p.index_dtype, row * p.targets.stride[0]);
}

// Elements [begin, begin + n) of a row, and as many as fill a vector with `padding`.
void load_piece(const CrossEntropyFwdParams& p, int64_t row, int64_t begin, int64_t n,
                float padding, float* piece) {
  const int64_t size = static_cast<int64_t>(dtype_size(p.dtype));
  load_row(row_of(p.logits, p.dtype, row) + begin * p.logits.stride[1] * size, p.dtype,
           p.logits.stride[1], n, piece);
  for (int64_t i = n; i % kLanes != 0; ++i) piece[i] = padding;
}

float logit_at(const CrossEntropyFwdParams& p, int64_t row, int64_t column) {
  float logit;
  const int64_t size = static_cast<int64_t>(dtype_size(p.dtype));
  load_row(row_of(p.logits, p.dtype, row) + column * p.logits.stride[1] * size, p.dtype, 1, 1,
           &logit);
  return logit;
}

float log_sum_exp(const CrossEntropyFwdParams& p, int64_t row) {
  const float least = -__builtin_inff();
  float piece[kPiece];
  Vec largest = broadcast(0) + least;
  for (int64_t begin = 0; begin < p.vocab_size; begin += kPiece) {
    const int64_t n = min(kPiece, p.vocab_size - begin);
    load_piece(p, row, begin, n, least, piece);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec v = load(piece + i);
      largest = select(v > largest, v, largest);
    }
  }
  float max_logit = least;
  for (int i = 0; i < kLanes; ++i) max_logit = largest[i] > max_logit ? largest[i] : max_logit;

  Vec sum{};
  for (int64_t begin = 0; begin < p.vocab_size; begin += kPiece) {
    const int64_t n = min(kPiece, p.vocab_size - begin);
    load_piece(p, row, begin, n, least, piece);
    Vec of_piece{};
    for (int64_t i = 0; i < n; i += kLanes) of_piece += exp(load(piece + i) - max_logit);
    sum += of_piece;
  }
  return max_logit + log(broadcast(horizontal_sum(sum)))[0];
}

float* at(const Strided<1>& tensor, int64_t row) {
  return static_cast<float*>(tensor.data) + row * tensor.stride[0];
}

// Losses of rows, where mean_loss sums them.
float* losses(const CrossEntropyFwdParams& p, Scratch& scratch) {
  return p.mean_loss ? scratch.floats(p.rows) : nullptr;
}

int64_t count_rows(const CrossEntropyFwdParams& p) {
  int64_t count = 0;
  for (int64_t row = 0; row < p.rows; ++row) count += target_of(p, row) != p.ignore_index;
  return count;
}

void differentiate_row(const CrossEntropyBwdParams& p, int64_t row, float dloss) {
  const CrossEntropyFwdParams& fwd = p.fwd;
  const int64_t target = target_of(fwd, row);
  const bool ignored = target == fwd.ignore_index;
  const float lse = *at(fwd.lse, row);
  const int64_t step = p.dlogits.stride[1] * static_cast<int64_t>(dtype_size(p.dlogits.dtype));
  float piece[kPiece];
  for (int64_t begin = 0; begin < fwd.vocab_size; begin += kPiece) {
    const int64_t n = min(kPiece, fwd.vocab_size - begin);
    if (ignored) {
      for (int64_t i = 0; i < n; ++i) piece[i] = 0;
    } else {
      load_piece(fwd, row, begin, n, 0, piece);
      for (int64_t i = 0; i < n; i += kLanes) store(piece + i, dloss * exp(load(piece + i) - lse));
      if (target >= begin && target < begin + n) piece[target - begin] -= dloss;
    }
    store_gradient_row(piece, n, row_of(p.dlogits, p.dlogits.dtype, row) + begin * step,
                       p.dlogits.dtype, p.dlogits.stride[1], p.dlogits.accumulate);
  }
}

template <typename Body>
void for_each_row(const CrossEntropyFwdParams& p, const Exec& exec, const Body& body) {
  exec.context.thread_pool().parallel_for(
      ceil_div(p.rows, kTaskRows), useful_workers(kWorkOfExp * p.rows * p.vocab_size, exec.context),
      [&](int64_t task, int) {
        const int64_t end = min((task + 1) * kTaskRows, p.rows);
        for (int64_t row = task * kTaskRows; row < end; ++row) body(row);
      });
}

}  // namespace

size_t cross_entropy_fwd_workspace_size(const CrossEntropyFwdParams& p, const Context&) {
  if (p.dtype == DType::float64) return 0;
  Scratch scratch = Scratch::nowhere();
  losses(p, scratch);
  return scratch.used();
}

void cross_entropy_fwd(const CrossEntropyFwdParams& p, const Exec& exec) {
  if (p.dtype == DType::float64) return cross_entropy_fwd_float64(p);
  Scratch scratch(exec.workspace);
  float* row_losses = losses(p, scratch);
  for_each_row(p, exec, [&](int64_t row) {
    const int64_t target = target_of(p, row);
    const bool ignored = target == p.ignore_index;
    const float lse = ignored && !p.lse ? 0 : log_sum_exp(p, row);
    const float loss = ignored ? 0 : lse - logit_at(p, row, target);
    if (p.lse) *at(p.lse, row) = lse;
    if (p.loss) *at(p.loss, row) = loss;
    if (row_losses) row_losses[row] = loss;
  });
  if (!row_losses) return;
  double sum = 0;
  for (int64_t row = 0; row < p.rows; ++row) sum += row_losses[row];
  *at(p.mean_loss, 0) = static_cast<float>(sum / static_cast<double>(count_rows(p)));
}

size_t cross_entropy_bwd_workspace_size(const CrossEntropyBwdParams&, const Context&) {
  return 0;
}

void cross_entropy_bwd(const CrossEntropyBwdParams& p, const Exec& exec) {
  if (p.fwd.dtype == DType::float64) return cross_entropy_bwd_float64(p);
  const float of_mean =
      p.dmean_loss ? *at(p.dmean_loss, 0) / static_cast<float>(count_rows(p.fwd)) : 0;
  for_each_row(p.fwd, exec, [&](int64_t row) {
    differentiate_row(p, row, p.dloss ? *at(p.dloss, row) : of_mean);
  });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
