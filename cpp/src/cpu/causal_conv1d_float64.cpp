// The causal convolution and its gradients in float64, one output at a time.
#include "float64.h"

namespace ssmcore::cpu {

using namespace float64;

namespace {

// One row's inputs, counted from its first step; those before are its initial state.
struct Row {
  const CausalConv1dFwdParams& p;
  int64_t batch, begin, end, slot;

  Row(const CausalConv1dFwdParams& p, int64_t row) : p(p), batch(row), begin(0), end(p.seqlen) {
    slot = p.state_indices ? integer(p.state_indices, DType::int32, row) : row;
    if (!p.cu_seqlens) return;
    batch = 0;
    begin = integer(p.cu_seqlens, DType::int32, row);
    end = integer(p.cu_seqlens, DType::int32, row + 1);
  }
  int64_t length() const { return end - begin; }

  int32_t number(int64_t t) const {
    return static_cast<const int32_t*>(
        p.seq_idx.data)[batch * p.seq_idx.stride[0] + t * p.seq_idx.stride[1]];
  }
  bool is_skipped(int64_t t) const { return p.seq_idx && number(t) < 0; }
  // Whether step t sees input s: one of the state, or a step that is not of another number.
  bool sees(int64_t t, int64_t s) const {
    if (s >= 0) return !p.seq_idx || number(s) == number(t);
    return has_state(s);
  }
  bool has_state(int64_t s) const { return !p.seq_idx && slot >= 0 && s >= -p.state_len; }
  double input(int64_t d, int64_t s) const {
    if (s >= 0) return at(p.x, batch, d, begin + s);
    return p.initial_state && has_state(s) ? at(p.initial_state, slot, d, p.state_len + s) : 0;
  }

  double before_activation(int64_t d, int64_t t) const {
    double sum = p.bias ? at(p.bias, d) : 0;
    for (int64_t k = 0; k < p.width; ++k) {
      const int64_t s = t - p.width + 1 + k;
      if (sees(t, s)) sum += at(p.weight, d, k) * input(d, s);
    }
    return sum;
  }
};

double activate(const CausalConv1dFwdParams& p, double x) {
  return p.activation == Activation::silu ? silu(x) : x;
}

// The gradient before the activation.
double gradient_at(const CausalConv1dBwdParams& p, const Row& row, int64_t d, int64_t t) {
  if (row.is_skipped(t)) return 0;
  const double dout = at(p.dout, row.batch, d, row.begin + t);
  if (p.fwd.activation == Activation::none) return dout;
  return dout * silu_slope(row.before_activation(d, t));
}

double input_gradient(const CausalConv1dBwdParams& p, const Row& row, int64_t d, int64_t s) {
  double sum = 0;
  for (int64_t k = 0; k < p.fwd.width; ++k) {
    const int64_t t = s + p.fwd.width - 1 - k;
    if (t >= 0 && t < row.length() && row.sees(t, s))
      sum += at(p.fwd.weight, d, k) * gradient_at(p, row, d, t);
  }
  const int64_t place = s - (row.length() - p.fwd.state_len);  // in the final state
  if (p.dfinal_state && row.slot >= 0 && place >= 0) sum += at(p.dfinal_state, row.slot, d, place);
  return sum;
}

}  // namespace

void causal_conv1d_fwd_float64(const CausalConv1dFwdParams& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const Row row(p, r);
    for (int64_t d = 0; d < p.dim; ++d) {
      for (int64_t t = 0; t < row.length(); ++t)
        at(p.out, row.batch, d, row.begin + t) =
            row.is_skipped(t) ? 0 : activate(p, row.before_activation(d, t));
      // The states may be the same memory: ascending, each entry is read before it is written.
      for (int64_t i = 0; p.final_state && row.slot >= 0 && i < p.state_len; ++i)
        at(p.final_state, row.slot, d, i) = row.input(d, row.length() - p.state_len + i);
    }
  }
}

void causal_conv1d_bwd_float64(const CausalConv1dBwdParams& p) {
  const int64_t width = p.fwd.width;
  for (int64_t d = 0; d < p.fwd.dim; ++d) {
    double dbias = 0, dweight[kMaxConvWidth] = {};
    for (int64_t r = 0; r < p.fwd.rows; ++r) {
      const Row row(p.fwd, r);
      for (int64_t t = 0; t < row.length(); ++t) {
        const double g = gradient_at(p, row, d, t);
        put(p.dx, input_gradient(p, row, d, t), row.batch, d, row.begin + t);
        if (row.is_skipped(t)) continue;
        dbias += g;
        for (int64_t k = 0; k < width; ++k) {
          const int64_t s = t - width + 1 + k;
          if (row.sees(t, s)) dweight[k] += g * row.input(d, s);
        }
      }
      for (int64_t i = 0; row.slot >= 0 && p.dinitial_state && i < p.fwd.state_len; ++i)
        put(p.dinitial_state, input_gradient(p, row, d, i - p.fwd.state_len), row.slot, d, i);
    }
    put(p.dbias, dbias, d);
    for (int64_t k = 0; k < width; ++k) put(p.dweight, dweight[k], d, k);
  }
}

}  // namespace ssmcore::cpu
