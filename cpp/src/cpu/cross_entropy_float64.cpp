// The cross entropy and its gradient in float64.
#include "float64.h"

namespace ssmcore::cpu {

using namespace float64;

namespace {

double log_sum_exp(const CrossEntropyFwdParams& p, int64_t row) {
  double largest = at(p.logits, row, 0), sum = 0;
  for (int64_t v = 1; v < p.vocab_size; ++v) largest = std::fmax(largest, at(p.logits, row, v));
  for (int64_t v = 0; v < p.vocab_size; ++v) sum += std::exp(at(p.logits, row, v) - largest);
  return largest + std::log(sum);
}

int64_t count_rows(const CrossEntropyFwdParams& p) {
  int64_t count = 0;
  for (int64_t row = 0; row < p.rows; ++row)
    count += integer(p.targets, p.index_dtype, row) != p.ignore_index;
  return count;
}

}  // namespace

void cross_entropy_fwd_float64(const CrossEntropyFwdParams& p) {
  double sum = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t target = integer(p.targets, p.index_dtype, row);
    const double lse = log_sum_exp(p, row);
    const double loss = target == p.ignore_index ? 0 : lse - at(p.logits, row, target);
    if (p.lse) at(p.lse, row) = lse;
    if (p.loss) at(p.loss, row) = loss;
    sum += loss;
  }
  if (p.mean_loss) at(p.mean_loss, 0) = sum / static_cast<double>(count_rows(p));
}

void cross_entropy_bwd_float64(const CrossEntropyBwdParams& p) {
  const CrossEntropyFwdParams& fwd = p.fwd;
  const double of_mean =
      p.dmean_loss ? at(p.dmean_loss, 0) / static_cast<double>(count_rows(fwd)) : 0;
  for (int64_t row = 0; row < fwd.rows; ++row) {
    const int64_t target = integer(fwd.targets, fwd.index_dtype, row);
    const double dloss = p.dloss ? at(p.dloss, row) : of_mean;
    for (int64_t v = 0; v < fwd.vocab_size; ++v) {
      const double p_v = std::exp(at(fwd.logits, row, v) - at(fwd.lse, row));
      put(p.dlogits, target == fwd.ignore_index ? 0 : dloss * (p_v - (v == target)), row, v);
    }
  }
}

}  // namespace ssmcore::cpu
