// The gradients that have no kernels yet.
#include <string>

#include "../cpp/src/kernels.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

[[noreturn]] void fail_gradient(const char* name) {
  throw Error(ErrorCode::unsupported, std::string(name) + ": there are no gradients on CUDA yet");
}

}  // namespace

#define SSMCORE_NO_GRADIENT(name, Params)                       \
  void name(const Params&, const Exec&) {                       \
    fail_gradient(#name);                                       \
  }                                                             \
  size_t name##_workspace_size(const Params&, const Context&) { \
    fail_gradient(#name);                                       \
  }

SSMCORE_NO_GRADIENT(causal_conv1d_bwd, CausalConv1dBwdParams)
SSMCORE_NO_GRADIENT(rms_norm_bwd, RmsNormBwdParams)
SSMCORE_NO_GRADIENT(linear_bwd, LinearBwdParams)
SSMCORE_NO_GRADIENT(embedding_bwd, EmbeddingBwdParams)
SSMCORE_NO_GRADIENT(cross_entropy_fwd, CrossEntropyFwdParams)
SSMCORE_NO_GRADIENT(cross_entropy_bwd, CrossEntropyBwdParams)

#undef SSMCORE_NO_GRADIENT

}  // namespace ssmcore::cuda
