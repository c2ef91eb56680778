// The loss of R rows of V logits with its mean, and its gradient. An element is a logit.
#include "ssmcore/cross_entropy.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

struct Loss {
  const Shape shape;
  const int64_t rows = shape['R'], vocab_size = shape['V'];
  const Context context;
  const Random logits, targets, lse, mean_loss;

  explicit Loss(const nvbench::state& state)
      : shape(state),
        context(device_of(state)),
        logits(context, -10, 10, {rows, vocab_size}, shape.dtype()),
        targets(context, 0, vocab_size, {rows}, DType::int64),
        lse(context, 12, 13, {rows}, DType::float32),
        mean_loss(context, 0, 1, {1}, DType::float32) {}
};

void cross_entropy(nvbench::state& state) {
  const Loss loss(state);
  CrossEntropyFwdArgs args;
  args.logits = loss.logits.view();
  args.targets = loss.targets.view();
  args.mean_loss = loss.mean_loss.view();
  args.lse = loss.lse.view();
  measure(state, loss.context, cross_entropy_fwd_workspace_size, cross_entropy_fwd, args,
          args.logits.numel(), bytes_of({args.logits, args.targets, args.lse}));
}

void cross_entropy_bwd(nvbench::state& state) {
  const Loss loss(state);
  const Random dlogits(loss.context, -1, 1, {loss.rows, loss.vocab_size}, loss.shape.dtype());
  CrossEntropyBwdArgs args;
  args.logits = loss.logits.view();
  args.dlogits.tensor = dlogits.view();
  args.targets = loss.targets.view();
  args.lse = loss.lse.view();
  args.dmean_loss = loss.mean_loss.view();
  measure(state, loss.context, cross_entropy_bwd_workspace_size, ssmcore::cross_entropy_bwd, args,
          args.logits.numel(),
          bytes_of({args.logits, args.targets, args.lse, args.dlogits.tensor}));
}

NVBENCH_BENCH(cross_entropy)
    .set_name("cross_entropy_fwd")
    .add_string_axis("shape", {"R2048 V50280 bf16", "R2048 V50280 fp32", "R65536 V256 bf16"});
NVBENCH_BENCH(cross_entropy_bwd)
    .add_string_axis("shape", {"R2048 V50280 bf16", "R2048 V50280 fp32", "R65536 V256 bf16"});

}  // namespace
}  // namespace ssmcore::bench
