/* Continues a text with a byte-level model (token ids are bytes), always taking the likeliest byte:
 *
 *     generate FOLDER PROMPT
 *
 * FOLDER holds config.json and model.safetensors. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ssmcore/c_api.h"

enum { kBytes = 256 }; /* to generate */

static void check(ssmcore_status status) {
  if (status == SSMCORE_OK) return;
  fprintf(stderr, "generate: %s\n", ssmcore_last_error());
  exit(2);
}

/* A contiguous tensor in host memory. */
static ssmcore_tensor tensor(void* data, ssmcore_dtype dtype, int32_t ndim, const int64_t* shape) {
  const ssmcore_tensor made = {.data = data,
                               .device = {SSMCORE_DEVICE_CPU, 0},
                               .ndim = ndim,
                               .dtype = dtype,
                               .shape = shape};
  return made;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s FOLDER PROMPT\n", argv[0]);
    return 2;
  }
  const unsigned char* prompt = (const unsigned char*)argv[2];

  ssmcore_context* context;
  ssmcore_model* model;
  ssmcore_state* state;
  check(ssmcore_context_create(NULL, &context));
  check(ssmcore_model_load(context, argv[1], NULL, &model));
  check(ssmcore_state_create(model, 1, NULL, &state));
  ssmcore_model_info info = SSMCORE_INIT(ssmcore_model_info);
  check(ssmcore_model_get_info(model, &info));

  const ssmcore_dtype int32 = SSMCORE_INT32, float32 = SSMCORE_FLOAT32;
  const int64_t length = (int64_t)strlen(argv[2]);
  const int64_t prompt_shape[] = {1, length}, logits_shape[] = {1, info.vocab_size}, one[] = {1};
  int32_t* ids = malloc((size_t)length * sizeof *ids);
  float* scores = malloc((size_t)info.vocab_size * sizeof *scores);
  if (!ids || !scores) return 2;
  for (int64_t i = 0; i < length; ++i) ids[i] = prompt[i];
  const ssmcore_tensor prompt_ids = tensor(ids, int32, 2, prompt_shape);
  const ssmcore_tensor logits = tensor(scores, float32, 2, logits_shape);

  ssmcore_model_prefill_args prefill = SSMCORE_INIT(ssmcore_model_prefill_args);
  prefill.token_ids = &prompt_ids;
  prefill.state = state;
  prefill.logits = &logits; /* of the last position alone */
  check(ssmcore_model_prefill(model, &prefill, NULL, 0, NULL));

  int32_t next;
  float cold = 0;
  const ssmcore_tensor next_id = tensor(&next, int32, 1, one);
  const ssmcore_tensor temperature = tensor(&cold, float32, 1, one);
  ssmcore_sample_args sample = SSMCORE_INIT(ssmcore_sample_args);
  sample.logits = &logits;
  sample.temperature = &temperature;
  sample.out = &next_id;
  ssmcore_model_step_args step = SSMCORE_INIT(ssmcore_model_step_args);
  step.token_ids = &next_id;
  step.state = state;
  step.logits = &logits;
  for (int i = 0; i < kBytes; ++i) {
    if (i > 0) check(ssmcore_model_step(model, &step, NULL, 0, NULL));
    check(ssmcore_sample(context, &sample, NULL, 0, NULL));
    putchar(next);
    fflush(stdout);
  }

  free(scores);
  free(ids);
  ssmcore_state_free(state);
  ssmcore_model_free(model);
  ssmcore_context_destroy(context);
  return 0;
}
