// Choosing a token among V, greedily and by each of the filters. An element is one of the logits.
#include "ssmcore/sample.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

void sample(nvbench::state& state) {
  const Shape shape(state);
  const int64_t batch = shape['B'], vocab_size = shape['V'];
  const std::string method = state.get_string("method");
  const Context context(device_of(state));
  // A setting is the same for every row: a range of no width.
  const float temperature_value = method == "greedy" ? 0 : 1;
  const Random logits(context, -8, 8, {batch, vocab_size}, DType::float32),
      temperature(context, temperature_value, temperature_value, {batch}, DType::float32),
      top_k(context, 50, 50, {batch}, DType::int32),
      top_p(context, 0.9f, 0.9f, {batch}, DType::float32),
      position(context, 0, 1 << 20, {batch}, DType::int64),
      out(context, 0, vocab_size, {batch}, DType::int64);
  SampleArgs args;
  args.logits = logits.view();
  args.temperature = temperature.view();
  if (method == "top-k") args.top_k = top_k.view();
  if (method == "top-p") args.top_p = top_p.view();
  args.position = position.view();
  args.out = out.view();
  measure(state, context, sample_workspace_size, ssmcore::sample, args, args.logits.numel(),
          bytes_of({args.logits, args.out}));
}

NVBENCH_BENCH(sample)
    .add_string_axis("shape", {"B1 V50280 fp32", "B64 V50280 fp32"})
    .add_string_axis("method", {"greedy", "plain", "top-k", "top-p"});

}  // namespace
}  // namespace ssmcore::bench
