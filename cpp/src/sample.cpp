#include "ssmcore/sample.h"

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "kernels.h"
#include "largest.h"

namespace ssmcore {
namespace {

template <typename T, typename Valid>
void check_setting(const Checks& check, const TensorView& setting, const char* name,
                   const char* expected, const Valid& valid) {
  if (!setting || setting.device.type != DeviceType::cpu) return;  // else the kernel does
  for (int64_t b = 0; b < setting.shape[0]; ++b) {
    const T value = setting.as<const T>()[b * setting.strides[0]];
    check.require(valid(value), [&] {
      return std::string(name) + " is " + std::to_string(value) + " in row " + std::to_string(b) +
             ", expected " + expected;
    });
  }
}

// The draw is over probabilities, so each row needs at least one finite logit and no NaN.
void check_logits(const Checks& check, const TensorView& logits) {
  const int64_t n = logits.shape[1], stride = logits.strides[1];
  for (int64_t b = 0; b < logits.shape[0]; ++b) {
    const float* row = logits.as<const float>() + b * logits.strides[0];
    bool has_nan = false;
    if (stride == 1)  // what a compiler turns into vectors
      for (int64_t i = 0; i < n; ++i) has_nan |= row[i] != row[i];
    else
      for (int64_t i = 0; i < n; ++i) has_nan |= row[i * stride] != row[i * stride];
    check.require(!has_nan, [&] { return "logits hold a NaN in row " + std::to_string(b); });
    float largest = stride == 1 ? largest_of(row, n) : row[0];
    for (int64_t i = 0; stride != 1 && i < n; ++i) largest = std::max(largest, row[i * stride]);
    check.require(std::isfinite(largest), [&] {
      return "the largest of the logits in row " + std::to_string(b) + " is not finite";
    });
  }
}

void check_history(const Checks& check, const TensorView& history, int64_t vocab_size) {
  for (int64_t b = 0; b < history.shape[0]; ++b)
    for (int64_t i = 0; i < history.shape[1]; ++i) {
      const int64_t id =
          integer_at(history.data, history.dtype, b * history.strides[0] + i * history.strides[1]);
      check.require(id < vocab_size, [&] {
        return "history holds " + std::to_string(id) + " in row " + std::to_string(b) +
               ", expected less than vocab_size " + std::to_string(vocab_size);
      });
    }
}

SampleParams lower(const SampleArgs& args, const Context& context) {
  const Checks check("sample", context.device());
  check.rank(args.logits, "logits", 2, "(batch, vocab_size)");
  const Dim batch{"batch", args.logits.shape[0]}, vocab_size{"vocab_size", args.logits.shape[1]};
  check.range("logits: vocab_size", vocab_size.size, 1, INT32_MAX);
  check.input(args.logits, "logits", {batch, vocab_size}, {DType::float32});
  check.optional(args.repetition_penalty, "repetition_penalty", {batch}, {DType::float32});
  check.optional(args.temperature, "temperature", {batch}, {DType::float32});
  check.optional(args.top_k, "top_k", {batch}, {DType::int32});
  check.optional(args.top_p, "top_p", {batch}, {DType::float32});
  check.optional(args.min_p, "min_p", {batch}, {DType::float32});
  check.optional(args.seed, "seed", {batch}, {DType::int64});
  check.optional(args.position, "position", {batch}, {DType::int64});
  check.output(args.out, "out", {batch}, {DType::int32, DType::int64});

  SampleParams params{};
  if (args.history) {
    check.require(args.history.rank == 2, [&] {
      return "history has shape " + args.history.shape_string() + ", expected (batch, length)";
    });
    params.history_length = args.history.shape[1];
    check.input(args.history, "history", {batch, {"length", params.history_length}},
                {DType::int32, DType::int64});
  }
  params.history_dtype = args.history.dtype;
  params.out_dtype = args.out.dtype;
  params.batch = batch.size;
  params.vocab_size = vocab_size.size;
  params.logits = Strided<2>(args.logits);
  params.history = Strided<2>(args.history);
  params.repetition_penalty = Strided<1>(args.repetition_penalty);
  params.temperature = Strided<1>(args.temperature);
  params.top_k = Strided<1>(args.top_k);
  params.top_p = Strided<1>(args.top_p);
  params.min_p = Strided<1>(args.min_p);
  params.seed = Strided<1>(args.seed);
  params.position = Strided<1>(args.position);
  params.out = Strided<1>(args.out);
  return params;
}

// Only when it runs: those who ask for a size need not have filled their tensors.
void check_values(const SampleArgs& args, const Context& context) {
  const Checks check("sample", context.device());
  check_sample_settings(args);
  for (const auto& [input, name] : {std::pair{&args.logits, "logits"}, {&args.history, "history"}})
    check.disjoint(args.out, "out", *input, name);
  if (context.device().type != DeviceType::cpu) return;
  if (args.history) check_history(check, args.history, args.logits.shape[1]);
  check_logits(check, args.logits);
}

}  // namespace

void check_sample_settings(const SampleArgs& args) {
  const Checks check("sample", {});
  check_setting<float>(check, args.repetition_penalty, "repetition_penalty", "a positive number",
                       [](float v) { return v > 0 && std::isfinite(v); });
  check_setting<float>(check, args.temperature, "temperature", "a finite number of at least 0",
                       [](float v) { return v >= 0 && std::isfinite(v); });
  check_setting<int32_t>(check, args.top_k, "top_k", "at least 0 (0: off)",
                         [](int32_t v) { return v >= 0; });
  check_setting<float>(check, args.top_p, "top_p", "more than 0 and at most 1",
                       [](float v) { return v > 0 && v <= 1; });
  check_setting<float>(check, args.min_p, "min_p", "0 to 1",
                       [](float v) { return v >= 0 && v <= 1; });
}

size_t sample_workspace_size(const SampleArgs& args, const Context& context) {
  return kernel_table(context).sample.workspace_size(lower(args, context), context);
}

void sample(const SampleArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_values(args, exec.context);
  launch("sample", kernel_table(exec.context).sample, params, exec);
}

}  // namespace ssmcore
