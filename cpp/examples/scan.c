/* Runs one selective scan on arrays of its own, and compares it with the recurrence written out. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "ssmcore/c_api.h"

enum { kBatch = 2, kDim = 48, kSeqlen = 300, kDstate = 16 };

static float u[kBatch][kDim][kSeqlen], delta[kBatch][kDim][kSeqlen], A[kDim][kDstate];
static float B[kBatch][kDstate][kSeqlen], C[kBatch][kDstate][kSeqlen], D[kDim];
static float out[kBatch][kDim][kSeqlen], last_state[kBatch][kDim][kDstate];

/* `count` numbers between `low` and `high`. */
static void fill(float* values, size_t count, float low, float high) {
  for (size_t i = 0; i < count; ++i)
    values[i] = low + (high - low) * (float)rand() / (float)RAND_MAX;
}

/* A contiguous float32 tensor in host memory. */
static ssmcore_tensor tensor(float* data, int32_t ndim, const int64_t* shape) {
  const ssmcore_tensor made = {.data = data,
                               .device = {SSMCORE_DEVICE_CPU, 0},
                               .ndim = ndim,
                               .dtype = SSMCORE_FLOAT32,
                               .shape = shape};
  return made;
}

/* The largest difference between the results and the recurrence in double precision:
 *   h(t) = exp(Δ(t) A) h(t - 1) + Δ(t) B(t) u(t),  out(t) = C(t) h(t) + D u(t),
 *   Δ = softplus(delta) */
static double largest_difference(void) {
  double largest = 0;
  for (int b = 0; b < kBatch; ++b)
    for (int d = 0; d < kDim; ++d) {
      double h[kDstate] = {0};
      for (int t = 0; t < kSeqlen; ++t) {
        const double step = log1p(exp(delta[b][d][t]));
        double y = D[d] * u[b][d][t];
        for (int n = 0; n < kDstate; ++n) {
          h[n] = exp(step * A[d][n]) * h[n] + step * B[b][n][t] * u[b][d][t];
          y += C[b][n][t] * h[n];
        }
        largest = fmax(largest, fabs(y - out[b][d][t]));
      }
      for (int n = 0; n < kDstate; ++n) largest = fmax(largest, fabs(h[n] - last_state[b][d][n]));
    }
  return largest;
}

int main(void) {
  fill(&u[0][0][0], sizeof u / sizeof(float), -1, 1);
  fill(&delta[0][0][0], sizeof delta / sizeof(float), -4, 1);
  fill(&A[0][0], sizeof A / sizeof(float), -8, -0.1f);
  fill(&B[0][0][0], sizeof B / sizeof(float), -1, 1);
  fill(&C[0][0][0], sizeof C / sizeof(float), -1, 1);
  fill(D, kDim, -1, 1);

  const int64_t sequence[] = {kBatch, kDim, kSeqlen}, decay[] = {kDim, kDstate},
                channels[] = {kDim};
  const int64_t coefficients[] = {kBatch, kDstate, kSeqlen}, states[] = {kBatch, kDim, kDstate};
  const ssmcore_tensor t_u = tensor(&u[0][0][0], 3, sequence);
  const ssmcore_tensor t_delta = tensor(&delta[0][0][0], 3, sequence);
  const ssmcore_tensor t_A = tensor(&A[0][0], 2, decay);
  const ssmcore_tensor t_B = tensor(&B[0][0][0], 3, coefficients);
  const ssmcore_tensor t_C = tensor(&C[0][0][0], 3, coefficients);
  const ssmcore_tensor t_D = tensor(D, 1, channels);
  const ssmcore_tensor t_last_state = tensor(&last_state[0][0][0], 3, states);
  const ssmcore_tensor t_out = tensor(&out[0][0][0], 3, sequence);
  const ssmcore_selective_scan_fwd_args args = {.struct_size = sizeof args,
                                                .u = &t_u,
                                                .delta = &t_delta,
                                                .A = &t_A,
                                                .B = &t_B,
                                                .C = &t_C,
                                                .D = &t_D,
                                                .delta_softplus = 1,
                                                .last_state = &t_last_state,
                                                .out = &t_out};

  ssmcore_context* context;
  if (ssmcore_context_create(NULL, &context) != SSMCORE_OK ||
      ssmcore_selective_scan_fwd(context, &args, NULL, 0, NULL) != SSMCORE_OK) {
    fprintf(stderr, "scan: %s\n", ssmcore_last_error());
    return 1;
  }
  ssmcore_context_destroy(context);

  const double difference = largest_difference();
  printf("largest difference %.2g\n", difference);
  return difference < 1e-4 ? 0 : 1;
}
