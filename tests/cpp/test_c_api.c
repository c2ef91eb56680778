/* The C interface from C: contexts, structs, tensors and workspaces, and what it refuses. */
#include <stdlib.h>
#include <string.h>

#include "c_api_check.h"
#include "ssmcore/c_api.h"

/* A product of a 2 x 3 and a 2 x 3 matrix, (1 2 3; 4 5 6) and (1 0 2; 0 1 -1). */
typedef struct {
  float x[6], weight[6], out[4];
  Array x_array, weight_array, out_array;
  ssmcore_linear_args args;
} Product;

static void make_product(Product* product) {
  static const float x[] = {1, 2, 3, 4, 5, 6}, weight[] = {1, 0, 2, 0, 1, -1};
  memcpy(product->x, x, sizeof x);
  memcpy(product->weight, weight, sizeof weight);
  memset(product->out, 0, sizeof product->out);
  const ssmcore_linear_args args = {
      .struct_size = sizeof args,
      .x = array(&product->x_array, product->x, kFloat32, 2, 2, 3, 0),
      .weight = array(&product->weight_array, product->weight, kFloat32, 2, 2, 3, 0),
      .out = array(&product->out_array, product->out, kFloat32, 2, 2, 2, 0)};
  product->args = args;
}

static int product_is_right(const Product* product) {
  static const float expected[] = {7, -1, 16, -1};
  return memcmp(product->out, expected, sizeof expected) == 0;
}

/* ---- Contexts ---- */

static void test_context(void) {
  ssmcore_context* context = NULL;
  ssmcore_context_options options = SSMCORE_INIT(ssmcore_context_options);
  options.num_threads = 2;
  CHECK_OK(ssmcore_context_create(&options, &context));
  int32_t threads = 0;
  CHECK_OK(ssmcore_context_num_threads(context, &threads));
  CHECK(threads == 2);
  CHECK_OK(ssmcore_context_set_num_threads(context, 1));
  CHECK_OK(ssmcore_context_num_threads(context, &threads));
  CHECK(threads == 1);
  CHECK_FAILS(ssmcore_context_set_num_threads(context, 0), SSMCORE_INVALID_ARGUMENT, "n is 0");
  CHECK_FAILS(ssmcore_context_set_num_threads(NULL, 1), SSMCORE_INVALID_ARGUMENT,
              "context_set_num_threads: context is NULL");
  CHECK_OK(ssmcore_context_synchronize(context, NULL));
  CHECK_FAILS(ssmcore_context_synchronize(NULL, NULL), SSMCORE_INVALID_ARGUMENT,
              "context_synchronize: context is NULL");
  CHECK_FAILS(ssmcore_context_num_threads(context, NULL), SSMCORE_INVALID_ARGUMENT,
              "num_threads is NULL");
  ssmcore_context_destroy(context);
  ssmcore_context_destroy(NULL);

  options.num_threads = -3;
  CHECK_FAILS(ssmcore_context_create(&options, &context), SSMCORE_INVALID_ARGUMENT, "-3");
  CHECK(context == NULL);
  CHECK_FAILS(ssmcore_context_create(&options, NULL), SSMCORE_INVALID_ARGUMENT, "context is NULL");
  options.num_threads = 1;
  options.device.type = 77;
  CHECK_FAILS(ssmcore_context_create(&options, &context), SSMCORE_INVALID_ARGUMENT, "type 77");
}

/* Counts what is allocated; `fails` gives nothing, `misaligned` something 8 bytes off. */
typedef struct {
  size_t allocated, freed, calls;
  int fails, misaligned;
} Counter;

static void* count_allocate(void* user_data, size_t bytes, void* stream) {
  Counter* counter = user_data;
  (void)stream;
  if (counter->fails) return NULL;
  counter->calls += 1;
  counter->allocated += bytes;
  char* data = aligned_alloc(64, (bytes + 128) / 64 * 64);
  return counter->misaligned ? data + 8 : data;
}

static void count_deallocate(void* user_data, void* data, size_t bytes, void* stream) {
  Counter* counter = user_data;
  (void)stream;
  counter->freed += bytes;
  free(counter->misaligned ? (char*)data - 8 : data);
}

static void test_allocator(void) {
  Counter counter = {0};
  ssmcore_allocator allocator = SSMCORE_INIT(ssmcore_allocator);
  allocator.allocate = count_allocate;
  allocator.user_data = &counter;
  ssmcore_context_options options = SSMCORE_INIT(ssmcore_context_options);
  options.allocator = &allocator;
  ssmcore_context* context;
  CHECK_FAILS(ssmcore_context_create(&options, &context), SSMCORE_INVALID_ARGUMENT,
              "allocator lacks");
  allocator.deallocate = count_deallocate;
  CHECK_OK(ssmcore_context_create(&options, &context));
  memset(&allocator, 0, sizeof allocator); /* it has been copied */

  ssmcore_model* model;
  CHECK_OK(ssmcore_model_load(context, SSMCORE_TEST_MODEL_DIR, NULL, &model));
  ssmcore_state* state;
  const size_t before = counter.allocated;
  CHECK_OK(ssmcore_state_create(model, 3, NULL, &state));
  size_t nbytes = 0;
  CHECK_OK(ssmcore_state_nbytes(state, &nbytes));
  CHECK(nbytes > 0 && counter.allocated - before == nbytes);
  ssmcore_state_free(state);

  counter.fails = 1;
  CHECK_FAILS(ssmcore_state_create(model, 3, NULL, &state), SSMCORE_OUT_OF_MEMORY, "out of memory");
  CHECK(state == NULL);
  counter.fails = 0;
  counter.misaligned = 1;
  CHECK_FAILS(ssmcore_state_create(model, 3, NULL, &state), SSMCORE_INVALID_ARGUMENT,
              "not aligned");
  counter.misaligned = 0;

  ssmcore_model_free(model);
  ssmcore_context_destroy(context);
  CHECK(counter.allocated == counter.freed);
}

/* ---- Structs of other versions ---- */

static void test_struct_size(ssmcore_context* context) {
  Product product;
  make_product(&product);
  ssmcore_linear_args* args = &product.args;
  CHECK_OK(ssmcore_linear(context, args, NULL, 0, NULL));
  CHECK(product_is_right(&product));

  /* an older header, whose struct ended before `out` */
  args->struct_size = offsetof(ssmcore_linear_args, out);
  CHECK_FAILS(ssmcore_linear(context, args, NULL, 0, NULL), SSMCORE_INVALID_ARGUMENT,
              "linear: out is missing");

  /* a newer one, with a field that is not used, then used */
  struct {
    ssmcore_linear_args known;
    const void* unknown;
  } newer = {*args, NULL};
  newer.known.struct_size = sizeof newer;
  make_product(&product);
  CHECK_OK(ssmcore_linear(context, &newer.known, NULL, 0, NULL));
  CHECK(product_is_right(&product));
  newer.unknown = &product;
  CHECK_FAILS(ssmcore_linear(context, &newer.known, NULL, 0, NULL), SSMCORE_INVALID_ARGUMENT,
              "sets fields beyond");

  const size_t senseless[] = {0, 1, sizeof(size_t) + 1, (size_t)-8};
  for (size_t i = 0; i < sizeof senseless / sizeof *senseless; ++i) {
    args->struct_size = senseless[i];
    CHECK_FAILS(ssmcore_linear(context, args, NULL, 0, NULL), SSMCORE_INVALID_ARGUMENT,
                "linear: args has struct_size");
  }
}

/* ---- Tensors and workspaces ---- */

static void test_tensors(ssmcore_context* context) {
  Product product;
  make_product(&product);
  ssmcore_tensor* x = &product.x_array.tensor;

  /* strides, a byte offset, and a transposed output: column by column */
  const int64_t column_major[] = {1, 2};
  float padded[8] = {0};
  memcpy(padded + 2, product.x, sizeof product.x);
  x->data = padded;
  x->byte_offset = 2 * sizeof(float);
  product.out_array.tensor.strides = column_major;
  CHECK_OK(ssmcore_linear(context, &product.args, NULL, 0, NULL));
  CHECK(product.out[0] == 7 && product.out[1] == 16 && product.out[2] == -1);

#define CHECK_REFUSED(words)                                                                   \
  CHECK_FAILS(ssmcore_linear(context, &product.args, NULL, 0, NULL), SSMCORE_INVALID_ARGUMENT, \
              (words));                                                                        \
  make_product(&product)

  make_product(&product);
  x->ndim = 0;
  CHECK_REFUSED("linear: x has 0 dimensions, expected 1 to 6");
  x->ndim = 7;
  CHECK_REFUSED("x has 7 dimensions");
  x->shape = NULL;
  CHECK_REFUSED("x has no shape");
  x->data = NULL;
  x->byte_offset = 64;
  CHECK_REFUSED("x has no memory");
  x->dtype.bits = 8;
  CHECK_REFUSED("x has a dtype (code 2, 8 bits, 1 lanes)");
  x->dtype.lanes = 4;
  CHECK_REFUSED("4 lanes");
  x->device.type = 10;
  CHECK_REFUSED("x is on a device (type 10)");
  x->device.type = SSMCORE_DEVICE_CUDA;
  CHECK_REFUSED("x is on cuda:0, expected cpu");
  product.x_array.shape[0] = -2;
  CHECK_REFUSED("x has a negative size in dimension 0");
  product.x_array.shape[0] = INT64_MAX;
  CHECK_REFUSED("x is larger than the address space");
  const int64_t wide[] = {INT64_MAX, 1}, backward[] = {-3, 1};
  x->strides = wide;
  CHECK_REFUSED("x is larger than the address space");
  x->strides = backward;
  CHECK_REFUSED("negative stride");
  product.args.weight = NULL;
  CHECK_REFUSED("linear: weight is missing");
  product.x_array.shape[1] = 2;
  CHECK_REFUSED("linear: weight has in_features 3");
#undef CHECK_REFUSED
}

static void test_workspace(ssmcore_context* context) {
  enum { kBatch = 1, kDim = 4, kSeqlen = 8, kWidth = 4, kModel = 2, kRank = 1, kState = 2 };
  static float x[kSeqlen * kModel], out[kSeqlen * kModel], in_proj[2 * kDim * kModel];
  static float conv[kDim * kWidth], x_proj[(kRank + 2 * kState) * kDim], dt_proj[kDim * kRank];
  static float A[kDim * kState], out_proj[kModel * kDim];
  Array arrays[8];
  const ssmcore_mamba_block_weights weights = {
      .struct_size = sizeof weights,
      .in_proj = array(&arrays[0], in_proj, kFloat32, 2, 2 * kDim, kModel, 0),
      .conv_weight = array(&arrays[1], conv, kFloat32, 2, kDim, kWidth, 0),
      .x_proj = array(&arrays[2], x_proj, kFloat32, 2, kRank + 2 * kState, kDim, 0),
      .dt_proj = array(&arrays[3], dt_proj, kFloat32, 2, kDim, kRank, 0),
      .A = array(&arrays[4], A, kFloat32, 2, kDim, kState, 0),
      .out_proj = array(&arrays[5], out_proj, kFloat32, 2, kModel, kDim, 0)};
  ssmcore_mamba_block_fwd_args args = {
      .struct_size = sizeof args,
      .weights = &weights,
      .x = array(&arrays[6], x, kFloat32, 3, kBatch, kSeqlen, kModel),
      .out = array(&arrays[7], out, kFloat32, 3, kBatch, kSeqlen, kModel)};
  size_t bytes = 0;
  CHECK_OK(ssmcore_mamba_block_fwd_workspace_size(context, &args, &bytes));
  CHECK(bytes > 0);
  char* workspace = aligned_alloc(64, (bytes + 127) / 64 * 64);
  CHECK(workspace != NULL);
  CHECK_OK(ssmcore_mamba_block_fwd(context, &args, workspace, bytes, NULL));
  CHECK_FAILS(ssmcore_mamba_block_fwd(context, &args, workspace, bytes - 1, NULL),
              SSMCORE_INVALID_ARGUMENT, "mamba_block: workspace has");
  CHECK_FAILS(ssmcore_mamba_block_fwd(context, &args, workspace + 4, bytes, NULL),
              SSMCORE_INVALID_ARGUMENT, "workspace is not aligned");
  CHECK_FAILS(ssmcore_mamba_block_fwd(context, &args, NULL, bytes, NULL), SSMCORE_INVALID_ARGUMENT,
              "workspace has 0 bytes");
  CHECK_FAILS(ssmcore_mamba_block_fwd_workspace_size(context, &args, NULL),
              SSMCORE_INVALID_ARGUMENT, "bytes is NULL");
  CHECK_FAILS(ssmcore_mamba_block_fwd_workspace_size(context, NULL, &bytes),
              SSMCORE_INVALID_ARGUMENT, "mamba_block: args is NULL");
  CHECK_FAILS(ssmcore_mamba_block_fwd(NULL, &args, NULL, 0, NULL), SSMCORE_INVALID_ARGUMENT,
              "mamba_block: context is NULL");
  args.weights = NULL;
  CHECK_FAILS(ssmcore_mamba_block_fwd(context, &args, NULL, 0, NULL), SSMCORE_INVALID_ARGUMENT,
              "mamba_block: weights is NULL");
  free(workspace);
}

int main(void) {
  CHECK(strcmp(ssmcore_last_error(), "") == 0);
  CHECK(strchr(ssmcore_version(), '.') != NULL);
  test_context();
  test_allocator();
  ssmcore_context* context;
  CHECK_OK(ssmcore_context_create(NULL, &context));
  test_struct_size(context);
  test_tensors(context);
  test_workspace(context);
  ssmcore_context_destroy(context);
  return 0;
}
