/* The C interface (C99): every operator, the Mamba block and the language model.
 *
 * Every function that can fail returns an ssmcore_status, and ssmcore_last_error() then says what
 * was wrong: "selective_scan: C has dstate 8, expected 16". Nothing prints, aborts or throws.
 *
 * Arguments are structs. Begin with SSMCORE_INIT, which zeroes the rest: a tensor that is NULL is
 * absent, a number that is 0 has its default.
 *
 *     ssmcore_linear_args args = SSMCORE_INIT(ssmcore_linear_args);
 *     args.x = &x;
 *     args.weight = &weight;
 *     args.out = &out;
 *     if (ssmcore_linear(context, &args, NULL, 0, NULL) != SSMCORE_OK) puts(ssmcore_last_error());
 *
 * A program built against an older header runs with a newer library, whose added fields are then
 * absent; one built against a newer header runs with an older library as long as it leaves the
 * fields that the library does not know at 0.
 *
 * A context and a model may be used by several threads at a time; a state by one at a time. Handles
 * may be freed in any order, each once: what another handle still needs stays. Freeing NULL does
 * nothing. */
#ifndef SSMCORE_C_API_H_
#define SSMCORE_C_API_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SSMCORE_C_API __declspec(dllexport)
#else
#define SSMCORE_C_API __attribute__((visibility("default")))
#endif

/* Initialises a struct that has a struct_size. */
#ifdef __cplusplus
#define SSMCORE_INIT(type) {sizeof(type)}
#else
#define SSMCORE_INIT(type) {.struct_size = sizeof(type)}
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* "0.1.0" */
SSMCORE_C_API const char* ssmcore_version(void);

/* ---- Errors ---- */

typedef enum ssmcore_status {
  SSMCORE_OK = 0,
  SSMCORE_INVALID_ARGUMENT,   /* a shape, dtype, device, value or combination that is not taken */
  SSMCORE_NOT_FOUND,          /* a file or folder that does not exist or cannot be read */
  SSMCORE_INVALID_CHECKPOINT, /* a file that is damaged or does not describe a known model */
  SSMCORE_OUT_OF_MEMORY,
  SSMCORE_UNSUPPORTED, /* valid, but not available in this build or on this device */
  SSMCORE_DEVICE_ERROR,
  SSMCORE_INTERNAL,  /* a mistake in ssmcore */
  SSMCORE_NOT_FINITE /* training met an infinity or a NaN */
} ssmcore_status;

/* What went wrong in the calling thread's last call that failed ("" before one has), in UTF-8.
 * Valid until its next call that fails. */
SSMCORE_C_API const char* ssmcore_last_error(void);

/* ---- Tensors ---- */

/* The layout and the codes are DLPack's (https://dmlc.github.io/dlpack): a DLTensor can be passed
 * by casting its address. */
enum { SSMCORE_DEVICE_CPU = 1, SSMCORE_DEVICE_CUDA = 2 };
enum {
  SSMCORE_DTYPE_INT = 0,
  SSMCORE_DTYPE_FLOAT = 2,
  SSMCORE_DTYPE_BFLOAT = 4,
  SSMCORE_DTYPE_COMPLEX = 5
};

typedef struct ssmcore_device {
  int32_t type;
  int32_t id;
} ssmcore_device;

typedef struct ssmcore_dtype {
  uint8_t code;
  uint8_t bits;   /* of a whole element: 64 for two floats that make a complex number */
  uint16_t lanes; /* 1 */
} ssmcore_dtype;

/* Initialisers of an ssmcore_dtype, and all that ssmcore knows. */
#define SSMCORE_FLOAT32 {SSMCORE_DTYPE_FLOAT, 32, 1}
#define SSMCORE_FLOAT64 {SSMCORE_DTYPE_FLOAT, 64, 1}
#define SSMCORE_FLOAT16 {SSMCORE_DTYPE_FLOAT, 16, 1}
#define SSMCORE_BFLOAT16 {SSMCORE_DTYPE_BFLOAT, 16, 1}
#define SSMCORE_INT32 {SSMCORE_DTYPE_INT, 32, 1}
#define SSMCORE_INT64 {SSMCORE_DTYPE_INT, 64, 1}
#define SSMCORE_COMPLEX64 {SSMCORE_DTYPE_COMPLEX, 64, 1}

/* Memory that the caller owns. It is only read, unless an argument is described as written or
 * updated. */
typedef struct ssmcore_tensor {
  void* data;
  ssmcore_device device;
  int32_t ndim; /* 1 to 6 */
  ssmcore_dtype dtype;
  const int64_t* shape;
  const int64_t* strides; /* in elements, never negative; NULL: row-major and contiguous */
  uint64_t byte_offset;   /* of the first element from `data` */
} ssmcore_tensor;

/* Where a backward puts the gradient of one of its inputs. For a complex x + iy it is dx + i dy. */
typedef struct ssmcore_gradient {
  const ssmcore_tensor* tensor; /* NULL: it is not wanted */
  int32_t accumulate;           /* flag: is added to what is there, instead of overwriting it */
} ssmcore_gradient;

/* ---- Contexts ---- */

/* What is made once for a device: threads, allocator, properties. */
typedef struct ssmcore_context ssmcore_context;

/* Memory for states, converted weights and workspaces. The functions are called from any thread. */
typedef struct ssmcore_allocator {
  size_t struct_size;
  /* Memory aligned to 64 bytes, or NULL when there is none. `stream` is the device stream on which
   * it is first used. */
  void* (*allocate)(void* user_data, size_t bytes, void* stream);
  void (*deallocate)(void* user_data, void* data, size_t bytes, void* stream);
  void* user_data;
} ssmcore_allocator;

typedef struct ssmcore_context_options {
  size_t struct_size;
  ssmcore_device device; /* zeros: the CPU */
  int32_t num_threads; /* CPU threads that one call uses, the caller's included; 0: the environment
                          variable SSMCORE_NUM_THREADS, else every core */
  const ssmcore_allocator* allocator; /* copied; NULL: the device's default */
  int32_t batch_invariant; /* 1: results of a row whose bits do not depend on the batch it is in,
                              for some speed on a GPU; on the CPU they never do */
} ssmcore_context_options;

/* `options` may be NULL: the defaults. On failure *context is NULL. SSMCORE_UNSUPPORTED for a
 * device that this build or machine does not have. */
SSMCORE_C_API ssmcore_status ssmcore_context_create(const ssmcore_context_options* options,
                                                    ssmcore_context** context);
SSMCORE_C_API void ssmcore_context_destroy(ssmcore_context* context);

SSMCORE_C_API ssmcore_status ssmcore_context_num_threads(const ssmcore_context* context,
                                                         int32_t* num_threads);
/* Not between asking for the size of a workspace and the call that uses it. */
SSMCORE_C_API ssmcore_status ssmcore_context_set_num_threads(ssmcore_context* context,
                                                             int32_t num_threads);

/* Waits for what was launched on `stream`, a device stream. SSMCORE_INVALID_ARGUMENT where a kernel
 * met an index out of range, which nobody can look at before it runs on a GPU; the next call on the
 * context says so too. */
SSMCORE_C_API ssmcore_status ssmcore_context_synchronize(const ssmcore_context* context,
                                                         void* stream);

/* ---- Operators ----
 *
 * Each is a pair of functions. ssmcore_<operator>_workspace_size gives the memory that a call with
 * these arguments needs besides its tensors; only their shapes and dtypes matter to it, but the
 * values of indices on the CPU are checked. ssmcore_<operator> runs the call with that much memory
 * in `workspace`, aligned to 64 bytes, and allocates nothing. With workspace NULL and 0 bytes it
 * takes the memory from the context's allocator, for the length of the call.
 *
 * `stream` is the device stream to run on; the CPU ignores it.
 *
 * Unless said otherwise a tensor has the activation type, one for the whole call: float32, bfloat16
 * or float16. A written tensor overlaps no other. A flag is true when it is not 0. */

/* The selective scan (Gu & Dao, arXiv 2312.00752, algorithm 2) over a whole sequence. For every
 * batch b, channel d and state n, with Δ = delta + delta_bias, or softplus of that:
 *
 *   h[n](t) = exp(Δ(t) A[d, n]) h[n](t - 1) + Δ(t) B[n](t) u(t)
 *   y(t)    = Σ_n C[n](t) h[n](t) + D[d] u(t)        (complex A: 2 Re Σ_n C[n](t) h[n](t) + …)
 *   out(t)  = y(t) SiLU(z(t))                        (without z: y(t))
 *
 * Everything may also be float64, for checking. With a complex64 A, constant B and C and the states
 * are complex64 too, and varying B and C hold real and imaginary parts side by side,
 * (…, dstate, 2 seqlen). */
typedef struct ssmcore_selective_scan_fwd_args {
  size_t struct_size;
  const ssmcore_tensor* u;          /* (batch, dim, seqlen) */
  const ssmcore_tensor* delta;      /* (batch, dim, seqlen) */
  const ssmcore_tensor* A;          /* (dim, dstate), float32 or complex64 */
  const ssmcore_tensor* B;          /* (dim, dstate), A's dtype: constant in time; or
                                       (batch, dstate, seqlen); or (batch, ngroups, dstate, seqlen),
                                       ngroups dividing dim */
  const ssmcore_tensor* C;          /* like B, independently of it */
  const ssmcore_tensor* D;          /* optional (dim), float32 */
  const ssmcore_tensor* z;          /* optional (batch, dim, seqlen) */
  const ssmcore_tensor* delta_bias; /* optional (dim), float32 */
  int32_t delta_softplus;           /* flag */
  /* optional (sequences + 1), int32, from 0, ascending, to seqlen: batch is 1 and sequence s is the
   * steps [cu_seqlens[s], cu_seqlens[s + 1]); each is then what a row is below */
  const ssmcore_tensor* cu_seqlens;
  /* States are (slots, dim, dstate), float32 or complex64 as A. Without state_indices there is a
   * slot for each row, in order. The two may be the same tensor. */
  const ssmcore_tensor* initial_state; /* optional; absent: zeros */
  const ssmcore_tensor* last_state;    /* optional, written: h after the last step */
  const ssmcore_tensor* state_indices; /* optional (rows), int32, all different: each row's slot; a
                                          negative one starts from zeros and leaves nothing */
  const ssmcore_tensor* chunk_states;  /* optional (batch, chunks, dim, dstate), written: h after
                                          every chunk_size steps of a row and after its last */
  int64_t chunk_size;
  const ssmcore_tensor* delta_sum; /* optional (rows, dim), float32, written: Σ_t Δ(t) */
  const ssmcore_tensor* out;       /* (batch, dim, seqlen), written */
} ssmcore_selective_scan_fwd_args;

SSMCORE_C_API ssmcore_status ssmcore_selective_scan_fwd_workspace_size(
    const ssmcore_context* context, const ssmcore_selective_scan_fwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_selective_scan_fwd(const ssmcore_context* context,
                                                        const ssmcore_selective_scan_fwd_args* args,
                                                        void* workspace, size_t workspace_bytes,
                                                        void* stream);

/* Its backward: the gradients of a scalar, given those with respect to out and last_state. The
 * states are computed again. */
typedef struct ssmcore_selective_scan_bwd_args {
  size_t struct_size;
  /* As the forward had them. */
  const ssmcore_tensor* u;
  const ssmcore_tensor* delta;
  const ssmcore_tensor* A;
  const ssmcore_tensor* B;
  const ssmcore_tensor* C;
  const ssmcore_tensor* D;
  const ssmcore_tensor* z;
  const ssmcore_tensor* delta_bias;
  int32_t delta_softplus; /* flag */
  const ssmcore_tensor* cu_seqlens;
  const ssmcore_tensor* initial_state; /* as it was before the forward */
  const ssmcore_tensor* state_indices; /* of initial_state, dlast_state and dinitial_state */
  const ssmcore_tensor* chunk_states;  /* optional: as the forward wrote them. Without them the call
                                          takes about one more forward's time */
  int64_t chunk_size;                  /* with chunk_states; fastest: 32 on a GPU, 64
                                          on a CPU */
  const ssmcore_tensor* dout;          /* (batch, dim, seqlen) */
  const ssmcore_tensor* dlast_state;   /* optional (slots, dim, dstate), A's dtype; absent: zeros */
  /* Each has the shape and dtype of its input. */
  ssmcore_gradient du;
  ssmcore_gradient ddelta;
  ssmcore_gradient dA;
  ssmcore_gradient dB;
  ssmcore_gradient dC;
  ssmcore_gradient dD;
  ssmcore_gradient dz;
  ssmcore_gradient ddelta_bias;
  ssmcore_gradient dinitial_state; /* slots that state_indices does not name stay as they are */
} ssmcore_selective_scan_bwd_args;

SSMCORE_C_API ssmcore_status ssmcore_selective_scan_bwd_workspace_size(
    const ssmcore_context* context, const ssmcore_selective_scan_bwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_selective_scan_bwd(const ssmcore_context* context,
                                                        const ssmcore_selective_scan_bwd_args* args,
                                                        void* workspace, size_t workspace_bytes,
                                                        void* stream);

/* One step of the same recurrence, for decoding. dim may be two dimensions, (nheads, headdim), in
 * every operand (Mamba-2). */
typedef struct ssmcore_selective_state_update_args {
  size_t struct_size;
  const ssmcore_tensor* state;   /* (slots, dim, dstate), float32 or as A complex64, updated */
  const ssmcore_tensor* x;       /* (batch, dim) */
  const ssmcore_tensor* dt;      /* (batch, dim) */
  const ssmcore_tensor* A;       /* (dim, dstate), float32 or complex64 */
  const ssmcore_tensor* B;       /* (batch, dstate) or (batch, ngroups, dstate), ngroups dividing
                                    dim (nheads); for complex A (…, dstate, 2) */
  const ssmcore_tensor* C;       /* like B */
  const ssmcore_tensor* D;       /* optional (dim), float32 */
  const ssmcore_tensor* z;       /* optional (batch, dim) */
  const ssmcore_tensor* dt_bias; /* optional (dim), float32 */
  int32_t dt_softplus;           /* flag */
  const ssmcore_tensor* state_indices; /* optional (batch), int32, as in selective_scan */
  const ssmcore_tensor* out;           /* (batch, dim), written */
} ssmcore_selective_state_update_args;

SSMCORE_C_API ssmcore_status ssmcore_selective_state_update_workspace_size(
    const ssmcore_context* context, const ssmcore_selective_state_update_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_selective_state_update(
    const ssmcore_context* context, const ssmcore_selective_state_update_args* args,
    void* workspace, size_t workspace_bytes, void* stream);

enum { SSMCORE_ACTIVATION_NONE = 0, SSMCORE_ACTIVATION_SILU = 1 };

/* The causal depthwise convolution that precedes the scan:
 * out(t) = activation(bias[d] + Σ_w weight[d, w] x(t - width + 1 + w)), where x before the start
 * comes from initial_state, or is 0. */
typedef struct ssmcore_causal_conv1d_fwd_args {
  size_t struct_size;
  const ssmcore_tensor* x;      /* (batch, dim, seqlen) */
  const ssmcore_tensor* weight; /* (dim, width), width 2 to 8; x's dtype or float32 */
  const ssmcore_tensor* bias;   /* optional (dim), x's dtype or float32 */
  int32_t activation;           /* SSMCORE_ACTIVATION_* */
  /* States are (slots, dim, state_len), oldest first, in x's dtype, state_len ≥ width - 1. The two
   * may be the same tensor. */
  const ssmcore_tensor* initial_state; /* optional */
  const ssmcore_tensor* final_state;   /* optional, written */
  const ssmcore_tensor* state_indices; /* optional (rows), int32, as in selective_scan */
  const ssmcore_tensor* cu_seqlens;    /* optional, packed as in selective_scan */
  const ssmcore_tensor* seq_idx;       /* optional (batch, seqlen), int32, instead of states and
                                          cu_seqlens: a step sees those before it of the same number,
                                          and one with a negative number gives 0 */
  const ssmcore_tensor* out;           /* (batch, dim, seqlen), written */
} ssmcore_causal_conv1d_fwd_args;

SSMCORE_C_API ssmcore_status ssmcore_causal_conv1d_fwd_workspace_size(
    const ssmcore_context* context, const ssmcore_causal_conv1d_fwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_causal_conv1d_fwd(const ssmcore_context* context,
                                                       const ssmcore_causal_conv1d_fwd_args* args,
                                                       void* workspace, size_t workspace_bytes,
                                                       void* stream);

/* Its backward: the gradients of a scalar, given those with respect to out and final_state. */
typedef struct ssmcore_causal_conv1d_bwd_args {
  size_t struct_size;
  /* As the forward had them. */
  const ssmcore_tensor* x;
  const ssmcore_tensor* weight;
  const ssmcore_tensor* bias;
  int32_t activation;
  const ssmcore_tensor* initial_state; /* as it was before the forward */
  const ssmcore_tensor* state_indices; /* of initial_state, dfinal_state and dinitial_state */
  const ssmcore_tensor* cu_seqlens;
  const ssmcore_tensor* seq_idx;
  const ssmcore_tensor* dout;         /* (batch, dim, seqlen), x's dtype */
  const ssmcore_tensor* dfinal_state; /* optional (slots, dim, state_len), x's dtype */
  /* Each has the shape of its input, and its dtype or float32. */
  ssmcore_gradient dx;
  ssmcore_gradient dweight;
  ssmcore_gradient dbias;
  ssmcore_gradient dinitial_state; /* slots that state_indices does not name stay as they are */
} ssmcore_causal_conv1d_bwd_args;

SSMCORE_C_API ssmcore_status ssmcore_causal_conv1d_bwd_workspace_size(
    const ssmcore_context* context, const ssmcore_causal_conv1d_bwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_causal_conv1d_bwd(const ssmcore_context* context,
                                                       const ssmcore_causal_conv1d_bwd_args* args,
                                                       void* workspace, size_t workspace_bytes,
                                                       void* stream);

/* causal_conv1d_fwd for the next few tokens of a running sequence. */
typedef struct ssmcore_causal_conv1d_update_args {
  size_t struct_size;
  const ssmcore_tensor* x;          /* (batch, dim) or (batch, dim, tokens) */
  const ssmcore_tensor* conv_state; /* (slots, dim, state_len), updated */
  const ssmcore_tensor*
      cache_seqlens;            /* optional (batch), int32: the tokens that each row has seen;
                                   the state is then circular, input i at i modulo state_len */
  const ssmcore_tensor* weight; /* (dim, width) */
  const ssmcore_tensor* bias;   /* optional (dim) */
  int32_t activation;           /* SSMCORE_ACTIVATION_* */
  const ssmcore_tensor* state_indices; /* optional (batch), int32 */
  const ssmcore_tensor* out;           /* x's shape, written */
} ssmcore_causal_conv1d_update_args;

SSMCORE_C_API ssmcore_status ssmcore_causal_conv1d_update_workspace_size(
    const ssmcore_context* context, const ssmcore_causal_conv1d_update_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_causal_conv1d_update(
    const ssmcore_context* context, const ssmcore_causal_conv1d_update_args* args, void* workspace,
    size_t workspace_bytes, void* stream);

/* With r = x + residual in float32, out = norm(r), norm(v) = weight · v / sqrt(mean(v²) + eps), the
 * mean being over each group of group_size elements. With z, out = norm(r SiLU(z)), or
 * norm(r) SiLU(z) if norm_before_gate. Each tensor may be float32, bfloat16 or float16. */
typedef struct ssmcore_rms_norm_fwd_args {
  size_t struct_size;
  const ssmcore_tensor* x;            /* (rows, dim) */
  const ssmcore_tensor* weight;       /* optional (dim); absent: ones */
  const ssmcore_tensor* residual;     /* optional (rows, dim) */
  const ssmcore_tensor* residual_out; /* optional (rows, dim), written: r; may be `residual` */
  const ssmcore_tensor* z;            /* optional (rows, dim) */
  const ssmcore_tensor* out;          /* (rows, dim), written; may be x */
  int64_t group_size;                 /* divides dim; 0: dim */
  int32_t norm_before_gate;           /* flag */
  float eps;                          /* 0: 1e-5 */
} ssmcore_rms_norm_fwd_args;

SSMCORE_C_API ssmcore_status ssmcore_rms_norm_fwd_workspace_size(
    const ssmcore_context* context, const ssmcore_rms_norm_fwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_rms_norm_fwd(const ssmcore_context* context,
                                                  const ssmcore_rms_norm_fwd_args* args,
                                                  void* workspace, size_t workspace_bytes,
                                                  void* stream);

/* Its backward: the gradients of a scalar, given those with respect to out and residual_out.
 * Instead of x and residual, x may be the r that the forward left in residual_out. */
typedef struct ssmcore_rms_norm_bwd_args {
  size_t struct_size;
  /* As the forward had them. */
  const ssmcore_tensor* x;
  const ssmcore_tensor* weight;
  const ssmcore_tensor* residual;
  const ssmcore_tensor* z;
  int64_t group_size;
  int32_t norm_before_gate;
  float eps;
  const ssmcore_tensor* dout;          /* (rows, dim), any activation type, as all that follow */
  const ssmcore_tensor* dresidual_out; /* optional (rows, dim) */
  ssmcore_gradient dx;        /* (rows, dim), of r and so of x; may be dout or dresidual_out */
  ssmcore_gradient dresidual; /* the same, in a dtype of its own; may be dresidual_out */
  ssmcore_gradient dz;        /* (rows, dim) */
  ssmcore_gradient dweight;   /* (dim) */
} ssmcore_rms_norm_bwd_args;

SSMCORE_C_API ssmcore_status ssmcore_rms_norm_bwd_workspace_size(
    const ssmcore_context* context, const ssmcore_rms_norm_bwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_rms_norm_bwd(const ssmcore_context* context,
                                                  const ssmcore_rms_norm_bwd_args* args,
                                                  void* workspace, size_t workspace_bytes,
                                                  void* stream);

/* out = x weightᵀ + bias, accumulated in float32. */
typedef struct ssmcore_linear_args {
  size_t struct_size;
  const ssmcore_tensor* x;      /* (rows, in_features) */
  const ssmcore_tensor* weight; /* (out_features, in_features), each row contiguous; float32,
                                   bfloat16 or float16 */
  const ssmcore_tensor* bias;   /* optional (out_features): float32, bfloat16 or float16 */
  const ssmcore_tensor* out;    /* (rows, out_features), written; x's dtype or float32 */
} ssmcore_linear_args;

SSMCORE_C_API ssmcore_status ssmcore_linear_workspace_size(const ssmcore_context* context,
                                                           const ssmcore_linear_args* args,
                                                           size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_linear(const ssmcore_context* context,
                                            const ssmcore_linear_args* args, void* workspace,
                                            size_t workspace_bytes, void* stream);

/* dx = dout weight, dweight = doutᵀ x, dbias = Σ dout over the rows, accumulated in float32. */
typedef struct ssmcore_linear_bwd_args {
  size_t struct_size;
  const ssmcore_tensor* x;      /* (rows, in_features); only needed for dweight */
  const ssmcore_tensor* weight; /* (out_features, in_features); only needed for dx */
  const ssmcore_tensor* dout;   /* (rows, out_features), any activation type, as all that follow */
  ssmcore_gradient dx;          /* (rows, in_features) */
  ssmcore_gradient dweight;     /* (out_features, in_features) */
  ssmcore_gradient dbias;       /* (out_features) */
} ssmcore_linear_bwd_args;

SSMCORE_C_API ssmcore_status ssmcore_linear_bwd_workspace_size(const ssmcore_context* context,
                                                               const ssmcore_linear_bwd_args* args,
                                                               size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_linear_bwd(const ssmcore_context* context,
                                                const ssmcore_linear_bwd_args* args,
                                                void* workspace, size_t workspace_bytes,
                                                void* stream);

/* out[i] = weight[token_ids[i]] */
typedef struct ssmcore_embedding_args {
  size_t struct_size;
  const ssmcore_tensor* token_ids; /* (rows), int32 or int64 */
  const ssmcore_tensor* weight;    /* (vocab_size, d_model), each row contiguous */
  const ssmcore_tensor* out;       /* (rows, d_model), written; may differ from weight in dtype */
} ssmcore_embedding_args;

SSMCORE_C_API ssmcore_status ssmcore_embedding_workspace_size(const ssmcore_context* context,
                                                              const ssmcore_embedding_args* args,
                                                              size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_embedding(const ssmcore_context* context,
                                               const ssmcore_embedding_args* args, void* workspace,
                                               size_t workspace_bytes, void* stream);

/* dweight[id] = Σ dout over the rows with that id, accumulated in float32. */
typedef struct ssmcore_embedding_bwd_args {
  size_t struct_size;
  const ssmcore_tensor* token_ids; /* (rows), int32 or int64 */
  const ssmcore_tensor* dout;      /* (rows, d_model): float32, bfloat16 or float16 */
  ssmcore_gradient dweight;        /* (vocab_size, d_model): float32, bfloat16 or float16 */
} ssmcore_embedding_bwd_args;

SSMCORE_C_API ssmcore_status ssmcore_embedding_bwd_workspace_size(
    const ssmcore_context* context, const ssmcore_embedding_bwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_embedding_bwd(const ssmcore_context* context,
                                                   const ssmcore_embedding_bwd_args* args,
                                                   void* workspace, size_t workspace_bytes,
                                                   void* stream);

/* loss[i] = lse[i] - logits[i, targets[i]] with lse[i] = log Σ_v exp(logits[i, v]); 0 where
 * targets[i] is ignore_index. */
typedef struct ssmcore_cross_entropy_fwd_args {
  size_t struct_size;
  const ssmcore_tensor* logits;    /* (rows, vocab_size): float32, bfloat16 or float16 */
  const ssmcore_tensor* targets;   /* (rows), int32 or int64 */
  int64_t ignore_index;            /* not 0, which stands for -100 */
  const ssmcore_tensor* loss;      /* optional (rows), float32, written */
  const ssmcore_tensor* mean_loss; /* optional (1), float32, written: over the rows that count */
  const ssmcore_tensor* lse;       /* optional (rows), float32, written */
} ssmcore_cross_entropy_fwd_args;

SSMCORE_C_API ssmcore_status ssmcore_cross_entropy_fwd_workspace_size(
    const ssmcore_context* context, const ssmcore_cross_entropy_fwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_cross_entropy_fwd(const ssmcore_context* context,
                                                       const ssmcore_cross_entropy_fwd_args* args,
                                                       void* workspace, size_t workspace_bytes,
                                                       void* stream);

/* dlogits[i, v] = dloss[i] (exp(logits[i, v] - lse[i]) - [v = targets[i]]). */
typedef struct ssmcore_cross_entropy_bwd_args {
  size_t struct_size;
  /* As the forward had them. */
  const ssmcore_tensor* logits;
  const ssmcore_tensor* targets;
  int64_t ignore_index;
  const ssmcore_tensor* lse;        /* the forward's */
  const ssmcore_tensor* dloss;      /* (rows), float32, or */
  const ssmcore_tensor* dmean_loss; /* (1), float32 */
  ssmcore_gradient dlogits;         /* (rows, vocab_size), any activation type; may be logits */
} ssmcore_cross_entropy_bwd_args;

SSMCORE_C_API ssmcore_status ssmcore_cross_entropy_bwd_workspace_size(
    const ssmcore_context* context, const ssmcore_cross_entropy_bwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_cross_entropy_bwd(const ssmcore_context* context,
                                                       const ssmcore_cross_entropy_bwd_args* args,
                                                       void* workspace, size_t workspace_bytes,
                                                       void* stream);

/* out = Σ x², summed in float64 in a fixed order: of gradients, the square of the norm that clips.
 */
typedef struct ssmcore_sum_of_squares_args {
  size_t struct_size;
  const ssmcore_tensor* x;   /* any shape, contiguous, float32 */
  const ssmcore_tensor* out; /* (1), float64, written */
} ssmcore_sum_of_squares_args;

SSMCORE_C_API ssmcore_status ssmcore_sum_of_squares_workspace_size(
    const ssmcore_context* context, const ssmcore_sum_of_squares_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_sum_of_squares(const ssmcore_context* context,
                                                    const ssmcore_sum_of_squares_args* args,
                                                    void* workspace, size_t workspace_bytes,
                                                    void* stream);

/* One step of AdamW (arXiv 1711.05101) on one tensor, in float32. Tensors are contiguous, of the
 * parameter's shape. */
typedef struct ssmcore_adamw_args {
  size_t struct_size;
  const ssmcore_tensor* parameter;      /* float32, bfloat16 or float16, updated */
  const ssmcore_tensor* master;         /* float32, updated: what a parameter of 16 bits is rounded
                                           from; absent where that is float32 */
  const ssmcore_tensor* gradient;       /* float32 */
  const ssmcore_tensor* exp_avg;        /* float32, updated; zeros before the first step */
  const ssmcore_tensor* exp_avg_sq;     /* likewise */
  const ssmcore_tensor* sum_of_squares; /* optional (1), float64: over all gradients that are
                                           clipped together; nothing is updated where it is not
                                           finite */
  double max_norm;     /* above 0: gradients are scaled by min(1, max_norm / norm) */
  int64_t step;        /* from 1 */
  double lr;           /* default 1e-3 */
  double beta1;        /* default 0.9 */
  double beta2;        /* default 0.999 */
  double eps;          /* default 1e-8 */
  double weight_decay; /* 0: none */
} ssmcore_adamw_args;

SSMCORE_C_API ssmcore_status ssmcore_adamw_workspace_size(const ssmcore_context* context,
                                                          const ssmcore_adamw_args* args,
                                                          size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_adamw(const ssmcore_context* context,
                                           const ssmcore_adamw_args* args, void* workspace,
                                           size_t workspace_bytes, void* stream);

/* The next token of each row: repetition penalty, temperature, top-k, top-p, min-p, then one draw,
 * of Philox4x32-10 with key = seed and counter = position. Each setting is a (batch) tensor; a
 * stride of 0 gives every row the same. SSMCORE_INVALID_ARGUMENT for logits with a NaN. */
typedef struct ssmcore_sample_args {
  size_t struct_size;
  const ssmcore_tensor* logits;  /* (batch, vocab_size), float32 */
  const ssmcore_tensor* history; /* optional (batch, length), int32 or int64: ids that the
                                    penalty applies to; negative ones are padding */
  const ssmcore_tensor* repetition_penalty; /* float32, > 0, default 1 */
  const ssmcore_tensor* temperature;        /* float32, default 1; 0: the largest logit */
  const ssmcore_tensor* top_k;              /* int32, default 0 (off) */
  const ssmcore_tensor* top_p;              /* float32 in (0, 1], default 1 (off) */
  const ssmcore_tensor* min_p;              /* float32 in [0, 1], default 0 (off) */
  const ssmcore_tensor* seed;               /* int64, default: the row's index */
  const ssmcore_tensor* position; /* int64, default 0: the draw's number in its sequence */
  const ssmcore_tensor* out;      /* (batch), int32 or int64, written */
} ssmcore_sample_args;

SSMCORE_C_API ssmcore_status ssmcore_sample_workspace_size(const ssmcore_context* context,
                                                           const ssmcore_sample_args* args,
                                                           size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_sample(const ssmcore_context* context,
                                            const ssmcore_sample_args* args, void* workspace,
                                            size_t workspace_bytes, void* stream);

/* Matrices and their biases may be float32, bfloat16 or float16. */
typedef struct ssmcore_mamba_block_weights {
  size_t struct_size;
  const ssmcore_tensor* in_proj;       /* (2 dim, d_model): x, then z */
  const ssmcore_tensor* in_proj_bias;  /* optional (2 dim) */
  const ssmcore_tensor* conv_weight;   /* (dim, width), float32 or the activation type */
  const ssmcore_tensor* conv_bias;     /* optional (dim), likewise */
  const ssmcore_tensor* x_proj;        /* (dt_rank + 2 dstate, dim): Δ, B, C */
  const ssmcore_tensor* dt_proj;       /* (dim, dt_rank) */
  const ssmcore_tensor* dt_bias;       /* optional (dim), float32 */
  const ssmcore_tensor* A;             /* (dim, dstate), float32: -exp(A_log) */
  const ssmcore_tensor* D;             /* optional (dim), float32 */
  const ssmcore_tensor* out_proj;      /* (d_model, dim) */
  const ssmcore_tensor* out_proj_bias; /* optional (d_model) */
  float dt_B_C_norm_eps;               /* > 0: RMS norms on Δ, B and C (FalconMamba) */
} ssmcore_mamba_block_weights;

/* The Mamba block (Gu & Dao, figure 3) on a sequence, or with seqlen 1 on the next token. */
typedef struct ssmcore_mamba_block_fwd_args {
  size_t struct_size;
  const ssmcore_mamba_block_weights* weights;
  const ssmcore_tensor* x;             /* (batch, seqlen, d_model), contiguous */
  const ssmcore_tensor* out;           /* (batch, seqlen, d_model), contiguous, written */
  const ssmcore_tensor* conv_state;    /* optional (slots, dim, width - 1), updated */
  const ssmcore_tensor* ssm_state;     /* optional (slots, dim, dstate), float32, updated */
  const ssmcore_tensor* state_indices; /* optional (rows), int32, as in selective_scan */
  const ssmcore_tensor* cu_seqlens;    /* optional, packed as in selective_scan */
} ssmcore_mamba_block_fwd_args;

SSMCORE_C_API ssmcore_status ssmcore_mamba_block_fwd_workspace_size(
    const ssmcore_context* context, const ssmcore_mamba_block_fwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_mamba_block_fwd(const ssmcore_context* context,
                                                     const ssmcore_mamba_block_fwd_args* args,
                                                     void* workspace, size_t workspace_bytes,
                                                     void* stream);

/* Steps between two states of chunk_states below. */
#define SSMCORE_MAMBA_BLOCK_CHUNK_SIZE 32

/* What the forward pass in training leaves for the backward pass, in the caller's memory; each
 * contiguous and, unless said otherwise, of x's dtype. The last two are computed again where they
 * are absent. */
typedef struct ssmcore_mamba_block_saved {
  size_t struct_size;
  const ssmcore_tensor* xz;           /* (batch, seqlen, 2 dim): in_proj's result */
  const ssmcore_tensor* delta_B_C;    /* (batch, seqlen, dt_rank + 2 dstate): x_proj's result */
  const ssmcore_tensor* y;            /* (batch, seqlen, dim): the scan's result, gated */
  const ssmcore_tensor* chunk_states; /* (batch, chunks, dim, dstate), float32: the scan's, as in
                                         selective_scan with the chunk_size above */
  const ssmcore_tensor* u;            /* optional (batch, seqlen, dim): the convolution's result */
  const ssmcore_tensor* delta;        /* optional (batch, seqlen, dim): dt_proj's result */
} ssmcore_mamba_block_saved;

/* mamba_block_fwd, leaving its arguments as they are. States are in the order of the rows. */
typedef struct ssmcore_mamba_block_train_fwd_args {
  size_t struct_size;
  const ssmcore_mamba_block_weights* weights;
  const ssmcore_tensor* x;                  /* (batch, seqlen, d_model), contiguous */
  const ssmcore_tensor* out;                /* (batch, seqlen, d_model), contiguous, written */
  const ssmcore_tensor* initial_conv_state; /* optional (rows, dim, width - 1) */
  const ssmcore_tensor* initial_ssm_state;  /* optional (rows, dim, dstate), float32 */
  const ssmcore_tensor* final_conv_state;   /* optional, written */
  const ssmcore_tensor* last_ssm_state;     /* optional, written */
  const ssmcore_tensor* cu_seqlens;         /* optional, packed as in selective_scan */
  const ssmcore_mamba_block_saved* saved;   /* written */
} ssmcore_mamba_block_train_fwd_args;

SSMCORE_C_API ssmcore_status ssmcore_mamba_block_train_fwd_workspace_size(
    const ssmcore_context* context, const ssmcore_mamba_block_train_fwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_mamba_block_train_fwd(
    const ssmcore_context* context, const ssmcore_mamba_block_train_fwd_args* args, void* workspace,
    size_t workspace_bytes, void* stream);

/* Its backward: the gradients of a scalar, given those with respect to what it wrote. */
typedef struct ssmcore_mamba_block_bwd_args {
  size_t struct_size;
  /* As the forward had and wrote them. */
  const ssmcore_mamba_block_weights* weights;
  const ssmcore_tensor* x;
  const ssmcore_tensor* initial_conv_state;
  const ssmcore_tensor* initial_ssm_state;
  const ssmcore_tensor* cu_seqlens;
  const ssmcore_mamba_block_saved* saved;
  const ssmcore_tensor* dout;              /* (batch, seqlen, d_model), contiguous */
  const ssmcore_tensor* dfinal_conv_state; /* optional (rows, dim, width - 1); absent: zeros */
  const ssmcore_tensor* dlast_ssm_state;   /* optional (rows, dim, dstate); absent: zeros */
  /* Each has the shape and dtype of its input; those of weights may also be float32. */
  ssmcore_gradient dx;                  /* contiguous */
  ssmcore_gradient dinitial_conv_state; /* only with the state */
  ssmcore_gradient dinitial_ssm_state;
  ssmcore_gradient din_proj;
  ssmcore_gradient din_proj_bias;
  ssmcore_gradient dconv_weight;
  ssmcore_gradient dconv_bias;
  ssmcore_gradient dx_proj;
  ssmcore_gradient ddt_proj;
  ssmcore_gradient ddt_bias;
  ssmcore_gradient dA;
  ssmcore_gradient dD;
  ssmcore_gradient dout_proj;
  ssmcore_gradient dout_proj_bias;
  ssmcore_gradient dA_log; /* instead of dA: of A = -exp(A_log), which is dA · A */
} ssmcore_mamba_block_bwd_args;

SSMCORE_C_API ssmcore_status ssmcore_mamba_block_bwd_workspace_size(
    const ssmcore_context* context, const ssmcore_mamba_block_bwd_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_mamba_block_bwd(const ssmcore_context* context,
                                                     const ssmcore_mamba_block_bwd_args* args,
                                                     void* workspace, size_t workspace_bytes,
                                                     void* stream);

/* ---- Language models ---- */

typedef struct ssmcore_model ssmcore_model;

/* The memory of running sequences, one slot each, of the model that it was created for. */
typedef struct ssmcore_state ssmcore_state;

typedef struct ssmcore_model_options {
  size_t struct_size;
  ssmcore_dtype dtype; /* of the activations: float32, bfloat16 or float16; zeros: float32 on the
                          CPU, the type most weights are stored in on a GPU */
  int64_t trainable;   /* flag: copies the weights as float32 to memory of the device where they may
                          be written */
} ssmcore_model_options;

/* Loads a folder with config.json and model.safetensors, or shards with an index, to the context's
 * device. `options` may be NULL: the defaults. On failure *model is NULL: SSMCORE_NOT_FOUND for a
 * folder or file that is not there, SSMCORE_INVALID_CHECKPOINT for one that is damaged or of an
 * unknown kind. */
SSMCORE_C_API ssmcore_status ssmcore_model_load(const ssmcore_context* context, const char* folder,
                                                const ssmcore_model_options* options,
                                                ssmcore_model** model);
/* A new model with random weights, drawn as the published implementation draws them: `config` is
 * the text of a config.json, as transformers writes it. */
SSMCORE_C_API ssmcore_status ssmcore_model_create(const ssmcore_context* context,
                                                  const char* config, uint64_t seed,
                                                  const ssmcore_model_options* options,
                                                  ssmcore_model** model);
/* Writes config.json, generation_config.json and model.safetensors, as transformers reads them,
 * each whole or not at all. SSMCORE_NOT_FOUND for a folder that cannot be written. */
SSMCORE_C_API ssmcore_status ssmcore_model_save(const ssmcore_model* model, const char* folder);
SSMCORE_C_API void ssmcore_model_free(ssmcore_model* model);

/* Pointers are valid as long as the model. */
typedef struct ssmcore_model_info {
  size_t struct_size;
  const char* model_type; /* as transformers names it: "mamba" */
  ssmcore_dtype dtype;    /* of the activations */
  int64_t num_parameters;
  int64_t vocab_size;
  int64_t d_model;
  int64_t n_layer;
  int64_t dim; /* channels of the scan */
  int64_t dstate;
  int64_t num_eos_token_ids; /* 0: no end-of-sequence token */
  const int64_t* eos_token_ids;
} ssmcore_model_info;

/* Fills `info`, whose struct_size must be set. Fields that the library does not know become 0. */
SSMCORE_C_API ssmcore_status ssmcore_model_get_info(const ssmcore_model* model,
                                                    ssmcore_model_info* info);

/* A state of `num_slots` ≥ 1 slots, all at the start of a sequence, on the model's device: on a
 * GPU, this and what follows are in the order of `stream`. On failure *state is NULL. */
SSMCORE_C_API ssmcore_status ssmcore_state_create(const ssmcore_model* model, int64_t num_slots,
                                                  void* stream, ssmcore_state** state);
/* A copy of every slot. On failure *copy is NULL. */
SSMCORE_C_API ssmcore_status ssmcore_state_clone(const ssmcore_state* state, void* stream,
                                                 ssmcore_state** copy);
SSMCORE_C_API void ssmcore_state_free(ssmcore_state* state);
SSMCORE_C_API ssmcore_status ssmcore_state_num_slots(const ssmcore_state* state,
                                                     int64_t* num_slots);
SSMCORE_C_API ssmcore_status ssmcore_state_nbytes(const ssmcore_state* state, size_t* nbytes);
/* Back to the start of a sequence. */
SSMCORE_C_API ssmcore_status ssmcore_state_reset_slot(ssmcore_state* state, int64_t slot,
                                                      void* stream);
SSMCORE_C_API ssmcore_status ssmcore_state_copy_slot(ssmcore_state* state, int64_t from, int64_t to,
                                                     void* stream);

/* Whole sequences, or their continuations. Workspaces are as for operators. On a GPU token_ids and
 * state_indices may be in memory of the host, and packed cu_seqlens and state_indices must be. */
typedef struct ssmcore_model_prefill_args {
  size_t struct_size;
  const ssmcore_tensor* token_ids;     /* (batch, seqlen), int32 or int64, seqlen ≥ 1 */
  const ssmcore_tensor* cu_seqlens;    /* optional (rows + 1), int32: batch is 1, and each of the
                                          packed sequences is a row */
  ssmcore_state* state;                /* updated */
  const ssmcore_tensor* state_indices; /* optional (rows), int32, all different: each row's slot;
                                          absent: row i uses slot i, of as many as there are rows */
  const ssmcore_tensor* logits; /* float32, written: (batch, seqlen, vocab_size); or, for the last
                                   position of each row, (rows, vocab_size); or absent */
} ssmcore_model_prefill_args;

SSMCORE_C_API ssmcore_status ssmcore_model_prefill_workspace_size(
    const ssmcore_model* model, const ssmcore_model_prefill_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_model_prefill(const ssmcore_model* model,
                                                   const ssmcore_model_prefill_args* args,
                                                   void* workspace, size_t workspace_bytes,
                                                   void* stream);

/* The next token of running sequences. */
typedef struct ssmcore_model_step_args {
  size_t struct_size;
  const ssmcore_tensor* token_ids;     /* (rows), int32 or int64 */
  ssmcore_state* state;                /* updated */
  const ssmcore_tensor* state_indices; /* optional (rows), as in prefill */
  const ssmcore_tensor* logits;        /* optional (rows, vocab_size), float32, written */
} ssmcore_model_step_args;

SSMCORE_C_API ssmcore_status ssmcore_model_step_workspace_size(const ssmcore_model* model,
                                                               const ssmcore_model_step_args* args,
                                                               size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_model_step(const ssmcore_model* model,
                                                const ssmcore_model_step_args* args,
                                                void* workspace, size_t workspace_bytes,
                                                void* stream);

/* One of the tensors that a model has learnt, as stored, or where it is trainable as it is now.
 * Pointers are valid as long as the model. */
typedef struct ssmcore_model_parameter {
  size_t struct_size;
  const char* name;
  ssmcore_tensor tensor; /* contiguous */
} ssmcore_model_parameter;

SSMCORE_C_API ssmcore_status ssmcore_model_num_parameters(const ssmcore_model* model,
                                                          int64_t* num_parameters);
/* Fills `parameter`, whose struct_size must be set, with that of index 0 to num_parameters - 1. */
SSMCORE_C_API ssmcore_status ssmcore_model_get_parameter(const ssmcore_model* model, int64_t index,
                                                         ssmcore_model_parameter* parameter);
/* Takes over what has been written to the parameters of a trainable model, on a GPU in the order of
 * its default stream. No other call may use the model meanwhile, nor while they are written. */
SSMCORE_C_API ssmcore_status ssmcore_model_refresh(ssmcore_model* model);

typedef struct ssmcore_named_gradient {
  const char* name;          /* of the parameter */
  ssmcore_gradient gradient; /* its shape, float32, contiguous */
} ssmcore_named_gradient;

/* One training step without the update: the mean cross entropy and its gradients. */
typedef struct ssmcore_model_loss_and_gradients_args {
  size_t struct_size;
  /* In memory of the host, where they are checked at once, or contiguous in that of the device;
   * cu_seqlens in that of the host. */
  const ssmcore_tensor* token_ids; /* (batch, seqlen), int32 or int64: sequences from their start */
  const ssmcore_tensor* targets;   /* (batch, seqlen), int32 or int64: what each position should
                                      predict, or -100 */
  const ssmcore_tensor* cu_seqlens; /* optional (sequences + 1), int32: packed, as in prefill */
  int64_t num_targets;      /* what the sum of the positions' losses is divided by; 0: the number of
                               targets but for those of -100 */
  int32_t recompute_layers; /* flag: keeps only what enters each layer, and computes the layer again
                               when its gradients are due */
  const ssmcore_tensor* loss;              /* (1), float32, on the device, written */
  const ssmcore_named_gradient* gradients; /* of the parameters whose gradients are wanted */
  int64_t num_gradients;
} ssmcore_model_loss_and_gradients_args;

SSMCORE_C_API ssmcore_status ssmcore_model_loss_and_gradients_workspace_size(
    const ssmcore_model* model, const ssmcore_model_loss_and_gradients_args* args, size_t* bytes);
SSMCORE_C_API ssmcore_status ssmcore_model_loss_and_gradients(
    const ssmcore_model* model, const ssmcore_model_loss_and_gradients_args* args, void* workspace,
    size_t workspace_bytes, void* stream);

/* ---- Training ---- */

/* What trains a trainable model with AdamW: gradients and moments. No other call may use the model
 * during a step. */
typedef struct ssmcore_trainer ssmcore_trainer;

typedef struct ssmcore_trainer_options {
  size_t struct_size;
  double lr;            /* at its peak, default 1e-3, to which it rises linearly */
  int64_t warmup_steps; /* at this step, */
  int64_t total_steps;  /* to fall along half a cosine until this one; 0: to stay */
  double final_lr;      /* to this part of the peak, default 0.1 */
  double beta1;         /* default 0.9 */
  double beta2;         /* default 0.95 */
  double eps;           /* default 1e-8 */
  double weight_decay;  /* of matrices, default 0.1; below 0: none */
  double max_grad_norm; /* gradients are clipped to it, all together, default 1; below 0: never */
  int64_t micro_batch;  /* rows whose gradients are computed at a time; 0: all of a batch */
  int64_t recompute_layers; /* flag, as in model_loss_and_gradients */
} ssmcore_trainer_options;

/* `options` may be NULL: the defaults. On failure *trainer is NULL. On a GPU everything is in the
 * order of `stream`. */
SSMCORE_C_API ssmcore_status ssmcore_trainer_create(ssmcore_model* model,
                                                    const ssmcore_trainer_options* options,
                                                    void* stream, ssmcore_trainer** trainer);
SSMCORE_C_API void ssmcore_trainer_free(ssmcore_trainer* trainer);

/* What a step found. */
typedef struct ssmcore_trainer_result {
  size_t struct_size;
  int64_t step;    /* the number of the step, from 1 */
  float loss;      /* mean cross entropy before the step, in nats */
  float grad_norm; /* before clipping */
  float lr;
} ssmcore_trainer_result;

/* Takes one step, and fills `result`, whose struct_size must be set, unless that is NULL. token_ids
 * and targets are (batch, seqlen), int32 or int64, in memory of the host, as in
 * model_loss_and_gradients. SSMCORE_NOT_FINITE, with the step and the tensor in the message, for a
 * loss or a gradient that is infinite or NaN; SSMCORE_OUT_OF_MEMORY for a batch that does not fit.
 * Nothing has changed then. */
SSMCORE_C_API ssmcore_status ssmcore_trainer_step(ssmcore_trainer* trainer,
                                                  const ssmcore_tensor* token_ids,
                                                  const ssmcore_tensor* targets,
                                                  ssmcore_trainer_result* result);
SSMCORE_C_API ssmcore_status ssmcore_trainer_steps_taken(const ssmcore_trainer* trainer,
                                                         int64_t* steps_taken);
/* Weights, moments and the number of steps as a safetensors file, which appears whole or not at
 * all, and back: training then goes on to the same bits. */
SSMCORE_C_API ssmcore_status ssmcore_trainer_save(const ssmcore_trainer* trainer, const char* path);
SSMCORE_C_API ssmcore_status ssmcore_trainer_load(ssmcore_trainer* trainer, const char* path);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SSMCORE_C_API_H_ */
