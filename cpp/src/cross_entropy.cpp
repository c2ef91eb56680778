#include "ssmcore/cross_entropy.h"

#include <string>

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

constexpr const char* kForward = "cross_entropy";
constexpr const char* kBackward = "cross_entropy_bwd";

// On the CPU each target is looked at.
void check_targets(const Checks& check, const TensorView& targets, int64_t vocab_size,
                   int64_t ignore_index) {
  if (targets.device.type != DeviceType::cpu) return;
  for (int64_t i = 0; i < targets.shape[0]; ++i) {
    const int64_t target = integer_at(targets.data, targets.dtype, i * targets.strides[0]);
    check.require(target == ignore_index || (target >= 0 && target < vocab_size), [&] {
      return "targets holds " + std::to_string(target) + " at position " + std::to_string(i) +
             ", expected 0 to " + std::to_string(vocab_size - 1) + ", or ignore_index " +
             std::to_string(ignore_index);
    });
  }
}

// What forward and backward read.
template <typename Args>
CrossEntropyFwdParams lower_inputs(const Args& args, const Checks& check, Device device) {
  check.rank(args.logits, "logits", 2, "(rows, vocab_size)");
  const Dim rows{"rows", args.logits.shape[0]}, vocab_size{"vocab_size", args.logits.shape[1]};
  check.input(args.logits, "logits", {rows, vocab_size}, activation_or_double(device));
  check.input(args.targets, "targets", {rows}, {DType::int32, DType::int64});
  check_targets(check, args.targets, vocab_size.size, args.ignore_index);

  CrossEntropyFwdParams params{};
  params.dtype = args.logits.dtype;
  params.index_dtype = args.targets.dtype;
  params.rows = rows.size;
  params.vocab_size = vocab_size.size;
  params.ignore_index = args.ignore_index;
  params.logits = Strided<2>(args.logits);
  params.targets = Strided<1>(args.targets);
  params.lse = Strided<1>(args.lse);
  return params;
}

CrossEntropyFwdParams lower(const CrossEntropyFwdArgs& args, const Context& context) {
  const Checks check(kForward, context.device());
  CrossEntropyFwdParams params = lower_inputs(args, check, context.device());
  const Shape rows{{"rows", params.rows}};
  const DType accumulator = accumulator_of(params.dtype);
  if (args.loss) check.output(args.loss, "loss", rows, {accumulator});
  if (args.mean_loss) check.output(args.mean_loss, "mean_loss", {{"one", 1}}, {accumulator});
  if (args.lse) check.output(args.lse, "lse", rows, {accumulator});
  params.loss = Strided<1>(args.loss);
  params.mean_loss = Strided<1>(args.mean_loss);
  return params;
}

CrossEntropyBwdParams lower(const CrossEntropyBwdArgs& args, const Context& context) {
  const Checks check(kBackward, context.device());
  CrossEntropyBwdParams params{};
  params.fwd = lower_inputs(args, check, context.device());
  const Dim rows{"rows", params.fwd.rows}, vocab_size{"vocab_size", params.fwd.vocab_size};
  const DType accumulator = accumulator_of(params.fwd.dtype);
  check.input(args.lse, "lse", {rows}, {accumulator});
  check.require(static_cast<bool>(args.dloss) != static_cast<bool>(args.dmean_loss), [&] {
    return std::string("dloss and dmean_loss are ") + (args.dloss ? "both given" : "both missing") +
           ", expected one of them";
  });
  check.optional(args.dloss, "dloss", {rows}, {accumulator});
  check.optional(args.dmean_loss, "dmean_loss", {{"one", 1}}, {accumulator});
  check.output(args.dlogits.tensor, "dlogits", {rows, vocab_size}, any_beside(params.fwd.dtype));
  params.dloss = Strided<1>(args.dloss);
  params.dmean_loss = Strided<1>(args.dmean_loss);
  params.dlogits = StridedGradient<2>(args.dlogits);
  return params;
}

}  // namespace

size_t cross_entropy_fwd_workspace_size(const CrossEntropyFwdArgs& args, const Context& context) {
  return kernel_table(context).cross_entropy_fwd.workspace_size(lower(args, context), context);
}

void cross_entropy_fwd(const CrossEntropyFwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  const Checks check(kForward, exec.context.device());
  for (const Named& output :
       {Named{args.loss, "loss"}, {args.mean_loss, "mean_loss"}, {args.lse, "lse"}}) {
    check.disjoint(output.tensor, output.name, args.logits, "logits");
    check.disjoint(output.tensor, output.name, args.targets, "targets");
  }
  check.disjoint(args.loss, "loss", args.lse, "lse");
  check.disjoint(args.mean_loss, "mean_loss", args.loss, "loss");
  check.disjoint(args.mean_loss, "mean_loss", args.lse, "lse");
  launch(kForward, kernel_table(exec.context).cross_entropy_fwd, params, exec);
}

size_t cross_entropy_bwd_workspace_size(const CrossEntropyBwdArgs& args, const Context& context) {
  return kernel_table(context).cross_entropy_bwd.workspace_size(lower(args, context), context);
}

void cross_entropy_bwd(const CrossEntropyBwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  const Checks check(kBackward, exec.context.device());
  const TensorView& dlogits = args.dlogits.tensor;
  check.require(!args.dlogits.accumulate || dlogits.data != args.logits.data, [] {
    return std::string("dlogits is to be added to what is there, but is logits' memory");
  });
  check.same_or_disjoint(dlogits, "dlogits", args.logits, "logits");
  check.disjoint_gradients({{dlogits, "dlogits"}}, {{args.targets, "targets"},
                                                    {args.lse, "lse"},
                                                    {args.dloss, "dloss"},
                                                    {args.dmean_loss, "dmean_loss"}});
  launch(kBackward, kernel_table(exec.context).cross_entropy_bwd, params, exec);
}

}  // namespace ssmcore
