/* The C interface from C: language models, their states, and threads. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "c_api_check.h"
#include "ssmcore/c_api.h"

enum { kVocabSize = 256, kLength = 256 };
static const char kPrompt[] =
    "It is a truth universally acknowledged, that a single man in possession of";

static void read_golden(char* text) {
  FILE* file = fopen(SSMCORE_TEST_DATA_DIR "/golden_mamba1_prose.txt", "rb");
  CHECK(file && fread(text, 1, kLength, file) == kLength);
  fclose(file);
}

/* The prompt into a slot of `state`, with the logits of its last position. */
static ssmcore_status prefill_slot(const ssmcore_model* model, ssmcore_state* state, int32_t slot,
                                   float* logits) {
  int32_t ids[sizeof kPrompt - 1];
  for (size_t i = 0; i < sizeof kPrompt - 1; ++i) ids[i] = (unsigned char)kPrompt[i];
  Array arrays[3];
  const ssmcore_model_prefill_args args = {
      .struct_size = sizeof args,
      .token_ids = array(&arrays[0], ids, kInt32, 2, 1, sizeof kPrompt - 1, 0),
      .state = state,
      .state_indices = array(&arrays[1], &slot, kInt32, 1, 1, 0, 0),
      .logits = array(&arrays[2], logits, kFloat32, 2, 1, kVocabSize, 0)};
  return ssmcore_model_prefill(model, &args, NULL, 0, NULL);
}

static ssmcore_status step_slot(const ssmcore_model* model, ssmcore_state* state, int32_t slot,
                                int32_t id, float* logits) {
  Array arrays[3];
  const ssmcore_model_step_args args = {
      .struct_size = sizeof args,
      .token_ids = array(&arrays[0], &id, kInt32, 1, 1, 0, 0),
      .state = state,
      .state_indices = array(&arrays[1], &slot, kInt32, 1, 1, 0, 0),
      .logits = array(&arrays[2], logits, kFloat32, 2, 1, kVocabSize, 0)};
  return ssmcore_model_step(model, &args, NULL, 0, NULL);
}

static int32_t likeliest(const ssmcore_context* context, float* logits) {
  int32_t id = -1;
  float cold = 0;
  Array arrays[3];
  const ssmcore_sample_args args = {
      .struct_size = sizeof args,
      .logits = array(&arrays[0], logits, kFloat32, 2, 1, kVocabSize, 0),
      .temperature = array(&arrays[1], &cold, kFloat32, 1, 1, 0, 0),
      .out = array(&arrays[2], &id, kInt32, 1, 1, 0, 0)};
  CHECK_OK(ssmcore_sample(context, &args, NULL, 0, NULL));
  return id;
}

/* `count` bytes that follow, the first being the likeliest of `logits`. */
static void continue_slot(const ssmcore_context* context, const ssmcore_model* model,
                          ssmcore_state* state, int32_t slot, float* logits, char* text,
                          int count) {
  for (int i = 0; i < count; ++i) {
    const int32_t id = likeliest(context, logits);
    text[i] = (char)id;
    CHECK_OK(step_slot(model, state, slot, id, logits));
  }
}

/* The prompt and half of its continuation in one slot, the rest in others that were copied. */
static void test_golden_text(const ssmcore_context* context, const ssmcore_model* model) {
  char golden[kLength], text[kLength];
  read_golden(golden);
  ssmcore_state *state, *copy;
  CHECK_OK(ssmcore_state_create(model, 3, NULL, &state));
  float logits[kVocabSize], logits_of_copy[kVocabSize];
  CHECK_OK(prefill_slot(model, state, 2, logits));
  continue_slot(context, model, state, 2, logits, text, kLength / 2);
  CHECK_OK(ssmcore_state_copy_slot(state, 2, 0, NULL));
  CHECK_OK(ssmcore_state_reset_slot(state, 2, NULL));
  CHECK_OK(ssmcore_state_clone(state, NULL, &copy));

  memcpy(logits_of_copy, logits, sizeof logits);
  continue_slot(context, model, state, 0, logits, text + kLength / 2, kLength / 2);
  CHECK(memcmp(text, golden, kLength) == 0);
  memset(text + kLength / 2, 0, kLength / 2);
  continue_slot(context, model, copy, 0, logits_of_copy, text + kLength / 2, kLength / 2);
  CHECK(memcmp(text, golden, kLength) == 0);

  /* slot 2 is at the start again: as in a new state */
  float logits_of_start[kVocabSize];
  CHECK_OK(prefill_slot(model, state, 2, logits));
  CHECK_OK(prefill_slot(model, copy, 1, logits_of_start));
  CHECK(memcmp(logits, logits_of_start, sizeof logits) == 0);
  ssmcore_state_free(copy);
  ssmcore_state_free(state);
}

static void test_model(ssmcore_context* context, const ssmcore_model* model) {
  ssmcore_model_info info = SSMCORE_INIT(ssmcore_model_info);
  CHECK_OK(ssmcore_model_get_info(model, &info));
  CHECK(strcmp(info.model_type, "mamba") == 0);
  CHECK(info.vocab_size == kVocabSize && info.d_model > 0 && info.n_layer > 0);
  CHECK(info.num_parameters > 3000000 && info.dim == 2 * info.d_model && info.dstate == 16);
  CHECK(info.num_eos_token_ids == 1 && info.eos_token_ids[0] == 0);
  CHECK(memcmp(&info.dtype, &kFloat32, sizeof kFloat32) == 0);
  struct {
    ssmcore_model_info known;
    int64_t unknown;
  } newer = {{.struct_size = sizeof newer}, 5};
  CHECK_OK(ssmcore_model_get_info(model, &newer.known));
  CHECK(newer.known.d_model == info.d_model && newer.unknown == 0);
  newer.known.struct_size = 0;
  CHECK_FAILS(ssmcore_model_get_info(model, &newer.known), SSMCORE_INVALID_ARGUMENT, "struct_size");

  ssmcore_model_options options = SSMCORE_INIT(ssmcore_model_options);
  options.dtype = kInt32;
  ssmcore_model* other = NULL;
  CHECK_FAILS(ssmcore_model_load(context, SSMCORE_TEST_MODEL_DIR, &options, &other),
              SSMCORE_INVALID_ARGUMENT, "dtype is int32");
  CHECK_FAILS(ssmcore_model_load(context, "/no/such/folder", NULL, &other), SSMCORE_NOT_FOUND,
              "/no/such/folder");
  CHECK(other == NULL);
  CHECK_FAILS(ssmcore_model_load(context, NULL, NULL, &other), SSMCORE_INVALID_ARGUMENT,
              "folder is NULL");
  CHECK_FAILS(ssmcore_model_load(NULL, SSMCORE_TEST_MODEL_DIR, NULL, &other),
              SSMCORE_INVALID_ARGUMENT, "context is NULL");
  ssmcore_model_free(NULL);

  ssmcore_state* state = NULL;
  float logits[kVocabSize];
  CHECK_FAILS(ssmcore_state_create(model, 0, NULL, &state), SSMCORE_INVALID_ARGUMENT,
              "num_slots is 0");
  CHECK_FAILS(ssmcore_state_create(NULL, 1, NULL, &state), SSMCORE_INVALID_ARGUMENT,
              "model is NULL");
  CHECK_FAILS(ssmcore_state_clone(NULL, NULL, &state), SSMCORE_INVALID_ARGUMENT, "state is NULL");
  CHECK_FAILS(ssmcore_state_reset_slot(NULL, 0, NULL), SSMCORE_INVALID_ARGUMENT, "state is NULL");
  CHECK_FAILS(ssmcore_state_copy_slot(NULL, 0, 0, NULL), SSMCORE_INVALID_ARGUMENT, "state is NULL");
  CHECK_FAILS(prefill_slot(model, NULL, 0, logits), SSMCORE_INVALID_ARGUMENT, "state is missing");
  CHECK_OK(ssmcore_state_create(model, 2, NULL, &state));
  int64_t slots = 0;
  CHECK_OK(ssmcore_state_num_slots(state, &slots));
  CHECK(slots == 2);
  CHECK_FAILS(ssmcore_state_reset_slot(state, 2, NULL), SSMCORE_INVALID_ARGUMENT, "slot is 2");
  CHECK_FAILS(ssmcore_state_copy_slot(state, 0, -1, NULL), SSMCORE_INVALID_ARGUMENT, "to is -1");
  CHECK_FAILS(prefill_slot(NULL, state, 0, logits), SSMCORE_INVALID_ARGUMENT, "model is NULL");
  CHECK_FAILS(prefill_slot(model, state, 5, logits), SSMCORE_INVALID_ARGUMENT, "2 slots");
  CHECK_FAILS(step_slot(model, state, 0, kVocabSize, logits), SSMCORE_INVALID_ARGUMENT,
              "holds 256");
  CHECK_OK(ssmcore_model_load(context, SSMCORE_TEST_MODEL_DIR, NULL, &other));
  CHECK_FAILS(prefill_slot(other, state, 0, logits), SSMCORE_INVALID_ARGUMENT, "another model");
  ssmcore_model_free(other);
  ssmcore_state_free(state);
}

/* ---- Threads ---- */

typedef struct {
  const ssmcore_model* model;
  int32_t slot; /* out of range, and different in each thread */
} Failure;

static void* fail_repeatedly(void* argument) {
  const Failure* failure = argument;
  char words[32];
  snprintf(words, sizeof words, "slot is %d", failure->slot);
  CHECK(strcmp(ssmcore_last_error(), "") == 0);
  ssmcore_state* state;
  CHECK_OK(ssmcore_state_create(failure->model, 1, NULL, &state));
  for (int i = 0; i < 1000; ++i)
    CHECK_FAILS(ssmcore_state_reset_slot(state, failure->slot, NULL), SSMCORE_INVALID_ARGUMENT,
                words);
  ssmcore_state_free(state);
  return NULL;
}

static void test_threads(const ssmcore_model* model) {
  Failure failures[] = {{model, 7}, {model, 8}};
  pthread_t threads[2];
  for (int i = 0; i < 2; ++i)
    CHECK(pthread_create(&threads[i], NULL, fail_repeatedly, &failures[i]) == 0);
  for (int i = 0; i < 2; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
}

/* Freed in the wrong order, what is in use stays. */
static void test_free_order(ssmcore_context* context, ssmcore_model* model) {
  ssmcore_state* state;
  float logits[kVocabSize];
  CHECK_OK(ssmcore_state_create(model, 1, NULL, &state));
  ssmcore_context_destroy(context);
  CHECK_OK(prefill_slot(model, state, 0, logits));
  ssmcore_model_free(model);
  CHECK_OK(ssmcore_state_reset_slot(state, 0, NULL));
  ssmcore_state_free(state);
}

int main(void) {
  ssmcore_context* context;
  ssmcore_model* model;
  CHECK_OK(ssmcore_context_create(NULL, &context));
  CHECK_OK(ssmcore_model_load(context, SSMCORE_TEST_MODEL_DIR, NULL, &model));
  test_golden_text(context, model);
  test_model(context, model);
  test_threads(model);
  test_free_order(context, model);
  return 0;
}
