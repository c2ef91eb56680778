// The table of kernels each backend fills: the one place where operators meet devices.
#pragma once

#include <cstddef>

#include "adamw_params.h"
#include "causal_conv1d_params.h"
#include "checks.h"
#include "cross_entropy_params.h"
#include "decoder_params.h"
#include "embedding_params.h"
#include "linear_params.h"
#include "mamba_step_params.h"
#include "parameter_params.h"
#include "rms_norm_params.h"
#include "sample_params.h"
#include "selective_scan_params.h"
#include "ssmcore/context.h"
#include "training_loss_params.h"

// X(name, Params): `void name(const Params&, const Exec&)` and the workspace it needs,
// `size_t name_workspace_size(const Params&, const Context&)`.

// Compiled once per instruction set on the CPU.
#define SSMCORE_FOR_EACH_VECTOR_KERNEL(X)       \
  X(selective_scan_fwd, SelectiveScanFwdParams) \
  X(causal_conv1d_fwd, CausalConv1dFwdParams)   \
  X(rms_norm_fwd, RmsNormFwdParams)             \
  X(linear, LinearParams)                       \
  X(embedding, EmbeddingParams)                 \
  X(selective_scan_bwd, SelectiveScanBwdParams) \
  X(causal_conv1d_bwd, CausalConv1dBwdParams)   \
  X(rms_norm_bwd, RmsNormBwdParams)             \
  X(linear_bwd, LinearBwdParams)                \
  X(embedding_bwd, EmbeddingBwdParams)          \
  X(cross_entropy_fwd, CrossEntropyFwdParams)   \
  X(cross_entropy_bwd, CrossEntropyBwdParams)   \
  X(sum_of_squares, SumOfSquaresParams)         \
  X(adamw, AdamWParams)

// On the CPU compiled once, for every instruction set.
#define SSMCORE_FOR_EACH_PLAIN_KERNEL(X)       \
  X(sample, SampleParams)                      \
  X(decoder_gather, DecoderRowsParams)         \
  X(decoder_scatter, DecoderRowsParams)        \
  X(parameter_copy, ParameterCopyParams)       \
  X(parameter_product, ParameterProductParams) \
  X(loss_weight, LossWeightParams)             \
  X(loss_sum, LossSumParams)

#define SSMCORE_FOR_EACH_KERNEL(X)  \
  SSMCORE_FOR_EACH_VECTOR_KERNEL(X) \
  SSMCORE_FOR_EACH_PLAIN_KERNEL(X)

// On a GPU alone: the CPU's table holds null.
#define SSMCORE_FOR_EACH_GPU_KERNEL(X) X(mamba_step, MambaStepParams)

#define SSMCORE_DECLARE_KERNEL(name, Params) \
  void name(const Params&, const Exec&);     \
  size_t name##_workspace_size(const Params&, const Context&);

namespace ssmcore {

template <typename Params>
struct Kernel {
  void (*run)(const Params&, const Exec&);
  size_t (*workspace_size)(const Params&, const Context&);
};

// What workspace_size says of what a GPU kernel does not take.
inline constexpr size_t kNoKernel = SIZE_MAX;

struct KernelTable {
#define SSMCORE_KERNEL_MEMBER(name, Params) Kernel<Params> name;
  SSMCORE_FOR_EACH_KERNEL(SSMCORE_KERNEL_MEMBER)
  SSMCORE_FOR_EACH_GPU_KERNEL(SSMCORE_KERNEL_MEMBER)
#undef SSMCORE_KERNEL_MEMBER
};

namespace cpu {
const KernelTable& kernel_table(Isa isa);
}

namespace cuda {
// Throws Error(unsupported) in a build without CUDA (no_cuda.cpp).
const KernelTable& kernel_table();
}  // namespace cuda

inline const KernelTable& kernel_table(const Context& context) {
  return context.device().type == DeviceType::cuda ? cuda::kernel_table()
                                                   : cpu::kernel_table(context.isa());
}

// Checks the workspace, then runs the kernel.
template <typename Params>
void launch(const char* op, const Kernel<Params>& kernel, const Params& params, const Exec& exec) {
  Checks(op, exec.context.device()).workspace(exec, kernel.workspace_size(params, exec.context));
  kernel.run(params, exec);
}

}  // namespace ssmcore
