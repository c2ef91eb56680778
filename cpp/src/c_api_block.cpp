// The C interface: the Mamba block.
#include "c_api_operator.h"
#include "ssmcore/c_api.h"
#include "ssmcore/mamba_block.h"
#include "ssmcore/mamba_block_train.h"

namespace ssmcore::c_api {
namespace {

static_assert(SSMCORE_MAMBA_BLOCK_CHUNK_SIZE == kMambaBlockChunkSize);

MambaBlockWeights read_weights(const ssmcore_mamba_block_weights* given,
                               const TensorReader& tensor) {
  const ssmcore_mamba_block_weights w = read_struct(tensor.op(), "weights", given);
  MambaBlockWeights weights;
  weights.in_proj = tensor(w.in_proj, "in_proj");
  weights.in_proj_bias = tensor(w.in_proj_bias, "in_proj_bias");
  weights.conv_weight = tensor(w.conv_weight, "conv_weight");
  weights.conv_bias = tensor(w.conv_bias, "conv_bias");
  weights.x_proj = tensor(w.x_proj, "x_proj");
  weights.dt_proj = tensor(w.dt_proj, "dt_proj");
  weights.dt_bias = tensor(w.dt_bias, "dt_bias");
  weights.A = tensor(w.A, "A");
  weights.D = tensor(w.D, "D");
  weights.out_proj = tensor(w.out_proj, "out_proj");
  weights.out_proj_bias = tensor(w.out_proj_bias, "out_proj_bias");
  weights.dt_B_C_norm_eps = w.dt_B_C_norm_eps;
  return weights;
}

MambaBlockSaved read_saved(const ssmcore_mamba_block_saved* given, const TensorReader& tensor) {
  const ssmcore_mamba_block_saved s = read_struct(tensor.op(), "saved", given);
  MambaBlockSaved saved;
  saved.xz = tensor(s.xz, "saved xz");
  saved.delta_B_C = tensor(s.delta_B_C, "saved delta_B_C");
  saved.y = tensor(s.y, "saved y");
  saved.chunk_states = tensor(s.chunk_states, "saved chunk_states");
  saved.u = tensor(s.u, "saved u");
  saved.delta = tensor(s.delta, "saved delta");
  return saved;
}

// The arguments of a pass point to its weights, which live here.
template <typename Args>
struct WithWeights : Args {
  WithWeights(const ssmcore_mamba_block_weights* given, const TensorReader& tensor)
      : owned(read_weights(given, tensor)) {
    this->weights = &owned;
  }
  WithWeights(const WithWeights&) = delete;

  MambaBlockWeights owned;
};

struct Forward : WithWeights<MambaBlockFwdArgs> {
  Forward(const ssmcore_mamba_block_fwd_args& c, const TensorReader& tensor)
      : WithWeights(c.weights, tensor) {
    x = tensor(c.x, "x");
    out = tensor(c.out, "out");
    conv_state = tensor(c.conv_state, "conv_state");
    ssm_state = tensor(c.ssm_state, "ssm_state");
    state_indices = tensor(c.state_indices, "state_indices");
    cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
  }
};

struct TrainForward : WithWeights<MambaBlockTrainFwdArgs> {
  TrainForward(const ssmcore_mamba_block_train_fwd_args& c, const TensorReader& tensor)
      : WithWeights(c.weights, tensor) {
    x = tensor(c.x, "x");
    out = tensor(c.out, "out");
    initial_conv_state = tensor(c.initial_conv_state, "initial_conv_state");
    initial_ssm_state = tensor(c.initial_ssm_state, "initial_ssm_state");
    final_conv_state = tensor(c.final_conv_state, "final_conv_state");
    last_ssm_state = tensor(c.last_ssm_state, "last_ssm_state");
    cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
    saved = read_saved(c.saved, tensor);
  }
};

struct Backward : WithWeights<MambaBlockBwdArgs> {
  Backward(const ssmcore_mamba_block_bwd_args& c, const TensorReader& tensor)
      : WithWeights(c.weights, tensor) {
    x = tensor(c.x, "x");
    initial_conv_state = tensor(c.initial_conv_state, "initial_conv_state");
    initial_ssm_state = tensor(c.initial_ssm_state, "initial_ssm_state");
    cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
    saved = read_saved(c.saved, tensor);
    dout = tensor(c.dout, "dout");
    dfinal_conv_state = tensor(c.dfinal_conv_state, "dfinal_conv_state");
    dlast_ssm_state = tensor(c.dlast_ssm_state, "dlast_ssm_state");
    dx = tensor(c.dx, "dx");
    dinitial_conv_state = tensor(c.dinitial_conv_state, "dinitial_conv_state");
    dinitial_ssm_state = tensor(c.dinitial_ssm_state, "dinitial_ssm_state");
    dweights.in_proj = tensor(c.din_proj, "din_proj");
    dweights.in_proj_bias = tensor(c.din_proj_bias, "din_proj_bias");
    dweights.conv_weight = tensor(c.dconv_weight, "dconv_weight");
    dweights.conv_bias = tensor(c.dconv_bias, "dconv_bias");
    dweights.x_proj = tensor(c.dx_proj, "dx_proj");
    dweights.dt_proj = tensor(c.ddt_proj, "ddt_proj");
    dweights.dt_bias = tensor(c.ddt_bias, "ddt_bias");
    dweights.A = tensor(c.dA, "dA");
    dweights.A_log = tensor(c.dA_log, "dA_log");
    dweights.D = tensor(c.dD, "dD");
    dweights.out_proj = tensor(c.dout_proj, "dout_proj");
    dweights.out_proj_bias = tensor(c.dout_proj_bias, "dout_proj_bias");
  }
};

Forward lower(const ssmcore_mamba_block_fwd_args& c, const TensorReader& tensor) {
  return Forward(c, tensor);
}

TrainForward lower(const ssmcore_mamba_block_train_fwd_args& c, const TensorReader& tensor) {
  return TrainForward(c, tensor);
}

Backward lower(const ssmcore_mamba_block_bwd_args& c, const TensorReader& tensor) {
  return Backward(c, tensor);
}

}  // namespace
}  // namespace ssmcore::c_api

using namespace ssmcore;
using namespace ssmcore::c_api;

SSMCORE_DEFINE_OPERATOR(mamba_block_fwd, "mamba_block")
SSMCORE_DEFINE_OPERATOR(mamba_block_train_fwd, "mamba_block_train_fwd")
SSMCORE_DEFINE_OPERATOR(mamba_block_bwd, "mamba_block_bwd")
