// Norms, matrix products and embeddings and their gradients in float64.
#include "float64.h"

namespace ssmcore::cpu {

using namespace float64;

namespace {

double norm_input(const RmsNormFwdParams& p, int64_t row, int64_t i) {
  return at(p.x, row, i) + (p.residual ? at(p.residual, row, i) : 0);
}
// The gates before and after the norm.
double gate_before(const RmsNormFwdParams& p, int64_t row, int64_t i) {
  return p.z && !p.norm_before_gate ? silu(at(p.z, row, i)) : 1;
}
double gate_after(const RmsNormFwdParams& p, int64_t row, int64_t i) {
  return p.z && p.norm_before_gate ? silu(at(p.z, row, i)) : 1;
}
double weight_at(const RmsNormFwdParams& p, int64_t i) {
  return p.weight ? at(p.weight, i) : 1;
}

// What the elements of the group from `begin` on are multiplied with.
double scale_of(const RmsNormFwdParams& p, int64_t row, int64_t begin) {
  double squares = 0;
  for (int64_t i = begin; i < begin + p.group_size; ++i) {
    const double v = norm_input(p, row, i) * gate_before(p, row, i);
    squares += v * v;
  }
  return 1 / std::sqrt(squares / static_cast<double>(p.group_size) + p.eps);
}

}  // namespace

void rms_norm_fwd_float64(const RmsNormFwdParams& p) {
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t begin = 0; begin < p.dim; begin += p.group_size) {
      const double scale = scale_of(p, row, begin);
      for (int64_t i = begin; i < begin + p.group_size; ++i) {
        const double r = norm_input(p, row, i);
        const double n = r * gate_before(p, row, i) * scale;
        at(p.out, row, i) = n * weight_at(p, i) * gate_after(p, row, i);
        if (p.residual_out) at(p.residual_out, row, i) = r;
      }
    }
}

void rms_norm_bwd_float64(const RmsNormBwdParams& p, double* scratch) {
  const RmsNormFwdParams& fwd = p.fwd;
  double *n = scratch, *dn = n + fwd.dim, *dweight = dn + fwd.dim;
  for (int64_t i = 0; i < fwd.dim; ++i) dweight[i] = 0;
  for (int64_t row = 0; row < fwd.rows; ++row)
    for (int64_t begin = 0; begin < fwd.dim; begin += fwd.group_size) {
      const int64_t end = begin + fwd.group_size;
      const double scale = scale_of(fwd, row, begin);
      double mean = 0;
      for (int64_t i = begin; i < end; ++i) {
        n[i] = norm_input(fwd, row, i) * gate_before(fwd, row, i) * scale;
        const double dy = at(p.dout, row, i) * gate_after(fwd, row, i);
        dweight[i] += dy * n[i];
        dn[i] = dy * weight_at(fwd, i);
        mean += dn[i] * n[i] / static_cast<double>(fwd.group_size);
      }
      for (int64_t i = begin; i < end; ++i) {
        const double dv = scale * (dn[i] - n[i] * mean);
        if (fwd.z) {
          // By the gate, through whichever product it is in.
          const double dgate = fwd.norm_before_gate ? at(p.dout, row, i) * n[i] * weight_at(fwd, i)
                                                    : dv * norm_input(fwd, row, i);
          put(p.dz, dgate * silu_slope(at(fwd.z, row, i)), row, i);
        }
        const double dr =
            dv * gate_before(fwd, row, i) + (p.dresidual_out ? at(p.dresidual_out, row, i) : 0);
        put(p.dx, dr, row, i);
        put(p.dresidual, dr, row, i);
      }
    }
  for (int64_t i = 0; i < fwd.dim; ++i) put(p.dweight, dweight[i], i);
}

void linear_float64(const LinearParams& p) {
  const auto* weight = static_cast<const double*>(p.weight);
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t o = 0; o < p.out_features; ++o) {
      double sum = p.bias ? at(p.bias, o) : 0;
      for (int64_t i = 0; i < p.in_features; ++i)
        sum += at(p.x, row, i) * weight[o * p.weight_row_stride + i];
      at(p.out, row, o) = sum;
    }
}

void linear_bwd_float64(const LinearBwdParams& p) {
  for (int64_t row = 0; p.dx && row < p.rows; ++row)
    for (int64_t i = 0; i < p.in_features; ++i) {
      double sum = 0;
      for (int64_t o = 0; o < p.out_features; ++o) sum += at(p.dout, row, o) * at(p.weight, o, i);
      put(p.dx, sum, row, i);
    }
  for (int64_t o = 0; o < p.out_features; ++o) {
    double dbias = 0;
    for (int64_t row = 0; row < p.rows; ++row) dbias += at(p.dout, row, o);
    put(p.dbias, dbias, o);
    for (int64_t i = 0; p.dweight && i < p.in_features; ++i) {
      double sum = 0;
      for (int64_t row = 0; row < p.rows; ++row) sum += at(p.dout, row, o) * at(p.x, row, i);
      put(p.dweight, sum, o, i);
    }
  }
}

void embedding_float64(const EmbeddingParams& p) {
  const auto* weight = static_cast<const double*>(p.weight);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t id = integer(p.token_ids, p.index_dtype, row);
    for (int64_t i = 0; i < p.d_model; ++i)
      at(p.out, row, i) = weight[id * p.weight_row_stride + i];
  }
}

void embedding_bwd_float64(const EmbeddingBwdParams& p) {
  const Strided<2>& dweight = p.dweight;
  for (int64_t id = 0; !p.dweight.accumulate && id < p.vocab_size; ++id)
    for (int64_t i = 0; i < p.d_model; ++i) at(dweight, id, i) = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t id = integer(p.token_ids, p.index_dtype, row);
    for (int64_t i = 0; i < p.d_model; ++i) at(dweight, id, i) += at(p.dout, row, i);
  }
}

}  // namespace ssmcore::cpu
