// What running and training a language model have in common.
#pragma once

#include <memory>

#include "mixer.h"
#include "ssmcore/language_model.h"
#include "ssmcore/rms_norm.h"

namespace ssmcore {

struct LanguageModel::Layer {
  TensorView norm;
  std::unique_ptr<Mixer> mixer;
};

// residual_out = residual + hidden; normed = norm(residual_out). Without hidden there is nothing to
// add. The residuals may be the same memory.
inline RmsNormFwdArgs add_and_norm(const TensorView& hidden, const TensorView& residual,
                                   const TensorView& residual_out, const TensorView& weight,
                                   float eps, const TensorView& normed) {
  RmsNormFwdArgs args;
  args.weight = weight;
  args.eps = eps;
  args.out = normed;
  args.x = hidden ? hidden : residual;
  if (hidden) {
    args.residual = residual;
    args.residual_out = residual_out;
  }
  return args;
}

}  // namespace ssmcore
